"""The fields of /v1/responses, and what they are in /v1/chat/completions, whose way its requests go."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .errors import ApiError, bad, show
from .fields import COMMON
from .parsers import (
    MAX_TOP_LOGPROBS,
    Field,
    boolean,
    check_pieces,
    hint,
    integer,
    joined,
    metadata,
    no_op,
    number,
    one_of,
    parse_object,
    schema_of_object,
    string,
)  # fmt: skip
from .schemas import STRING, any_of, array, described

LOGPROBS = "message.output_text.logprobs"
_STATUSES = ("in_progress", "completed", "incomplete")
_NOT_KEPT = "this server keeps nothing of a response"
_TEXT_ONLY = "the model reads text only"

EXTENSIONS = (
    "seed", "stop", "top_k", "min_p", "repetition_penalty", "ignore_eos", "cache_salt", "priority", "deadline_seconds",
    "stages_left",
)  # fmt: skip

# -- input ------------------------------------------------------------------------------------------------------------

_NOTHING_ATTACHED = {"annotations": Field(no_op([], why=_TEXT_ONLY)), "logprobs": Field(lambda param, value: value)}
_PARTS: dict[str, dict[str, Field]] = {
    "input_text": {"prompt_cache_breakpoint": Field(no_op(why="the lifetime of cached prompts can't be promised"))},
    "output_text": _NOTHING_ATTACHED,
}


def _part(param: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _PARTS:
        message = f"'{param}.type' must be one of {', '.join(_PARTS)}, got {show(kind)}: {_TEXT_ONLY}."
        raise bad(f"{param}.type", message, "unsupported_parameter")
    more = _PARTS[kind] if isinstance(kind, str) else {}
    table = {"type": Field(one_of(*_PARTS), required=True), "text": Field(string, required=True)}
    return parse_object(param, value, table | more)["text"]


_OWN = {"id": Field(hint), "status": Field(one_of(*_STATUSES))}  # as they were in a response
_CALL_ID = {"call_id": Field(string, required=True)}
_ITEMS: dict[str, dict[str, Field]] = {
    "message": _OWN
    | {
        "type": Field(one_of("message")),
        "role": Field(one_of("system", "developer", "user", "assistant"), required=True),
        "content": Field(joined(_part), required=True),
        "phase": Field(no_op(why="chat templates have no place for it")),
    },
    "function_call": _OWN
    | _CALL_ID
    | {
        "type": Field(one_of("function_call"), required=True),
        "name": Field(string, required=True),
        "arguments": Field(string, required=True),
    },
    "function_call_output": _OWN
    | _CALL_ID
    | {"type": Field(one_of("function_call_output"), required=True), "output": Field(joined(_part), required=True)},
}


@described(lambda: any_of(STRING, array(any_of(*map(schema_of_object, _ITEMS.values())), 1)))
def conversation(param: str, value: Any) -> list[dict[str, Any]]:
    """A text or a list of items -> messages of a chat."""
    if isinstance(value, str):
        return [{"role": "user", "content": string(param, value)}]
    if not isinstance(value, list) or not value:
        raise bad(param, f"'{param}' must be a string or a list of items, got {show(value)}.", "invalid_type")
    check_pieces(param, value)
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        _add(messages, f"{param}[{i}]", item)
    return messages


def _add(messages: list[dict[str, Any]], param: str, value: Any) -> None:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if not isinstance(kind, str) or kind not in _ITEMS:
        known = ", ".join(_ITEMS)
        message = f"'{param}.type' must be one of {known}, got {show(kind)}: {_NOT_KEPT}, and {_TEXT_ONLY}."
        raise bad(f"{param}.type", message, "unsupported_parameter")
    item = parse_object(param, value, _ITEMS[kind])
    if kind == "message":
        messages.append({"role": item["role"], "content": item["content"]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item["name"], "arguments": item["arguments"]}
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append({"id": item["call_id"], "type": "function", "function": function})


# -- the other fields -------------------------------------------------------------------------------------------------


def _flat(inner: str) -> Callable[[str, Any], Any]:
    """{"type": ..., a: b} as a chat writes it: {"type": ..., inner: {a: b}}. What it says is checked there."""

    @described({"type": "object"})
    def parse(param: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise bad(param, f"'{param}' must be an object with a 'type', got {show(value)}.", "invalid_type")
        rest = {name: part for name, part in value.items() if name != "type"}
        return {name: value[name] for name in ("type",) if name in value} | ({inner: rest} if rest else {})

    return parse


@described(array({"type": "object"}))
def _tools(param: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of tools, got {show(value)}.", "invalid_type")
    return [_flat("function")(f"{param}[{i}]", tool) for i, tool in enumerate(value)]


@described(any_of(STRING, {"type": "object"}))
def _tool_choice(param: str, value: Any) -> Any:
    return value if isinstance(value, str) else _flat("function")(param, value)


_TEXT = {
    "format": Field(_flat("json_schema"), {"type": "text"}),
    "verbosity": Field(no_op("medium", why="the model has no verbosity setting")),
}
_REASONING = {
    "effort": Field(no_op("none", why="the model has no reasoning mode")),
    "summary": Field(no_op(why="the model has no reasoning mode")),
    "generate_summary": Field(no_op(why="the model has no reasoning mode")),
}
_STREAM_OPTIONS = {"include_obfuscation": Field(no_op(False, why="stream obfuscation is not implemented"))}


def _object(table: dict[str, Field]) -> Callable[[str, Any], dict[str, Any]]:
    return described(lambda: schema_of_object(table))(lambda param, value: parse_object(param, value, table))


@described(array({"enum": [LOGPROBS]}))
def _include(param: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of strings, got {show(value)}.", "invalid_type")
    return [one_of(LOGPROBS)(f"{param}[{i}]", item) for i, item in enumerate(value)]


RESPONSES: dict[str, Field] = {
    "model": Field(string, required=True),
    "input": Field(conversation, required=True),
    "instructions": Field(string),
    "max_output_tokens": Field(integer(1)),
    "temperature": Field(number(0, 2), 1.0),
    "top_p": Field(number(0, 1, exclude_low=True), 1.0),
    "top_logprobs": Field(integer(0, MAX_TOP_LOGPROBS)),
    "include": Field(_include, []),
    "stream": Field(boolean, False),
    "stream_options": Field(_object(_STREAM_OPTIONS)),
    "text": Field(_object(_TEXT), {"format": {"type": "text"}}),
    "tools": Field(_tools, []),
    "tool_choice": Field(_tool_choice),
    "parallel_tool_calls": Field(boolean, True),
    "max_tool_calls": Field(integer(1)),  # of tools that a server calls itself; this one calls none
    "metadata": Field(metadata, {}),
    "user": Field(hint),
    "safety_identifier": Field(hint),
    "prompt_cache_key": Field(hint),
    "service_tier": Field(no_op("auto", "default", why="there is one service tier")),
    "truncation": Field(no_op("disabled", why="a conversation is never shortened; leave out old items yourself")),
    "store": Field(no_op(False, why=_NOT_KEPT)),
    "background": Field(no_op(False, why=f"{_NOT_KEPT}; /v1/batches runs requests that nobody waits for")),
    "previous_response_id": Field(no_op(why=f"{_NOT_KEPT}; send the items of the conversation as 'input'")),
    "conversation": Field(no_op(why=f"{_NOT_KEPT}; send the items of the conversation as 'input'")),
    "prompt": Field(no_op(why="this server keeps no prompts")),
    "prompt_cache_options": Field(no_op({}, why="the lifetime of cached prompts can't be promised")),
    "prompt_cache_retention": Field(no_op("in_memory", why="prompts are cached in memory only")),
    "reasoning": Field(_object(_REASONING)),
    "access_programs": Field(no_op(why="there are none")),
    "context_management": Field(no_op([], why="a conversation is never shortened")),
    "image": Field(no_op(why="the model writes text only")),
    "moderation": Field(no_op(why="there is no moderation model")),
    # Extensions, as of the other endpoints.
    **{name: COMMON[name] for name in EXTENSIONS},
}

_SAME = ("model", "temperature", "top_p", "tools", "tool_choice", *EXTENSIONS)


def as_chat(values: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat that says what the checked fields say."""
    messages = values["input"]
    if values["instructions"] is not None:
        messages = [{"role": "system", "content": values["instructions"]}, *messages]
    body = {name: values[name] for name in _SAME}
    body |= {"messages": messages, "max_completion_tokens": values["max_output_tokens"]}
    if values["text"]["format"] != {"type": "text"}:
        body["response_format"] = values["text"]["format"]
    if values["tools"]:
        body["parallel_tool_calls"] = values["parallel_tool_calls"]
    elif values["tool_choice"] == "auto":  # what every response says, also one without tools; a chat refuses it
        body["tool_choice"] = None
    if LOGPROBS in values["include"] or values["top_logprobs"] is not None:
        body |= {"logprobs": True, "top_logprobs": values["top_logprobs"]}
    return body


_NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}


def renamed(error: ApiError) -> ApiError:
    """An error over the chat's fields, over those that the client has sent."""
    param, message = error.param or "", error.message
    if re.match(r"messages\b", param):  # items are not numbered as messages are
        param, message = "input", message.replace(f"'{param}'", "'input'")
    elif re.match(r"tool", param):
        param, message = param.replace(".function", ""), message.replace(".function", "")
    for old, new in _NAMES.items():
        param = re.sub(rf"^{re.escape(old)}\b", new, param)
        message = re.sub(rf"'{re.escape(old)}\b", f"'{new}", message)
    details: dict[str, Any] = {"code": error.code, "type": error.type, "retry_after": error.retry_after}
    return ApiError(error.status, message, param=param or None, **details)
