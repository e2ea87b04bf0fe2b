"""`[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`, any number of them: Mistral, version 11 of its tokenizer."""

from . import Function, Marker, mistral_v13

MARKS, BEGINS_AS_JSON = mistral_v13.MARKS, mistral_v13.BEGINS_AS_JSON
parser, new_id = mistral_v13.parser, mistral_v13.new_id


def detect(template: str) -> bool:
    return all(mark in template for mark in MARKS)


def rules(functions: list[Function], marker: Marker, most: int) -> str:
    return mistral_v13.rules(functions, marker, most, f"{marker('[CALL_ID]')} /[A-Za-z0-9]{{9}}/")
