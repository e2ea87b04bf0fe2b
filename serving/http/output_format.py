"""`response_format` and `structured_outputs`: what the answer must be a text of, as a grammar."""

from __future__ import annotations

import json
import re
from typing import Any

from ..request import Grammar
from .errors import bad, show
from .parsers import Field, boolean, one_of, parse_object, schema_of_object, string
from .schemas import BOOLEAN, STRING, any_of, array, described

JSON_OBJECT = Grammar("json_schema", '{"type":"object"}')
KINDS = ("text", "json_object", "json_schema")


def json_text(param: str, value: Any) -> str:
    """A value as JSON, in the order of its parts. Raises 400 for what JSON has no words for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise bad(param, f"'{param}' holds a lone surrogate, which is not valid Unicode text.") from None
    except (ValueError, RecursionError) as error:
        raise bad(param, f"'{param}' can't be written as JSON: {error}.") from None
    return text


@described({"type": ["object", "boolean"]})
def json_schema(param: str, value: Any) -> Grammar:
    if not isinstance(value, dict | bool):
        raise bad(param, f"'{param}' must be a JSON schema, an object, got {show(value)}.", "invalid_type")
    return Grammar("json_schema", json_text(param, value))


@described(STRING | {"pattern": "^[A-Za-z0-9_-]{1,64}$"})
def name(param: str, value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", string(param, value)):
        raise bad(param, f"'{param}' must have 1 to 64 letters, digits, '_' and '-', got {show(value)}.")
    return value


_JSON_SCHEMA = {
    "name": Field(name, required=True),
    "description": Field(string),
    "schema": Field(json_schema),
    # The output keeps to the schema either way: where that can't be promised, the request is refused.
    "strict": Field(boolean),
}
_TEXT = {"type": Field(one_of("text"), required=True)}
_OBJECT = {"type": Field(one_of("json_object"), required=True)}


@described(lambda: schema_of_object(_JSON_SCHEMA))
def _described_schema(param: str, value: Any) -> Grammar:
    return parse_object(param, value, _JSON_SCHEMA)["schema"] or JSON_OBJECT


_SCHEMA = {"type": Field(one_of("json_schema"), required=True), "json_schema": Field(_described_schema, required=True)}


@described(lambda: any_of(*map(schema_of_object, (_TEXT, _OBJECT, _SCHEMA))))
def response_format(param: str, value: Any) -> Grammar | None:
    """OpenAI's field; None for plain text."""
    if not isinstance(value, dict):
        raise bad(param, f"'{param}' must be an object with a 'type', got {show(value)}.", "invalid_type")
    kind = one_of(*KINDS)(f"{param}.type", value["type"]) if value.get("type") is not None else None
    if kind == "json_object":
        parse_object(param, value, _OBJECT)
        return JSON_OBJECT
    if kind == "json_schema":
        return parse_object(param, value, _SCHEMA)["json_schema"]
    parse_object(param, value, _TEXT)
    return None


@described(any_of({"type": ["object", "boolean"]}, STRING))
def _json(param: str, value: Any) -> Grammar:
    if not isinstance(value, str):
        return json_schema(param, value)
    return Grammar("json_schema", string(param, value))


@described(STRING | {"minLength": 1})
def _regex(param: str, value: Any) -> Grammar:
    return Grammar("regex", string(param, value))


@described(STRING | {"minLength": 1})
def _lark(param: str, value: Any) -> Grammar:
    return Grammar("lark", string(param, value))


@described(array(STRING, 1))
def _choice(param: str, value: Any) -> Grammar:
    if not isinstance(value, list) or not value:
        raise bad(param, f"'{param}' must be a list of texts, with one at least, got {show(value)}.", "invalid_type")
    texts = [string(f"{param}[{i}]", text) for i, text in enumerate(value)]
    return Grammar("choice", json.dumps(texts))


@described(BOOLEAN)
def _any_object(param: str, value: Any) -> Grammar | None:
    return JSON_OBJECT if boolean(param, value) else None


_STRUCTURED = {
    "json": Field(_json),
    "regex": Field(_regex),
    "choice": Field(_choice),
    "grammar": Field(_lark),
    "json_object": Field(_any_object),
}


@described(lambda: schema_of_object(_STRUCTURED))
def structured_outputs(param: str, value: Any) -> Grammar | None:
    """An extension, as vLLM has it: one of a JSON schema, a regular expression, a choice and a Lark grammar."""
    given = [one for one in parse_object(param, value, _STRUCTURED).values() if one is not None]
    if len(given) > 1:
        raise bad(param, f"'{param}' takes one of {', '.join(_STRUCTURED)}, got {len(given)} of them.")
    return given[0] if given else None


def chosen(values: dict[str, Any]) -> tuple[Grammar | None, str]:
    """The grammar that the fields ask for, and the field that does. Raises 400 when both do."""
    asked = {param: values[param] for param in ("response_format", "structured_outputs") if values.get(param)}
    if len(asked) > 1:
        raise bad("structured_outputs", "'structured_outputs' and 'response_format' both say what the answer must be.")
    for param, grammar in asked.items():
        return grammar, param
    return None, ""
