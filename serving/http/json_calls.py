"""Calls that are JSON as a whole, as in `{"name": "f", "arguments": {...}}`."""

from __future__ import annotations

import json
import re

from .tool_parser import CallPiece, Piece, Scan, ToolParser

_LONGEST_HEAD = 1024  # characters before the arguments


class JsonCalls(ToolParser):
    """Gives out the very characters of the arguments.

    Args:
        begin: what announces calls.
        at_start: whether calls may also begin unannounced, with "{" as the first character.
        end: what follows a call, or "".
        in_list: whether what is announced is a JSON list of calls.
        separator: what stands between calls that are not announced each, or "".
        arguments: the name of the arguments in a call's JSON; that of the function is "name".
    """

    def __init__(
        self,
        begin: tuple[str, ...],
        *,
        at_start: bool = False,
        end: str = "",
        in_list: bool = False,
        separator: str = "",
        arguments: str = "arguments",
    ) -> None:
        super().__init__(begin)
        self._at_start, self._in_list = at_start, in_list
        self._end, self._separator, self._key = end, separator, arguments
        self._rest, self._scanned = Scan(), 0
        name = r'"name"\s*:\s*("(?:[^"\\]|\\.)*")'
        self._head = re.compile(rf'\s*\{{\s*{name}\s*,\s*"{arguments}"\s*:\s*(?=\{{)')

    def _content(self, out: list[Piece], ended: bool) -> None:
        if self._at_start and not self._said_any and not self.count:
            text = self._left
            if text.lstrip().startswith("{"):
                self._marker, self._where = "", self._opening
                return
            if not text.strip() and not ended:
                return
        super()._content(out, ended)

    def _opening(self, out: list[Piece], ended: bool) -> None:
        """Behind a marker: the bracket of a list, or the call itself."""
        text = self._left.lstrip()
        if self._in_list and text.startswith("["):
            self._left, self._marker = text[1:], self._marker + self._left[: len(self._left) - len(text) + 1]
            self._expect_call()
        elif self._in_list and (text or ended):
            self._where = self._give_up
        elif text or ended:
            self._expect_call()

    def _expect_call(self) -> None:
        self._where, self._scan, self._scanned = self._call, Scan(), 0

    def _call(self, out: list[Piece], ended: bool) -> None:
        text = self._left
        head = self._head.match(text) if self._scanned < _LONGEST_HEAD else None
        name = None if head is None else _string(head[1])
        if head is not None and head.end() < _LONGEST_HEAD and name is not None:
            self._begin(out, name)
            self._left, self._scan, self._where = text[head.end() :], Scan(), self._arguments
            self._rest = Scan(depth=1)
            return
        # In another order, or not a call at all: known when its JSON is whole.
        begins = text.lstrip()[:1]
        end = self._scan.end(text[self._scanned :]) if begins == "{" else -1
        if end >= 0:
            end += self._scanned
            name, arguments = self._whole(text[:end])
            if name is None:
                self._where = self._give_up
                return
            self._begin(out, name)
            out.append(CallPiece(self.count - 1, None, arguments))
            self._left, self._where = text[end:], self._after
        elif ended or begins not in ("", "{"):
            self._where = self._give_up
        elif begins:
            self._scanned = len(text)

    def _closing(self, out: list[Piece], ended: bool) -> None:
        """Behind the arguments: the rest of the call's JSON, of which nothing more is needed."""
        end = self._rest.end(self._left)
        if end >= 0:
            self._left, self._where = self._left[end:], self._after
        else:
            self._left = ""

    def _after(self, out: list[Piece], ended: bool) -> None:
        text = self._left.lstrip()
        if self._end and text.startswith(self._end):
            self._left, self._where = text[len(self._end) :], self._content
        elif self._end and self._end.startswith(text):
            self._left = "" if ended else self._left
        elif self._in_list and text.startswith(","):
            self._left, self._marker = text[1:], text[:1]
            self._expect_call()
        elif self._in_list and text.startswith("]"):
            self._left, self._where = text[1:], self._content
        elif self._separator and text.startswith(self._separator):
            self._left, self._marker = text[len(self._separator) :], self._separator
            self._expect_call()
        elif text or ended:
            self._where = self._content

    def _whole(self, text: str) -> tuple[str | None, str]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None, ""
        name, arguments = value.get("name"), value.get(self._key, {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None, ""
        return name, json.dumps(arguments, ensure_ascii=False)


def _string(text: str) -> str | None:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
