"""Parsers of fields: `(param, value) -> value`, each with the JSON Schema of what it accepts.

A parser either returns the value that the server will use or raises ApiError; none ignores what it does not understand.
Where a field asks for something this server lacks, the values that ask for nothing are accepted (`no_op`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..request import MAX_BIAS
from .errors import ApiError, bad, nearest, show
from .schemas import BOOLEAN, STRING, Schema, any_of, array, described, nullable, schema_of

Parser = Callable[[str, Any], Any]

MAX_N = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 2048
MAX_PROMPTS = 10_000
MAX_PIECES = 10_000  # of a conversation: messages, and their parts and calls
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Field:
    """`parse` sees every value but null; null and absence mean `default`, unless the field is `required`.

    One that is `required` and `nullable` may not be left out, and null means `default`.
    """

    parse: Parser
    default: Any = None
    required: bool = False
    nullable: bool = False


# -- parsers ----------------------------------------------------------------------------------------------------------


@described(BOOLEAN)
def boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad(param, f"'{param}' must be true or false, got {show(value)}.", "invalid_type")
    return value


@described(STRING)
def string(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad(param, f"'{param}' must be a string, got {show(value)}.", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad(param, f"'{param}' holds a lone surrogate, which is not valid Unicode text.") from None
    return value


def joined(part: Parser) -> Parser:
    """A string, or a list of parts of which `part` takes the texts; these are joined."""

    def parse(param: str, value: Any) -> str:
        if isinstance(value, str):
            return string(param, value)
        if not isinstance(value, list) or not value:
            raise bad(param, f"'{param}' must be a string or a list of text parts, got {show(value)}.", "invalid_type")
        return "".join(part(f"{param}[{i}]", one) for i, one in enumerate(value))

    return parse


def check_pieces(param: str, items: list[Any]) -> None:
    """Refuses a conversation of so many pieces that to look at each would hold up everybody's tokens."""
    own = sum(len(part) for item in items if isinstance(item, dict) for part in item.values() if isinstance(part, list))
    if (count := len(items) + own) > MAX_PIECES:
        raise bad(param, f"'{param}' has {count} messages, parts and calls in all; it may have {MAX_PIECES} at most.")


def integer(low: int, high: int | None = None) -> Parser:
    @described({"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high}))
    def parse(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(param, f"'{param}' must be an integer, got {show(value)}.", "invalid_type")
        if value < low or (high is not None and value > high):
            rule = f"at least {low}" if high is None else f"between {low} and {high}"
            raise bad(param, f"'{param}' must be {rule}, got {show(value)}.")
        return value

    return parse


def number(low: float, high: float, *, exclude_low: bool = False) -> Parser:
    @described({"type": "number", "exclusiveMinimum" if exclude_low else "minimum": low, "maximum": high})
    def parse(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(param, f"'{param}' must be a number, got {show(value)}.", "invalid_type")
        if not low <= value <= high or (exclude_low and value == low):  # NaN is not in any range
            rule = f"above {low:g}" if exclude_low else f"at least {low:g}"
            raise bad(param, f"'{param}' must be a number {rule} and at most {high:g}, got {show(value)}.")
        return float(value)

    return parse


@described(any_of(STRING | {"minLength": 1}, array(STRING | {"minLength": 1}, 0, MAX_STOPS)))
def stop(param: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise bad(param, f"'{param}' must be a string or a list of strings, got {show(value)}.", "invalid_type")
    if len(values) > MAX_STOPS:
        raise bad(param, f"'{param}' takes at most {MAX_STOPS} strings, got {len(values)}.")
    for i, item in enumerate(values):
        if not string(f"{param}[{i}]", item):
            raise bad(f"{param}[{i}]", f"'{param}[{i}]' is empty: it would stop before the first token.")
    return values


@described(
    {
        "type": "object",
        "maxProperties": MAX_BIAS,
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
)
def logit_bias(param: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise bad(param, f"'{param}' must be an object from token id to bias, got {show(value)}.", "invalid_type")
    if len(value) > MAX_BIAS:  # before each is looked at: of a million that takes half a second
        raise bad(param, f"'{param}' must have at most {MAX_BIAS} entries, got {len(value)}.")
    parse, out = number(-100, 100), {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad(f"{param}.{key}", f"'{param}' keys must be token ids in decimal, got {show(key)}.")
        if int(key) in out:
            raise bad(f"{param}.{key}", f"'{param}' names token {int(key)} twice.")
        out[int(key)] = parse(f"{param}.{key}", bias)
    return out


_TOKEN_IDS = array({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})


@described(_TOKEN_IDS)
def token_ids(param: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of token ids, got {show(value)}.", "invalid_type")
    # Of millions, to look at each by name takes seconds.
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**31:
        return value
    parse = integer(0, 2**31 - 1)
    return [parse(f"{param}[{i}]", item) for i, item in enumerate(value)]


@described(any_of(STRING, array(STRING, 1, MAX_PROMPTS), _TOKEN_IDS, array(_TOKEN_IDS, 1, MAX_PROMPTS)))
def prompts(param: str, value: Any) -> list[str | list[int]]:
    """A string, a list of strings, a list of ids, or a list of lists of ids -> the list of prompts."""
    if isinstance(value, str):
        return [string(param, value)]
    kinds = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be {kinds}, got {show(value)}.", "invalid_type")
    if not value:
        raise bad(param, f"'{param}' is an empty list; give at least one prompt ({kinds}).")
    if len(value) > MAX_PROMPTS and isinstance(value[0], str | list):  # as above
        raise bad(param, f"'{param}' must have at most {MAX_PROMPTS} prompts, got {len(value)}.")
    if all(isinstance(item, str) for item in value):
        return [string(f"{param}[{i}]", item) for i, item in enumerate(value)]
    if all(isinstance(item, list) for item in value):
        return [token_ids(f"{param}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value[0], str | list | dict):
        raise bad(param, f"'{param}' must be {kinds}, got {show(value)}.", "invalid_type")
    return [token_ids(param, value)]


@described(lambda: schema_of_object(_STREAM_OPTIONS))
def stream_options(param: str, value: Any) -> dict[str, bool]:
    return parse_object(param, value, _STREAM_OPTIONS)


def no_op(*accepted: Any, why: str) -> Parser:
    """Accept only the values that ask for nothing; all others are answered with `why` the server can't."""

    @described({"enum": [*accepted, None]})
    def parse(param: str, value: Any) -> Any:
        for choice in accepted:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return value
        choices = " or ".join(["null", *(show(choice) for choice in accepted)])
        message = f"'{param}' is not supported: {why}. Leave it out (or send {choices}), got {show(value)}."
        raise bad(param, message, "unsupported_parameter")

    return parse


def one_of(*choices: str) -> Parser:
    @described({"enum": list(choices)})
    def parse(param: str, value: Any) -> str:
        if string(param, value) not in choices:
            message = f"'{param}' must be one of {', '.join(choices)}, got {show(value)}.{nearest(value, choices)}"
            raise bad(param, message)
        return value

    return parse


@described(any_of(STRING, array(STRING, 1, MAX_INPUTS)))
def texts(param: str, value: Any) -> list[str]:
    """A string or a list of strings -> the list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise bad(param, f"'{param}' must be a string or a list of strings, got {show(value)}.", "invalid_type")
    if not 0 < len(values) <= MAX_INPUTS:
        raise bad(param, f"'{param}' must have from 1 to {MAX_INPUTS} strings, got {len(values)}.")
    return [string(f"{param}[{i}]", item) for i, item in enumerate(values)]


@described(lambda: schema_of(prompts))
def inputs(param: str, value: Any) -> list[str | list[int]]:
    """As `prompts`, of which there may be so many in one request."""
    found = prompts(param, value)
    if len(found) > MAX_INPUTS:
        raise bad(param, f"'{param}' must have at most {MAX_INPUTS} texts, got {len(found)}; send them in parts.")
    return found


@described(STRING)
def hint(param: str, value: Any) -> str:
    """A string that by its definition does not change the answer (who asks, which cache to prefer)."""
    return string(param, value)


def decimal(parse: Parser) -> Parser:
    """For numbers in a query or a form, where all is text."""

    @described(schema_of(parse))
    def read(param: str, value: Any) -> int:
        return parse(param, int(value) if re.fullmatch(r"-?[0-9]{1,18}", str(value)) else value)

    return read


@described({"type": "object", "maxProperties": 16, "additionalProperties": STRING | {"maxLength": 512}})
def metadata(param: str, value: Any) -> dict[str, str]:
    """At most 16 pairs of texts, of 64 and 512 characters."""
    if not isinstance(value, dict):
        raise bad(param, f"'{param}' must be an object with texts in it, got {show(value)}.", "invalid_type")
    if len(value) > 16:
        raise bad(param, f"'{param}' has at most 16 pairs, got {len(value)}.")
    for key, text in value.items():
        if len(string(param, key)) > 64 or len(string(f"{param}.{key}", text)) > 512:
            raise bad(f"{param}.{key}", f"'{param}' has keys of at most 64 characters and texts of at most 512.")
    return value


@described(lambda: schema_of_object(_EXPIRES_AFTER))
def expires_after(param: str, value: Any) -> int:
    """{"anchor": "created_at", "seconds": ...} -> the seconds."""
    return parse_object(param, value, _EXPIRES_AFTER)["seconds"]


_STREAM_OPTIONS = {
    "include_usage": Field(boolean, False),
    "include_obfuscation": Field(no_op(False, why="stream obfuscation is not implemented"), False),
}

_EXPIRES_AFTER = {
    "anchor": Field(one_of("created_at"), required=True),
    "seconds": Field(decimal(integer(3600, 30 * 86400)), required=True),
}


def schema_of_object(fields: dict[str, Field]) -> Schema:
    """What `parse_object` accepts."""
    properties = {
        name: nullable(schema_of(field.parse)) if field.nullable or not field.required else schema_of(field.parse)
        for name, field in fields.items()
    }
    required = [name for name, field in fields.items() if field.required]
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def parse_object(param: str | None, value: Any, fields: dict[str, Field]) -> dict[str, Any]:
    """Check an object against a table; unknown names are errors that suggest the nearest known one."""
    where = f"'{param}'" if param else "The request body"
    if not isinstance(value, dict):
        raise bad(param, f"{where} must be a JSON object, got {show(value)}.", "invalid_type")
    prefix = f"{param}." if param else ""
    unknown = _first_unknown(value, fields)
    if unknown is not None:
        message = f"Unknown field '{prefix}{unknown}'.{nearest(unknown, fields)}"
        raise ApiError(400, message, param=prefix + unknown, code="unknown_parameter")
    out = {}
    for name, field in fields.items():
        given = value.get(name)
        if given is None:
            if field.required and not (field.nullable and name in value):
                raise bad(prefix + name, f"'{prefix}{name}' is required.", "missing_required_parameter")
            out[name] = field.default
        else:
            out[name] = field.parse(prefix + name, given)
    return out


def _first_unknown(value: dict[str, Any], fields: Iterable[str]) -> str | None:
    known = set(fields)
    return next((name for name in value if name not in known), None)
