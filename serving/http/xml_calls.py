"""Calls that are XML of a kind: `<tool_call><function=f><parameter=x>value</parameter></function></tool_call>`.

A value stands as it is, between two line breaks: texts without quotes, all else as JSON. So what it is hangs on the
function's schema (`parameter_schema`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .parameter_schema import TYPES, ParameterSchemas
from .tool_parser import CallPiece, Piece, Scan, ToolParser, overlap

CALL, FUNCTION, PARAMETER = "<tool_call>", "<function=", "<parameter="
END_CALL, END_FUNCTION, END_PARAMETER = "</tool_call>", "</function>", "</parameter>"
_LONGEST_NAME = 256
# As templates write what is no text: Python's `str`.
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_KINDS = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class XmlCalls(ToolParser):
    """Gives out the arguments as JSON; texts as they come, other values when they are whole.

    `schemas`: of the arguments of each function, by name. What a schema does not name is JSON where it reads so.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        super().__init__((CALL, FUNCTION))  # models leave the first one out at times
        self._schemas, self._schema = schemas, ParameterSchemas({})
        self._types = TYPES
        self._parameters = 0
        self._seen = 0  # characters of a value that were looked at
        self._value_end = -1

    def _opening(self, out: list[Piece], ended: bool) -> None:
        text = self._left.lstrip()
        if self._marker.endswith(FUNCTION):
            self._where = self._name
        elif text.startswith(FUNCTION):
            end = len(self._left) - len(text) + len(FUNCTION)
            self._left, self._marker = self._left[end:], self._marker + self._left[:end]
        elif ended or not FUNCTION.startswith(text):
            self._where = self._give_up

    def _name(self, out: list[Piece], ended: bool) -> None:
        name = self._take_name(ended)
        if name:
            self._begin(out, name)
            self._schema, self._parameters = ParameterSchemas(self._schemas.get(name, {})), 0
            self._where = self._inside
        elif name is not None:
            self._where = self._give_up

    def _inside(self, out: list[Piece], ended: bool) -> None:
        """In a call, where a parameter may begin. What does not belong there is left out."""
        self._left = text = self._left.lstrip()
        if text.startswith(PARAMETER):
            self._where = self._parameter
        elif text.startswith((END_FUNCTION, END_CALL)):
            out.append(self._piece("}" if self._parameters else "{}"))
            self._ends, self._where = (END_FUNCTION, END_CALL), self._closing
        elif ended:
            self._left = ""
        elif not any(mark.startswith(text) for mark in (PARAMETER, END_FUNCTION, END_CALL)):
            at = text.find("<", 1)
            self._left = text[at:] if at >= 0 else ""

    def _parameter(self, out: list[Piece], ended: bool) -> None:
        whole, self._left = self._left, self._left[len(PARAMETER) :]
        name = self._take_name(ended)
        if name:
            self._types = self._schema.types(name)
            comma = ", " if self._parameters else "{"
            out.append(self._piece(f"{comma}{json.dumps(name, ensure_ascii=False)}: "))
            self._parameters += 1
            self._where = self._first_line
        elif name is None:
            self._left = whole
        else:
            self._where = self._inside

    def _first_line(self, out: list[Piece], ended: bool) -> None:
        """Behind a parameter's name: the line break before its value."""
        if self._left:
            self._left = self._left.removeprefix("\n")
            self._scan, self._seen, self._value_end = Scan(), 0, -1
            self._where = self._other
            if self._types == {"string"}:
                out.append(self._piece('"'))
                self._where = self._text

    def _text(self, out: list[Piece], ended: bool) -> None:
        """A text, as it comes."""
        text = self._left
        at = text.find(END_PARAMETER)
        if at >= 0:
            out.append(self._piece(_escaped(text[:at].removesuffix("\n")) + '"'))
            self._left, self._where = text[at + len(END_PARAMETER) :], self._inside
            return
        kept = text[: len(text) - (overlap(text, "\n" + END_PARAMETER) or overlap(text, END_PARAMETER))]
        if kept:
            out.append(self._piece(_escaped(kept)))
            self._left = text[len(kept) :]
        elif ended:
            self._left = ""

    def _other(self, out: list[Piece], ended: bool) -> None:
        """A value that is not only text, when it is whole."""
        at = self._end_of_value(ended)
        if at >= 0:
            out.append(self._piece(self._converted(self._left[:at].removesuffix("\n"))))
            self._left, self._where = self._left[at + len(END_PARAMETER) :], self._inside
        elif ended:
            self._left = ""

    def _end_of_value(self, ended: bool) -> int:
        """Where it is followed by `</parameter>`, which JSON may have in its texts; -1 where that is not known."""
        text = self._left
        if text.lstrip()[:1] in ("{", "["):
            if self._value_end < 0:
                end = self._scan.end(text[self._seen :])
                self._value_end = end if end < 0 else end + self._seen
                self._seen = len(text)
            if self._value_end < 0:
                return text.find(END_PARAMETER) if ended else -1
            rest = text[self._value_end :].lstrip()
            if rest.startswith(END_PARAMETER):
                return len(text) - len(rest)
            if END_PARAMETER.startswith(rest) and not ended:
                return -1
        return text.find(END_PARAMETER)

    def _converted(self, text: str) -> str:
        """JSON for a value: of a type that its schema has, or a text."""
        written = _PYTHON.get(text.strip(), text.strip())
        try:
            value = json.loads(written, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        kind = _KINDS.get(type(value), "string")
        fits = kind in self._types or (kind == "integer" and "number" in self._types)
        if "string" in self._types and (kind == "string" or not fits):
            return json.dumps(text, ensure_ascii=False)
        return written

    def _take_name(self, ended: bool) -> str | None:
        """What stands before the next ">", which is taken too; "" where that is no name, None where it is not known."""
        at = self._left.find(">", 0, _LONGEST_NAME)
        if at < 0:
            return "" if ended or len(self._left) >= _LONGEST_NAME else None
        name = self._left[:at].strip()
        if not name or any(character in name for character in "<\n"):
            return ""
        self._left = self._left[at + 1 :]
        return name

    def _piece(self, arguments: str) -> CallPiece:
        return CallPiece(self.count - 1, None, arguments)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _refuse(text: str) -> None:
    raise ValueError(text)
