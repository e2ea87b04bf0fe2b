"""Kernels timed on the GPU that is here: the half of `benchmarks.kernels` that needs a device."""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from twinax.planner.chips import Chip, find_chip

from . import kernel_cases
from .static import REPOSITORY, Program, Static, limit_seconds

LEAST_SECONDS, REPEATS = 0.05, 15  # of one timing, and how many of them; the median counts
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class InPlace(Program):
    """A program that updates one of its arguments, which it is given for good, and returns it last."""

    updated: int = 0


class LiveTarget:
    """As `static_child.Target`, for the device that is here."""

    def __init__(self, chip: Chip):
        import contextlib

        self.chip, self.context = chip, contextlib.nullcontext

    def array(self, shape: tuple[int, ...], dtype: Any = "bfloat16", cut: Any = None) -> Any:
        import jax

        return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))


def timed(operations: Sequence[str], match: str | None, json_file: Path | None, console: Console) -> None:
    """Times all cases, prints the table, writes benchmarks/results/kernels.CHIP.DATE.jsonl. RuntimeError: no GPU."""
    import jax

    from twinax.pallas_kernels.chips import target_chip

    if jax.default_backend() != "gpu":
        raise RuntimeError("there is no GPU here to time on: name a chip to compile for, such as --target v6e")
    name = target_chip()
    if name is None:
        raise RuntimeError(f"nothing is known of the limits of a {jax.devices()[0].device_kind}")
    from .kernels import Measured, fastest, show, to_json

    chip = find_chip(name)
    found = [case for operation in operations for case in kernel_cases.cases(operation, chip.name)]
    measured = []
    for case in found:
        if match is not None and match not in case.name:
            continue
        console.print(f"{case.operation}: {case.name}", style="dim", highlight=False)
        ours = time_one(case.builder(case.ours), case.ours.arguments, chip)
        peers = {
            peer: fastest([time_one(case.builder(kernel), kernel.arguments, chip) for kernel in kernels])
            for peer, kernels in case.peers.items()
            if kernels
        }
        measured.append(Measured(case, ours, peers))
    show(measured, f"{jax.devices()[0].device_kind}, timed", console)
    day = datetime.date.today().isoformat()
    text = to_json(measured, target=chip.name, date=day, timed=True)
    RESULTS.mkdir(exist_ok=True)
    for file in filter(None, (RESULTS / f"kernels.{chip.name}.{day}.jsonl", json_file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        console.print(f"wrote {file}")


def time_one(builder: str, arguments: dict[str, Any], chip: Chip) -> Static:
    """A kernel's microseconds on the device; what fails says why."""
    import jax

    from .static_child import load

    jax.clear_caches()
    try:
        program: Program = load(builder)(LiveTarget(chip), **arguments)
        given = list(fill(program.arguments))
        jitted = program.function if hasattr(program.function, "lower") else jax.jit(program.function)
        began = time.perf_counter()
        compiled = jitted.lower(*given).compile()
        compile_seconds = time.perf_counter() - began
        seconds = median_seconds(lambda: run_once(program, compiled, given)) * program.share
    except Exception as error:  # a kernel that is not there, or does not take these arguments, is a row that says so
        return Static(failed=f"{type(error).__name__}: {error}"[:2000])
    least = limit_seconds(chip, program.flops, program.hbm_bytes, program.dtype)
    return Static(
        microseconds=1e6 * seconds,
        of_limit=least / seconds,
        compile_seconds=compile_seconds,
        flops=program.flops,
        hbm_bytes=program.hbm_bytes,
    )


def run_once(program: Program, compiled: Any, given: list[Any]) -> Any:
    found = compiled(*given)
    if isinstance(program, InPlace):
        given[program.updated] = found[-1]
    return found


def fill(shapes: Any) -> Any:
    """Arrays with numbers: a GPU slows down by what the bits of its operands are, so never zeros."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), max(1, len(leaves)))

    def one(key: Any, like: Any) -> Any:
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jax.random.normal(key, like.shape, jnp.float32).astype(like.dtype)
        small = jnp.iinfo(like.dtype).bits <= 8
        return jax.random.randint(key, like.shape, -100 if small else 0, 100 if small else 1, jnp.int32).astype(
            like.dtype
        )

    return structure.unflatten([one(key, like) for key, like in zip(keys, leaves, strict=True)])


def median_seconds(run: Any) -> float:
    """Of one run: many after each other for a timing, so that launching them is hidden behind the device's work."""
    import jax

    jax.block_until_ready(run())
    runs, taken = 1, 0.0
    while taken < LEAST_SECONDS:
        runs = runs if taken == 0 else max(runs + 1, int(runs * min(10.0, 1.2 * LEAST_SECONDS / taken)))
        taken = _once(run, runs)
    return statistics.median(_once(run, runs) / runs for _ in range(REPEATS))


def _once(run: Any, runs: int) -> float:
    import jax

    began = time.perf_counter()
    for _ in range(runs - 1):
        run()
    jax.block_until_ready(run())  # the device works in order, so the last is the last
    return time.perf_counter() - began
