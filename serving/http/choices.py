"""One choice of an answer while it grows, and the log-probabilities of its tokens as the API writes them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...checkpoints.tokenizer import Tokenizer
from ..request import Output, TokenLogprob

_LEAST_LOGPROB = -9999.0  # how the API writes the probability zero


@dataclass(frozen=True)
class TokenEntry:
    """A token with its log-probability (None: nothing predicts it) and where its text begins in the choice's text."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int


@dataclass
class Delta:
    """What one output adds to a choice."""

    text: str
    entries: list[TokenEntry]
    finish_reason: str | None
    token_ids: list[int]


class _TokenStream:
    """Finds where the text of each token begins. `length`: characters decoded so far."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special)
        self.length = 0

    def entry(self, token: int, item: TokenLogprob | None) -> TokenEntry:
        text = self._stream.step(token) or ""
        offset = self.length
        own = self._tokenizer.token_bytes(token).decode("utf-8", "ignore")
        if own and text.endswith(own):
            offset += len(text) - len(own)  # what comes before is the remains of earlier tokens
        self.length += len(text)
        return TokenEntry(token, item.logprob if item else None, item.top if item else [], offset)


@dataclass
class Choice:
    """Accumulates a choice. Text and log-probabilities are released together: the engine holds back text that may be
    the beginning of a stop string, and the tokens of that text are held back with it, and dropped with it. `token_ids`
    are those tokens, without an echoed prompt's, where they are wanted."""

    index: int
    tokenizer: Tokenizer
    want_logprobs: bool
    want_ids: bool = False
    skip_special: bool = True  # special tokens have no text
    drop_output: bool = False  # max_tokens 0 with echo: the engine generates one token that nobody asked for
    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    total_logprob: float = 0.0

    def __post_init__(self) -> None:
        self._tokens = _TokenStream(self.tokenizer, self.skip_special)
        self._released = 0  # characters of text the engine has given out
        self._held: deque[TokenEntry] = deque()

    def begin(self, prompt_text: str, prompt_entries: list[TokenEntry]) -> None:
        """Echo: the choice starts with the prompt."""
        self.text += prompt_text
        self.entries += prompt_entries
        self._tokens.length = self._released = len(prompt_text)

    def feed(self, output: Output) -> Delta:
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        if self.drop_output:
            self.finish_reason = "length"
            return Delta("", [], "length", [])
        self.completion_tokens = output.completion_tokens
        self.finish_reason = output.finish_reason
        self.text += output.text
        self._released += len(output.text)
        self.total_logprob += sum(item.logprob for item in output.logprobs or ())
        if self.want_logprobs:
            self._held += [self._tokens.entry(item.id, item) for item in output.logprobs or ()]
        elif self.want_ids:
            self._held += [self._tokens.entry(token, None) for token in output.token_ids]
        entries = self._release(output)
        ids = [entry.id for entry in entries] if self.want_ids else []
        entries = entries if self.want_logprobs else []
        self.entries += entries
        self.token_ids += ids
        return Delta(output.text, entries, output.finish_reason, ids)

    def _release(self, output: Output) -> list[TokenEntry]:
        done = output.finish_reason is not None
        stopped_by_string = done and isinstance(output.stop_reason, str)
        entries = []
        while self._held and (self._held[0].offset < self._released or (done and not stopped_by_string)):
            entries.append(self._held.popleft())
        return entries

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(self.completion_tokens, 1)


def prompt_entries(
    tokenizer: Tokenizer,
    ids: list[int],
    logprobs: Iterable[TokenLogprob | None] | None,
    *,
    skip_special: bool,
    untold: int,
) -> list[TokenEntry]:
    """Entries for the tokens of an echoed prompt, in whose text the first `untold` tokens are not, and special ones
    only unless `skip_special`."""
    silent, tokens = _TokenStream(tokenizer), _TokenStream(tokenizer, skip_special)
    return [
        (silent if at < untold else tokens).entry(token, item)
        for at, (token, item) in enumerate(zip(ids, logprobs or (), strict=True))
    ]


def completion_logprobs(tokenizer: Tokenizer, entries: list[TokenEntry], count: int) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions: parallel lists; the chosen token joins its `count` likeliest."""

    def top(entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        out: dict[str, float] = {}
        for token, logprob in [*entry.top[:count], (entry.id, entry.logprob)]:
            name = token_text(tokenizer, token, "bytes:")
            out[name] = max(out.get(name, _LEAST_LOGPROB), finite(logprob))
        return out

    return {
        "tokens": [token_text(tokenizer, entry.id, "bytes:") for entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": [top(entry) for entry in entries] if count else None,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenEntry], count: int) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": finite(logprob), "bytes": list(data)}

    content = []
    for entry in entries:
        assert entry.logprob is not None  # only the first token of a prompt has none
        top = [one(token, logprob) for token, logprob in entry.top[:count]]
        content.append(one(entry.id, entry.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def token_text(tokenizer: Tokenizer, token: int, prefix: str = "") -> str:
    """A token as text; `\\xe2\\x82` (after `prefix`) when its bytes are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
