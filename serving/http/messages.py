"""The `messages` of /v1/chat/completions, checked, as a chat template gets them."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import bad, nearest, show
from .parsers import Field, check_pieces, joined, no_op, one_of, parse_object, string
from .tools import function_name

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(value: Any, template: str) -> list[dict[str, Any]]:
    """The messages as the template gets them: role, content as one string, calls of tools with their arguments as
    objects, and the name where the template uses it."""
    if not isinstance(value, list):
        raise bad("messages", f"'messages' must be a list of messages, got {show(value)}.", "invalid_type")
    if not value:
        raise bad("messages", "'messages' is empty; send at least one message.")
    check_pieces("messages", value)
    return [_message(f"messages[{i}]", message, template) for i, message in enumerate(value)]


def with_written_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with the arguments of calls as texts in JSON."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**message, "tool_calls": list(map(written, message["tool_calls"]))} if "tool_calls" in message else message
        for message in messages
    ]


def _message(param: str, value: Any, template: str) -> dict[str, Any]:
    given = value.get("role") if isinstance(value, dict) else None
    if isinstance(given, str):
        _role(f"{param}.role", given)  # before the fields that only other roles have
    table = {"assistant": _ASSISTANT, "tool": _TOOL}.get(given, _MESSAGE) if isinstance(given, str) else _MESSAGE
    message = parse_object(param, value, table)
    role, content, calls = message["role"], message["content"], message.get("tool_calls") or []
    if content is None and not calls:
        raise bad(f"{param}.content", f"'{param}.content' is required.", "missing_required_parameter")
    if (calls or role == "tool") and not re.search(r"\btool", template):
        field = f"{param}.role" if role == "tool" else f"{param}.tool_calls"
        text = f"'{field}' is not supported: this model's chat template has no place for calls of tools."
        raise bad(field, text, "unsupported_parameter")
    # By its definition a developer message is what a system message was; few templates know the new name.
    if role == "developer" and "developer" not in template:
        role = "system"
    out: dict[str, Any] = {"role": role, "content": content or ""}
    if calls:
        out["tool_calls"] = calls
    if role == "tool":
        out["tool_call_id"] = message["tool_call_id"]
    if message["name"] is not None:
        if not re.search(r"\bname\b", template):
            text = f"'{param}.name' is not supported: this model's chat template has no place for names."
            raise bad(f"{param}.name", text, "unsupported_parameter")
        out["name"] = message["name"]
    return out


def _role(param: str, value: Any) -> str:
    role = string(param, value)
    if role == "function":
        raise bad(param, f"'{param}' is 'function', which is the old name; use 'tool'.", "unsupported_parameter")
    if role not in ROLES:
        raise bad(param, f"'{param}' must be one of {', '.join(ROLES)}, got {show(role)}.{nearest(role, ROLES)}")
    return role


def _part(param: str, value: Any) -> str:
    if isinstance(value, dict) and value.get("type") != "text":
        kind = value.get("type")
        message = f"'{param}.type' must be 'text', got {show(kind)}: this model reads text only."
        raise bad(f"{param}.type", message, "unsupported_parameter" if isinstance(kind, str) else "invalid_value")
    return parse_object(param, value, _PART)["text"]


def _arguments(param: str, value: Any) -> dict[str, Any]:
    try:
        found = json.loads(string(param, value))
    except (ValueError, RecursionError) as error:
        raise bad(param, f"'{param}' must be a JSON object, written as a string: {error}.") from None
    if not isinstance(found, dict):
        raise bad(param, f"'{param}' must be a JSON object, written as a string, got {show(value)}.")
    return found


def _function(param: str, value: Any) -> dict[str, Any]:
    return parse_object(param, value, _CALLED)


def _tool_calls(param: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of calls, got {show(value)}.", "invalid_type")
    calls = [parse_object(f"{param}[{i}]", call, _CALL) for i, call in enumerate(value)]
    return [{name: call[name] for name in ("id", "type", "function")} for call in calls]


_CALLED = {"name": Field(function_name, required=True), "arguments": Field(_arguments, required=True)}
_CALL = {
    "id": Field(string, required=True),
    "type": Field(one_of("function"), required=True),
    "function": Field(_function, required=True),
    "index": Field(lambda param, value: value),  # sent back by clients that put a stream's deltas together
}
_PART = {
    "type": Field(string, required=True),
    "text": Field(string, required=True),
    "prompt_cache_breakpoint": Field(no_op(why="the lifetime of cached prompts can't be promised")),
}
_MESSAGE = {"role": Field(_role, required=True), "content": Field(joined(_part)), "name": Field(string)}
_TOOL = _MESSAGE | {"tool_call_id": Field(string, required=True)}
_ASSISTANT = _MESSAGE | {
    "audio": Field(no_op(why="the model reads text only")),
    "function_call": Field(no_op(why="it is the old name; use 'tool_calls'")),
    "refusal": Field(no_op(why="chat templates have no place for a refusal; send it as content")),
    "tool_calls": Field(_tool_calls, []),
    # Sent back by clients that return our own answers as they got them.
    "annotations": Field(no_op([], why="the model reads text only")),
}
