"""Compiles kernels for a machine that is not there. A process of its own, started by `benchmarks.static`.

It reads what to do as JSON from its standard input and prints one line `RESULT {...}` for each kernel.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinax.pallas_kernels import tuned

from .dumps import Dump, forget, read_cuda, read_tpu
from .static import Program, Static, limit_seconds


class Target:
    """The described devices, as builders see them.

    Attributes:
        chip: facts of the chip (`planner.chips.Chip`). devices: JAX's, all of the machine.
        mesh: one axis "x" over all devices of a machine that was named, or the first device alone.
    """

    def __init__(self, topology: Any, alone: bool):
        import jax
        import numpy as np
        from jax.sharding import AxisType, Mesh

        from twinax.planner.devices import find_devices

        self.chip, self.devices = topology.chip, find_devices(topology)
        used = self.devices[:1] if alone else self.devices
        self.mesh = Mesh(np.array(used), ("x",), axis_types=(AxisType.Auto,))
        self._jax = jax

    def array(self, shape: tuple[int, ...], dtype: Any = "bfloat16", cut: Any = None) -> Any:
        """An argument: its shape and dtype, on the mesh, cut as the PartitionSpec says (whole on each device)."""
        from jax.sharding import NamedSharding, PartitionSpec

        sharding = NamedSharding(self.mesh, PartitionSpec() if cut is None else cut)
        return self._jax.ShapeDtypeStruct(shape, self._jax.numpy.dtype(dtype), sharding=sharding)

    def context(self) -> Any:
        """Within it, kernels know the chip that they are traced for."""
        from jax._src.mesh import AbstractDevice
        from jax.sharding import AbstractMesh

        from twinax.planner.gpu_target import TARGETS

        device = self.devices[0]
        is_gpu = self.chip.platform == "cuda"
        cores = TARGETS[self.chip.name].cores if is_gpu else getattr(device, "num_cores", 1)
        more = [self.chip.platform] if "platform" in AbstractDevice.__dataclass_fields__ else []
        described = AbstractDevice(device.device_kind, cores, *more)
        mesh = AbstractMesh(self.mesh.axis_sizes, self.mesh.axis_names, self.mesh.axis_types, abstract_device=described)
        return self._jax.sharding.use_abstract_mesh(mesh)


def load(builder: str) -> Any:
    """The function of "module:function" or "file.py:function"."""
    module, _, name = builder.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    path = Path(module).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader, f"{path} is no Python file"
    sys.path.insert(0, str(path.parent))
    loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def compile_one(target: Target, request: dict[str, Any], dump: Path) -> Static:
    import jax

    jax.clear_caches()  # or a kernel traced with other block sizes would be found again
    program: Program = load(request["builder"])(target, **request["arguments"])
    began = time.perf_counter()
    with _standard_output(dump / "said"):
        with target.context():
            # What is jitted already may donate arguments.
            jitted = program.function if hasattr(program.function, "lower") else jax.jit(program.function)
            with using(request["using"]), tuned.asked() as asked:
                lowered = jitted.lower(*program.arguments)
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    if target.chip.platform == "cuda":
        found = read_cuda(dump, target.chip.name)
    else:
        found = read_tpu(dump, target.chip.name, None if program.data is None else scalars(target, program))
    if request["cycles"] is not None:  # from an earlier compilation, on which the profiler died
        found = dataclasses.replace(found, cycles=request["cycles"])
    memory = compiled.memory_analysis()
    result = summary(target.chip, program, found, seconds, None if memory is None else memory.temp_size_in_bytes)
    return dataclasses.replace(result, asked=tuple(asked))


@contextlib.contextmanager
def using(choices: list[Any]) -> Iterator[None]:
    """Kernels take these block sizes."""
    with contextlib.ExitStack() as stack:
        for operation, key, blocks in choices:
            stack.enter_context(tuned.using(operation, key, blocks))
        yield


def scalars(target: Target, program: Program) -> dict[str, dict[int, Any]]:
    """What the program's Pallas kernels that have scalars find in them, computed here of the program's `data`."""
    import jax

    with target.context():
        traced = jax.make_jaxpr(program.function)(*program.arguments)
    assert program.data is not None
    given = [
        value
        for argument, data in zip(program.arguments, program.data, strict=True)
        for value in ([None] * len(jax.tree.leaves(argument)) if data is None else jax.tree.leaves(data))
    ]
    found = list(_kernels_scalars(traced, given))
    assert len(dict(found)) == len(found), f"kernels of one name: {[name for name, _ in found]}"
    return {name: dict(enumerate(values)) for name, values in found}


def _kernels_scalars(closed: Any, given: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Of each kernel that has some, by its name. `given`: values, or None. The results' values are appended to it."""
    from jax.extend.core import Literal

    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= {name: value for name, value in zip(closed.jaxpr.invars, given, strict=True) if value is not None}

    def value_of(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values.get(x)

    for equation in closed.jaxpr.eqns:
        inputs, results = [value_of(x) for x in equation.invars], None
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if equation.primitive.name == "pallas_call":
            count = equation.params["grid_mapping"].num_index_operands
            if count:
                yield equation.params["name"] or "", inputs[:count]
        elif hasattr(inner, "jaxpr") and equation.primitive.name != "scan":
            yield from _kernels_scalars(inner, inputs)
            results = inputs[len(inner.jaxpr.invars) :]
        elif all(x is not None for x in inputs):
            found = equation.primitive.bind(*inputs, **equation.params)
            results = list(found) if equation.primitive.multiple_results else [found]
        if results is not None:
            values |= {name: value for name, value in zip(equation.outvars, results, strict=True) if value is not None}
    given += [value_of(x) for x in closed.jaxpr.outvars]


def summary(chip: Any, program: Program, found: Dump, seconds: float, temp_bytes: int | None) -> Static:
    least = limit_seconds(chip, program.flops, program.hbm_bytes, program.dtype)
    # Where one clock fails on the kernel itself, what the rest takes is no time.
    longest = max(found.bundles, key=lambda name: found.bundles[name], default=None)

    def seconds_of(by_op: dict[str, float]) -> float | None:
        if not by_op or (longest is not None and longest not in by_op):
            return None
        moved = max(program.hbm_bytes, program.moved_bytes)
        return max(sum(by_op.values()) * program.share / chip.clock, moved / chip.memory_bandwidth)

    # The profiler takes data for 0.
    profiled = seconds_of(found.cycles) if program.data is None else None
    counted = seconds_of(found.counted)
    by_op, time_taken = (found.counted, counted) if profiled is None else (found.cycles, profiled)
    return Static(
        microseconds=None if time_taken is None else 1e6 * time_taken,
        of_limit=None if not time_taken else least / time_taken,
        cycles=None if time_taken is None else sum(by_op.values()) * program.share,
        by_op=by_op,
        clock=None if time_taken is None else "bundles" if profiled is None else "profile",
        counted=found.counted,
        counted_microseconds=None if counted is None else 1e6 * counted,
        lost=found.lost,
        bundles=sum(found.bundles.values()) or None,
        unprofiled=tuple(name for name in found.bundles if name not in by_op) if by_op else (),
        spills=found.spills,
        spilled=found.spilled,
        registers=found.registers,
        warnings=found.warnings,
        temp_bytes=temp_bytes,
        compile_seconds=seconds,
        flops=program.flops,
        hbm_bytes=program.hbm_bytes,
    )


@contextlib.contextmanager
def _standard_output(file: Path) -> Iterator[None]:
    """What C++ code prints on the standard output goes to `file`."""
    sys.stdout.flush()
    kept, opened = os.dup(1), os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(opened)


def main() -> None:
    question = json.loads(sys.stdin.read())
    from twinax.planner.topology import Topology

    dump = Path(question["dump"])
    targets: dict[bool, Target] = {}
    for request in question["requests"]:
        try:
            alone = ":" not in request["chip"]
            if alone not in targets:
                targets[alone] = Target(Topology.parse(question["topology"]), alone)
            found = compile_one(targets[alone], request, dump)
        except Exception as error:  # whatever it is, the parent says it
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = Static(failed=f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:3000])
            forget(dump)
        print("RESULT " + json.dumps(found.to_json()), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # libtpu's threads may outlive the interpreter
