"""One layout on one topology: what the analytic model says and, where it was compiled, what the compiler says."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .compile import Compilation, Compiled
from .costs import Costs, Key, Traffic
from .model import Estimate
from .roofline import Roofline, attention_seconds, roofline
from .serving import serve_attention_flops
from .sizes import share_of
from .traffic import forward_passes, turns


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Attributes:
    estimate: the analytic model's.
    compilation: the compiler's, None when it was not asked or refused.
    reason: why there is no compilation, in words, if it was asked.
    requests: when serving, how many requests of the workload's length fit at once.
    """

    estimate: Estimate
    compilation: Compilation | None = None
    reason: str | None = None
    requests: int | None = None

    @property
    def compiled(self) -> Compiled | None:
        """What a step compiles to: the trainer's program, or the engine's for a step of decoding as one."""
        if self.compilation is None:
            return None
        programs = self.compilation.programs
        return programs[0] if self.estimate.workload.mode == "train" else _engine(self.estimate, programs)

    @property
    def total_memory(self) -> float:
        """Bytes on a device, by the compiler where it was asked."""
        return self.estimate.total_memory if self.compiled is None else self.compiled.total_memory

    @property
    def free(self) -> float:
        return self.estimate.topology.chip.memory - self.total_memory

    @property
    def fits(self) -> bool:
        refused = self.compilation is not None and any(program.refused for program in self.compilation.programs)
        return self.free >= 0 and not refused

    @property
    def roofline(self) -> Roofline:
        """Of the compiled program where there is one."""
        return self.estimate.roofline if self.compiled is None else compiled_roofline(self.estimate, self.compiled)

    @property
    def seconds(self) -> float:
        """Of a step, under the stated assumption about overlap."""
        return self.roofline.expected

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers of one device and one step, bytes, FLOPs and seconds."""
        estimate, topology = self.estimate, self.estimate.topology
        found: dict[str, Any] = {
            "topology": str(topology),
            "chips": topology.chips,
            "devices_per_chip": topology.chip.devices_per_chip,
            **estimate.layout.to_dict(),
            "mode": estimate.workload.mode,
            "rows": estimate.workload.rows,
            "seq_len": estimate.workload.seq_len,
            "fits": self.fits,
            "memory_available": topology.chip.memory,
            "memory_free": self.free,
            "seconds": self.seconds,
            **estimate.rates(self.seconds),
            "estimated": {
                "memory": estimate.memory,
                "memory_total": estimate.total_memory,
                "flops": estimate.work.flops,
                "hbm_bytes": estimate.work.hbm_bytes,
                "collectives": _collectives(estimate.work.collectives),
                "seconds": _seconds(estimate.roofline),
            },
        }
        if self.requests is not None:
            found["requests"] = self.requests
        if self.reason is not None:
            found["not_compiled"] = self.reason
        if self.compilation is not None:
            found["compiled"] = [_program(estimate, program) for program in self.compilation.programs]
            found["compile_seconds"] = self.compilation.seconds
            found["compile_cpu_seconds"] = self.compilation.cpu_seconds
        return found


def _engine(estimate: Estimate, programs: Sequence[Compiled]) -> Compiled:
    """The engine's programs as one: what they hold together, and the most that any of them adds to it.

    What they hold is known from shapes, as each takes a part of it, but for the padding that a compiler adds.
    """
    held = {
        name: max(estimate.memory[name], *(program.memory[name] for program in programs))
        for name in ("parameters", "cache", "inputs")
    }
    added = max((dict(program.memory) for program in programs), key=lambda memory: _added(memory, held))
    decode, finish = (next(p for p in programs if p.name == name) for name in ("decode", "finish"))
    totals = Costs(decode.flops, decode.hbm_bytes, decode.cycles, dict(decode.collectives), attend=decode.attend)
    totals.add(Costs(finish.flops, finish.hbm_bytes, finish.cycles, dict(finish.collectives)))
    return Compiled(
        name="decode and finish",
        memory={**added, **held},
        refused=next((program.refused for program in programs if program.refused), None),
        flops=totals.flops,
        hbm_bytes=totals.hbm_bytes,
        collectives=totals.collectives,
        cycles=totals.cycles,
        attend=totals.attend,
        # Attention's loops are as long as the requests; what they take is known from those.
        unknown=tuple(name for name in (*decode.unknown, *finish.unknown) if "attend" not in name),
        own={},
        seconds=sum(program.seconds for program in programs),
    )


def _added(memory: dict[str, float], held: dict[str, float]) -> float:
    return sum(size for name, size in memory.items() if name not in held)


def compiled_roofline(estimate: Estimate, compiled: Compiled) -> Roofline:
    """The roofline of an optimized program, but that attention is taken to read and write only its inputs and outputs.

    What XLA's own implementation of attention moves is no guide to a kernel's, which keeps its tiles on the chip.
    """
    outside = compiled.hbm_bytes - compiled.attend[1] + attention_bytes(estimate)
    attention = compiled.attend[0]
    if estimate.workload.mode == "serve":  # its loops are as long as the requests, which the compiler can't know
        attention = serve_attention_flops(estimate.workload, estimate.layout)
    flops = compiled.flops - compiled.attend[0] + attention
    return roofline(
        estimate.topology,
        estimate.layout.plan.sizes,
        estimate.workload.dtype,
        (flops, attention),
        outside,
        compiled.collectives,
    )


def attention_bytes(estimate: Estimate) -> float:
    """Queries, keys, values and results, and their gradients, once in and once out."""
    workload, layout = estimate.workload, estimate.layout
    share = share_of(workload, layout)
    if workload.mode == "serve":
        return estimate.memory["cache"]
    _, attentions = forward_passes(workload, layout)
    times = layout.accumulation * turns(layout.plan) * share.layers * (attentions + 2)
    return workload.itemsize * 2 * (share.heads + share.kv_heads) * share.tokens * times


def scheduled_seconds(estimate: Estimate, compiled: Compiled) -> float | None:
    """The step by the compiler's own estimates: its cycles, and the collectives that it does not run beside them.

    Attention is taken at what a kernel is expected to take, for the reason above. None where the compiler estimates no
    cycles.
    """
    chip = estimate.topology.chip
    if not chip.clock or not compiled.cycles:
        return None
    attention_flops, _, attention_cycles = compiled.attend
    if estimate.workload.mode == "serve":
        attention_flops = serve_attention_flops(estimate.workload, estimate.layout)
    busy = (compiled.cycles - attention_cycles) / chip.clock
    busy += attention_seconds(chip, estimate.workload.dtype, attention_flops)
    waiting = {
        key: Traffic(traffic.sent - traffic.beside, traffic.count) for key, traffic in compiled.collectives.items()
    }
    sizes = estimate.layout.plan.sizes
    waits = roofline(estimate.topology, sizes, estimate.workload.dtype, (0, 0), 0, waiting)
    return busy + sum(waits.axes.values())


def _program(estimate: Estimate, program: Compiled) -> dict[str, Any]:
    return {
        "program": program.name,
        "refused": program.refused,
        "memory": program.memory,
        "memory_total": program.total_memory,
        "flops": program.flops,
        "hbm_bytes": program.hbm_bytes,
        "collectives": _collectives(program.collectives),
        "seconds": _seconds(compiled_roofline(estimate, program)),
        "seconds_as_scheduled": scheduled_seconds(estimate, program),
        "unknown": list(program.unknown),
        "compiler": program.own,
    }


def _collectives(collectives: dict[Key, Traffic]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "axes": list(axes), "bytes": t.sent, "count": t.count, "bytes_beside_compute": t.beside}
        for (kind, axes), t in sorted(collectives.items())
    ]


def _seconds(times: Roofline) -> dict[str, Any]:
    return {
        "compute": times.compute,
        "compute_expected": times.busy,
        "memory": times.memory,
        "axes": {"+".join(axes): seconds for axes, seconds in times.axes.items()},
        "least": times.least,
        "expected": times.expected,
        "most": times.most,
        "bound": times.bound,
    }
