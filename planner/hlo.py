"""Reads the text of an optimized HLO module: computations, instructions, shapes.

Only what the planner asks about is understood: names, types, opcodes, operands; attributes are read on demand.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

ITEM_BITS = {
    "pred": 8, "token": 0, "opaque": 0, "s1": 1, "u1": 1, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4,
    "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,<=?]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type, sizes and layout text."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = ITEM_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
        return -(-self.elements * bits // 8)

    @property
    def is_on_chip(self) -> bool:
        """Whether it lies in a TPU's on-chip memory and not in HBM."""
        return re.search(r"S\([1-9]\d*\)", self.layout) is not None


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line. `shapes` are the leaves of its type, one for an array, several for a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str
    is_root: bool = False

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations it runs: of a fusion, call, reduction, loop (condition and body) or conditional."""
        found = _CALLED.findall(self.attributes)
        for names, name in _BRANCHES.findall(self.attributes):
            found += [part.strip().lstrip("%") for part in names.split(",")] if names else [name]
        return tuple(found)

    def attribute(self, name: str) -> str | None:
        """The value of a plain attribute such as `index=3` or `direction=LT`."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def braces(self, name: str) -> str | None:
        """The text within an attribute's outer braces, as in `dimensions={0,1}`."""
        start = self.attributes.find(f"{name}={{")
        return None if start < 0 else _balanced(self.attributes, start + len(name) + 1, "{", "}")[1:-1]

    def integers(self, name: str) -> tuple[int, ...]:
        text = self.braces(name)
        return tuple(int(n) for n in re.findall(r"-?\d+", text)) if text else ()

    @cached_property
    def op_name(self) -> str:
        """Where in the JAX program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(eq=False)
class Computation:
    """A function of the module: its instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self if i.is_root), next(reversed(self.instructions.values())))

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.inside): i for i in self if i.opcode == "parameter"}


@dataclasses.dataclass(eq=False)
class Module:
    """A whole program; `entry` is where it starts."""

    computations: dict[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Reads `compiled.as_text()` or a dump of it. ValueError without an ENTRY computation."""
        computations: dict[str, Computation] = {}
        entry = current = None
        for line in _whole_lines(text):
            if line.startswith(" "):
                if current is not None and " = " in line:
                    instruction = _instruction(line)
                    current.instructions[instruction.name] = instruction
                continue
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2], {})
                entry = current if header[1] else entry
            elif line == "}":
                current = None
        if entry is None:
            raise ValueError("This text is not an HLO module: it has no ENTRY computation.")
        return cls(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """The text's lines; an instruction's attributes may go on over several, as a kernel's metadata do."""
    pending = ""
    for line in text.splitlines():
        if pending.startswith(" ") and not line.startswith(" ") and line.strip() != "}" and not _HEADER.match(line):
            pending += line
            continue
        if pending:
            yield pending
        pending = line.rstrip()
    yield pending


def leaf_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type's text, in order."""
    return tuple(
        Shape(dtype, tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    right = right.lstrip()
    type_text = _balanced(right, 0, "(", ")") if right.startswith("(") else right[: right.index(" ")]
    rest = right[len(type_text) :].lstrip()
    opcode, _, _ = rest.partition("(")
    inside = _balanced(rest, len(opcode), "(", ")")
    attributes = rest[len(opcode) + len(inside) :]
    inside = _COMMENT.sub("", inside[1:-1])
    operands = () if opcode in ("parameter", "constant") else tuple(_OPERAND.findall(inside))
    if not operands and opcode not in ("parameter", "constant", "iota", "partition-id", "replica-id", "tuple"):
        operands = tuple(part.split()[-1] for part in inside.split(",") if part.strip())  # printed without %
    return Instruction(name, opcode, leaf_shapes(type_text), operands, inside, attributes, is_root)


def _balanced(text: str, start: int, opening: str, closing: str) -> str:
    """From the bracket at `start` to the one that closes it."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == opening:
            depth += 1
        elif text[at] == closing:
            depth -= 1
            if depth == 0:
                return text[start : at + 1]
    return text[start:]
