"""What `twinax plan` says, against what is known: published training runs, the compiler's memory, and a clock.

Three parts, all by default. `published`: runs that others measured on TPUs, each compiled by us for the same chips at
the same batch; our tokens/s a chip beside theirs. `memory`: the analytic model's bytes beside the compiler's, over
dense and mixture models, layouts, remat and chips. `time`: planning an 8B on 128 chips, searching, and compiling 8, 32
and 80 layers. Needs libtpu (pip install 'twinax[tpu]'); 30 minutes on two cores. docs/plan-accuracy.md explains.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig
from twinax.planner.compile import Compilation, Compiled, compile_layouts
from twinax.planner.model import Estimate, estimate
from twinax.planner.plan import Wishes, plan_on
from twinax.planner.topology import Topology
from twinax.planner.verdict import compiled_roofline, scheduled_seconds
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan

from . import report

MEMORY_LIMIT, PLAN_LIMIT, SEARCH_LIMIT = 0.15, 180.0, 600.0


def _llama(hidden: int, mlp: int, layers: int, heads: int, vocabulary: int, **more: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    )


LLAMA_8B = _llama(4096, 14336, 32, 32, 128256)
LLAMA_70B = _llama(8192, 28672, 80, 64, 128256)
LLAMA_405B = _llama(16384, 53248, 126, 128, 128256)
LLAMA2_70B = _llama(8192, 28672, 80, 64, 32000)
LLAMA_1B = dataclasses.replace(
    _llama(2048, 8192, 16, 32, 128256), head_dim=64, tie_embeddings=True
)  # fmt: skip
MIXTURE = dataclasses.replace(
    _llama(2048, 1024, 8, 16, 32000), moe=MoEConfig(num_experts=16, experts_per_token=2, expert_size=1024)
)
DENSE_32B = _llama(5120, 25600, 64, 64, 151936)
LARGE_MIXTURE = dataclasses.replace(
    _llama(4096, 1536, 24, 32, 128256),
    moe=MoEConfig(num_experts=64, experts_per_token=4, expert_size=1536, shared_experts=1),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A run that others measured: the batch is theirs, `remat` is the nearest to theirs that we have."""

    name: str
    model: DecoderConfig
    topology: str
    rows: int
    seq_len: int
    remat: str
    tokens: float
    mfu: float


PUBLISHED = (
    Published("Llama 3.1 405B, 256 TPU7x", LLAMA_405B, "tpu7x:4x8x8", 1536, 8192, "offload", 499.77, 0.547),
    Published("Llama 3.1 8B, 256 v6e", LLAMA_8B, "v6e:16x16", 1024, 8192, "full", 7207, 0.4546),
    Published("Llama 2 70B, 512 v5p", LLAMA2_70B, "v5p:8x8x8", 2048, 4096, "full", 692, 0.654),
    Published("Llama 3.1 70B, 64 TPU7x", LLAMA_70B, "tpu7x:4x4x4", 256, 8192, "full", 2686.98, 0.523),
)

# Model, chips, plan, rows, tokens of a row, accumulation, remat.
MemoryCase = tuple[DecoderConfig, str, str, int, int, int, str]
MEMORY: tuple[MemoryCase, ...] = (
    (LLAMA_1B, "v5e:4x4", "fsdp=16", 16, 4096, 1, "full"),
    (LLAMA_1B, "v5e:4x4", "fsdp=16", 16, 4096, 1, "none"),
    (LLAMA_1B, "v5e:4x4", "fsdp=16", 16, 4096, 1, "dots"),
    (LLAMA_1B, "v5e:4x4", "fsdp=4,tensor=4", 16, 4096, 1, "full"),
    (LLAMA_1B, "v5e:4x4", "data=4,fsdp=4", 16, 4096, 1, "full"),
    (LLAMA_1B, "v5e:4x4", "fsdp=16", 64, 4096, 4, "full"),
    (LLAMA_1B, "v5e:4x4", "fsdp=4,sequence=4", 16, 8192, 1, "full"),
    (LLAMA_1B, "v5e:4x4", "data=16", 16, 4096, 1, "full"),
    (LLAMA_1B, "v6e:2x2", "stage=4", 16, 4096, 1, "full"),
    (LLAMA_8B, "v5p:4x4x4", "fsdp=64", 128, 8192, 1, "full"),
    (LLAMA_8B, "v6e:8x8", "fsdp=64", 256, 8192, 1, "full"),
    (LLAMA_8B, "v6e:8x8", "fsdp=64", 256, 8192, 1, "offload"),
    (LLAMA_8B, "v6e:8x8", "fsdp=64", 64, 8192, 1, "full"),
    (MIXTURE, "v5e:4x4", "fsdp=4,expert=4", 32, 2048, 1, "full"),
    (MIXTURE, "v5e:4x4", "fsdp=16", 32, 2048, 1, "full"),
    (MIXTURE, "v5e:4x4", "fsdp=4,expert=4", 32, 2048, 1, "none"),
    # Predicted before they were compiled; the model was not fitted to these.
    (LLAMA_8B, "v5p:4x4x4", "fsdp=16,tensor=4", 32, 4096, 1, "none"),
    (LLAMA_1B, "v5e:4x4", "fsdp=4,tensor=4", 16, 4096, 1, "none"),
    (LLAMA_1B, "v5e:4x4", "fsdp=4,sequence=4", 16, 4096, 1, "none"),
    (LLAMA_8B, "v6e:8x8", "fsdp=64", 64, 4096, 1, "dots"),
    (DENSE_32B, "v5p:4x4x4", "fsdp=64", 64, 8192, 1, "full"),
    (LLAMA_70B, "v6e:8x8", "fsdp=32,tensor=2", 64, 4096, 1, "full"),
    (MIXTURE, "v5p:2x2x2", "expert=8", 32, 4096, 1, "full"),
    (LARGE_MIXTURE, "v6e:8x8", "fsdp=8,expert=8", 64, 4096, 1, "full"),
    (MIXTURE, "v5e:4x4", "fsdp=4,tensor=4", 32, 2048, 1, "none"),
)


def _compile(workload: Workload, topology: Topology, layout: Layout) -> tuple[Compilation, Compiled]:
    (found,) = compile_layouts(workload, topology, [layout])
    if isinstance(found, Exception):
        raise found
    return found, found.programs[0]


def _rate(found: Estimate, seconds: float) -> float:
    return found.rates(seconds)["tokens_per_second_per_chip"]


def published() -> Iterator[report.Row]:
    for run in PUBLISHED:
        topology = Topology.parse(run.topology)
        workload, layout = (
            Workload(run.model, "train", run.rows, run.seq_len),
            Layout(Plan(fsdp=topology.devices), 1, run.remat),
        )
        found = estimate(workload, topology, layout)
        compilation, program = _compile(workload, topology, layout)
        scheduled = scheduled_seconds(found, program)
        times = {"analytic": found.seconds, "compiled": compiled_roofline(found, program).expected}
        if scheduled is not None:
            times["as scheduled"] = scheduled
        for name, seconds in times.items():
            mfu = found.rates(seconds)["mfu"]
            case = f"{run.name}, remat {run.remat}, {name}: MFU {mfu:.1%} (published {run.mfu:.1%})"
            yield report.Row("plan", case, _rate(found, seconds), run.tokens, "published", "tokens/s a chip", None)
        fits = f"{run.name}: memory by the compiler, analytic model"
        yield report.Row("plan", fits, program.total_memory / 2**30, found.total_memory / 2**30, "ours", "GiB", None)
        yield report.Row("plan", f"{run.name}: compiling", compilation.seconds, None, "", "s", None)


def memory() -> Iterator[report.Row]:
    def one(case: MemoryCase) -> report.Row:
        model, chips, plan, rows, seq_len, accumulation, remat = case
        topology, workload = Topology.parse(chips), Workload(model, "train", rows, seq_len)
        layout = Layout(Plan.parse(plan), accumulation, remat)
        ours = estimate(workload, topology, layout).memory
        theirs = _compile(workload, topology, layout)[1].memory
        kind = (
            f"mixture, {model.num_layers} layers" if model.moe else f"{model.num_layers} layers of {model.hidden_size}"
        )
        name = f"memory: {kind}, {chips}, {plan}, {rows} x {seq_len}, accumulation {accumulation}, remat {remat}"
        total, known = sum(ours.values()), sum(theirs.values())
        name += f": {total / 2**30:.2f} against {known / 2**30:.2f} GiB"
        return report.Row("plan", name, abs(total / known - 1), None, "", "off", MEMORY_LIMIT, False)

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(one, MEMORY)


def clock() -> Iterator[report.Row]:
    topology, workload = Topology.parse("v5p:4x4x8"), Workload(LLAMA_8B, "train", 128, 8192)
    for name, wishes, limit in (
        ("one plan of an 8B on 128 v5p", Wishes(plans=(Plan(fsdp=128),), display=False), PLAN_LIMIT),
        ("searching all plans of an 8B on 128 v5p", Wishes(display=False), SEARCH_LIMIT),
    ):
        began = time.perf_counter()
        plan_on(workload, topology, wishes)
        yield report.Row("plan", name, time.perf_counter() - began, None, "", "s", limit, False)
    for layers in (8, 32, 80):
        model = dataclasses.replace(LLAMA_8B, num_layers=layers)
        layout = Layout(Plan(fsdp=128), 1, "full")
        _, program = _compile(Workload(model, "train", 128, 8192), topology, layout)
        yield report.Row("plan", f"compiling a step of {layers} layers", program.seconds, None, "", "s", None)


PARTS = {"published": published, "memory": memory, "time": clock}


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this; may be repeated")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.error("libtpu is not installed, and it is the compiler: pip install 'twinax[tpu]'")
    rows = []
    for name in options.part or PARTS:
        for row in PARTS[name]():
            print(f"{row.case}: {row.ours:,.3g} {row.unit}", flush=True)
            rows.append(row)
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
