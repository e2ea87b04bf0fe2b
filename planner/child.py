"""Compiles one step for a machine that is not there. Runs in a process of its own: `python -m twinax.planner.child`.

It is given a request as JSON on its standard input, says on its standard output which stage it is in, and writes what
it found to the file that the request names. JAX must not have been imported before, as libtpu reads its settings then.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("starting", "lowering", "compiling", "reading")


def stage(name: str) -> None:
    print(f"STAGE {name}", flush=True)


def main() -> None:
    request = json.loads(sys.stdin.read())
    begin = time.perf_counter()
    result: dict[str, Any]
    try:
        result = compile_request(request)
    except Exception as error:  # whatever it is, the parent says it
        result = {"failed": f"{type(error).__name__}: {error}"[:4000]}
    result["seconds"] = time.perf_counter() - begin
    result["cpu_seconds"] = time.process_time()
    Path(request["output"]).write_text(json.dumps(result))


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Lowers and compiles; the costs, the memory, and what the compiler itself says."""
    stage("starting")
    from ..sharding.plan import Plan
    from .devices import find_devices
    from .programs import programs
    from .topology import Topology

    topology, plan = Topology.parse(request["topology"]), Plan.parse(request["plan"])
    mesh = plan.mesh(devices=find_devices(topology))
    found: dict[str, Any] = {"programs": []}
    for name, lower, names in programs(request, plan, mesh):
        stage("lowering")
        lowered = lower()
        stage("compiling")
        with tempfile.TemporaryDirectory() as folder:
            found["programs"].append(_compile(name, lowered, Path(folder), names, plan))
    return found


def _compile(name: str, lowered: Any, folder: Path, names: Any, plan: Any) -> dict[str, Any]:
    from .buffers import read_memory
    from .costs import count
    from .hlo import Module

    started, refused = time.perf_counter(), None
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    try:
        compiled = lowered.compile(compiler_options=options)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refused = None, str(error).partition("RESOURCE_EXHAUSTED:")[2].strip()
    seconds = time.perf_counter() - started
    stage("reading")
    memory, module = read_memory(folder, names)
    own = {}
    if compiled is not None:
        module = Module.parse(compiled.as_text())  # the dump was written before cycles were estimated
        analysis = compiled.cost_analysis() or {}
        own = {key: analysis[key] for key in ("flops", "bytes accessed") if key in analysis}
        sizes = compiled.memory_analysis()
        own |= {key: getattr(sizes, key) for key in ("argument_size_in_bytes", "temp_size_in_bytes")}
    costs = count(module, plan.sizes)
    return {
        "name": name,
        "compile_seconds": seconds,
        "refused": refused,
        "memory": {"total": memory.total, "by_class": memory.by_class},
        "flops": costs.flops,
        "hbm_bytes": costs.hbm_bytes,
        "cycles": costs.cycles,
        "attend": costs.attend,
        "collectives": [
            [kind, list(axes), traffic.sent, traffic.count, traffic.beside]
            for (kind, axes), traffic in costs.collectives.items()
        ],
        "unknown": sorted(costs.unknown),
        "compiler": own,
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # libtpu's threads may outlive the interpreter
