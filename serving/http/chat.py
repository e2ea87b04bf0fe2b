"""POST /v1/chat/completions: messages through the model's chat template, and chunks back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from ...checkpoints.chat_template import ChatTemplateError, ChatTemplateTimeout
from ..request import Grammar, Output, Request
from . import fields, output_format
from .choices import Choice, TokenEntry, chat_logprobs
from .errors import bad, unavailable
from .jobs import Job, check_count, new_id
from .messages import check_messages, with_written_arguments
from .service import Service, include_usage, sampling_params, scheduling, usage
from .tools import ToolAnswer, ToolUse, tool_use


class ChatJob(Job):
    """Each of the `n` choices is one engine request with the same prompt.

    `grammar`: what the answers must be texts of. `use`: what may be called, where something may.
    """

    def __init__(
        self,
        service: Service,
        values: dict[str, Any],
        prompt_ids: list[int],
        arrival: float,
        grammar: Grammar | None,
        use: ToolUse | None,
    ) -> None:
        self.id = new_id("chatcmpl")
        self.stream = values["stream"]
        self._include_usage = include_usage(values)
        self._service = service
        self._logprobs = _logprobs(values)
        self._return_ids = values["return_token_ids"]
        self._service_tier = values["service_tier"]
        self._created = int(time.time())
        self._prompt_ids = prompt_ids
        asked, asked_name = _max_tokens(values)
        max_tokens = service.new_tokens(len(prompt_ids), asked, None, ("messages", asked_name))
        check_count(service, values["n"], "n")
        self.requests = []
        for i in range(values["n"]):
            params = sampling_params(
                values, max_tokens=max_tokens, seed_offset=i, logprobs=self._logprobs, grammar=grammar
            )
            request = Request(f"{self.id}-{i}", prompt_ids, params, arrival, values["cache_salt"], **scheduling(values))
            service.check_request(request, {"prompt": "messages", "max_tokens": asked_name, "logprobs": "top_logprobs"})
            self.requests.append(request)
        self._choices = {
            request.id: Choice(
                i, service.tokenizer, self._logprobs is not None, self._return_ids, values["skip_special_tokens"]
            )
            for i, request in enumerate(self.requests)
        }
        self._answers = {request.id: ToolAnswer(use) for request in self.requests} if use else {}
        # Where the answer is a call, there is no content.
        self._first = {"role": "assistant", "content": None if use and use.forced else "", "refusal": None}

    def first_events(self) -> Iterator[dict[str, Any]]:
        for choice in self._choices.values():
            chunk = self._chunk(choice.index, self._first, [], None)
            yield chunk | ({"prompt_token_ids": self._prompt_ids} if self._return_ids else {})

    def events(self, output: Output) -> Iterator[dict[str, Any]]:
        choice = self._choices[output.request_id]
        delta = choice.feed(output)
        answer, reason = self._answers.get(output.request_id), delta.finish_reason
        changes: list[dict[str, Any]] = [{"content": delta.text}] if delta.text else []
        if answer is not None:
            changes = list(answer.feed(delta.text, reason is not None))
            reason = answer.finish_reason(reason)
        if not changes and (delta.entries or delta.token_ids):
            changes = [{"content": ""} if answer is None else {}]
        entries, token_ids = delta.entries, delta.token_ids
        for change in changes:
            yield self._chunk(choice.index, change, entries, None, token_ids)
            entries, token_ids = [], []  # they went with the first
        if reason is not None:
            yield self._chunk(choice.index, {}, None, reason)

    def last_events(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield self._body("chat.completion.chunk", [], self._usage())

    def feed(self, output: Output) -> None:
        delta = self._choices[output.request_id].feed(output)
        answer = self._answers.get(output.request_id)
        if answer is not None:
            for _ in answer.feed(delta.text, delta.finish_reason is not None):
                continue

    def body(self) -> dict[str, Any]:
        choices = [
            {
                "index": choice.index,
                "message": self._message(name, choice),
                "logprobs": self._format(choice.entries),
                "finish_reason": self._reason(name, choice),
                **({"token_ids": choice.token_ids} if self._return_ids else {}),
            }
            for name, choice in self._choices.items()
        ]
        ids = {"prompt_token_ids": self._prompt_ids} if self._return_ids else {}
        return self._body("chat.completion", choices, self._usage()) | ids

    def _message(self, name: str, choice: Choice) -> dict[str, Any]:
        if name in self._answers:
            return self._answers[name].message()
        return {"role": "assistant", "content": choice.text, "refusal": None}

    def _reason(self, name: str, choice: Choice) -> str | None:
        reason = choice.finish_reason
        return self._answers[name].finish_reason(reason) if name in self._answers else reason

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        entries: list[TokenEntry] | None,
        finish_reason: str | None,
        token_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        logprobs = self._format(entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if self._return_ids:
            choice["token_ids"] = token_ids
        return self._body("chat.completion.chunk", [choice], None)

    def _format(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return chat_logprobs(self._service.tokenizer, entries, self._logprobs)

    def _usage(self) -> dict[str, Any]:
        choices = list(self._choices.values())
        completion_tokens = [choice.completion_tokens for choice in choices]
        return usage([len(self._prompt_ids)], completion_tokens, choices[0].cached_tokens)

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
    grammar, param = output_format.chosen(values)
    use = tool_use(values, service.tokenizer, grammar)
    if use is not None:
        grammar, param = use.grammar, "tools"
        values["skip_special_tokens"] &= not use.shows_special
    await service.check_grammar(grammar, param)
    tools = use.offered if use else None
    prompt_ids = await chat_prompt(service, values["messages"], add_generation_prompt=True, tools=tools)
    return ChatJob(service, values, prompt_ids, arrival, grammar, use)


async def chat_prompt(
    service: Service, given: Any, *, add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The token ids of a conversation. Raises 400 where it is malformed or the template refuses it, 503 where the
    process that renders it hangs."""
    tokenizer = service.tokenizer
    template = tokenizer.template_for(bool(tools))
    if template is None:
        message = "This model has no chat template, so it can't chat. Put a chat_template.jinja beside its "
        message += "tokenizer.json and restart, or use /v1/completions."
        raise bad("messages", message, "no_chat_template")
    messages = check_messages(given, template)

    # Another process does it: one that starts, or is at a novel, holds up nobody else's tokens.
    async def render(messages: list[dict[str, Any]]) -> str:
        try:
            return await asyncio.to_thread(
                tokenizer.apply_chat_template, messages, tools, add_generation_prompt=add_generation_prompt
            )
        except ChatTemplateTimeout as error:
            raise unavailable(f"{error}. Try again.", "chat_template_timeout") from None

    try:
        text = await render(messages)
    except ChatTemplateError as error:
        written = with_written_arguments(messages)  # as templates of DeepSeek want them
        if written == messages:
            raise bad("messages", f"{error}.") from None
        try:
            text = await render(written)
        except ChatTemplateError:
            raise bad("messages", f"{error}.") from None
    return await service.encode_prompt("messages", text, add_bos=False)
