"""Asks the real compiler: lowers and compiles the trainer's or the engine's own step for a described machine.

Each compilation is a child process (libtpu reads its settings once), two at a time; a callback hears of their progress.
Flags that a run would have in LIBTPU_INIT_ARGS or XLA_FLAGS count here too: the children see the same environment.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .buffers import CLASSES
from .costs import Traffic
from .devices import check_compiler, settings
from .errors import CompileFailed
from .topology import Topology
from .workload import Layout, Workload

AT_ONCE = 2  # compilations at once: XLA uses several threads for a part of each
Progress = Callable[[Layout, str], None]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, for one device.

    Attributes:
        name: the program: "step" of a training run; "decode" or "chunk" of an engine.
        memory: bytes of HBM by class, its own total being their sum.
        refused: why the compiler would not make the program (it does not fit), or None.
        flops, hbm_bytes, collectives: of the optimized program, loops multiplied out (`costs`).
        cycles: its estimate of what is not communication; 0 where it makes none.
        attend: FLOPs, bytes and cycles of attention alone, held by the totals too.
        unknown: loops and kernels whose costs are not known; see `costs`.
        own: numbers as the compiler gives them: FLOPs and bytes with each loop counted once, and sizes.
        seconds: that the compilation took.
    """

    name: str
    memory: dict[str, float]
    refused: str | None
    flops: float
    hbm_bytes: float
    collectives: dict[tuple[str, tuple[str, ...]], Traffic]
    cycles: float
    attend: tuple[float, float, float]
    unknown: tuple[str, ...]
    own: dict[str, float]
    seconds: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Compilation:
    """All programs of one layout, and what making them took in this machine's seconds."""

    layout: Layout
    programs: tuple[Compiled, ...]
    seconds: float
    cpu_seconds: float


def compile_layouts(
    workload: Workload, topology: Topology, layouts: Sequence[Layout], progress: Progress | None = None
) -> list[Compilation | CompileFailed]:
    """Compiles each layout; a failure is returned in its place, not raised. Raises CompilerMissing."""
    check_compiler(topology)
    running: set[subprocess.Popen[str]] = set()
    lock = threading.Lock()

    def one(layout: Layout) -> Compilation | CompileFailed:
        try:
            return _compile(workload, topology, layout, progress or (lambda layout, stage: None), running, lock)
        except CompileFailed as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(pool.map(one, layouts))
        except BaseException:  # Ctrl-C ends the children too
            pool.shutdown(wait=False, cancel_futures=True)
            with lock:
                for process in running:
                    process.kill()
            raise


def _compile(
    workload: Workload,
    topology: Topology,
    layout: Layout,
    progress: Progress,
    running: set[subprocess.Popen[str]],
    lock: threading.Lock,
) -> Compilation:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "twinax.planner.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings(topology)},
        )
        with lock:
            running.add(process)
        errors: list[str] = []
        assert process.stdin and process.stdout and process.stderr
        reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,), daemon=True)
        reader.start()
        process.stdin.write(json.dumps({**request(workload, topology, layout), "output": str(output)}))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("STAGE "):
                progress(layout, line.removeprefix("STAGE ").strip())
        process.wait()
        reader.join()
        with lock:
            running.discard(process)
        progress(layout, "done")
        if not output.exists():
            last = "".join(errors)[-1500:].strip() or f"exit status {process.returncode}"
            raise CompileFailed(f"The compiler's process left no result for {layout.plan} on {topology}: {last}")
        result = json.loads(output.read_text())
    if "failed" in result:
        raise CompileFailed(f"{layout.plan} on {topology} cannot be compiled: {result['failed']}")
    programs = tuple(_compiled(values) for values in result["programs"])
    return Compilation(layout, programs, result["seconds"], result["cpu_seconds"])


def request(workload: Workload, topology: Topology, layout: Layout) -> dict[str, Any]:
    """What the child is told."""
    return {
        "topology": str(topology),
        "model": workload.model.to_dict(),
        "mode": workload.mode,
        "rows": workload.rows,
        "seq_len": workload.seq_len,
        "dtype": workload.dtype,
        "cache_dtype": workload.cache_dtype,
        "plan": "" if layout.plan.devices == 1 else str(layout.plan),
        "accumulation": layout.accumulation,
        "remat": layout.remat,
    }


def _compiled(values: dict[str, Any]) -> Compiled:
    collectives = {
        (kind, tuple(axes)): Traffic(sent, count, beside) for kind, axes, sent, count, beside in values["collectives"]
    }
    by_class = values["memory"]["by_class"]
    return Compiled(
        name=values["name"],
        memory={name: by_class[name] for name in CLASSES},
        refused=values["refused"],
        flops=values["flops"],
        hbm_bytes=values["hbm_bytes"],
        collectives=collectives,
        cycles=values["cycles"],
        attend=tuple(values["attend"]),
        unknown=tuple(values["unknown"]),
        own=values["compiler"],
        seconds=values["compile_seconds"],
    )
