"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them: Hermes, Qwen 2.5 and 3."""

import json
from collections.abc import Mapping
from typing import Any

from ..json_calls import JsonCalls
from . import Function, Marker, json_arguments, long_id, more, text_then

MARKS = (_BEGIN, _END) = ("<tool_call>", "</tool_call>")
BEGINS_AS_JSON = False
new_id = long_id


def detect(template: str) -> bool:
    # Others write XML within the same marks.
    return _BEGIN in template and "<function=" not in template and "<arg_key>" not in template


def parser(schemas: Mapping[str, Any]) -> JsonCalls:
    return JsonCalls((_BEGIN,), end=_END)


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    begin, end = marker(_BEGIN), marker(_END)
    heads = [json.dumps('\n{"name": ' + json.dumps(one.name) + ', "arguments": ') for one in functions]
    close = json.dumps("}\n")
    first, others = f"body {end}", more("\\n", "call", most)
    lines = [
        f"calls: call {others}",
        f"call: {begin} {first}",
        "body: " + " | ".join(f"{head} args_{n} {close}" for n, head in enumerate(heads)),
    ]
    return "\n".join([*lines, *text_then(begin, f"{first} {others}"), *json_arguments(functions)])
