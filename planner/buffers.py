"""Where a compiled program's memory goes, read from the compiler's own buffer assignment.

XLA writes it when asked (`xla_dump_to`), also for a program that it then refuses because it does not fit. The bytes of
arguments and the size of the heap are the compiler's. Which of the heap's buffers are gradients, kept activations or
weights is decided here, for the buffers alive at its fullest moment, by their place in the JAX program and their shape.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from .hlo import Instruction, Module, Shape

# In the order in which reports list them.
CLASSES = (
    "parameters", "optimizer", "cache", "inputs", "gradients", "activations", "weights", "temporaries", "unused",
)  # fmt: skip
MEANINGS = {
    "parameters": "as they rest",
    "optimizer": "moments",
    "cache": "pages of keys and values",
    "inputs": "the batch, and what is kept for each slot",
    "gradients": "whole or cut",
    "activations": "kept from the forward for the backward pass",
    "weights": "copies: cast, or gathered to compute with",
    "temporaries": "everything else",
    "unused": "gaps between buffers",
}
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*):$", re.MULTILINE)
_LIVE = re.compile(r"^    (.+?)\{([\d,]*)\}: (\d+) bytes", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Names:
    """How arguments are told apart, and shapes that weights have.

    Attributes:
        arguments: class of an argument by the beginning of its path, such as {"state['params']": "parameters"}.
        weights: dimensions of parameters, whole or as they rest, sorted, without ones and the layers' axis.
        layers: blocks in a stack.
    """

    arguments: Mapping[str, str]
    weights: Collection[tuple[int, ...]]
    layers: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device: in all, and by class (of CLASSES)."""

    total: float
    by_class: dict[str, float]


def read_memory(folder: Path, names: Names) -> tuple[Memory, Module]:
    """What a dump says, and the module that it is about. ValueError when the dump is incomplete."""
    module = Module.parse(_newest(folder, "after_optimizations.txt"))
    assignment = _newest(folder, "after_optimizations-buffer-assignment.txt")
    parameters = {number: _argument_class(i, names) for number, i in module.entry.parameters.items()}
    by_class: dict[str, float] = {name: 0.0 for name in CLASSES}
    heap = 0.0
    for size, kind in _ALLOCATION.findall(assignment):
        if "color" in kind or "thread-local" in kind:  # on-chip memory, and what reductions keep in registers
            continue
        argument = re.search(r"parameter (\d+)", kind)
        if argument:
            by_class[parameters[int(argument[1])]] += float(size)
        elif "preallocated-temp" in kind:
            heap += float(size)
        else:
            by_class["temporaries"] += float(size)
    live = _heap_classes(_newest(folder, "after_optimizations-live-range.txt"), module, names)
    # What is alive at once can't be more than the heap; the report counts some values that share a buffer.
    share = min(1.0, heap / max(sum(live.values()), 1.0))
    for name, size in live.items():
        by_class[name] += share * size
    by_class["unused"] += heap - share * sum(live.values())
    return Memory(sum(by_class.values()), by_class), module


def _newest(folder: Path, ending: str) -> str:
    found = sorted(folder.glob(f"*{ending}"))
    if not found:
        raise ValueError(f"The compiler left no *{ending} in {folder}; its version may write other files.")
    return found[-1].read_text()


def _argument_class(parameter: Instruction, names: Names) -> str:
    path = parameter.op_name.replace("\\'", "'")
    return next((kind for start, kind in names.arguments.items() if path.startswith(start)), "inputs")


def _heap_classes(report: str, module: Module, names: Names) -> dict[str, float]:
    """Bytes by class of the values on the heap that are alive at the fullest moment."""
    at = re.search(r"Live ranges at (\d+) \(peak\):", report)
    if at is None:
        return {}
    order = re.search(rf"^    {at[1]}:(\S+)$", report, re.MULTILINE)
    instructions = {i.name: i for computation in module.computations.values() for i in computation}
    carriers = _carriers(module)
    now = instructions.get(order[1]) if order else None
    after_forward = now is not None and not _is_forward(now.op_name)
    parts = report[at.end() :].split("Stack trace breakdown")[0]
    totals: dict[str, float] = {}
    for name, index, size in _LIVE.findall(parts):
        i = carriers.get(name) or instructions.get(name)
        if i is None or i.opcode in ("parameter", "constant"):
            continue
        if name in instructions and instructions[name].opcode == "parameter" and name not in carriers:
            continue
        kind = _value_class(i, _leaf(i, index), names, after_forward)
        totals[kind] = totals.get(kind, 0.0) + float(size)
    return totals


def _carriers(module: Module) -> dict[str, Instruction]:
    """The parameter of each loop's body and condition, by name, as the loop itself: they share its buffers."""
    found = {}
    for computation in module.computations.values():
        for i in computation:
            if i.opcode == "while":
                for name in i.called:
                    found |= {parameter.name: i for parameter in module[name].parameters.values()}
    return found


def _leaf(i: Instruction, index: str) -> Shape | None:
    place = int(index) if index.isdecimal() else 0
    return i.shapes[place] if place < len(i.shapes) else None


def _is_forward(op_name: str) -> bool:
    return "jvp(" in op_name and "transpose(" not in op_name


def _value_class(i: Instruction, shape: Shape | None, names: Names, after_forward: bool) -> str:
    """Which of CLASSES a value on the heap is."""
    if shape is None:
        return "temporaries"
    dims = [size for size in shape.dims if size != 1]
    stacked = dims[:1] == [names.layers]
    looks_like_weight = tuple(sorted(dims[1:] if stacked else dims)) in names.weights or (
        tuple(sorted(dims)) in names.weights
    )
    backward = "transpose(" in i.op_name and "rematted_computation" not in i.op_name
    if looks_like_weight and len(dims) > 1:
        # The backward pass gathers weights too, in the dtype of the products; gradients are kept in float32.
        gathered = "sharding_constraint" in i.op_name or i.opcode == "all-gather"
        return "gradients" if (backward and not gathered) or shape.dtype == "f32" else "weights"
    if _is_forward(i.op_name) and (after_forward or stacked):
        return "activations"
    if stacked and len(dims) > 2 and i.opcode == "while":
        return "activations"
    return "temporaries"
