"""What the endpoints share: the engine, the tokenizer it reported, and the model's name and limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from ...checkpoints.tokenizer import Tokenizer
from ..request import SCHEDULING, Grammar, InvalidRequest, Request, SamplingParams
from .engine_client import EngineClient, Generation
from .errors import ApiError, bad, nearest, show
from .grammar_check import GrammarCheck
from .metrics import Metrics

T = TypeVar("T")

# Longer texts are tokenized in a thread, so that one client's novel does not hold up the others' tokens.
_LONG_TEXT = 20_000
_CHARACTERS_A_TOKEN = 5  # of most texts that fill a context, less
_LEAST_PIECE = 1 << 16  # characters
# How often those who are not in a hurry look whether there is room.
_ROOM_SECONDS = 0.02


@dataclass(frozen=True)
class Caller:
    """Who asks: `tenant`, whose API key it is, and when: `arrival`, by the monotonic clock.

    `offline`: nobody waits for the answer, so his requests come in only while few of others wait. `priority`: of his
    requests, where the scheduler knows it; None: what they say.
    """

    tenant: str = ""
    arrival: float = field(default_factory=time.monotonic)
    offline: bool = False
    priority: int | None = None


class Service:
    def __init__(self, engine: EngineClient, metrics: Metrics, model_id: str, max_body_bytes: int) -> None:
        self.engine = engine
        self.metrics = metrics
        self.model_id = model_id
        self.max_body_bytes = max_body_bytes
        self.created = int(time.time())
        self._grammars = GrammarCheck()
        metrics.set_model(model_id)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises 503 before the engine has reported it."""
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """The most tokens that prompt and completion may have together."""
        ready = self.engine.info
        return min(ready.max_model_len, ready.cache_tokens + 1)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_id:
            message = f"The model {show(name)} does not exist; this server serves '{self.model_id}'."
            message += nearest(name, [self.model_id])
            raise ApiError(404, message, param="model", code="model_not_found")

    def model_card(self) -> dict[str, Any]:
        card: dict[str, Any] = {"id": self.model_id, "object": "model", "created": self.created, "owned_by": "twinax"}
        if self.engine.ready is not None:
            card["max_model_len"] = self.context
        return card

    async def encode(self, text: str, *, add_bos: bool) -> list[int]:
        tokenizer = self.tokenizer
        return await off_loop(len(text), lambda: tokenizer.encode(text, add_bos=add_bos))

    async def encode_prompt(self, param: str, text: str, *, add_bos: bool) -> list[int]:
        """The ids of a text that is to fit the context. Raises 400 for the field `param` where it is far from that."""
        if len(text) > _CHARACTERS_A_TOKEN * self.context + _LEAST_PIECE:
            await self._check_size(param, text)
        return await self.encode(text, add_bos=add_bos)

    async def _check_size(self, param: str, text: str) -> None:
        """Counts the tokens piece by piece until they are too many: to tokenize ten megabytes takes ten seconds.

        Where a piece is cut a word makes more tokens than it would in one, a few of the thousands that a piece has: an
        eighth more than fit are too many for certain.
        """
        context, count = self.context, 0
        size = max(context, _LEAST_PIECE)
        for at in range(0, len(text), size):
            count += len(await self.encode(text[at : at + size], add_bos=False))
            if count > context + context // 8:
                message = f"This model's context holds {context} tokens, but the first {min(at + size, len(text))} "
                message += f"characters alone have about {count} (of {len(text)} characters). Shorten it."
                raise bad(param, message, "context_length_exceeded")

    def new_tokens(self, prompt_length: int, asked: int | None, default: int | None, names: tuple[str, str]) -> int:
        """How many tokens to generate. `names` are the fields that hold the prompt and the number asked for.

        Raises 400 (context_length_exceeded) when the prompt, or the prompt and what was asked, don't fit the context.
        """
        context = self.context
        room = context - prompt_length
        rule = f"This model's context holds {context} tokens"
        if room < 1:
            message = f"{rule}, prompt and completion together, but the prompt alone has {prompt_length}. Shorten it."
            raise bad(names[0], message, "context_length_exceeded")
        if asked is None:
            return room if default is None else min(default, room)
        if asked > room:
            message = f"{rule}, but {prompt_length + asked} were requested ({prompt_length} in the prompt, {asked} "
            message += f"for the completion). Send at most {room} as '{names[1]}', or shorten the prompt."
            raise bad(names[1], message, "context_length_exceeded")
        return asked

    def check_room(self, caller: Caller) -> None:
        """Raises 429 or 503 for what would be refused later, before there is work in it; not for who can wait."""
        if not caller.offline:
            self.engine.check_room()

    @asynccontextmanager
    async def generate(self, requests: Sequence[Request], caller: Caller) -> AsyncIterator[Generation]:
        """`EngineClient.generate` for a caller: every request goes this way, so that none is without its tenant."""
        change: dict[str, Any] = {"tenant": caller.tenant}
        if caller.priority is not None and "priority" in self.engine.info.honours:
            change["priority"] = caller.priority
        own = [msgspec.structs.replace(request, **change) for request in requests]
        if caller.offline:
            most = self.engine.info.max_running
            while self.engine.in_flight and self.engine.in_flight + len(own) > most + most // 4:
                await asyncio.sleep(_ROOM_SECONDS)
        async with self.engine.generate(own) as outputs:
            yield outputs

    async def check_grammar(self, grammar: Grammar | None, param: str) -> None:
        """Raises ApiError for a grammar, asked for by the field `param`, that is wrong or costs too much."""
        if grammar is None:
            return
        try:
            grammar.validate()
        except InvalidRequest as error:
            raise bad(param, f"'{param}' can't be used: {error}.", "invalid_grammar") from None
        await self._grammars.check(grammar, param, self.engine.info)

    def check_request(self, request: Request, rename: dict[str, str]) -> None:
        """The engine's own rules, with its field names put as the client wrote them."""
        ready = self.engine.info
        try:
            request.validate(ready.vocab_size, ready.max_model_len)
        except InvalidRequest as error:
            raise bad(rename.get(error.param, error.param), f"{error}.") from None


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, in a thread when it is not."""
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)


Answer = Callable[[Service, dict[str, Any], Caller], Awaitable[dict[str, Any]]]


def scheduling(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that its scheduler looks at, from checked fields."""
    return {name: values[name] for name in SCHEDULING}


def sampling_params(
    values: dict[str, Any],
    *,
    max_tokens: int,
    seed_offset: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """From checked fields. Choice i of a seeded request is seeded with seed + i (modulo 2^64, as a signed number)."""
    seed = values["seed"]
    if seed is not None:
        seed = (seed + seed_offset + 2**63) % 2**64 - 2**63
    return SamplingParams(
        temperature=values["temperature"],
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        logit_bias=values["logit_bias"],
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=values["min_tokens"],
        stop=values["stop"],
        stop_token_ids=values["stop_token_ids"],
        ignore_eos=values["ignore_eos"],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        skip_special_tokens=values["skip_special_tokens"],
    )


def include_usage(values: dict[str, Any]) -> bool:
    """`stream_options.include_usage`, which may only be sent with `stream`."""
    options = values["stream_options"]
    if options is not None and not values["stream"]:
        raise bad("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    return bool(options and options["include_usage"])


def usage(prompt_tokens: Sequence[int], completion_tokens: Sequence[int], cached_tokens: int) -> dict[str, Any]:
    """Of prompts and choices; `cached_tokens` of the prompts were computed for earlier requests."""
    prompt, completion = sum(prompt_tokens), sum(completion_tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
