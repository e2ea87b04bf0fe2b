"""`[TOOL_CALLS]name[ARGS]{...}`, any number of them: Mistral, version 13 of its tokenizer and later."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..named_calls import NAME, NamedCalls
from . import Function, Marker, json_arguments, more, short_id, text_then

MARKS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
BEGINS_AS_JSON = False
new_id = short_id
# With an id, as version 11 writes it. Where the last mark is a special token, some leave it out of the text.
_HEAD = re.compile(rf"\s*{NAME}\s*(?:\[CALL_ID\]\s*(?P<id>[A-Za-z0-9_-]{{1,64}})\s*)?(?:\[ARGS\])?\s*")


def detect(template: str) -> bool:
    return "[TOOL_CALLS]" in template and "[ARGS]" in template and "[CALL_ID]" not in template


def parser(schemas: Mapping[str, Any]) -> NamedCalls:
    return NamedCalls("[TOOL_CALLS]", _HEAD)


def rules(functions: list[Function], marker: Marker, most: int, call_id: str = "") -> str:
    """`call_id`: Lark for what stands between name and arguments."""
    begin, arguments = marker("[TOOL_CALLS]"), marker("[ARGS]")
    calls = [f"{json.dumps(one.name)} {call_id} {arguments} args_{n}" for n, one in enumerate(functions)]
    others = more("", "call", most)
    lines = [f"calls: call {others}", f"call: {begin} body", f"body: {' | '.join(calls)}"]
    return "\n".join([*lines, *text_then(begin, f"body {others}"), *json_arguments(functions)])
