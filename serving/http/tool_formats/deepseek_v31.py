"""`<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`, any number, within marks of all: DeepSeek V3.1."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..named_calls import NAME, NamedCalls
from . import Function, Marker, json_arguments, long_id, more, text_then

MARKS = (_ALL, _CALL, _SEP, _END, _END_ALL) = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
BEGINS_AS_JSON = False
new_id = long_id
_HEAD = re.compile(rf"\s*{NAME}\s*{_SEP}\s*")


def detect(template: str) -> bool:
    return _CALL in template and "```json" not in template


def parser(schemas: Mapping[str, Any], head: re.Pattern[str] = _HEAD) -> NamedCalls:
    return NamedCalls(_ALL, head, opens=_CALL, ends=("```", _END, _END_ALL))


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    heads = [f"{json.dumps(one.name)} {marker(_SEP)}" for one in functions]
    return around(functions, [f"{head} args_{n}" for n, head in enumerate(heads)], "", marker, most)


def around(functions: list[Function], calls: list[str], separator: str, marker: Marker, most: int) -> str:
    """The rules, from Lark for what stands between a call's marks, and the text between two calls."""
    body = f"call {more(separator, 'call', most)} {marker(_END_ALL)}"
    lines = [
        f"calls: {marker(_ALL)} {body}",
        f"call: {marker(_CALL)} ({' | '.join(calls)}) {marker(_END)}",
    ]
    lines += text_then(marker(_ALL), body)
    return "\n".join([*lines, *json_arguments(functions)])
