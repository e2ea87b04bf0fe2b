"""Tools of /v1/chat/completions: what a request says of them, a grammar of calls, and the calls in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...checkpoints.tokenizer import Tokenizer
from ..request import Grammar
from . import tool_formats
from .errors import bad, show
from .output_format import json_text
from .parameter_schema import json_rule
from .parsers import Field, boolean, one_of, parse_object, schema_of_object, string
from .schemas import STRING, any_of, array, described
from .tool_formats import Function, ToolFormat
from .tool_parser import CallPiece

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer, where a grammar writes them
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function. `given`: as the client wrote it, for the chat template."""

    name: str
    schema: dict[str, Any]
    strict: bool
    given: dict[str, Any]


# -- fields -----------------------------------------------------------------------------------------------------------


@described(STRING | {"pattern": "^[A-Za-z0-9_.-]{1,64}$"})
def function_name(param: str, value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", string(param, value)):
        raise bad(param, f"'{param}' must have 1 to 64 letters, digits, '_', '.' and '-', got {show(value)}.")
    return value


@described({"type": "object"})
def _parameters(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise bad(param, f"'{param}' must be a JSON schema of an object, got {show(value)}.", "invalid_type")
    json_text(param, value)
    return {"type": "object", **value}


_FUNCTION = {
    "name": Field(function_name, required=True),
    "description": Field(string),
    "parameters": Field(_parameters, _NO_PARAMETERS),
    "strict": Field(boolean, False),
}


@described(lambda: schema_of_object(_FUNCTION))
def _function(param: str, value: Any) -> dict[str, Any]:
    return parse_object(param, value, _FUNCTION)


_TOOL = {"type": Field(one_of("function"), required=True), "function": Field(_function, required=True)}


@described(lambda: array(schema_of_object(_TOOL), 0, MAX_TOOLS))
def tools(param: str, value: Any) -> list[Tool]:
    if not isinstance(value, list):
        raise bad(param, f"'{param}' must be a list of tools, got {show(value)}.", "invalid_type")
    if len(value) > MAX_TOOLS:
        raise bad(param, f"'{param}' takes at most {MAX_TOOLS} tools, got {len(value)}.")
    out: dict[str, Tool] = {}
    for i, given in enumerate(value):
        function = parse_object(f"{param}[{i}]", given, _TOOL)["function"]
        name = function["name"]
        if name in out:
            raise bad(f"{param}[{i}].function.name", f"'{param}[{i}].function.name' is {show(name)} a second time.")
        out[name] = Tool(name, function["parameters"], function["strict"], given)
    return list(out.values())


_NAMED_FUNCTION = {"name": Field(function_name, required=True)}
_NAMED = {
    "type": Field(one_of("function"), required=True),
    "function": Field(lambda param, value: parse_object(param, value, _NAMED_FUNCTION), required=True),
}
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Named:
    """The function that is to be called."""

    name: str


@described(lambda: any_of({"enum": list(_CHOICES)}, schema_of_object(_NAMED)))
def tool_choice(param: str, value: Any) -> str | Named:
    if isinstance(value, dict):
        return Named(parse_object(param, value, _NAMED)["function"]["name"])
    return one_of(*_CHOICES)(param, value)


# -- one request ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolUse:
    """What a request with tools asks of an answer.

    Attributes:
        schemas: of the functions' arguments, by name.
        grammar: where its text must be calls, or have right ones.
    """

    format: ToolFormat
    schemas: dict[str, Any]
    offered: list[dict[str, Any]]
    grammar: Grammar | None
    forced: bool
    shows_special: bool


def tool_use(values: dict[str, Any], tokenizer: Tokenizer, content: Grammar | None) -> ToolUse | None:
    """From checked fields; None where no tool may be called. Raises 400.

    `content`: what an answer must be a text of that calls nothing.
    """
    given: list[Tool] = values["tools"]
    choice = values["tool_choice"] or ("auto" if given else "none")
    if choice == "none":
        return None
    if not given:
        raise bad("tool_choice", "'tool_choice' is only allowed with 'tools'.")
    if isinstance(choice, Named) and choice.name not in [tool.name for tool in given]:
        raise bad("tool_choice", f"'tool_choice' names {show(choice.name)}, which is not one of the 'tools'.")
    template = tokenizer.template_for(tools=True)
    if template is None or not re.search(r"\btools\b", template):
        raise bad("tools", "'tools' is not supported: this model's chat template has no place for tools.", "no_tools")
    found = tool_formats.of_template(template)
    if found is None:
        known = ", ".join(tool_formats.names())
        message = f"'tools' is not supported: how this model writes tool calls is not known (known are {known})."
        raise bad("tools", message, "no_tools")
    special = {mark: token for mark in found.MARKS if (token := tokenizer.token_to_id(mark)) in tokenizer.special_ids}
    forced = choice != "auto"
    return ToolUse(
        format=found,
        schemas={tool.name: tool.schema for tool in given},
        offered=[tool.given for tool in given],
        grammar=_grammar(given, choice, found, special, values["parallel_tool_calls"] is not False, content),
        forced=forced,
        shows_special=bool(special),
    )


def _grammar(
    given: list[Tool],
    choice: str | Named,
    written: ToolFormat,
    special: dict[str, Any],
    parallel: bool,
    content: Grammar | None,
) -> Grammar | None:
    if choice == "auto" and content is None and not any(tool.strict for tool in given):
        return None
    start = "calls"
    if choice == "auto":
        start = "text_then_calls" if content is None else "calls | content"
        if content is not None and content.kind != "json_schema":
            raise bad("structured_outputs", "'structured_outputs' goes with 'tools' only where it is JSON.")
        if content is not None and written.BEGINS_AS_JSON:
            message = "goes with 'tools' only where a call is required or forbidden: this model's calls are JSON too."
            raise bad("response_format", f"'response_format' {message}")
    callable_ = [tool for tool in given if not isinstance(choice, Named) or tool.name == choice.name]
    most = MAX_CALLS if parallel and not isinstance(choice, Named) else 1
    functions = [
        Function(tool.name, tool.schema if tool.strict or choice != "auto" else {"type": "object"})
        for tool in callable_
    ]
    try:
        rules = written.rules(
            functions, lambda mark: f"<[{special[mark]}]>" if mark in special else json.dumps(mark), most
        )
    except ValueError as error:
        raise bad("tools", f"'tools' can't be used: {error}.", "invalid_grammar") from None
    lines = [f"start: {start}", rules, "TEXT: /(?s:.*)/"]
    if content is not None and choice == "auto":
        try:
            lines.append(f"content: {json_rule(json.loads(content.text))}")
        except (ValueError, TypeError, RecursionError):
            raise bad("structured_outputs", "'structured_outputs.json' must be a JSON schema, an object.") from None
    return Grammar("lark", "\n".join(lines))


def _mark(mark: str, special: dict[str, Any]) -> str:
    return f"<[{special[mark]}]>" if mark in special else json.dumps(mark, ensure_ascii=False)


class ToolAnswer:
    """The message of one choice whose text may have calls in it."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = use.format.parser(use.schemas)
        self._new_id = use.format.new_id
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def feed(self, text: str, ended: bool) -> Iterator[dict[str, Any]]:
        """The deltas of a stream that a piece of text makes."""
        pieces = self._parser.feed(text) + (self._parser.finish() if ended else [])
        for piece in pieces:
            yield self._call(piece) if isinstance(piece, CallPiece) else self._text(piece)

    def _text(self, text: str) -> dict[str, Any]:
        self.content += text
        return {"content": text}

    def _call(self, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            self.calls[piece.index]["function"]["arguments"] += piece.arguments
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
        own = piece.id if piece.id not in [call["id"] for call in self.calls] else None
        call = {"id": own or self._new_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}}
        self.calls.append(call)
        return {"tool_calls": [{"index": piece.index, **call, "function": dict(call["function"])}]}

    def message(self) -> dict[str, Any]:
        content = self.content if self.content or not self.calls else None
        return {"role": "assistant", "content": content, "refusal": None} | (
            {"tool_calls": self.calls} if self.calls else {}
        )

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if self.calls and reason == "stop" else reason
