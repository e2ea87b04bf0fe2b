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
from typing import Any, Literal, NoReturn, get_args

import msgspec

MAX_LOGPROBS = 20
MAX_BIAS = 1024  # entries of logit_bias
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 64
MAX_TOKENS = 2**31 - 1
MAX_GRAMMAR_BYTES = 512 << 10

# Fields of Request that only some schedulers honour, and what they are where nothing is asked.
SCHEDULING: dict[str, Any] = {"priority": 0, "deadline_seconds": None, "stages_left": 1}
MAX_PRIORITY = 100
MAX_DEADLINE_SECONDS = 86400.0
MAX_STAGES = 1000

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "lark", "choice"]
Pooling = Literal["", "last", "mean"]


class InvalidRequest(ValueError):
    """A request that can never be served as asked. `.param` is the name of the offending field."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class QueueFull(RuntimeError):
    """The waiting queue is at its limit: the same request may be accepted later."""


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the output must be a text of.

    `text` is a JSON schema, a regular expression (Rust's syntax, for the whole output), a Lark grammar (llguidance's
    variant), or a choice: a JSON list of texts, one of which is the output.
    """

    kind: GrammarKind
    text: str

    def validate(self) -> None:
        if self.kind not in get_args(GrammarKind):
            _refuse("grammar", f"of a kind in {', '.join(get_args(GrammarKind))}", self.kind, "choose one")
        if not isinstance(self.text, str) or not self.text or not _is_utf8(self.text):
            _refuse("grammar", "a non-empty text that UTF-8 can hold", self.text, "leave it out for none")
        if (size := len(self.text.encode())) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                "grammar", f"grammar must have at most {MAX_GRAMMAR_BYTES:,} bytes, got {size:,}; shorten it"
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to continue one prompt.

    - `temperature` 0 is greedy decoding; `top_k` 0, `top_p` 1 and `min_p` 0 each leave that filter off.
    - `repetition_penalty` (1 is off) looks at prompt and output, `presence_penalty` and `frequency_penalty` at output.
    - `logit_bias` maps token id to a number added to its logit.
    - `seed` makes the tokens a function of (prompt, params, seed); None lets the engine choose one.
    - `max_tokens` counts new tokens; prompt and output together are capped by the model's context (finish "length").
    - `min_tokens`: end-of-sequence and `stop_token_ids` can't be sampled before so many new tokens.
    - `logprobs`, `prompt_logprobs`: None for none, k for the chosen token's and the k likeliest's. They are the model's
      own, before penalties, bias, grammar and temperature.
    - `grammar`: the output is a text of it, and ends ("stop") where it is complete and can't go on; end-of-sequence can
      be sampled only where it is complete. Cut by a limit or a stop of the request's own, it is the beginning of one.
    - `skip_special_tokens`: whether tokens that are no text, such as "<|im_start|>", are left out of the text.
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
    grammar: Grammar | None = None
    skip_special_tokens: bool = True

    def validate(self, vocab_size: int, max_model_len: int | None = None) -> None:
        """Raises `InvalidRequest` for the first field that breaks its rule; `max_model_len` bounds `max_tokens`."""
        longest = MAX_TOKENS if max_model_len is None else max_model_len
        _number("temperature", self.temperature, 0, math.inf, "use 0 for greedy decoding, 1 to sample as trained")
        _integer("top_k", self.top_k, 0, MAX_TOKENS, "use 0 to turn it off")
        _number("top_p", self.top_p, 0, 1, "use 1 to turn it off", low_open=True)
        _number("min_p", self.min_p, 0, 1, "use 0 to turn it off")
        _number("repetition_penalty", self.repetition_penalty, 0, 100, "use 1 to turn it off", low_open=True)
        _number("presence_penalty", self.presence_penalty, -2, 2, "use 0 to turn it off")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 to turn it off")
        if not isinstance(self.logit_bias, dict):
            _refuse("logit_bias", "a map from token id to bias", self.logit_bias, "write logit_bias={token_id: bias}")
        if len(self.logit_bias) > MAX_BIAS:
            message = f"logit_bias must have at most {MAX_BIAS} entries, got {len(self.logit_bias)}; leave some out"
            raise InvalidRequest("logit_bias", message)
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
        if not isinstance(self.skip_special_tokens, bool):
            _refuse("skip_special_tokens", "true or false", self.skip_special_tokens, "leave it out to skip them")
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                _refuse("grammar", "a Grammar", self.grammar, "leave it out for none")
            self.grammar.validate()
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(name, count, 0, MAX_LOGPROBS, "leave it out for none")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt to continue. `id` is unique among live requests; `arrival` is in seconds, on any clock.

    Requests share what is kept of equal prompts only with those of the same `tenant` (whose API key it is) and the
    same `cache_salt` (which the client chooses). With `pooling` nothing is generated: what comes back is one vector for
    the prompt, the final hidden state of its last token or the mean of all of them; `params.max_tokens` is then 1.

    For schedulers that honour it: of `priority` the lowest goes first; the job that it is a part of has
    `deadline_seconds` left from its arrival on, and `stages_left` requests to go, this one included.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams = SamplingParams()
    arrival: float = 0.0
    cache_salt: str = ""
    tenant: str = ""
    pooling: Pooling = ""
    priority: int = 0
    deadline_seconds: float | None = None
    stages_left: int = 1

    @property
    def cache_scope(self) -> str:
        """Equal for requests that share what is kept. A tenant's name has no line break: no salt fakes another's."""
        return f"{self.tenant}\n{self.cache_salt}"

    @property
    def finds_prefixes(self) -> bool:
        """Whether it may begin behind tokens of its prompt that were computed before.

        Log-probabilities of the prompt and the mean over it come from computing it.
        """
        return self.params.prompt_logprobs is None and self.pooling != "mean"

    @property
    def counts_output(self) -> bool:
        """Whether tokens that it generates are counted as they are computed, for penalties: after a preemption all of
        them are computed again."""
        return bool(self.params.presence_penalty or self.params.frequency_penalty)

    def validate(self, vocab_size: int, max_model_len: int) -> None:
        """Raises `InvalidRequest` for the first field that breaks its rule; the prompt's name is "prompt"."""
        if not isinstance(self.id, str) or not self.id or not _is_utf8(self.id):
            _refuse("id", "a non-empty text", self.id, "give each request an id of its own")
        validate_prompt(self.prompt_ids, vocab_size, max_model_len)
        if not isinstance(self.cache_salt, str) or not _is_utf8(self.cache_salt):
            _refuse("cache_salt", "a text", self.cache_salt, "leave it out to share with all requests that do")
        if not isinstance(self.tenant, str) or "\n" in self.tenant or not _is_utf8(self.tenant):
            _refuse("tenant", "a text of one line", self.tenant, "leave it out where there is one tenant")
        _integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY, "the lowest goes first, and 0 is usual")
        if self.deadline_seconds is not None:
            fix = "leave it out for none"
            _number("deadline_seconds", self.deadline_seconds, 0, MAX_DEADLINE_SECONDS, fix, low_open=True)
        _integer("stages_left", self.stages_left, 1, MAX_STAGES, "count this request too")
        _number("arrival", self.arrival, -math.inf, math.inf, "give the time of arrival in seconds")
        self.params.validate(vocab_size, max_model_len)
        if self.pooling not in ("", "last", "mean"):
            _refuse("pooling", '"last" or "mean"', self.pooling, 'or "" to generate')
        if self.pooling and self.params.max_tokens != 1:
            _refuse("max_tokens", "1 with pooling", self.params.max_tokens, "nothing is generated then")


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Natural-log probability of token `id`, and of the likeliest tokens as (id, logprob), likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What one step adds to one request.

    - `token_ids`, `text` and `logprobs` hold only what is new. The engine leaves `text` empty: `Detokenizer.fill`
      fills it, never with any part of a stop string.
    - `stop_token`: the last token ended the request and is no text (end of sequence, or one of `stop_token_ids`).
    - `prompt_logprobs` comes once, with the first output; entry 0 is None (nothing predicts the first token).
    - `stop_reason` is the stop string or stop token id that ended the request, None for end-of-sequence or length.
    - `prompt_tokens` and `completion_tokens` are totals so far; `cached_tokens` of the prompt were in the prefix cache.
    - `error` says why the request ended in one: its grammar could not be followed ("grammar"), or the model failed.
    - `embedding` is what a request with `pooling` asked for, as little-endian float32, not normalised.
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
    error_kind: Literal["engine", "grammar", "not_finite"] = "engine"
    cached_tokens: int = 0
    embedding: bytes = b""
    stop_token: bool = False


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
