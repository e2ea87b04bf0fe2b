"""`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, at the end of the text: Mistral, up to its version 7."""

import json
from collections.abc import Mapping
from typing import Any

from ..json_calls import JsonCalls
from . import Function, Marker, json_arguments, more, short_id, text_then

MARKS = ("[TOOL_CALLS]",)
BEGINS_AS_JSON = False
new_id = short_id


def detect(template: str) -> bool:
    return "[TOOL_CALLS]" in template and "[ARGS]" not in template  # later ones write JSON for the arguments only


def parser(schemas: Mapping[str, Any]) -> JsonCalls:
    return JsonCalls(MARKS, in_list=True)


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    begin = marker("[TOOL_CALLS]")
    heads = [json.dumps('{"name": ' + json.dumps(one.name) + ', "arguments": ') for one in functions]
    lines = [
        f"calls: {begin} list",
        f'list: "[" call {more(", ", "call", most)} "]"',
        "call: " + " | ".join(f'{head} args_{n} "}}"' for n, head in enumerate(heads)),
    ]
    return "\n".join([*lines, *text_then(begin, "list"), *json_arguments(functions)])
