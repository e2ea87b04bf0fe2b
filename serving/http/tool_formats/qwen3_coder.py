"""`<tool_call><function=name><parameter=x>value</parameter></function></tool_call>`, any number: Qwen3-Coder."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..parameter_schema import ParameterSchemas
from ..xml_calls import CALL, END_CALL, END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, XmlCalls
from . import Function, Marker, long_id, more

MARKS = (CALL, END_CALL)
BEGINS_AS_JSON = False
new_id = long_id
_READ = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_READ |= {"title", "description", "examples", "default", "$comment"}
_END = f"\n{END_PARAMETER}\n"
_CLOSE = json.dumps(f"{END_FUNCTION}\n")


def detect(template: str) -> bool:
    return FUNCTION in template and PARAMETER in template


def parser(schemas: Mapping[str, Any]) -> XmlCalls:
    return XmlCalls(schemas)


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    begin, end, head = marker(CALL), marker(END_CALL), json.dumps(f"\n{FUNCTION}")
    others = more("\\n", "call", most)
    lines = [
        f"calls: call {others}",
        f"call: {begin} {head} body",
        f"body: ({' | '.join(f'called_{n}' for n in range(len(functions)))}) {_CLOSE} {end}",
    ]
    for n, function in enumerate(functions):
        lines += _function(n, function)
    # Models leave the first mark out at times.
    unmarked = f"before body {others}"
    if begin.startswith("<"):
        lines.append(f"text_then_calls: TEXT ({begin} {head} body {others})? | {unmarked}")
    else:
        lines.append(f"text_then_calls: TEXT | {unmarked}")
    return "\n".join([*lines, f"before[lazy]: TEXT {json.dumps(FUNCTION)}"])


def _function(n: int, function: Function) -> list[str]:
    """Lark for `called_n`: a name and parameters, in the order in which the schema has them."""
    schema, parts, lines = function.schema, [], []
    where = f"the parameters of {function.name!r}, in this model's format,"
    if others := sorted(set(schema) - _READ):
        raise ValueError(f"{where} can't be held to {', '.join(others)}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError(f"{where} need 'properties' that are an object, and 'required' that is a list")
    if lacking := [name for name in required if not isinstance(name, str) or name not in properties]:
        raise ValueError(f"{where} are required, but not described: {', '.join(map(repr, lacking))}")
    shapes = ParameterSchemas(schema)
    for m, (name, shape) in enumerate(properties.items()):
        if not re.fullmatch(r"[^\s<>]{1,128}", name):
            raise ValueError(f"{where} can't be called {name!r}")
        if shape is False and name not in required:
            continue
        rule = f"value_{n}_{m}"
        try:
            lines += shapes.lark(rule, shape, _END)
        except ValueError as error:
            raise ValueError(f"{where} can't be held to what {name!r} has: {error}") from None
        head = json.dumps(f"{PARAMETER}{name}>\n")
        parts.append(f"({head} {rule}){'' if name in required else '?'}")
    other = schema.get("additionalProperties", True)
    if not properties and other not in (True, False, {}):
        raise ValueError(f"{where} can't be held to additionalProperties of a kind")
    if not properties and other is not False:
        parts.append(f"free_{n}*")
        lines += [f"FREE_{n}: /{PARAMETER}[A-Za-z0-9_.-]{{1,64}}>\\n(?s:.*)/ & ~/(?s:.*)<\\/parameter>(?s:.*)/"]
        lines += [f"free_{n}[lazy]: FREE_{n} {json.dumps(_END)}"]
    head = json.dumps(f"{function.name}>\n")
    return [f"called_{n}: {' '.join([head, *parts])}", *lines]
