"""Works out the small integers of an HLO program: counters, bounds and offsets, and so how often a loop runs.

A compiler's text says of a loop only "while this condition holds". The trip counts that matter are functions of
constants and of enclosing loops' counters (a causal attention's inner loop runs longer for later rows), so they are
found by running the few integer instructions that the condition depends on. What depends on data is None: unknown.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .hlo import Computation, Instruction, Module

LARGEST = 1 << 16  # elements of an array that is still followed
MOST_TURNS = 1 << 20  # of one loop without a closed form
_HOLDERS = ("tuple", "while", "copy-start", "fusion", "call", "opt-barrier", "get-tuple-element")
INTEGERS = ("pred", "s4", "u4", "s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")

Value = Any  # np.ndarray, a _Tuple, or None when unknown


class _Tuple:
    """A tuple whose items are worked out when asked for."""

    def __init__(self, item: Callable[[int], Value]):
        self.item = item


class Frame:
    """One run of a computation with given arguments, each a Value."""

    def __init__(self, module: Module, computation: Computation, arguments: list[Value]):
        self.module, self.computation, self._arguments = module, computation, arguments
        self._known: dict[str, Value] = {}

    def get(self, name: str) -> Value:
        """The value of an instruction; None if it is not a small integer array or depends on data."""
        if name not in self._known:
            self._known[name] = self._evaluate(self.computation[name])
        return self._known[name]

    def root(self) -> Value:
        return self.get(self.computation.root.name)

    def call(self, computation: str, arguments: list[Value]) -> "Frame":
        return Frame(self.module, self.module[computation], arguments)

    def _evaluate(self, i: Instruction) -> Value:
        if i.opcode == "parameter":
            number = int(i.inside)
            return self._arguments[number] if number < len(self._arguments) else None
        if i.opcode == "tuple":
            return _Tuple(lambda index: self.get(i.operands[index]))
        if i.opcode == "get-tuple-element":
            whole = self.get(i.operands[0])
            return whole.item(int(i.attribute("index") or 0)) if isinstance(whole, _Tuple) else None
        if i.opcode == "while":
            return loop_result(self, i)
        if i.opcode in ("fusion", "call"):
            return self.call(i.called[0], [self.get(name) for name in i.operands]).root()
        if i.opcode == "copy-start":
            return _Tuple(lambda index: self.get(i.operands[0]) if index < 2 else None)
        if i.opcode == "copy-done":
            started = self.get(i.operands[0])
            return started.item(0) if isinstance(started, _Tuple) else None
        if i.opcode == "opt-barrier":
            return self.get(i.operands[0])
        if not _is_followed(i):
            return None
        if i.opcode == "custom-call":
            return np.zeros(i.shape.dims, np.int64) if 'custom_call_target="AllocateBuffer"' in i.attributes else None
        if i.opcode in ("partition-id", "replica-id"):
            return np.array(0)  # the first device stands for all
        if i.opcode not in _OPERATIONS:
            return None
        values = [self.get(name) for name in i.operands]
        if any(value is None or isinstance(value, _Tuple) for value in values):
            return None
        result = _OPERATIONS[i.opcode](i, *values)
        return None if result is None else np.asarray(result).reshape(i.shape.dims)


def _is_followed(i: Instruction) -> bool:
    return len(i.shapes) == 1 and i.shape.dtype in INTEGERS and i.shape.elements <= LARGEST


# -- loops ------------------------------------------------------------------------------------------------------------


class Loop:
    """A `while` as it is about to run: what its turns see of the carried tuple."""

    def __init__(self, frame: Frame, instruction: Instruction):
        self.frame = frame
        self.condition, self.body = (frame.module[str(instruction.attribute(name))] for name in ("condition", "body"))
        self._stuck = False
        self._start = frame.get(instruction.operands[0])
        self._known_turns = re.search(r'known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)', instruction.attributes)

    def turns(self) -> int | None:
        """How often the body runs; None when that depends on data."""
        if self._known_turns:
            return int(self._known_turns[1])
        wanted = self.reads(self.condition, [self.condition.root.name])
        closed = self._closed_form(wanted)
        if closed is not None:
            return closed
        count = 0
        for _ in self.states(wanted):
            count += 1
            if count > MOST_TURNS:
                return None
        return None if self._stuck else count

    def states(self, wanted: set[int]):
        """The items `wanted` (and what they depend on) as each turn finds them, as {index: value}."""
        wanted = self.closure(wanted | self.reads(self.condition, [self.condition.root.name]))
        state = {index: self._start.item(index) if isinstance(self._start, _Tuple) else None for index in wanted}
        self._stuck = False
        turns = int(self._known_turns[1]) if self._known_turns else None
        done = 0
        while turns is None or done < turns:
            if turns is None:
                goes_on = self._run(self.condition, state).root()
                if goes_on is None:
                    self._stuck = True
                    return
                if not goes_on:
                    return
            yield state
            after = self._run(self.body, state)
            outputs = self.body.root.operands
            state = {index: after.get(outputs[index]) for index in wanted}
            done += 1

    def item_after(self, index: int) -> Value:
        """An item of the tuple when the loop has ended."""
        found = list(self.states({index}))
        if self._stuck:
            return None
        if not found:
            return self._start.item(index) if isinstance(self._start, _Tuple) else None
        return self._run(self.body, found[-1]).get(self.body.root.operands[index])

    def at(self, state: dict[int, Value]) -> Frame:
        """The body's run in a turn that finds `state`."""
        return self._run(self.body, state)

    def is_fixed(self, index: int) -> bool:
        """Whether the body passes the item on as it got it."""
        name = self.body.root.operands[index]
        return _carried_index(self.body, name) == index

    def reads(self, computation: Computation, names: list[str]) -> set[int]:
        """The carried items that the integers `names` of the loop's condition or body depend on."""
        found, seen, queue = set(), set(), list(names)
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            i = computation[name]
            index = _carried_index(computation, name)
            if index is not None:
                found.add(index)
            elif i.opcode in _HOLDERS or _is_followed(i):
                queue += i.operands
        return found

    def closure(self, wanted: set[int]) -> set[int]:
        """`wanted` and all carried items that their next values depend on."""
        found, queue = set(), list(wanted)
        while queue:
            index = queue.pop()
            if index not in found:
                found.add(index)
                queue += self.reads(self.body, [self.body.root.operands[index]])
        return found

    def _run(self, computation: Computation, state: dict[int, Value]) -> Frame:
        return Frame(self.frame.module, computation, [_Tuple(state.get)])

    def _closed_form(self, wanted: set[int]) -> int | None:
        """The turns of `for (i = start; i < limit; i += step)`, the usual case."""
        root = self.condition.root
        if root.opcode != "compare" or root.attribute("direction") != "LT" or not isinstance(self._start, _Tuple):
            return None
        moving = [index for index in wanted if not self.is_fixed(index)]
        if len(moving) != 1 or _carried_index(self.condition, root.operands[0]) != moving[0]:
            return None
        if moving[0] in self.reads(self.condition, [root.operands[1]]):
            return None
        update = self.body[self.body.root.operands[moving[0]]]
        if update.opcode != "add" or len(update.operands) != 2:
            return None
        others = [name for name in update.operands if _carried_index(self.body, name) != moving[0]]
        if len(others) != 1 or any(not self.is_fixed(index) for index in self.reads(self.body, others)):
            return None
        needed = wanted | self.reads(self.body, others)
        state = {index: self._start.item(index) for index in needed}
        start, limit = state[moving[0]], self._run(self.condition, state).get(root.operands[1])
        step = self._run(self.body, state).get(others[0])
        if any(not isinstance(value, np.ndarray) for value in (start, limit, step)) or int(step) < 1:
            return None
        return max(0, -((int(start) - int(limit)) // int(step)))


def loop_result(frame: Frame, instruction: Instruction) -> _Tuple:
    loop, known = Loop(frame, instruction), {}

    def item(index: int) -> Value:
        if index not in known:
            known[index] = loop.item_after(index)
        return known[index]

    return _Tuple(item)


def _carried_index(computation: Computation, name: str) -> int | None:
    """Which item of the carried tuple an instruction is, if it is one as it came (or a copy of one)."""
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "copy-done", "opt-barrier") and len(i.shapes) == 1 and i.operands:
        i = computation[i.operands[0]]
        if i.opcode == "copy-start":
            i = computation[i.operands[0]]
    if i.opcode == "get-tuple-element" and computation[i.operands[0]].opcode == "parameter":
        return int(i.attribute("index") or 0)
    return None


# -- operations -------------------------------------------------------------------------------------------------------

_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _constant(i: Instruction) -> Value:
    if "..." in i.inside:
        return None
    words = re.findall(r"true|false|-?\d+", i.inside)
    values = [{"true": 1, "false": 0}[word] if word in ("true", "false") else int(word) for word in words]
    return np.array(values, np.int64) if len(values) == i.shape.elements else None


def _quotient(_: Instruction, a: np.ndarray, b: np.ndarray) -> Value:
    if np.any(b == 0):
        return None
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b))  # towards zero


def _remainder(i: Instruction, a: np.ndarray, b: np.ndarray) -> Value:
    quotient = _quotient(i, a, b)
    return None if quotient is None else a - quotient * b


def _broadcast(i: Instruction, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(i.shape.dims)
    for axis, size in zip(i.integers("dimensions"), x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), i.shape.dims)


def _starts(x: np.ndarray, sizes: tuple[int, ...], starts: tuple[np.ndarray, ...]) -> tuple[slice, ...]:
    places = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, x.shape, sizes, strict=True)]
    return tuple(slice(place, place + size) for place, size in zip(places, sizes, strict=True))


def _update(_: Instruction, x: np.ndarray, update: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[_starts(x, update.shape, starts)] = update
    return x


def _slice(i: Instruction, x: np.ndarray) -> np.ndarray:
    cuts = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", i.braces("slice") or "")
    return x[tuple(slice(int(low), int(high), int(step or 1)) for low, high, step in cuts)]


def _shifted(how: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, a, b: np.where((b >= 0) & (b < 32), how(a, np.clip(b, 0, 31)), 0)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "constant": _constant,
    "iota": lambda i: np.broadcast_to(
        np.arange(i.shape.dims[int(i.attribute("iota_dimension") or 0)]).reshape(
            [-1 if axis == int(i.attribute("iota_dimension") or 0) else 1 for axis in range(len(i.shape.dims))]
        ),
        i.shape.dims,
    ),
    "add": lambda _, a, b: a + b,
    "subtract": lambda _, a, b: a - b,
    "multiply": lambda _, a, b: a * b,
    "divide": _quotient,
    "remainder": _remainder,
    "minimum": lambda _, a, b: np.minimum(a, b),
    "maximum": lambda _, a, b: np.maximum(a, b),
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "not": lambda i, a: 1 - a if i.shape.dtype == "pred" else ~a,
    "negate": lambda _, a: -a,
    "abs": lambda _, a: abs(a),
    "sign": lambda _, a: np.sign(a),
    "shift-left": _shifted(np.left_shift),
    "shift-right-logical": _shifted(np.right_shift),
    "shift-right-arithmetic": _shifted(np.right_shift),
    "compare": lambda i, a, b: _COMPARE[i.attribute("direction") or "EQ"](a, b).astype(np.int64),
    "select": lambda _, p, a, b: np.where(p != 0, a, b),
    "clamp": lambda _, low, x, high: np.clip(x, low, high),
    "convert": lambda _, a: a,
    "copy": lambda _, a: a,
    "bitcast": lambda _, a: a,
    "reshape": lambda _, a: a,
    "transpose": lambda i, a: a.transpose(i.integers("dimensions")),
    "broadcast": _broadcast,
    "slice": _slice,
    "dynamic-slice": lambda i, x, *starts: x[_starts(x, i.integers("dynamic_slice_sizes"), starts)],
    "dynamic-update-slice": _update,
    "concatenate": lambda i, *xs: np.concatenate(xs, axis=i.integers("dimensions")[0]),
}
