"""How fast a kernel will be on an accelerator that is not there: compiles it, and reads what the compiler says.

    from benchmarks.static import Request, compile_all
    (found,) = compile_all([Request("v6e", "benchmarks.kernel_cases.flash_attention:forward", {"T": 4096})])
    print(found.microseconds, found.of_limit, found.spills)

or `python -m benchmarks.static v6e MODULE:FUNCTION '{"T": 4096}'`, where MODULE may be the path of a file. The function
is called in a child process as `function(target, **arguments)` and returns a `Program`: what to compile, its arguments
as shapes that `target.array(shape, dtype)` made, and what it has to compute and to move.

TPU (needs libtpu): the microseconds are the static profiler's cycles over the clock, but never less than the program's
bytes over the bandwidth, as contention for memory is not modelled. The profiler follows the scalar program, so that
loops and conditions on program ids count as they run; values from memory (scalar prefetch) it takes for 0. Where these
decide how long a kernel runs, or the profiler aborts, the bundles that run are counted (`benchmarks.bundles`). What
follows a loop under a condition (`pl.when`) was seen to count twice by the profiler.
A `while` of XLA's own (`lax.map`) counts once. On v5p, a device is two cores: a grid dimension marked "parallel"
is divided over both, any other grid runs on one; limits are of the device.

NVIDIA (needs JAX's CUDA plug-in and ptxas): registers, spills and ptxas's warnings; there is no clock.

Several requests for one chip share a child. Where the profiler aborts (it often does for TPU7x, once it has written
what is wanted), the child ends, the others go on in a new one, and such kernels are compiled again without it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twinax.planner.chips import Chip, find_chip
from twinax.planner.devices import check_compiler, settings
from twinax.planner.errors import PlannerError
from twinax.planner.topology import Topology

from .dumps import read_tpu

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT = 900.0  # seconds, for one kernel on a busy machine
A_CHILD = 6  # kernels
# Of the many stages that a program for TPUs goes through, what is read here.
LAST = ".*(final|packed-bundles-post-ra).*"
# The smallest machine that a chip comes in; kernels of one device are compiled for its first.
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A kernel to compile.

    Attributes:
        chip: "v5e", "v5p", "v6e", "7x", "h200", ...; or a machine, "v5p:2x2x1", for programs on several devices.
        builder: "module:function" or "file.py:function"; called as `function(target, **arguments)`.
        arguments: JSON values.
        using: (operation, key, blocks) for `pallas_kernels.tuned`, in place of what is known to be best.
        profiled: by libtpu; otherwise only bundles are counted, which takes less time where a grid is large.
    """

    chip: str
    builder: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    using: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = ()
    profiled: bool = True

    @property
    def topology(self) -> Topology:
        if ":" in self.chip:
            return Topology.parse(self.chip)
        name = find_chip(self.chip).name
        return Topology.parse(SMALLEST.get(name, f"{name}:1"))


@dataclasses.dataclass(frozen=True)
class Program:
    """What a builder returns.

    Attributes:
        function, arguments: to be jitted and lowered; arguments are pytrees of `target.array`s.
        flops, hbm_bytes: what one device cannot avoid, for the limit. Causal attention counts half.
        dtype: of the products, for their peak: "bfloat16", "float32", "int8" or "float8".
        share: how much of the compiled program's cycles counts; for variants that compute a known multiple.
        data: of each argument None, or its value where that decides how long the program runs. The Pallas kernels
            among its operations get the scalars that are made of them; several have a name each.
        moved_bytes: what it does move, where its way of cutting the work moves more than it has to: no time is less.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    hbm_bytes: float
    dtype: str = "bfloat16"
    share: float = 1.0
    data: tuple[Any, ...] | None = None
    moved_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Static:
    """What the compiler says of a program; None where it does not say. Of several operations, sums.

    Attributes:
        microseconds: see the module; `of_limit`: the limit (the larger of FLOPs over peak and bytes over bandwidth)
            over it.
        cycles: of the busiest core, `share` counted in. by_op: those of each operation of the program, without it.
        clock: "profile", or "bundles": by the number that run. counted: these of each operation.
            counted_microseconds: by them, also where there is a profile. lost: of each that could not be counted, why.
        bundles: instructions of a TPU's program. spills: its uses of spilled vector registers, spilled: of each
            operation; on a GPU, bytes.
        registers: of a GPU's thread.
        warnings: ptxas's "Potential Performance Loss" (C7510 to C7512: wgmma serialised).
        unprofiled: operations whose cycles are not known, and not counted. If the longest is one, no time is given.
        temp_bytes: HBM that the program needs beside arguments and results.
        asked: (operation, key) of each choice of block sizes that kernels asked `pallas_kernels.tuned` for.
        failed: why there is nothing, or None.
    """

    microseconds: float | None = None
    of_limit: float | None = None
    cycles: float | None = None
    by_op: dict[str, float] = dataclasses.field(default_factory=dict)
    clock: str | None = None
    counted: dict[str, float] = dataclasses.field(default_factory=dict)
    counted_microseconds: float | None = None
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    bundles: int | None = None
    spills: int | None = None
    spilled: dict[str, int] = dataclasses.field(default_factory=dict)
    registers: int | None = None
    warnings: tuple[str, ...] = ()
    unprofiled: tuple[str, ...] = ()
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    flops: float = 0.0
    hbm_bytes: float = 0.0
    asked: tuple[tuple[str, dict[str, Any]], ...] = ()
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Static":
        asked = tuple((operation, key) for operation, key in values["asked"])
        names = {name: tuple(values[name]) for name in ("warnings", "unprofiled")}
        return cls(**{**values, **names, "asked": asked})


def limit_seconds(chip: Chip, flops: float, hbm_bytes: float, dtype: str = "bfloat16") -> float:
    """The least time that `chip` can take: the larger of products at its peak and bytes at its bandwidth."""
    return max(flops / chip.peak(dtype), hbm_bytes / chip.memory_bandwidth)


Progress = Callable[[int, Static], None]


def compile_all(
    requests: Sequence[Request],
    *,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    profiled: bool = True,
) -> list[Static]:
    """Compiles each; what cannot be compiled has `failed` set. `progress(index, result)` hears of each as it is there.

    What is not `profiled` has no cycles or times, and is compiled in half the time.
    Raises CompilerMissing (`planner.errors`), saying what to install.
    """
    results: dict[int, Static] = {}

    def keep(index: int, found: Static) -> None:
        results[index] = found
        if progress:
            progress(index, found)

    for topology in dict.fromkeys(request.topology for request in requests):
        check_compiler(topology)
        todo = {i: request for i, request in enumerate(requests) if request.topology == topology}
        aborted: dict[int, dict[str, float]] = {}
        while todo:
            some, profiler = _alike(todo, profiled)
            for index, found in _child(topology, some, timeout, salvaged=None if profiler else {}):
                del todo[index]
                if isinstance(found, Static):
                    keep(index, found)
                else:
                    aborted[index] = found
        # The profiler has often said all before it aborts; the rest is read from a compilation without it.
        while aborted:
            again = {i: requests[i] for i in _some(aborted)}
            for index, found in _child(topology, again, timeout, salvaged=aborted.copy()):
                assert isinstance(found, Static)
                keep(index, found)
                del aborted[index]
    return [results[i] for i in range(len(requests))]


def _alike(requests: dict[int, Request], profiled: bool) -> tuple[dict[int, Request], bool]:
    """Some that want the profiler, or some that do not."""
    first = profiled and next(iter(requests.values())).profiled
    return _some({i: request for i, request in requests.items() if (profiled and request.profiled) == first}), first


def _some(of: dict[int, Any]) -> dict[int, Any]:
    """What one process does: the profiler keeps what it saw, gigabytes after some large grids."""
    return dict(itertools.islice(of.items(), A_CHILD))


def _child(
    topology: Topology, requests: dict[int, Request], timeout: float, salvaged: dict[int, dict[str, float]] | None
) -> Iterator[tuple[int, Static | dict[str, float]]]:
    """Results as they come; the last may be the cycles of a kernel on which the profiler died.

    Profiles, unless `salvaged` is given: the cycles from earlier, of those kernels that have any.
    """
    profiled = salvaged is None
    with tempfile.TemporaryDirectory() as folder:
        dump, errors = Path(folder), Path(folder) / "errors"
        known = salvaged or {}
        asked = [{**dataclasses.asdict(request), "cycles": known.get(i)} for i, request in requests.items()]
        question = {"topology": str(topology), "dump": str(dump), "requests": asked}
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.static_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, **_environment(topology, dump, profiled)},
            )
        assert process.stdin and process.stdout
        late = threading.Event()
        try:
            process.stdin.write(json.dumps(question))
            process.stdin.close()
            for index in tuple(requests):
                timer = threading.Timer(timeout, lambda: (late.set(), process.kill()))
                timer.start()
                line = _answer(process.stdout)
                timer.cancel()
                if line is not None:
                    yield index, Static.from_json(json.loads(line))
                    continue
                process.wait()
                last = errors.read_text()
                if late.is_set():
                    yield index, Static(failed=f"not compiled after {timeout:.0f} s")
                elif profiled and "DumpStaticLloProfile" in last:
                    yield index, read_tpu(dump, topology.chip.name).cycles
                else:
                    yield index, Static(failed=f"the compiler's process died: {last[-1500:] or process.returncode}")
                return
        finally:
            process.kill()
            process.wait()


def _answer(lines: Any) -> str | None:
    return next((line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")), None)


def _environment(topology: Topology, dump: Path, profiled: bool) -> dict[str, str]:
    """The compilers read these once, when they are loaded."""
    if topology.chip.platform == "cuda":
        flags = os.environ.get("XLA_FLAGS", "")
        cuda = os.environ.get("CUDA_ROOT", "/usr/local/cuda")
        return {
            **settings(topology),
            "XLA_FLAGS": f"{flags} --xla_dump_to={dump}/xla --xla_gpu_cuda_data_dir={cuda}",
            "MOSAIC_GPU_DUMP_PTXAS": "1",  # on the standard output
        }
    (dump / "llo").mkdir()
    (dump / "static").mkdir()
    flags = [f"--xla_jf_dump_to={dump}/llo", "--xla_jf_dump_llo_text", f"--xla_jf_dump_llo_pass_label_regex={LAST}"]
    if profiled:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={dump}/static")
    flags.append("--xla_tpu_check_llo_types=false")  # the profiler's check refuses bits taken as another type
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {**settings(topology), "LIBTPU_INIT_ARGS": " ".join([given, *flags]).strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", help="v5e, v5p, v6e, 7x, h100, h200, b200, or a machine such as v5p:2x2x1")
    parser.add_argument("builder", help="MODULE:FUNCTION or FILE.py:FUNCTION")
    parser.add_argument("arguments", nargs="*", help="JSON objects: one compilation each, in one child")
    options = parser.parse_args()
    requests = [Request(options.chip, options.builder, json.loads(given)) for given in options.arguments or ["{}"]]

    def show(index: int, found: Static) -> None:
        print(json.dumps({**requests[index].arguments, **found.to_json()}), flush=True)

    try:
        found = compile_all(requests, progress=show)
    except PlannerError as error:
        parser.error(str(error))
    sys.exit(1 if any(one.failed for one in found) else 0)


if __name__ == "__main__":
    main()
