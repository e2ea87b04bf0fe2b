"""What an optimized HLO program does in one run, loops multiplied out: products, memory traffic, collectives, cycles.

- FLOPs are those of products (`dot`, `convolution`, kernels that declare theirs), 2 for a multiplication and addition.
- Bytes of a collective are what one device sends: in a group of n, (n - 1) / n of the whole array for a gather, scatter
  or exchange, twice that for an all-reduce, all of it for a permutation. A start and its end count once.
- Memory traffic is what each operation outside of fusions reads and writes in HBM. A slice reads the slice, an update
  in place writes the update.
- Cycles are the compiler's own estimates (TPU only), without the collectives.
- What attention does between its projections is also counted apart (`layers.attention` names it "attend").
- Of a conditional's branches the dearest is taken. What a loop that depends on data does is counted once and named.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from .groups import group_of
from .hlo import Computation, Instruction, Module
from .integers import Frame, Loop
from .products import custom_call_flops, product_flops

COLLECTIVES = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
}  # fmt: skip
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier",
    "after-all", "partition-id", "replica-id", "iota", "copy-done", "async-start", "async-update", "async-done",
}  # fmt: skip
_ATTEND = re.compile(r"\battend\b")
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,15})"')
Key = tuple[str, tuple[str, ...]]  # kind, mesh axes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective over one set of mesh axes: bytes that a device sends, how often it runs, and the bytes
    that the compiler sends beside other work."""

    sent: float = 0.0
    count: float = 0.0
    beside: float = 0.0

    def plus(self, other: "Traffic", times: float = 1.0) -> "Traffic":
        return Traffic(
            self.sent + times * other.sent, self.count + times * other.count, self.beside + times * other.beside
        )


@dataclasses.dataclass
class Costs:
    """Totals of one device.

    Attributes:
        flops: of products.
        hbm_bytes: read and written.
        cycles: the compiler's estimate; 0 where it makes none.
        collectives: what is sent, by kind and mesh axes.
        unknown: loops whose turns depend on data, and kernels that do not say what they compute.
        attend: flops, hbm_bytes and cycles of attention alone, which the totals hold too.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    collectives: dict[Key, Traffic] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)
    attend: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, other: "Costs", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.cycles += times * other.cycles
        for key, traffic in other.collectives.items():
            self.collectives[key] = self.collectives.get(key, Traffic()).plus(traffic, times)
        self.unknown |= other.unknown
        flops, hbm_bytes, cycles = (a + times * b for a, b in zip(self.attend, other.attend, strict=True))
        self.attend = (flops, hbm_bytes, cycles)


def count(module: Module, sizes: Mapping[str, int]) -> Costs:
    """The costs of a run of `module`, whose devices make a mesh of `sizes`, {axis: devices}, in order."""
    return _Counter(module, sizes).run(Frame(module, module.entry, []))


class _Counter:
    def __init__(self, module: Module, sizes: Mapping[str, int]):
        self.module, self.sizes = module, sizes
        self._straight: dict[str, Costs] = {}
        self._relevant: dict[str, set[int]] = {}

    def run(self, frame: Frame) -> Costs:
        total = Costs()
        total.add(self.straight(frame.computation))
        for i in frame.computation:
            if i.opcode == "while":
                total.add(self._loop(frame, i))
            elif i.opcode in ("call", "async-start") and i.called:
                inner = self.run(frame.call(i.called[0], [frame.get(name) for name in i.operands]))
                if i.opcode == "async-start" and _is_beside(i):
                    inner.collectives = {
                        key: dataclasses.replace(traffic, beside=traffic.sent)
                        for key, traffic in inner.collectives.items()
                    }
                total.add(inner)
            elif i.opcode == "conditional":
                branches = [self.run(frame.call(name, [None])) for name in i.called]
                total.add(max(branches, key=lambda costs: (costs.flops, costs.hbm_bytes)))
        return total

    def _loop(self, frame: Frame, i: Instruction) -> Costs:
        loop, total = Loop(frame, i), Costs()
        turns = loop.turns()
        if turns is None:
            total.unknown.add(f"loop {i.op_name or i.name}")
            total.add(self.run(loop.at({})))
            return total
        if turns == 0:
            return total
        relevant = self._depends(loop.body, loop)
        if all(loop.is_fixed(index) for index in relevant):
            total.add(self.run(loop.at(next(iter(loop.states(relevant)), {}))), turns)
            return total
        known: dict[tuple[bytes | None, ...], Costs] = {}
        for state in loop.states(relevant):
            values = (state[index] for index in sorted(relevant))
            key = tuple(value.tobytes() if isinstance(value, np.ndarray) else None for value in values)
            if key not in known:
                known[key] = self.run(loop.at(state))
            total.add(known[key])
        return total

    def _depends(self, body: Computation, loop: Loop) -> set[int]:
        """The carried items that decide how often the loops within `body` run."""
        if body.name not in self._relevant:
            found: set[int] = set()
            for i in body:
                if i.opcode != "while":
                    continue
                inner = Loop(Frame(self.module, body, []), i)
                start = body[i.operands[0]]
                wanted = inner.reads(inner.condition, [inner.condition.root.name]) | self._depends(inner.body, inner)
                wanted = inner.closure(wanted)
                names = [start.operands[k] for k in wanted] if start.opcode == "tuple" else [start.name]
                found |= loop.reads(body, names)
            self._relevant[body.name] = found
        return self._relevant[body.name]

    def straight(self, computation: Computation) -> Costs:
        """What a computation does itself, fusions included, loops and calls left out."""
        if computation.name not in self._straight:
            costs, asynchronous = Costs(), set()
            for i in computation:
                one = Costs(hbm_bytes=self._traffic(computation, i))
                self._products(computation, i, one, asynchronous, fused=False)
                match = _CYCLES.search(i.attributes)
                one.cycles = float(match[1]) if match else 0.0
                if _ATTEND.search(i.op_name):
                    one.attend = (one.flops, one.hbm_bytes, one.cycles)
                costs.add(one)
            self._straight[computation.name] = costs
        return self._straight[computation.name]

    def _products(
        self, computation: Computation, i: Instruction, costs: Costs, asynchronous: set[str], fused: bool
    ) -> None:
        """Adds the products and collectives of one instruction, and of what a fusion holds."""
        if i.opcode == "fusion":
            inner = self.module[i.called[0]]
            for j in inner:
                self._products(inner, j, costs, asynchronous, fused=True)
        elif i.opcode in ("dot", "convolution"):
            costs.flops += product_flops(computation, i)
        elif i.opcode == "custom-call":
            flops = custom_call_flops(computation, i)
            costs.flops += flops or 0.0
            if flops is None:
                costs.unknown.add(f"kernel {i.op_name or i.name}")
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = i.attribute("channel_id")
            # One that runs beside other work is split into fusions for its start, its steps and its end.
            if fused and channel is not None:
                if channel in asynchronous:
                    return
                asynchronous.add(channel)
            beside = _is_beside(i)
            self._collective(computation, i, kind, costs, beside)

    def _collective(self, computation: Computation, i: Instruction, kind: str, costs: Costs, beside: bool) -> None:
        group = group_of(i, self.sizes)
        if group.size < 2:
            return
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's: an all-reduce of which only a slice is made
        held = sum(computation[name].bytes for name in i.operands)
        part = (group.size - 1) / group.size
        sent = {
            "all-gather": held * (group.size - 1),
            "all-reduce": 2 * part * held,
            "collective-permute": group.share * held,
            "collective-broadcast": held,
        }.get(kind, part * held)
        key = (kind, group.axes)
        costs.collectives[key] = costs.collectives.get(key, Traffic()).plus(Traffic(sent, 1, sent if beside else 0.0))

    def _traffic(self, computation: Computation, i: Instruction) -> float:
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0.0
        if i.opcode == "copy-start":
            return float(sum(shape.bytes for shape in i.shapes[:2] if not shape.is_on_chip))
        reads = [_in_memory(computation[name]) for name in i.operands]
        writes = float(_in_memory(i))
        if i.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * writes
        if i.opcode == "dynamic-update-slice":
            return 2.0 * reads[1]
        if i.opcode == "fusion":
            inner = self.module[i.called[0]]
            for number, parameter in inner.parameters.items():
                part = _part_read(inner, parameter)
                if part is not None and reads[number]:
                    reads[number] = part
            written = _part_written(inner)
            writes = min(writes, written) if written is not None else writes
        elif i.opcode.removesuffix("-start") in COLLECTIVES:
            writes = sum(reads)
        return sum(reads) + writes


def _is_beside(i: Instruction) -> bool:
    """Whether other work goes on while a collective runs."""
    is_split = i.opcode.endswith("-start") or "async_collective" in i.attributes
    return is_split and '"is_sync":true' not in i.attributes


def _in_memory(i: Instruction) -> float:
    return float(sum(shape.bytes for shape in i.shapes if not shape.is_on_chip))


def _part_read(computation: Computation, parameter: Instruction) -> float | None:
    """Bytes read of a fusion's input when all its users only slice it or update it in place; else None."""
    total = 0.0
    for user in computation:
        if parameter.name in user.operands:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
                return None
    return total


def _part_written(computation: Computation) -> float | None:
    """Bytes written by a fusion that updates an array in place; None when it does not."""
    root = computation.root
    while root.opcode in ("bitcast", "convert", "copy"):
        root = computation[root.operands[0]]
    return float(computation[root.operands[1]].bytes) if root.opcode == "dynamic-update-slice" else None
