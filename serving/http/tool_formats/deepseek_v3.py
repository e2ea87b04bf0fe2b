"""As `deepseek_v31`, but a call is `function<｜tool▁sep｜>name` and then its arguments in a block of code: DeepSeek V3
(and R1)."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..named_calls import NAME, NamedCalls
from . import Function, Marker, deepseek_v31

MARKS, BEGINS_AS_JSON, new_id = deepseek_v31.MARKS, deepseek_v31.BEGINS_AS_JSON, deepseek_v31.new_id
_SEP = "<｜tool▁sep｜>"
_HEAD = re.compile(rf"\s*function\s*{_SEP}\s*{NAME}\s*(?:```(?:json)?)?\s*")


def detect(template: str) -> bool:
    return "<｜tool▁call▁begin｜>" in template and "```json" in template


def parser(schemas: Mapping[str, Any]) -> NamedCalls:
    return deepseek_v31.parser(schemas, _HEAD)


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    blocks = [json.dumps(f"{one.name}\n```json\n") for one in functions]
    calls = [f'"function" {marker(_SEP)} {block} args_{n} "\\n```"' for n, block in enumerate(blocks)]
    return deepseek_v31.around(functions, calls, "\\n", marker, most)
