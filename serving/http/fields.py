"""Every field of the two OpenAI endpoints, and what this server does with each: honour it, or answer 400.

A field is a parser `(param, value) -> value`. Parsers either return the value the server will use or raise ApiError;
none ignores what it does not understand. Fields that ask for something this server lacks accept exactly the values
that ask for nothing (`no_op`). The tables are compared with the installed `openai` client's types by a test, so a field
added to the API shows up as a failing test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import ApiError, bad, nearest, show

Parser = Callable[[str, Any], Any]

MAX_N = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Field:
    """`parse` sees every value but null; null and absence mean `default`, unless the field is `required`."""

    parse: Parser
    default: Any = None
    required: bool = False


# -- parsers ----------------------------------------------------------------------------------------------------------


def boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad(param, f"'{param}' must be true or false, got {show(value)}.", "invalid_type")
    return value


def string(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad(param, f"'{param}' must be a string, got {show(value)}.", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad(param, f"'{param}' holds a lone surrogate, which is not valid Unicode text.") from None
    return value


def integer(low: int, high: int | None = None) -> Parser:
    def parse(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(param, f"'{param}' must be an integer, got {show(value)}.", "invalid_type")
        if value < low or (high is not None and value > high):
            rule = f"at least {low}" if high is None else f"between {low} and {high}"
            raise bad(param, f"'{param}' must be {rule}, got {show(value)}.")
        return value

    return parse


def number(low: float, high: float, *, exclude_low: bool = False) -> Parser:
    def parse(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(param, f"'{param}' must be a number, got {show(value)}.", "invalid_type")
        if not low <= value <= high or (exclude_low and value == low):  # NaN is not in any range
            rule = f"above {low:g}" if exclude_low else f"at least {low:g}"
            raise bad(param, f"'{param}' must be a number {rule} and at most {high:g}, got {show(value)}.")
        return float(value)

    return parse


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


def logit_bias(param: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise bad(param, f"'{param}' must be an object from token id to bias, got {show(value)}.", "invalid_type")
    parse, out = number(-100, 100), {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad(f"{param}.{key}", f"'{param}' keys must be token ids in decimal, got {show(key)}.")
        if int(key) in out:
            raise bad(f"{param}.{key}", f"'{param}' names token {int(key)} twice.")
        out[int(key)] = parse(f"{param}.{key}", bias)
    return out


def token_ids(param: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of token ids, got {show(value)}.", "invalid_type")
    parse = integer(0, 2**31 - 1)
    return [parse(f"{param}[{i}]", item) for i, item in enumerate(value)]


def prompts(param: str, value: Any) -> list[str | list[int]]:
    """A string, a list of strings, a list of ids, or a list of lists of ids -> the list of prompts."""
    if isinstance(value, str):
        return [string(param, value)]
    kinds = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be {kinds}, got {show(value)}.", "invalid_type")
    if not value:
        raise bad(param, f"'{param}' is an empty list; give at least one prompt ({kinds}).")
    if all(isinstance(item, str) for item in value):
        return [string(f"{param}[{i}]", item) for i, item in enumerate(value)]
    if all(isinstance(item, list) for item in value):
        return [token_ids(f"{param}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value[0], str | list | dict):
        raise bad(param, f"'{param}' must be {kinds}, got {show(value)}.", "invalid_type")
    return [token_ids(param, value)]


def stream_options(param: str, value: Any) -> dict[str, bool]:
    fields = {
        "include_usage": Field(boolean, False),
        "include_obfuscation": Field(no_op(False, why="stream obfuscation is not implemented"), False),
    }
    return parse_object(param, value, fields)


def no_op(*accepted: Any, why: str) -> Parser:
    """Accept only the values that ask for nothing; all others are answered with `why` the server can't."""

    def parse(param: str, value: Any) -> Any:
        for choice in accepted:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return value
        choices = " or ".join(["null", *(show(choice) for choice in accepted)])
        message = f"'{param}' is not supported: {why}. Leave it out (or send {choices}), got {show(value)}."
        raise bad(param, message, "unsupported_parameter")

    return parse


def hint(param: str, value: Any) -> str:
    """A string that by its definition does not change the answer (who asks, which cache to prefer)."""
    return string(param, value)


# -- tables -----------------------------------------------------------------------------------------------------------

_NO_TOOLS = "this server does not parse tool calls"

COMMON: dict[str, Field] = {
    "model": Field(string, required=True),
    "frequency_penalty": Field(number(-2, 2), 0.0),
    "presence_penalty": Field(number(-2, 2), 0.0),
    "logit_bias": Field(logit_bias, {}),
    "n": Field(integer(1, MAX_N), 1),
    "seed": Field(integer(SEED_MIN, SEED_MAX)),
    "stop": Field(stop, []),
    "stream": Field(boolean, False),
    "stream_options": Field(stream_options),
    "temperature": Field(number(0, 2), 1.0),
    "top_p": Field(number(0, 1, exclude_low=True), 1.0),
    "user": Field(hint),
    # Extensions of the OpenAI API, named as other open servers name them.
    "top_k": Field(integer(0), 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0, 100, exclude_low=True), 1.0),
    "stop_token_ids": Field(token_ids, []),
    "ignore_eos": Field(boolean, False),
    "min_tokens": Field(integer(0), 0),
    "cache_salt": Field(string, ""),
}

EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "cache_salt")

COMPLETIONS: dict[str, Field] = COMMON | {
    "prompt": Field(prompts),
    "best_of": Field(integer(1, MAX_N)),
    "echo": Field(boolean, False),
    "logprobs": Field(integer(0, MAX_TOP_LOGPROBS)),
    "max_tokens": Field(integer(0)),
    "suffix": Field(no_op("", why="the model does not fill in the middle")),
}

CHAT: dict[str, Field] = COMMON | {
    "messages": Field(lambda param, value: value, required=True),
    "max_tokens": Field(integer(1)),
    "max_completion_tokens": Field(integer(1)),
    "logprobs": Field(boolean, False),
    "top_logprobs": Field(integer(0, MAX_TOP_LOGPROBS)),
    "audio": Field(no_op(why="the model writes text only")),
    "function_call": Field(no_op("none", why=_NO_TOOLS)),
    "functions": Field(no_op([], why=_NO_TOOLS)),
    "metadata": Field(no_op({}, why="nothing is stored that it could be attached to")),
    "modalities": Field(no_op(["text"], why="the model writes text only")),
    "moderation": Field(no_op(why="there is no moderation model")),
    "parallel_tool_calls": Field(boolean),  # says how tools are called; without tools neither value means anything
    "prediction": Field(no_op(why="predicted outputs are not implemented")),
    "prompt_cache_key": Field(hint),
    "prompt_cache_options": Field(no_op({}, why="the lifetime of cached prompts can't be promised")),
    "prompt_cache_retention": Field(no_op("in_memory", why="prompts are cached in memory only")),
    "reasoning_effort": Field(no_op("none", why="the model has no reasoning mode")),
    "response_format": Field(no_op({"type": "text"}, why="output can't be constrained to a format")),
    "safety_identifier": Field(hint),
    "service_tier": Field(no_op("auto", "default", why="there is one service tier")),
    "store": Field(no_op(False, why="completions are not stored")),
    "tool_choice": Field(no_op("none", why=_NO_TOOLS)),
    "tools": Field(no_op([], why=_NO_TOOLS)),
    "verbosity": Field(no_op("medium", why="the model has no verbosity setting")),
    "web_search_options": Field(no_op(why="there is no web search")),
}


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
            if field.required:
                raise bad(prefix + name, f"'{prefix}{name}' is required.", "missing_required_parameter")
            out[name] = field.default
        else:
            out[name] = field.parse(prefix + name, given)
    return out


def _first_unknown(value: dict[str, Any], fields: Iterable[str]) -> str | None:
    known = set(fields)
    return next((name for name in value if name not in known), None)
