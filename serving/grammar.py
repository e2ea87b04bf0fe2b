"""Structured output: which tokens may come next, so that what a request generates keeps to its grammar.

The parser is llguidance's (an Earley parser over derivatives of regular expressions), on the host. V: vocabulary, W:
words of 32 tokens' bits.

Invariants:
- requests with the same grammar share what is compiled (`Grammars`); each has a matcher of its own (`Matcher`);
- a mask depends on the grammar and on the request's own tokens, so neighbours, chunks and preemption change nothing;
- a grammar that is wrong or too costly raises `GrammarError`, when it is compiled or in the request that uses it.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from ..checkpoints.tokenizer import Tokenizer
from .request import Grammar

# What one grammar may take, on top of its length (`request.MAX_GRAMMAR_BYTES`). Fuel is llguidance's unit of work.
LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
KEPT_GRAMMARS = 256  # compiled ones that are kept; most take less than a megabyte
KEPT_BYTES = 16 << 20  # of their texts
# Between the parts of JSON: a space, or a line break and indentation. Without a bound many a model writes spaces only.
WHITESPACE = r"( |\n[ \t]{0,40})"

THREAD_STACK = 8 << 20  # bytes, of threads in which grammars are compiled and followed
_FORCED_CHARACTERS = 256
_TEMPERATURE = re.compile(r"^\s*[\w?!-]+\[[^\]\n]*\btemperature\s*=", re.MULTILINE)
_MESSAGE_CHARACTERS = 400


class GrammarError(ValueError):
    """What is wrong with a grammar, or why it can't go on."""


class Grammars:
    """The grammars of one vocabulary. Compiling is slow and may be done in any thread.

    Args:
        vocab_size: V of the model, which may have more rows than the tokenizer has tokens.
        eos_ids: what the model may end with, where a grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def __contains__(self, grammar: Grammar) -> bool:
        with self._lock:
            return grammar in self._compiled

    def compile(self, grammar: Grammar) -> Any:
        """Makes a grammar ready and keeps it; its parser, at the beginning. Raises GrammarError."""
        from llguidance import LLMatcher, LLParserLimits

        self.load()
        compiled = LLMatcher(self._vocabulary, _source(grammar), log_level=0, limits=LLParserLimits(**LIMITS))
        _raise_error(compiled)
        if not any(compiled.compute_bitmask()):
            raise GrammarError("no text of this model's tokens fits it")
        _raise_error(compiled)
        size = len(grammar.text)
        with self._lock:
            if grammar in self._compiled:
                return self._compiled[grammar]
            while self._compiled and (len(self._compiled) >= KEPT_GRAMMARS or self._bytes + size > KEPT_BYTES):
                self._bytes -= len(self._compiled.popitem(last=False)[0].text)
            self._compiled[grammar] = compiled
            self._bytes += size
        return compiled

    def matcher(self, grammar: Grammar, ends: bool = True) -> "Matcher":
        """A new matcher, at the beginning; compiles what is not kept. Raises GrammarError.

        Args:
            ends: whether end-of-sequence may be sampled where the grammar is complete.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = self.compile(grammar)
        return Matcher(compiled.deep_copy(), () if ends else self._eos_ids)

    def load(self) -> None:
        """Reads the vocabulary, which the first grammar needs. Raises GrammarError where there can be none."""
        with self._loading:
            _ = self._vocabulary

    @cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary as llguidance wants it: takes about a second for 150,000 tokens."""
        from llguidance import LLTokenizer

        if not self._eos_ids:
            raise GrammarError("a grammar needs an end-of-sequence token, and this model has none")
        if not self._tokenizer.has_token_bytes:
            raise GrammarError(
                "a grammar needs tokens that stand for fixed bytes, and this model's tokenizer has others"
            )
        vocabulary: Any = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
        return LLTokenizer(vocabulary, eos_token=self._eos_ids)


class Matcher:
    """Where one request is in its grammar."""

    def __init__(self, parser: Any, never: Collection[int]):
        self.parser, self.never = parser, never

    def push(self, token: int) -> bool:
        """Goes on by a token that was sampled; True where nothing can follow it. Raises GrammarError."""
        self.parser.consume_token(token)
        _raise_error(self.parser)
        return self.parser.is_stopped()

    def following(self) -> list[int]:
        """All tokens that may come next. Raises GrammarError."""
        bits = np.frombuffer(self.parser.compute_bitmask(), np.uint8)
        _raise_error(self.parser)
        found = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        return [token for token in found if token not in self.never]

    @property
    def may_end(self) -> bool:
        """Whether what was generated so far is complete."""
        return self.parser.is_accepting()


def fill_masks(matchers: list[tuple[Matcher, int]], masks_RW: np.ndarray) -> dict[int, GrammarError]:
    """Writes into each matcher's row, int32, the tokens that may come next; returns errors by row."""
    if not matchers:
        return {}
    work = [(matcher.parser, row) for matcher, row in matchers]
    _executor().unsafe_compute_mask_ptr(work, masks_RW.ctypes.data, masks_RW.shape[1] * 4, len(masks_RW))
    for matcher, row in matchers:
        leave_out(masks_RW[row], matcher.never)
    return {row: GrammarError(_message(parser)) for parser, row in work if parser.is_error()}


def leave_out(mask_W: np.ndarray, tokens: Iterable[int]) -> bool:
    """Takes `tokens` out of a row of a mask; False where none is left."""
    words = mask_W.view(np.uint32)
    for token in tokens:
        words[token >> 5] &= ~np.uint32(1 << (token & 31))
    return bool(words.any())


class _Vocabulary:
    """What llguidance asks of a tokenizer: attributes and a call."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos_ids))

    def __call__(self, text: str) -> list[int]:
        """How the model would have a text that a grammar leaves no choice about. Only the first token is used."""
        text = text[:_FORCED_CHARACTERS]
        data, ids = text.encode(), self._tokenizer.encode(text, special=False)
        if b"".join(self.tokens[token] for token in ids) == data:
            return ids
        return self._longest(data)  # of a tokenizer that changes a text, with a space in front perhaps

    def _longest(self, data: bytes) -> list[int]:
        ids = []
        while data:
            size = next(size for size in range(len(data), 0, -1) if data[:size] in self._token_of)
            ids.append(self._token_of[data[:size]])
            data = data[size:]
        return ids

    @cached_property
    def _token_of(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {data: token for token, data in enumerate(self.tokens) if data and token not in special}


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        if _TEMPERATURE.search(grammar.text):
            raise GrammarError("a rule can't have a temperature of its own; leave it out, the request's holds for all")
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        value = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"a {grammar.kind} is written in JSON, and this is none: {error}") from None
    if grammar.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise GrammarError("a choice is a list of texts, with one at least")
        return LLMatcher.grammar_from_regex("|".join(map(escape, value)))
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise GrammarError("a JSON schema is an object")
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(value), overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise GrammarError(f"the JSON schema can't be read: {error}") from None


def escape(text: str) -> str:
    """A regular expression, in Rust's syntax, for one text."""
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in r"\.+*?()|[]{}^$#&-~":
        return "\\" + character
    return character if character.isprintable() else f"\\x{{{ord(character):x}}}"


def _raise_error(parser: Any) -> None:
    if parser.is_error():
        raise GrammarError(_message(parser))


def _message(parser: Any) -> str:
    """The library's message without the parser's state, which may follow it."""
    text = parser.get_error().split("\n<")[0].strip()
    if text.startswith("NoExtension"):
        return "no text fits it"
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + "..."


_made_executor: Any = None


def _executor() -> Any:
    global _made_executor
    if _made_executor is None:
        from llguidance import LLExecutor

        os.environ.setdefault("RUST_MIN_STACK", str(THREAD_STACK))
        _made_executor = LLExecutor()
    return _made_executor
