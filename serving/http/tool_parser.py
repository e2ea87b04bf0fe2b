"""Finds tool calls in a text while it grows: what the parsers of all formats share.

What a parser gives out, put together, is the text outside of calls, and of each call its name and its arguments. What
only begins like a call is given back as text. How a text is cut into pieces changes nothing of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CallPiece:
    """A call begins (`name`, and `id` where the model gave it one), or its arguments, which are JSON, go on."""

    index: int
    name: str | None
    arguments: str
    id: str | None = None


Piece = str | CallPiece
State = Callable[[list[Piece], bool], None]


class ToolParser:
    """The calls of one answer. `feed` text as it comes, then `finish`. `count`: calls found so far.

    A subclass has `_opening`, the state behind what announces a call. States take what they can from `_left`, and may
    hand over to another by `_where`.

    Args:
        begin: what announces calls. Each may stand anywhere in the text.
    """

    def __init__(self, begin: tuple[str, ...]) -> None:
        self._begins = begin
        self.count = 0
        self._left = ""  # not yet given out, or part of something that is not yet clear
        self._said_any = False
        self._where: State = self._content
        self._marker = ""  # what announced the call that is awaited
        self._scan = Scan()
        self._ends: tuple[str, ...] = ()

    def feed(self, text: str) -> list[Piece]:
        self._left += text
        return self._go_on(False)

    def finish(self) -> list[Piece]:
        """What is left when the answer ends."""
        return self._go_on(True)

    def _go_on(self, ended: bool) -> list[Piece]:
        out: list[Piece] = []
        while True:
            before = (self._left, self._where)
            self._where(out, ended)
            if (self._left, self._where) == before:
                return out

    # -- states -------------------------------------------------------------------------------------------------------

    def _content(self, out: list[Piece], ended: bool) -> None:
        text = self._left
        found = [(at, marker) for marker in self._begins if (at := text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            end, content = at + len(marker), text[:at].rstrip()
            self._say(out, content)
            self._left, self._marker, self._where = text[end:], text[len(content) : end], self._opening
            return
        # Held back: what may be the beginning of a marker, and space, which is dropped before a call and after it.
        held = 0 if ended else max(overlap(text, marker) for marker in self._begins)
        kept = text[: len(text) - held]
        settled = kept if ended and not self.count else kept.rstrip()
        if settled:
            self._say(out, settled)
            self._left = text[len(settled) :]
        elif ended:
            self._left = ""

    def _opening(self, out: list[Piece], ended: bool) -> None:
        raise NotImplementedError

    def _arguments(self, out: list[Piece], ended: bool) -> None:
        """JSON as it comes, from its "{" on; `_closing` follows."""
        if not self._left:
            return
        end = self._scan.end(self._left)
        taken = self._left if end < 0 else self._left[:end]
        out.append(CallPiece(self.count - 1, None, taken))
        self._left = self._left[len(taken) :]
        if end >= 0:
            self._where = self._closing

    def _closing(self, out: list[Piece], ended: bool) -> None:
        """Behind the arguments: `_ends`, in this order, of which each may be missing."""
        text = self._left.lstrip()
        for at, mark in enumerate(self._ends):
            if text.startswith(mark):
                self._left, self._ends = text[len(mark) :], self._ends[at + 1 :]
                return
            if mark.startswith(text):
                self._left = "" if ended else self._left
                return
        self._where = self._content

    def _give_up(self, out: list[Piece], ended: bool) -> None:
        """It was no call: the marker is text, and what follows it."""
        self._say(out, self._marker)
        self._said_any, self._where = True, self._content

    # -- what states do -----------------------------------------------------------------------------------------------

    def _begin(self, out: list[Piece], name: str, given_id: str | None = None) -> None:
        out.append(CallPiece(self.count, name, "", given_id))
        self.count += 1

    def _say(self, out: list[Piece], text: str) -> None:
        if text:
            self._said_any = True
            out.append(text)


class Scan:
    """Follows the brackets of JSON through pieces of text."""

    _STEPS = re.compile(r'["\\{}\[\]]')

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str) -> int:
        """Where the value ends within `text`; -1 where it goes on behind it."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = self._STEPS.search(text, at)
            if found is None:
                return -1
            character, at = found[0], found.end()
            if self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return -1


def overlap(text: str, marker: str) -> int:
    """The most characters at the end of `text` that begin `marker` (less than all of it)."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
