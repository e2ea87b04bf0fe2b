"""A server with the OpenAI API, of any make: which model it has, what it takes, and one streamed request, timed."""

import asyncio
import dataclasses
import json
import time
from typing import Any

import msgspec

from .client import Answer, Client, HttpFailure
from .config import BenchConfig
from .prompts import Prompts

_PROBE_SECONDS = 300.0  # the first answer may wait for the server's own start
_PROBE_WORDS = (20, 220)


class TargetError(ValueError):
    """The server can't be measured as asked; the message says why."""


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    """Of an event of the stream, what is measured; msgspec passes over the rest."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclasses.dataclass(slots=True)
class Record:
    """One request, seen from the client. Times are seconds after the run's start.

    Attributes:
        due, sent: when it should have gone out, and when it did.
        first, last: when its first and last token came; None: none did.
        done: when all was over.
        gaps: seconds between pieces of text, one less than there are.
        silent: all its tokens together had no text (half a character, a special token), so nobody saw the first one
            come; the end counts as that.
        prompt_tokens, output_tokens, cached_tokens: as the server counted them (`usage`).
        error: None, or what went wrong, in a few words to count by; `detail` says more.
    """

    number: int
    due: float
    asked_prompt: int
    asked_output: int
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    done: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)
    silent: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""


class _Stream:
    """Reads the events of one answer into its record."""

    def __init__(self, record: Record, start: float):
        self.record, self._start = record, start
        self._rest = b""
        self.usage = self.ended = False

    def feed(self, data: bytes, at: float) -> None:
        *lines, self._rest = (self._rest + data if self._rest else data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at - self._start)

    def _event(self, data: bytes, at: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        record = self.record
        event = _decode(data)
        if event.error is not None:
            record.error, record.detail = "error in the stream", json.dumps(event.error)[:300]
        for choice in event.choices:
            delta = choice.delta
            seen = bool(choice.text) or (
                delta is not None
                and bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)
            )
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
                record.silent = record.last is None and not seen
            if seen or record.silent:
                if record.last is None:
                    record.first = at
                else:
                    record.gaps.append(at - record.last)
                record.last = at
        if event.usage is not None:
            self.usage = True
            record.prompt_tokens, record.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            record.cached_tokens = (details and details.cached_tokens) or 0


class Target:
    """One model of one server. `prepare` first."""

    def __init__(self, config: BenchConfig):
        self._config = config
        self.client = Client(config.url, config.resolved_api_key)
        self.model = ""
        self.max_tokens: int | None = None  # of prompt and output together, where the server says so
        self.sends_ids = self.ignores_eos = True
        self.notes: list[str] = []  # what it does not take, in words

    async def prepare(self, text: str, block_tokens: int) -> Prompts:
        """Finds the model, tokens to ask with, and what the server takes. Raises TargetError."""
        await self._find_model()
        config = self._config
        ids = None if config.chat or config.text_prompts else await self._tokens(text)
        units = ids if ids is not None else text.split()
        prompts = Prompts(units, config.seed_used, block_tokens)
        if ids is not None:
            self._note("prompts are token ids, drawn from those that the server's tokenizer makes of a text")
            await self._probe(prompts, 0, 16)
            return prompts
        self.sends_ids = False
        few, many = [await self._probe(prompts, number, words) for number, words in enumerate(_PROBE_WORDS)]
        tokens_per_word = max((many - few) / (_PROBE_WORDS[1] - _PROBE_WORDS[0]), 0.1)
        overhead = max(round(few - _PROBE_WORDS[0] * tokens_per_word), 0)
        self._note(f"prompts are words, {tokens_per_word:.2f} tokens each: their lengths are about those asked for")
        return Prompts(units, config.seed_used, block_tokens, 1 / tokens_per_word, overhead)

    def body(self, prompt: list[int] | str, output_tokens: int) -> bytes:
        """The request's JSON."""
        config = self._config
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": config.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if config.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.ignores_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | config.more_fields)

    def encode(self, prompt: list[int] | str, output_tokens: int) -> bytes:
        """The whole HTTP request, to `run` later."""
        path = "/v1/chat/completions" if self._config.chat else "/v1/completions"
        return self.client.encode("POST", path, self.body(prompt, output_tokens))

    async def run(self, record: Record, request: bytes, start: float) -> None:
        """Sends the request and fills the record. `start`: `time.perf_counter` at the run's start."""
        stream = _Stream(record, start)
        record.sent = time.perf_counter() - start
        try:
            answer = await self.client.send(request, self._config.timeout, stream.feed)
        except HttpFailure as failure:
            record.error, record.detail = record.error or failure.kind, record.detail or str(failure)
        except msgspec.MsgspecError as error:
            record.error, record.detail = "an event is not the API's JSON", str(error)
        except asyncio.CancelledError:
            record.error = "stopped by the user"
            raise
        else:
            if answer.status != 200:
                record.error, record.detail = f"HTTP {answer.status}", _reason(answer)
            elif record.error is None and not stream.ended:
                record.error = "stream without an end"
            elif record.error is None and not stream.usage:
                record.error = "stream without usage"
        finally:
            record.done = time.perf_counter() - start

    # -- questions before the run -------------------------------------------------------------------------------------

    async def _find_model(self) -> None:
        answer = await self._ask(self.client.encode("GET", "/v1/models"))
        try:
            listed = {one["id"]: one for one in json.loads(answer.body)["data"]}
        except (ValueError, KeyError, TypeError):
            listed = None
        if answer.status != 200 or not listed:
            raise TargetError(
                f"{self._config.url}/v1/models names no model (status {answer.status}: {_reason(answer)}); "
                "is this the URL of a server with the OpenAI API, and the key right?"
            )
        wanted = self._config.model
        if wanted is None and len(listed) > 1:
            raise TargetError(f"the server has several models; choose one with --model: {', '.join(sorted(listed))}")
        self.model = next(iter(listed)) if wanted is None else wanted
        if self.model not in listed:
            raise TargetError(f"the server has no model {self.model!r}; it has {', '.join(sorted(listed))}")
        one = listed[self.model]
        meta = one.get("meta")
        limit = one.get("max_model_len") or (isinstance(meta, dict) and meta.get("n_ctx"))
        self.max_tokens = limit if isinstance(limit, int) and limit > 0 else None

    async def _tokens(self, text: str) -> list[int] | None:
        """The text's tokens by the server's own tokenizer; None when it has no route for it (vLLM's or llama.cpp's)."""
        for field in ("prompt", "content"):
            body = {field: text} | ({"model": self.model, "add_special_tokens": False} if field == "prompt" else {})
            answer = await self._ask(self.client.encode("POST", "/tokenize", json.dumps(body).encode()))
            try:
                tokens = json.loads(answer.body)["tokens"] if answer.status == 200 else None
            except (ValueError, KeyError, TypeError):
                tokens = None
            if tokens and all(type(token) is int for token in tokens):
                return tokens
        return None

    async def _probe(self, prompts: Prompts, number: int, units: int) -> int:
        """Sends a small request as those of the run will be; returns its tokens. Learns whether `ignore_eos` goes."""
        while True:
            record = Record(-1, 0.0, units, 4)
            await self.run(record, self.encode(prompts.probe(number, units), 4), 0.0)
            if record.error is None:
                if not record.output_tokens:
                    raise TargetError(
                        "the server generated no token of 4 that were asked for; there is nothing to time"
                    )
                return record.prompt_tokens
            if record.error == "stream without usage":
                raise TargetError(
                    "the server sends no usage with stream_options.include_usage: tokens can't be counted, as pieces "
                    "of a stream are not tokens"
                )
            if self.ignores_eos and record.error.startswith("HTTP 4") and "ignore_eos" in record.detail:
                self.ignores_eos = False
                self._note("the server does not take ignore_eos: answers may be shorter than the trace's")
                continue
            raise TargetError(f"a first small request failed: {record.error}. {record.detail}".rstrip(". ") + ".")

    async def _ask(self, request: bytes) -> Answer:
        try:
            return await self.client.send(request, _PROBE_SECONDS)
        except HttpFailure as failure:
            raise TargetError(f"{self._config.url} can't be asked: {failure}") from None

    def _note(self, words: str) -> None:
        self.notes.append(words)


def _reason(answer: Answer) -> str:
    """The message of an error's body, or its beginning."""
    try:
        body = json.loads(answer.body)
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError):
        return answer.body[:200].decode("utf-8", "replace")
