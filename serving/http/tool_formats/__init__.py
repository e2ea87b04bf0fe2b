"""How models write tool calls: one file a format; the file's name is the format's name.

A chat template says by its text which format it teaches (`detect`). Each file has

- `detect(template)`: whether a template asks for calls in this format;
- `MARKS`: what may be special tokens of the model;
- `BEGINS_AS_JSON`: whether a call looks like an answer in JSON at its beginning;
- `parser(schemas)`: finds the calls in an answer; `schemas`: of each function's arguments, by its name;
- `rules(functions, marker, most)`: Lark rules for `calls` (from one to `most` calls) and `text_then_calls` (text, in
  which a call may begin at any place where the parser would find one). Any text is `TEXT`, and `marker(text)` is how a
  mark is written: as a text, or as a special token, `<[id]>`. ValueError for a schema that can't be kept to;
- `new_id()`: a name for a call, as the templates of this format want them.
"""

from __future__ import annotations

import pkgutil
import secrets
import string
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from ..parameter_schema import json_rule
from ..tool_parser import ToolParser

Marker = Callable[[str], str]


class Function(NamedTuple):
    """What may be called. `schema`: of its arguments, an object."""

    name: str
    schema: dict[str, Any]


class ToolFormat(Protocol):
    """A module of this folder."""

    MARKS: tuple[str, ...]
    BEGINS_AS_JSON: bool

    def detect(self, template: str) -> bool: ...

    def parser(self, schemas: Mapping[str, Any]) -> ToolParser: ...

    def rules(self, functions: list[Function], marker: Marker, most: int) -> str: ...

    def new_id(self) -> str: ...


def json_arguments(functions: list[Function]) -> list[str]:
    """Lark: the arguments of function number n in JSON are `args_n`."""
    return [f"args_{n}: {json_rule(function.schema)}" for n, function in enumerate(functions)]


def text_then(mark: str, rest: str) -> list[str]:
    """Lark for `text_then_calls`, where calls are `rest` behind a mark."""
    if mark.startswith("<"):
        return [f"text_then_calls: TEXT ({mark} {rest})?"]
    return [f"text_then_calls: TEXT | before {rest}", f"before[lazy]: TEXT {mark}"]


def more(separator: str, rule: str, most: int) -> str:
    """Lark for what may follow the first of at most `most`."""
    between = f'"{separator}" ' if separator else ""
    return "" if most == 1 else f"({between}{rule}){{0,{most - 1}}}"


def long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """As Mistral's templates want it: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ToolFormat:
    """The format `name`. Raises ValueError, with the choices, for one that is not known."""
    if name not in names():
        raise ValueError(f"there is no tool format {name!r}; choose from {', '.join(names())}")
    return import_module(f".{name}", __name__)  # type: ignore[return-value]


def of_template(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it is not known."""
    return next((one for one in map(load, names()) if one.detect(template)), None)
