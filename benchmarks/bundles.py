"""A clock from the program itself: runs the scalar half of what libtpu compiled, and counts bundles as they come.

A TPU's core issues a bundle a cycle and has no branch prediction, cache or reordering: the compiler leaves a bundle
empty where a result is not there yet. Its last dump before it takes the empty ones out (`packed-bundles-post-ra`) says
for every bundle what scalar instructions do and where branches go. So the time of a kernel is the number of bundles on
the path that its scalar instructions take, and these are simulated here: registers, predicates, scalar memory and
branches, with the values of prefetched tables (lengths, pages) given. Nothing is declared or guessed: an instruction
that decides a branch and is not known, or a value that is not there, is a `Lost`.

What it does not see: waiting for a copy (so a time is never less than the bytes over the bandwidth), fetching
instructions, and whatever units do to one another beyond what the compiler planned. Where libtpu's profiler works, it
was seen to say 0.4 to 1.5% less for each further head of an attention kernel, and 500 to 2,900 cycles more for a whole
program, whose first copies nothing hides.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

DELAYS = {"tpu7x": 6}  # bundles after a branch that run before it is taken; else 4
ALLOCATION = 1 << 20  # how far apart allocations lie
MOST = 100_000_000  # blocks that may run

_COMMENT = re.compile(r"/\*|\*/")
_END = re.compile(r"End (?:empty )?region")
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +[A-Z]* *: *[> ]*\{(.*)\} *(@*)$")
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, %(\w+))?\)")
_INSTRUCTION = re.compile(r"%(\w+) = ([a-z_]+[a-z0-9_.]*(?:<[a-z ]+>)?)(.*)$")
_TARGET = re.compile(r"target bundleno = (\d+)")
_ADDRESS = re.compile(r"\[smem:\[(.*?)\]\]")
_OPERAND = re.compile(r"index: (\d+), kind: input")
_COMPARE = re.compile(r"scmp\.(\w\w)\.([su])32")


class Lost(Exception):
    """The program cannot be followed; says where and why."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name` = `op` `rest`. predicate: (register, whether it must be false, the register that is kept otherwise)."""

    name: str
    op: str
    rest: str
    predicate: tuple[str, bool, str | None] | None

    @property
    def reads(self) -> list[str]:
        named = re.findall(r"%(\w+)", self.rest)
        return named if self.predicate is None else [*named, self.predicate[0], *filter(None, self.predicate[2:])]


def parse(dump: str) -> tuple[list[list[Instruction]], set[int]]:
    """The bundles of a dump, each with its scalar instructions; and which end a region of the compiler's."""
    bundles: list[list[Instruction]] = []
    ends: set[int] = set()
    for line in _without_comments(dump).splitlines():
        found = _BUNDLE.match(line)
        if not found:
            if ":" in line and "{" in line:
                raise Lost(f"no bundle: {line[:200]}")
            continue
        if int(found[1], 16) != len(bundles):
            raise Lost(f"bundle {found[1]} follows {len(bundles)} others")
        if found[3]:
            ends.add(len(bundles))
        bundles.append([one for text in found[2].split(";;") if (one := _instruction(text.strip()))])
    return bundles, ends


def _without_comments(dump: str) -> str:
    """They nest, go over several lines and hold braces. Of one that says that a region ends, `@` is left."""
    kept, depth, begin, outer = [], 0, 0, 0
    for mark in _COMMENT.finditer(dump):
        if mark[0] == "/*":
            if not depth:
                kept.append(dump[begin : mark.start()])
                outer = mark.end()
            depth += 1
        elif depth:
            depth, begin = depth - 1, mark.end()
            if not depth and _END.search(dump, outer, mark.start()):
                kept.append("@")
    return "".join([*kept, dump[begin:]])


def _instruction(text: str) -> Instruction | None:
    found = _INSTRUCTION.match(text)
    if not found or found[2].startswith("v"):
        return None
    predicate, rest = None, found[3]
    if said := _PREDICATE.search(rest):
        predicate = said[2], bool(said[1]), said[3]
        rest = rest.replace(said[0], " ", 1)
    rest = rest.strip().removeprefix(",").strip()
    return Instruction(found[1], found[2], rest, predicate)


def _wrap(x: int) -> int:
    return (x + 0x80000000 & 0xFFFFFFFF) - 0x80000000


BINARY = {
    "sadd.s32": "wrap({} + {})",
    "ssub.s32": "wrap({} - {})",
    "smul.u32": "wrap({} * {})",
    "smul.s32": "wrap({} * {})",
    "smulhi.u32": "wrap(({} & M) * ({} & M) >> 32)",
    "sshll.u32": "wrap({} << {})",
    "sshra.s32": "({} >> {})",
    "sshrl.u32": "wrap(({} & M) >> {})",
    "sand.u32": "({} & {})",
    "sor.u32": "({} | {})",
    "sxor.u32": "({} ^ {})",
    "smin.u32": "wrap(min({} & M, {} & M))",
    "smax.u32": "wrap(max({} & M, {} & M))",
    "smin.s32": "min({}, {})",
    "smax.s32": "max({}, {})",
    "por": "({} or {})",
    "pand": "({} and {})",
    "pnand": "(not ({} and {}))",
    "pnor": "(not ({} or {}))",
    "pxor": "({} != {})",
}
COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class Program:
    """The parsed bundles of one operation; `cycles` runs it."""

    def __init__(self, dump: str, chip: str):
        self.bundles, ends = parse(dump)
        self.delay = DELAYS.get(chip, 4)
        self.branches = {
            place: one for place, bundle in enumerate(self.bundles) for one in bundle if one.op.startswith("sbr")
        }
        strange = {one.op for bundle in self.bundles for one in bundle if one.op.startswith("sb") or one.op == "call"}
        if strange - {"sbr.rel"}:
            raise Lost(f"branches of another kind: {strange}")
        if not {place + self.delay for place in self.branches} <= ends:
            raise Lost(f"branches that are not taken after {self.delay} bundles")
        self.targets = {place: self._target(one) for place, one in self.branches.items()}
        self.watched: set[str] = set()
        self.vague: set[str] = set()
        self.vague = self._vague()
        self.needed = self._slice()
        self.merged = {name for name, one in self.needed.items() if one.op == "sphi"}
        self.watched = {read for name in self.merged for read in self.needed[name].reads}
        self.leaders = sorted({0, *self.targets.values(), *(place + self.delay + 1 for place in self.branches)})

    def _target(self, branch: Instruction) -> int:
        if not (found := _TARGET.search(branch.rest)):
            raise Lost(f"a branch to {branch.rest[:80]}")
        return int(found[1])

    def _slice(self) -> dict[str, Instruction]:
        """What decides branches, and all that is stored where something is loaded, as it may be loaded again."""
        defined = {one.name: one for bundle in self.bundles for one in bundle}
        todo = [branch.name for branch in self.branches.values()]
        stores = [name for name, one in defined.items() if one.op == "sst" or one.op.endswith("_to_smem")]
        needed: dict[str, Instruction] = {}
        while todo:
            name = todo.pop()
            if name in needed:
                continue
            one = needed[name] = defined[name]
            reads = _reads(one)
            if name in self.vague and one.op == "sst":
                reads = re.findall(r"%(\w+)", one.rest.partition("]] ")[0])
            if vague := [name for name in reads if name in self.vague or name not in defined]:
                raise Lost(f"{one.op} {one.rest[:80]} hangs on %{vague[0]}, which vectors decide or nobody knows")
            todo += reads
            if one.op == "sld":
                todo, stores = todo + stores, []
        return needed

    def _vague(self) -> set[str]:
        """What hangs on vectors, or on instructions that are not known; but for stores, which make their place so."""
        every = [one for bundle in self.bundles for one in bundle]
        defined = {one.name for one in every}
        vague: set[str] = set()
        before = -1
        while len(vague) != before:
            before = len(vague)
            for one in every:
                reads = _reads(one)
                if any(name in vague or name not in defined for name in reads) or not self._known(one):
                    vague.add(one.name)
        return vague

    def _known(self, one: Instruction) -> bool:
        try:
            return bool(one.op == "sbr.rel" or list(self._python(one)))
        except Lost:
            return False

    def cycles(self, operands: Mapping[int, Any] | None = None, core: int = 0) -> int:
        """How many bundles run. `operands`: the values of those that the scalar program reads, by their place."""
        machine = _Machine(operands or {})
        machine.memory[0] = core
        counted, at, blocks, runs = 0, 0, {}, 0
        while at < len(self.bundles):
            if at not in blocks:
                blocks[at] = self._block(at)
            length, run, after = blocks[at]
            counted, runs = counted + length, runs + 1
            if runs > MOST:
                raise Lost(f"{MOST} blocks ran and it goes on")
            try:
                at = after if run is None else run(machine.values, machine.times, machine.memory, machine)
            except KeyError as error:
                raise Lost(f"no value for {error} in the block at {at:#x}") from None
        return counted

    def _block(self, at: int) -> tuple[int, Callable[..., int] | None, int]:
        """The bundles from `at` to the next branch or place that one goes to: how many, and what they do."""
        last = next((place for place in range(at, len(self.bundles)) if place in self.branches), None)
        until = len(self.bundles) if last is None else last + self.delay + 1
        for place in range(at + 1, until):
            if last is not None and last < place < until and place in self.branches:
                raise Lost(f"a branch at {place:#x}, while another is under way")
            if place in self.leaders and (last is None or place <= last):
                until, last = place, None
                break
            if place in self.leaders:
                raise Lost(f"a branch goes to {place:#x}, where another is under way")
        lines = ["def run(V, T, memory, machine):"]
        for place in range(at, until):
            needed = [one for one in self.bundles[place] if one.name in self.needed and one.op != "sbr.rel"]
            for one in _in_order(needed):
                lines += [" " + line for line in self._python(one)]
        after = str(until)
        if last is not None:
            branch = self.branches[last]
            after = f"{self.targets[last]} if {_condition(branch)} else {until}"
        if len(lines) == 1 and last is None:
            return until - at, None, until
        lines.append(f" return {after}")
        space: dict[str, Any] = {"wrap": _wrap, "M": 0xFFFFFFFF, "Lost": Lost}
        exec("\n".join(lines), space)
        return until - at, space["run"], until

    def _python(self, one: Instruction) -> Iterator[str]:
        """The instruction as statements."""
        indent = ""
        if one.predicate and one.predicate[2] is None and one.name not in self.vague:
            yield f"if {_condition(one)}:"
            indent = " "
        if one.op == "sst":
            address, _, value = one.rest.partition("]] ")
            place = _address(address + "]]")
            if one.name in self.vague:
                yield f"memory.pop({place}, None)"
            else:
                yield f"{indent}memory[{place}] = {_value(value.lstrip(' ,'))}"
            return
        if one.op.endswith("_to_smem"):
            source, size, where = (part.strip() for part in one.rest.split(",")[:3])
            yield f"{indent}machine.copy({_value(source)}, {size}, {_value(where)})"
            return
        if one.op == "sphi":
            names = [f"'{name}'" for name in _reads(one)]
            value = f"V[max(({', '.join(names)},), key=lambda name: T.get(name, -1))]"
        else:
            value = self._expression(one)
            if one.predicate and one.predicate[2] is not None:
                value = f"{value} if {_condition(one)} else V['{one.predicate[2]}']"
        yield f"{indent}V['{one.name}'] = {value}"
        if one.name in self.watched:
            yield f"{indent}T['{one.name}'] = machine.tick()"

    def _expression(self, one: Instruction) -> str:
        op, given = one.op, [part.strip() for part in one.rest.split(",")]
        if op in BINARY and len(given) == 2:
            return BINARY[op].format(*map(_value, given))
        if op == "pneg":
            return f"(not {_value(given[0])})"
        if op.startswith(("smov", "pmov")):
            return _value(given[0])
        if op.startswith("int_to_ptr"):
            return _value(given[0].rpartition(" ")[2])
        if op.startswith("scalar_lea") and len(given) == 2:
            offset, _, more = given[1].partition(" ")  # a number and an allocation, or one of both
            return BINARY["sadd.s32"].format(_value(given[0]), " + ".join(map(_value, filter(None, (offset, more)))))
        if op == "scalar_select":
            return f"({_value(given[1])} if {_value(given[0])} else {_value(given[2])})"
        if found := _COMPARE.match(op):
            left, right = (_value(x) if found[2] == "s" else f"({_value(x)} & M)" for x in given)
            return f"({left} {COMPARE[found[1]]} {right})"
        if op == "sld":
            return f"memory[{_address(one.rest)}]"
        if op.startswith("inlined_call_operand"):
            if not (found := _OPERAND.search(one.rest)):
                return "0"  # a result
            return f"machine.operand({found[1]}, {'no memory' in op})"
        raise Lost(f"{op} {one.rest[:80]} decides a branch, and is not known")


def _reads(one: Instruction) -> list[str]:
    """`%` names that the instruction reads."""
    return [] if one.op.startswith("inlined_call_operand") else one.reads


def _in_order(bundle: list[Instruction]) -> list[Instruction]:
    """Merges first, all at once; then so that what a name of the same bundle stands for is there."""
    merges = [one for one in bundle if one.op == "sphi"]
    rest, done, order = [one for one in bundle if one.op != "sphi"], set(), merges
    waiting = {one.name for one in rest}
    while rest:
        ready = [one for one in rest if not (set(_reads(one)) & waiting - done)]
        if not ready:
            raise Lost(f"%{rest[0].name} needs itself")
        order = order + ready
        done |= {one.name for one in ready}
        rest = [one for one in rest if one.name not in done]
    return order


def _condition(one: Instruction) -> str:
    if one.predicate is None:
        return "True"
    name, false, _ = one.predicate
    return f"{'not ' if false else ''}V['{name}']"


def _value(text: str) -> str:
    """A register, a number, or the address of an allocation."""
    if found := re.fullmatch(r"%(\w+)", text):
        return f"V['{found[1]}']"
    if re.fullmatch(r"-?\d+", text):
        return str(_wrap(int(text)))
    if re.fullmatch(r"\[.*\]", text):
        return _sum(text[1:-1])
    raise Lost(f"what is {text[:80]}")


def _address(text: str) -> str:
    if not (found := _ADDRESS.search(text)):
        raise Lost(f"the address {text[:80]}")
    return _sum(found[1])


def _sum(text: str) -> str:
    parts = []
    for part in (part.strip() for part in text.split(" + ")):
        if found := re.fullmatch(r"#allocation(\d+)(?:_\w+)?", part):
            parts.append(str(int(found[1]) * ALLOCATION))
        elif found := re.fullmatch(r"\$0x([0-9a-f]+)", part):
            parts.append(str(int(found[1], 16)))
        else:
            parts.append(_value(part))
    return " + ".join(parts)


class _Machine:
    """Registers by their names in the dump, when those that merge were written, and scalar memory in words."""

    def __init__(self, operands: Mapping[int, Any]):
        self.operands = {place: np.asarray(value) for place, value in operands.items()}
        self.values: dict[str, Any] = {}
        self.times: dict[str, int] = {}
        self.memory: dict[int, int] = {}
        self.time = 0

    def tick(self) -> int:
        self.time += 1
        return self.time

    def operand(self, place: int, by_value: bool) -> int:
        if not by_value:
            return (place + 1) * 0x1000 + 1
        if place not in self.operands:
            raise Lost(f"operand {place} is data that was not given")
        return int(self.operands[place].reshape(()))

    def copy(self, source: int, granules: int, where: int) -> None:
        """An operand, given as its address in HBM or, shifted, in vector memory, into scalar memory, 32 bytes each."""
        source = source if source % 16 else source >> 4
        place = source // 0x1000 - 1
        if source % 0x1000 != 1 or place not in self.operands:
            raise Lost(f"operand {place} is data that was not given")
        table = self.operands[place]
        if table.ndim > 1:  # rows lie 128 words apart
            table = np.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, -table.shape[-1] % 128)])
        words = table.reshape(-1).tolist()
        if len(words) * 4 > granules * 32:
            raise Lost(f"{len(words)} words of operand {place} in {granules} granules")
        self.memory.update(enumerate(words, where))
