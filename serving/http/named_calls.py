"""Calls that are a name and then JSON, which is the arguments alone: `[TOOL_CALLS]f[ARGS]{...}`."""

from __future__ import annotations

import re

from .tool_parser import Piece, Scan, ToolParser

NAME = r"(?P<name>[^\s<>\[\]{}\"`]{1,128})"  # of a function, in a pattern
_LONGEST_HEAD = 512  # characters before the arguments


class NamedCalls(ToolParser):
    """Gives out the very characters of the arguments.

    Args:
        begin: what announces a call, or several, in which case `opens` announces each of them.
        head: what stands between that and the "{" of the arguments; its groups are `name` and perhaps `id`.
        opens: "" where `begin` announces each call.
        ends: what follows a call and all calls, in this order; each may be missing.
    """

    def __init__(self, begin: str, head: re.Pattern[str], opens: str = "", ends: tuple[str, ...] = ()) -> None:
        super().__init__((begin,))
        self._head, self._opens, self._all_ends = head, opens, ends

    def _opening(self, out: list[Piece], ended: bool) -> None:
        text = self._left.lstrip()
        if text.startswith(self._opens):  # also where that is ""
            end = len(self._left) - len(text) + len(self._opens)
            self._left, self._marker = self._left[end:], self._marker + self._left[:end]
            self._where = self._name
        elif ended or not self._opens.startswith(text):
            self._where = self._give_up

    def _name(self, out: list[Piece], ended: bool) -> None:
        at = self._left.find("{", 0, _LONGEST_HEAD)
        head = self._head.fullmatch(self._left, 0, at) if at >= 0 else None
        if head is not None:
            found = head.groupdict()
            self._begin(out, found["name"], found.get("id"))
            self._left, self._scan, self._ends = self._left[at:], Scan(), self._all_ends
            self._where = self._arguments
        elif at >= 0 or ended or len(self._left) >= _LONGEST_HEAD:
            self._where = self._give_up

    def _closing(self, out: list[Piece], ended: bool) -> None:
        text = self._left.lstrip()
        if not (self._opens and self._ends):
            super()._closing(out, ended)
        elif text.startswith(self._opens):
            self._left, self._marker, self._where = text[len(self._opens) :], self._opens, self._name
        elif ended or not self._opens.startswith(text):
            super()._closing(out, ended)
