"""`{"name": ..., "parameters": {...}}` as the whole answer, one call at a time: Llama 3.1 to 3.3."""

import json
from collections.abc import Mapping
from typing import Any

from ..json_calls import JsonCalls
from . import Function, Marker, json_arguments, long_id

MARKS = ("<|python_tag|>",)
BEGINS_AS_JSON = True
new_id = long_id


def detect(template: str) -> bool:
    return '"parameters": ' in template and ("<|python_tag|>" in template or "Environment: ipython" in template)


def parser(schemas: Mapping[str, Any]) -> JsonCalls:
    return JsonCalls(MARKS, at_start=True, separator=";", arguments="parameters")


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    heads = [json.dumps('{"name": ' + json.dumps(one.name) + ', "parameters": ') for one in functions]
    return "\n".join(
        [
            "calls: call",  # its template takes no more in a message
            "call: " + " | ".join(f'{head} args_{n} "}}"' for n, head in enumerate(heads)),
            "text_then_calls: calls | PLAIN",
            "PLAIN: /([^{](?s:.*))?/",
            *json_arguments(functions),
        ]
    )
