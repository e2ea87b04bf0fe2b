"""Every parallel layout against one device, in float64: losses, gradients and five AdamW steps.

A difference above 1e-9 is a bug and not rounding. Writes docs/equivalence.md: a row for each plan, a column for each
variant, the largest relative difference of any array in each cell; a plan that is refused says why.

Plans are all ways of dividing 1, 2, 4 or 8 simulated devices over the six axes. By default each is run in every
variant of remat and accumulation, with one way for its attention to cross devices and one schedule for its pipeline,
taken in turn so that all meet all (an hour on two cores); --quick takes the variants in turn too (a quarter of that),
--full runs every combination (hours). A long run that was stopped goes on with --resume.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress

from . import report

DEVICES, LIMIT, STEPS = 8, 1e-9, 5
QUICK = {"xla_backend_optimization_level": 0}  # the same sums and products, compiled in a third of the time
ROWS, TOKENS, VOCABULARY = 16, 16, 64
MODELS = ("dense", "mixture of experts")
# Not in the matrix: what families other than Llama bring, all at once.
EVERY_OPTION = "every option"
LATENT = "latent attention"  # dense layers and mixtures in turn
STATES = "states"  # Mamba-2, lightning attention and attention
STATES_ALIKE = "states, of layers alike"  # without lightning attention, whose decays hang on the layer's number
FILE = Path(__file__).parent.parent / "docs" / "equivalence.md"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a step is made: `packed` rows hold several documents and padding; `accumulation` micro-batches of 16 rows."""

    remat: str
    accumulation: int

    def __str__(self) -> str:
        return f"remat {self.remat}, accumulation {self.accumulation}"


VARIANTS = tuple(itertools.starmap(Variant, itertools.product(("none", "full"), (1, 2))))


def model_config(name: str) -> Any:
    from twinax.layers.mixer_config import LatentAttentionConfig, LightningConfig, Mamba2Config
    from twinax.layers.moe_config import MoEConfig
    from twinax.layers.rope_config import RopeConfig
    from twinax.models.config import DecoderConfig, LayerKind

    moe = MoEConfig(
        num_experts=8, experts_per_token=2, expert_size=16, shared_experts=1, balance_loss=0.02, z_loss=1e-3
    )  # fmt: skip
    more: dict[str, Any] = {}
    if name == EVERY_OPTION:
        more = {
            "pattern": (LayerKind(window=5, rope="local_rope"), LayerKind(rope=None)),
            "local_rope": RopeConfig(theta=100.0, size=2),
            "learned_positions": True,
            "norm": "rms_offset",
            "norm_placement": "both",
            "qk_norm": "all",
            "sinks": True,
            "attention_scale": 0.3,
            "attention_softcap": 5.0,
            "activation": "gelu_tanh",
            "gated": False,
            "embedding_scale": 2.0,
            "residual_scale": 0.7,
            "logit_scale": 0.5,
            "logit_softcap": 3.0,
            "tie_embeddings": True,
        }
    if name == LATENT:
        kinds = (LayerKind(mixer="latent_attention", feed_forward="mlp"), LayerKind(mixer="latent_attention"))
        moe = dataclasses.replace(
            moe, router="sigmoid", groups=4, groups_per_token=2, group_top=2, router_bias=True, bias=True, clamp=0.5,
            gate_slope=1.7, up_offset=1.0, bias_update=1e-3,
        )  # fmt: skip
        more = {
            "pattern": kinds,
            "rope": RopeConfig(size=2),
            "latent": LatentAttentionConfig(query_rank=8, kv_rank=8, nope_dim=2, rope_dim=2, value_dim=6),
            "num_kv_heads": 8,
        }
    if name.startswith(STATES):
        mamba = LayerKind(rope=None, mixer="mamba2", feed_forward=None)
        lightning = LayerKind(rope=None, mixer="lightning_attention", mixer_scales=(1.5, 0.5))
        more = {
            "pattern": (mamba, LayerKind()) if name == STATES_ALIKE else (mamba, lightning, LayerKind(), mamba),
            "mamba2": Mamba2Config(num_heads=8, head_dim=4, state_size=6, groups=2),
            "lightning": None if name == STATES_ALIKE else LightningConfig(num_heads=4, head_dim=8),
            "norm_placement": "residual",
        }
    return DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=8,
        num_heads=8,
        head_dim=4,
        max_position_embeddings=TOKENS,
        attention_bias=True,
        moe=moe if name in (MODELS[1], LATENT) else None,
        **{"num_kv_heads": 4, **more},
    )


def dimensions(config: Any) -> dict[str, int]:
    """What a plan must be able to cut; see `Plan.problems`."""
    return {**config.dimensions, "rows": ROWS, "tokens": TOKENS}


def plans(full: bool) -> Iterator[Any]:
    """Every plan of 1 to 8 devices, with every way of crossing devices or with one of them in turn."""
    from twinax.sharding.plan import CHOICES, Plan

    turn = itertools.count()
    for devices in (2**n for n in range(DEVICES.bit_length())):
        for plan in Plan().variants(devices):
            attention = CHOICES["attention"] if plan.sequence > 1 else ("ring",)
            schedules = CHOICES["schedule"] if plan.stage > 1 else ("gpipe",)
            ways = list(itertools.product(attention, schedules))
            for kind, schedule in ways if full else [ways[next(turn) % len(ways)]]:
                rounds = 2 if schedule == "interleaved" else 1
                yield dataclasses.replace(plan, attention=kind, schedule=schedule, rounds=rounds)


def batch(packed: bool, rows: int, step: int) -> Any:
    """Random rows: whole ones, or of two or three documents and padding."""
    import numpy as np

    from twinax.train.data import Batch

    rng = np.random.default_rng([int(packed), step])
    tokens, targets = rng.integers(0, VOCABULARY, (2, rows, TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (rows, TOKENS)).copy()
    segments, weights = np.ones((rows, TOKENS), np.int32), np.ones((rows, TOKENS), np.float32)
    if packed:
        for row in range(rows):
            ends = np.sort(rng.choice(np.arange(3, TOKENS + 1), 3, replace=False))
            for number, (start, end) in enumerate(itertools.pairwise([0, *ends]), 1):
                segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
                weights[row, end - 1] = 0
            segments[row, ends[-1] :] = positions[row, ends[-1] :] = weights[row, ends[-1] :] = 0
    return Batch(tokens, targets, segments, positions, weights)


@cache
def start(model: str) -> Any:
    """The state before the first step, as host arrays. That every plan draws the same is tested in tests/models."""
    import jax
    import jax.numpy as jnp

    from twinax.models.decoder import init_params
    from twinax.sharding.plan import ONE_DEVICE
    from twinax.train.step import init_state

    config, mesh = model_config(model), ONE_DEVICE.mesh()
    return jax.device_get(init_state(config, 0, mesh, init_params(config, 0, dtype=jnp.float64, mesh=mesh)))


def run(model: str, plan: Any, variant: Variant) -> dict[bool, dict[str, Any]]:
    """What five steps of the trainer's own step give under `plan`, with packed rows and without, as host arrays."""
    import jax
    import jax.numpy as jnp

    from twinax.train.recipe import OptimizerConfig
    from twinax.train.step import make_step, put_batch, state_shardings

    config, mesh, rows = model_config(model), plan.mesh(), ROWS * variant.accumulation
    places = state_shardings(config, mesh)
    step = make_step(
        config,
        OptimizerConfig(),
        lambda step: jnp.float32(1e-3),
        mesh,
        dtype=jnp.float64,
        remat=variant.remat,
        plan=plan,
    )
    compiled, found = None, {}
    for packed in (False, True):
        state, losses, first = jax.device_put(start(model), places), [], None
        for number in range(STEPS):
            placed = put_batch(batch(packed, rows, number), number, variant.accumulation, mesh)
            if compiled is None:
                compiled = step.lower(state, placed).compile(compiler_options=QUICK)
            state, metrics = compiled(state, placed)
            losses.append(metrics["loss"])
            if first is None:  # a copy, as the next step consumes the state
                first = jax.device_get(state["optimizer"]["mu"])
        # After one step the first moment is the gradient times a constant.
        found[packed] = {"losses": jnp.stack(losses), "gradients": first, "state": state}
    return jax.device_get(found)


def difference(got: Any, want: Any) -> float:
    """The largest relative difference of any array, by the norm; inf if something is not finite."""
    import jax
    import numpy as np

    largest = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.isfinite(a).all():
            return math.inf
        size, off = np.linalg.norm(b), np.linalg.norm(a - b)
        largest = max(largest, float(off / size if size else off))
    return largest


@cache
def reference(model: str, accumulation: int) -> dict[bool, dict[str, Any]]:
    """One device's, which computes nothing again for the backward pass."""
    from twinax.sharding.plan import ONE_DEVICE

    return run(model, ONE_DEVICE, Variant("none", accumulation))


def compare(model: str, plan: Any, variant: Variant) -> dict[bool, float] | str:
    """By packing: how far `plan` is from one device; or why the plan is refused."""
    problems = plan.problems(dimensions(model_config(model)))
    if problems:
        return "; ".join(problems)
    got, want = run(model, plan, variant), reference(model, variant.accumulation)
    return {packed: difference(got[packed], want[packed]) for packed in got}


def start_worker() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)


def work(scope: str) -> Iterator[tuple[str, Any, Variant]]:
    """All cells of a scope: "quick", "default" or "full"."""
    for turn, plan in enumerate(plans(scope == "full")):
        for offset, model in enumerate(MODELS):
            for variant in [VARIANTS[(turn + offset) % len(VARIANTS)]] if scope == "quick" else VARIANTS:
                yield model, plan, variant


class Kept:
    """Results in a file, a line each, so that a run that was stopped can go on. Its lines belong to one state of the
    code; who changes the code starts another file."""

    def __init__(self, file: Path | None):
        self.file, self.results = file, {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                key, result = json.loads(line)
                # JSON knows no numbers or truth values as keys.
                self.results[key] = result if isinstance(result, str) else dict(zip((False, True), result, strict=True))

    def get(self, one: tuple[str, Any, Variant]) -> Any:
        return self.results.get(self._key(one))

    def add(self, one: tuple[str, Any, Variant], result: dict[bool, float] | str) -> None:
        if self.file is not None:
            values = result if isinstance(result, str) else list(result.values())
            with self.file.open("a") as stream:
                stream.write(json.dumps([self._key(one), values]) + "\n")

    @staticmethod
    def _key(one: tuple[str, Any, Variant]) -> str:
        return ": ".join(map(str, one))


def write(cells: dict[Any, Any], file: Path, scope: str) -> None:
    """The table, as Markdown."""
    import jax

    numbers = [value for cell in cells.values() if isinstance(cell, dict) for value in cell.values()]
    rows = list(dict.fromkeys(plan for _, plan, _ in cells))
    how = "" if scope == "default" else f" --{scope}"
    ran = sum(isinstance(cell, dict) for cell in cells.values())
    lines = [
        "# Every layout against one device",
        "",
        f"Written by `python -m benchmarks.equivalence{how}`: {len(rows)} plans, {ran} compiled steps, {len(numbers)} "
        f"comparisons; jax {jax.__version__}, {DEVICES} simulated CPU devices, float64.",
        "",
        f"A cell is the largest relative difference from one device, of any array: the losses of {STEPS} AdamW steps, "
        "every parameter's gradient in the first, and parameters and moments after the last. Two numbers: whole rows, "
        f"and rows packed with documents and padding. The largest of all is **{max(numbers):.1e}**; more than "
        f"{LIMIT:g} would be a bug.",
    ]
    if len(cells) < len(MODELS) * len(rows) * len(VARIANTS) or None in cells.values():
        lines[-1] += " A dot was not run."
    for model in MODELS:
        lines += ["", f"## {model.capitalize()}", "", "| plan | " + " | ".join(map(str, VARIANTS)) + " |"]
        lines.append("|---" * (len(VARIANTS) + 1) + "|")
        for plan in rows:
            found = [cells.get((model, plan, variant)) for variant in VARIANTS]
            refused = next((cell for cell in found if isinstance(cell, str)), None)
            if refused:
                lines.append(f"| {plan} | refused: {refused} |" + " |" * (len(VARIANTS) - 1))
                continue
            shown = ["·" if cell is None else " ".join(f"{v:.0e}" for v in cell.values()) for cell in found]
            lines.append(f"| {plan} | " + " | ".join(shown) + " |")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    scopes = parser.add_mutually_exclusive_group()
    scopes.add_argument("--quick", dest="scope", action="store_const", const="quick", help="variants in turn")
    scopes.add_argument("--full", dest="scope", action="store_const", const="full", help="every combination, hours")
    parser.add_argument("--output", type=Path, default=FILE, help="the table")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each result there, and skip what it holds")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)), help="processes")
    options = parser.parse_args()
    scope = options.scope or "default"
    began, failed, kept = time.perf_counter(), [], Kept(options.resume)
    cells: dict[Any, Any] = {one: kept.get(one) for one in work(scope)}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.workers, mp_context=context, initializer=start_worker) as pool,
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty()) as progress,
    ):
        pending = {pool.submit(compare, *one): one for one, found in cells.items() if found is None}
        bar = progress.add_task("steps", total=len(cells), completed=len(cells) - len(pending))
        for count, future in enumerate(as_completed(pending), len(cells) - len(pending) + 1):
            one = pending[future]
            cells[one] = future.result()
            kept.add(one, cells[one])
            progress.advance(bar)
            if not sys.stdout.isatty() and count % 20 == 0:
                print(f"{count} of {len(cells)}, {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    for one, cell in cells.items():
        if isinstance(cell, dict) and max(cell.values()) > LIMIT:
            failed.append(one)
            print(f"DIFFERENT: {', '.join(map(str, one))}: {cell}")
    seconds = time.perf_counter() - began
    write(cells, options.output, scope)
    ran = [cell for cell in cells.values() if isinstance(cell, dict)]
    largest = max(value for cell in ran for value in cell.values())
    rows = [
        report.Row("equivalence", "largest relative difference, / 1e-9", largest / LIMIT, None, "", "", 1, False),
        report.Row("equivalence", "compiled steps", len(ran), None, "", "", None),
        report.Row("equivalence", "time", seconds / 60, None, "", "min", None, False),
    ]
    report.finish(rows, options.json)
    print(f"written to {options.output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
