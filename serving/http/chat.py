"""POST /v1/chat/completions: messages through the model's chat template, and chunks back."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from ...checkpoints.chat_template import ChatTemplateError
from ..request import Output, Request
from . import fields
from .choices import Choice, TokenEntry, chat_logprobs
from .errors import bad, nearest, show
from .fields import Field, no_op, string
from .jobs import Job, check_count, new_id
from .service import Service, include_usage, off_loop, sampling_params, usage

ROLES = ("system", "developer", "user", "assistant")
_NO_TOOLS = "this server does not parse tool calls"


class ChatJob(Job):
    """Each of the `n` choices is one engine request with the same prompt."""

    def __init__(self, service: Service, values: dict[str, Any], prompt_ids: list[int], arrival: float) -> None:
        self.id = new_id("chatcmpl")
        self.stream = values["stream"]
        self._include_usage = include_usage(values)
        self._service = service
        self._logprobs = _logprobs(values)
        self._service_tier = values["service_tier"]
        self._created = int(time.time())
        self._prompt_tokens = len(prompt_ids)
        asked, asked_name = _max_tokens(values)
        max_tokens = service.new_tokens(len(prompt_ids), asked, None, ("messages", asked_name))
        check_count(service, values["n"], "n")
        self.requests = []
        for i in range(values["n"]):
            params = sampling_params(values, max_tokens=max_tokens, seed_offset=i, logprobs=self._logprobs)
            request = Request(f"{self.id}-{i}", prompt_ids, params, arrival, values["cache_salt"])
            service.check_request(request, {"prompt": "messages", "max_tokens": asked_name, "logprobs": "top_logprobs"})
            self.requests.append(request)
        self._choices = {
            request.id: Choice(i, service.tokenizer, self._logprobs is not None)
            for i, request in enumerate(self.requests)
        }

    def first_events(self) -> Iterator[dict[str, Any]]:
        for choice in self._choices.values():
            yield self._chunk(choice.index, {"role": "assistant", "content": "", "refusal": None}, [], None)

    def events(self, output: Output) -> Iterator[dict[str, Any]]:
        choice = self._choices[output.request_id]
        delta = choice.feed(output)
        if delta.text or delta.entries:
            yield self._chunk(choice.index, {"content": delta.text}, delta.entries, None)
        if delta.finish_reason is not None:
            yield self._chunk(choice.index, {}, None, delta.finish_reason)

    def last_events(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield self._body("chat.completion.chunk", [], self._usage())

    def feed(self, output: Output) -> None:
        self._choices[output.request_id].feed(output)

    def body(self) -> dict[str, Any]:
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._format(choice.entries),
                "finish_reason": choice.finish_reason,
            }
            for choice in self._choices.values()
        ]
        return self._body("chat.completion", choices, self._usage())

    def _chunk(
        self, index: int, delta: dict[str, Any], entries: list[TokenEntry] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._format(entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice], None)

    def _format(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return chat_logprobs(self._service.tokenizer, entries, self._logprobs)

    def _usage(self) -> dict[str, Any]:
        choices = list(self._choices.values())
        completion_tokens = [choice.completion_tokens for choice in choices]
        return usage([self._prompt_tokens], completion_tokens, choices[0].cached_tokens)

    def _body(self, kind: str, choices: list[dict[str, Any]], tokens: dict[str, Any] | None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_id,
            "system_fingerprint": self._service.engine.info.fingerprint,
            "choices": choices,
        }
        if self._service_tier is not None:
            body["service_tier"] = "default"
        if tokens is not None or (self.stream and self._include_usage):
            body["usage"] = tokens
        return body


def _logprobs(values: dict[str, Any]) -> int | None:
    """None for no log-probabilities, else how many of the likeliest tokens."""
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise bad("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.")
    return (values["top_logprobs"] or 0) if values["logprobs"] else None


def _max_tokens(values: dict[str, Any]) -> tuple[int | None, str]:
    old, new = values["max_tokens"], values["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        message = f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; send the latter only."
        raise bad("max_tokens", message)
    return (new, "max_completion_tokens") if old is None else (old, "max_tokens")


async def chat_job(service: Service, body: dict[str, Any], arrival: float) -> ChatJob:
    values = fields.parse_object(None, body, fields.CHAT)
    service.check_model(values["model"])
    prompt_ids = await chat_prompt(service, values["messages"], add_generation_prompt=True)
    return ChatJob(service, values, prompt_ids, arrival)


async def chat_prompt(service: Service, given: Any, *, add_generation_prompt: bool) -> list[int]:
    """The token ids of a conversation. Raises 400 where it is malformed or the template refuses it."""
    tokenizer = service.tokenizer
    template = tokenizer.chat_template
    if template is None:
        message = "This model has no chat template, so it can't chat. Put a chat_template.jinja beside its "
        message += "tokenizer.json and restart, or use /v1/completions."
        raise bad("messages", message, "no_chat_template")
    messages = check_messages(given, template)
    size = sum(len(message["content"]) for message in messages)
    try:
        text = await off_loop(
            size, lambda: tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        )
    except ChatTemplateError as error:
        raise bad("messages", f"{error}.") from None
    return await service.encode(text, add_bos=False)


# -- messages ---------------------------------------------------------------------------------------------------------


def _role(param: str, value: Any) -> str:
    role = string(param, value)
    if role in ("tool", "function"):
        raise bad(param, f"'{param}' is {show(role)}, but {_NO_TOOLS}.", "unsupported_parameter")
    if role not in ROLES:
        raise bad(param, f"'{param}' must be one of {', '.join(ROLES)}, got {show(role)}.{nearest(role, ROLES)}")
    return role


def _content(param: str, value: Any) -> str:
    """A string, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return string(param, value)
    if not isinstance(value, list) or not value:
        raise bad(param, f"'{param}' must be a string or a list of text parts, got {show(value)}.", "invalid_type")
    return "".join(_part(f"{param}[{i}]", part) for i, part in enumerate(value))


def _part(param: str, value: Any) -> str:
    if isinstance(value, dict) and value.get("type") != "text":
        kind = value.get("type")
        message = f"'{param}.type' must be 'text', got {show(kind)}: this model reads text only."
        raise bad(f"{param}.type", message, "unsupported_parameter" if isinstance(kind, str) else "invalid_value")
    return fields.parse_object(param, value, _PART)["text"]


_PART = {
    "type": Field(string, required=True),
    "text": Field(string, required=True),
    "prompt_cache_breakpoint": Field(no_op(why="the lifetime of cached prompts can't be promised")),
}
_MESSAGE = {"role": Field(_role, required=True), "content": Field(_content), "name": Field(string)}
_ASSISTANT = _MESSAGE | {
    "audio": Field(no_op(why="the model reads text only")),
    "function_call": Field(no_op(why=_NO_TOOLS)),
    "refusal": Field(no_op(why="chat templates have no place for a refusal; send it as content")),
    "tool_calls": Field(no_op([], why=_NO_TOOLS)),
    # Sent back by clients that return our own answers as they got them.
    "annotations": Field(no_op([], why="the model reads text only")),
}


def check_messages(value: Any, template: str) -> list[dict[str, str]]:
    """The messages as the template gets them: role, content as one string, and the name where the template uses it."""
    if not isinstance(value, list):
        raise bad("messages", f"'messages' must be a list of messages, got {show(value)}.", "invalid_type")
    if not value:
        raise bad("messages", "'messages' is empty; send at least one message.")
    return [_message(f"messages[{i}]", message, template) for i, message in enumerate(value)]


def _message(param: str, value: Any, template: str) -> dict[str, str]:
    is_assistant = isinstance(value, dict) and value.get("role") == "assistant"
    if isinstance(value, dict) and isinstance(value.get("role"), str):
        _role(f"{param}.role", value["role"])  # before the fields that only other roles have
    message = fields.parse_object(param, value, _ASSISTANT if is_assistant else _MESSAGE)
    if message["content"] is None:
        raise bad(f"{param}.content", f"'{param}.content' is required.", "missing_required_parameter")
    role = message["role"]
    # By its definition a developer message is what a system message was; few templates know the new name.
    if role == "developer" and "developer" not in template:
        role = "system"
    out = {"role": role, "content": message["content"]}
    if message["name"] is not None:
        if not re.search(r"\bname\b", template):
            text = f"'{param}.name' is not supported: this model's chat template has no place for names."
            raise bad(f"{param}.name", text, "unsupported_parameter")
        out["name"] = message["name"]
    return out
