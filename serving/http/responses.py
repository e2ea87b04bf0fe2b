"""POST /v1/responses, as far as nothing is kept from one request to the next: a chat that answers in items and events.

https://platform.openai.com/docs/api-reference/responses. The request is a chat's, and so is the answer, whose chunks
become output items: a message, and calls of functions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from ..request import Output
from .chat import chat_job
from .errors import ApiError
from .jobs import Job
from .parsers import parse_object
from .response_input import RESPONSES, as_chat, renamed
from .service import Service


class ResponseJob(Job):
    """One response. `chat` is the same request as a chat with one choice."""

    named_events = True

    def __init__(self, service: Service, values: dict[str, Any], given: dict[str, Any], chat: Job) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        self.stream = values["stream"]
        self.requests = chat.requests
        self._service, self._values, self._given, self._chat = service, values, given, chat
        self._created = int(time.time())
        self._events = 0
        self._items: list[dict[str, Any]] = []
        self._open = False  # whether the last item may grow
        self._status = "in_progress"
        self._usage: dict[str, Any] | None = None

    # -- answers --------------------------------------------------------------------------------------------------

    def first_events(self) -> Iterator[dict[str, Any]]:
        yield self._event("created", response=self._response())
        yield self._event("in_progress", response=self._response())

    def events(self, output: Output) -> Iterator[dict[str, Any]]:
        for chunk in self._chat.events(output):
            for choice in chunk["choices"]:
                yield from self._delta(choice["delta"], (choice["logprobs"] or {}).get("content") or [])
                if choice["finish_reason"] is not None:
                    yield from self._end("incomplete" if choice["finish_reason"] == "length" else "completed")

    def last_events(self) -> Iterator[dict[str, Any]]:
        yield self._event(self._status, response=self.body())

    def failed(self, error: ApiError) -> Iterator[dict[str, Any]]:
        yield {
            "type": "error",
            "sequence_number": self._number(),
            "code": error.code,
            "message": error.message,
            "param": error.param,
        }

    def feed(self, output: Output) -> None:
        for _ in self.events(output):
            pass

    def body(self) -> dict[str, Any]:
        used = self._chat.body()["usage"]
        self._usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": used["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        return self._response()

    # -- items ----------------------------------------------------------------------------------------------------

    def _delta(self, delta: dict[str, Any], logprobs: list[Any]) -> Iterator[dict[str, Any]]:
        text = delta.get("content")
        if text or logprobs:
            if not self._open or self._items[-1]["type"] != "message":
                yield from self._close()
                yield from self._begin_message()
            part = self._items[-1]["content"][0]
            part["text"] += text or ""
            part["logprobs"] += logprobs
            yield self._event("output_text.delta", content_index=0, delta=text or "", logprobs=logprobs, **self._at())
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            if "id" in call:
                yield from self._close()
                yield from self._begin({
                    "type": "function_call", "id": f"fc_{secrets.token_hex(16)}", "call_id": call["id"],
                    "name": function["name"], "arguments": "",
                })  # fmt: skip
            if function["arguments"]:
                self._items[-1]["arguments"] += function["arguments"]
                yield self._event("function_call_arguments.delta", delta=function["arguments"], **self._at())

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._items.append(item | {"status": "in_progress"})
        self._open = True
        yield self._event("output_item.added", output_index=len(self._items) - 1, item=_copy(self._items[-1]))

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        yield from self._begin(
            {"type": "message", "id": f"msg_{secrets.token_hex(16)}", "role": "assistant", "content": []}
        )
        self._items[-1]["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        [part] = self._items[-1]["content"]
        yield self._event("content_part.added", content_index=0, part=_copy(part), **self._at())

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        item, self._open = self._items[-1], False
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("output_text.done", content_index=0, **text, **self._at())
            yield self._event("content_part.done", content_index=0, part=_copy(part), **self._at())
        else:
            yield self._event(
                "function_call_arguments.done", arguments=item["arguments"], name=item["name"], **self._at()
            )
        yield self._event("output_item.done", output_index=len(self._items) - 1, item=_copy(item))

    def _end(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._items:
            yield from self._begin_message()
        yield from self._close(status)
        self._status = status

    # -- what is sent ---------------------------------------------------------------------------------------------

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _number(self) -> int:
        self._events += 1
        return self._events - 1

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": self._number(), **fields}

    def _response(self) -> dict[str, Any]:
        values, given = self._values, self._given
        text = given.get("text") or {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self._service.model_id,
            "output": _copy(self._items),
            "usage": self._usage,
            "instructions": values["instructions"],
            "max_output_tokens": values["max_output_tokens"],
            "max_tool_calls": values["max_tool_calls"],
            "temperature": values["temperature"],
            "top_p": values["top_p"],
            "top_logprobs": values["top_logprobs"] or 0,
            "text": {"format": text.get("format") or {"type": "text"}},
            "tools": given.get("tools") or [],
            "tool_choice": given.get("tool_choice") or "auto",
            "parallel_tool_calls": values["parallel_tool_calls"],
            "metadata": values["metadata"],
            "user": values["user"],
            "service_tier": "default",
            "truncation": "disabled",
            "store": False,
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
        }


def _copy(value: Any) -> Any:
    """What an event shows stays as it was when it was made, while the item grows."""
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


async def response_job(service: Service, body: dict[str, Any], arrival: float) -> ResponseJob:
    values = parse_object(None, body, RESPONSES)
    try:
        chat = await chat_job(service, as_chat(values), arrival)
    except ApiError as error:
        raise renamed(error) from None
    return ResponseJob(service, values, body, chat)
