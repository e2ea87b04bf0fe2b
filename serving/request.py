"""What a client asks of the engine and what comes back, as plain `msgspec` structs (no JAX).

The same types cross the socket between the HTTP process and the engine process, so:
- decoding refuses unknown fields (`forbid_unknown_fields`): nothing a client sends is dropped silently;
- `validate` is called by whoever knows the vocabulary and the context length. It raises `InvalidRequest`, whose
  `.param` names the field, so that a server can answer with an error that names it too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence as Collection
from typing import Any, Literal, NoReturn

import msgspec

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 64
MAX_TOKENS = 2**31 - 1

FinishReason = Literal["stop", "length", "cancelled", "error"]


class InvalidRequest(ValueError):
    """A request that can never be served as asked. `.param` is the name of the offending field."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class QueueFull(RuntimeError):
    """The waiting queue is at its limit: the same request may be accepted later."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to continue one prompt.

    - `temperature` 0 is greedy decoding; `top_k` 0, `top_p` 1 and `min_p` 0 each leave that filter off.
    - `repetition_penalty` (1 is off) looks at prompt and output, `presence_penalty` and `frequency_penalty` at output.
    - `logit_bias` maps token id to a number added to its logit.
    - `seed` makes the tokens a function of (prompt, params, seed); None lets the engine choose one.
    - `max_tokens` counts new tokens; prompt and output together are capped by the model's context (finish "length").
    - `min_tokens`: end-of-sequence and `stop_token_ids` can't be sampled before so many new tokens.
    - `logprobs`, `prompt_logprobs`: None for none, k for the chosen token's and the k likeliest's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int, max_model_len: int | None = None) -> None:
        """Raises `InvalidRequest` for the first field that breaks its rule; `max_model_len` bounds `max_tokens`."""
        longest = MAX_TOKENS if max_model_len is None else max_model_len
        _number("temperature", self.temperature, 0, math.inf, "use 0 for greedy decoding, 1 to sample as trained")
        _integer("top_k", self.top_k, 0, MAX_TOKENS, "use 0 to turn it off")
        _number("top_p", self.top_p, 0, 1, "use 1 to turn it off", low_open=True)
        _number("min_p", self.min_p, 0, 1, "use 0 to turn it off")
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, "use 1 to turn it off", low_open=True)
        _number("presence_penalty", self.presence_penalty, -2, 2, "use 0 to turn it off")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 to turn it off")
        if not isinstance(self.logit_bias, dict):
            _refuse("logit_bias", "a map from token id to bias", self.logit_bias, "write logit_bias={token_id: bias}")
        for token, bias in self.logit_bias.items():
            _token("logit_bias", token, vocab_size)
            _number("logit_bias", bias, -100, 100, f"change the bias of token {token}")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1, "leave it out for a seed chosen by the engine")
        fix = "ask for at least one token" if max_model_len is None else "the model's context is no longer than that"
        _integer("max_tokens", self.max_tokens, 1, longest, fix)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens, "it can't exceed max_tokens")
        _list("stop", self.stop, MAX_STOP_STRINGS, 'write stop=["text"]')
        for text in self.stop:
            _stop_string(text)
        _list("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS, "write stop_token_ids=[id]")
        for token in self.stop_token_ids:
            _token("stop_token_ids", token, vocab_size)
        if not isinstance(self.ignore_eos, bool):
            _refuse("ignore_eos", "true or false", self.ignore_eos, "leave it out to stop at end-of-sequence")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(name, count, 0, MAX_LOGPROBS, "leave it out for none")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt to continue. `id` is unique among live requests; `arrival` is in seconds, on any clock.

    Requests share what is kept of equal prompts only with those of the same `cache_salt`.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams = SamplingParams()
    arrival: float = 0.0
    cache_salt: str = ""

    @property
    def finds_prefixes(self) -> bool:
        """Whether it may begin behind tokens that were computed before.

        Log-probabilities of the prompt come from computing it, and penalties count the tokens as they are computed.
        """
        params = self.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return params.prompt_logprobs is None and penalties == (1.0, 0.0, 0.0)

    def validate(self, vocab_size: int, max_model_len: int) -> None:
        """Raises `InvalidRequest` for the first field that breaks its rule; the prompt's name is "prompt"."""
        if not isinstance(self.id, str) or not self.id or not _is_utf8(self.id):
            _refuse("id", "a non-empty text", self.id, "give each request an id of its own")
        validate_prompt(self.prompt_ids, vocab_size, max_model_len)
        if not isinstance(self.cache_salt, str) or not _is_utf8(self.cache_salt):
            _refuse("cache_salt", "a text", self.cache_salt, "leave it out to share with all requests that do")
        _number("arrival", self.arrival, -math.inf, math.inf, "give the time of arrival in seconds")
        self.params.validate(vocab_size, max_model_len)


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Natural-log probability of token `id`, and of the likeliest tokens as (id, logprob), likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What one step adds to one request.

    - `token_ids`, `text` and `logprobs` hold only what is new; `text` never holds any part of a stop string.
    - `prompt_logprobs` comes once, with the first output; entry 0 is None (nothing predicts the first token).
    - `stop_reason` is the stop string or stop token id that ended the request, None for end-of-sequence or length.
    - `prompt_tokens` and `completion_tokens` are totals so far; `cached_tokens` of the prompt were in the prefix cache.
    """

    request_id: str
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    cached_tokens: int = 0


def validate_prompt(prompt_ids: Collection[int], vocab_size: int, max_model_len: int) -> None:
    """Raises `InvalidRequest` ("prompt") unless there is a token, all are known, and one more fits the context."""
    if not isinstance(prompt_ids, list | tuple):
        _refuse("prompt", "a list of token ids", prompt_ids, "encode the text first")
    if not prompt_ids:
        raise InvalidRequest("prompt", "prompt must have at least one token, got none; send some text")
    if len(prompt_ids) >= max_model_len:
        raise InvalidRequest(
            "prompt",
            f"prompt must be shorter than the model's context of {max_model_len} tokens, to leave room for a new one; "
            f"got {len(prompt_ids)} tokens; shorten it by {len(prompt_ids) - max_model_len + 1}",
        )
    if not set(map(type, prompt_ids)) <= {int} or min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        for token in prompt_ids:
            _token("prompt", token, vocab_size)


def _refuse(param: str, rule: str, value: object, fix: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise InvalidRequest(param, f"{param} must be {rule}, got {shown}; {fix}")


def _number(param: str, value: Any, low: float, high: float, fix: str, low_open: bool = False) -> None:
    # False for NaN, and for an int too large for a float, which would overflow later, on its way to the device.
    finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not finite or not low <= value <= high or (low_open and value == low):
        if math.isinf(low):
            rule = "a finite number"
        elif math.isinf(high):
            rule = f"a finite number {'above' if low_open else 'of at least'} {low}"
        else:
            rule = f"a number in {'(' if low_open else '['}{low}, {high}]"
        _refuse(param, rule, value, fix)


def _integer(param: str, value: object, low: int, high: int, fix: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(param, f"a whole number from {low} to {high}", value, fix)


def _token(param: str, value: object, vocab_size: int) -> None:
    _integer(param, value, 0, vocab_size - 1, f"token ids of this model are below {vocab_size}")


def _list(param: str, value: object, most: int, fix: str) -> None:
    if not isinstance(value, list | tuple):
        _refuse(param, "a list", value, fix)
    if len(value) > most:
        raise InvalidRequest(param, f"{param} must have at most {most} entries, got {len(value)}; leave some out")


def _stop_string(text: object) -> None:
    if not isinstance(text, str) or not text:
        _refuse("stop", "a list of non-empty strings", text, "leave out the empty ones")
    if len(text) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            "stop", f"stop strings must have at most {MAX_STOP_CHARACTERS} characters, got {len(text)}; shorten it"
        )
    if not _is_utf8(text):
        _refuse("stop", "text that UTF-8 can hold", text, "remove the lone surrogates")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
