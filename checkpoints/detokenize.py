"""From token ids to text: the bytes of each token, and decoding that can be done one token at a time.

Four kinds of decoder are known, by what `tokenizer.json` says of itself:

- `byte_level`: each character of a token stands for one byte (GPT-2, Llama 3, Qwen, our own);
- `byte_fallback`: pieces of text with "▁" for a space, and tokens `<0x0A>` for single bytes (Llama 2, Mistral);
- `metaspace`: the same without the byte tokens (T5);
- `generic`: anything else; the `tokenizers` library decodes, and a stream decodes a small window again and again.

For the first three, text is the UTF-8 decoding of the joined bytes of the tokens, with U+FFFD where they are not UTF-8,
so decoding token by token and decoding at once give the same text by construction. (On `byte_fallback` the `tokenizers`
library writes one U+FFFD per byte of an invalid run, and also replaces the valid characters in that run; we keep them.)
"""

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies -> the byte. Printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


class Detokenizer:
    """Decodes ids for one vocabulary.

    Args:
      decoder: the "decoder" entry of tokenizer.json.
      id_to_token: the vocabulary; None for an id that has no token (it decodes to nothing).
      special_ids: the ids that `skip_special` leaves out.
      decode_generic: `ids -> text` of the `tokenizers` library, special tokens kept; used by the `generic` kind only.
    """

    def __init__(
        self,
        decoder: dict[str, Any] | None,
        id_to_token: Callable[[int], str | None],
        special_ids: frozenset[int],
        decode_generic: Callable[[list[int]], str],
    ):
        self._id_to_token = id_to_token
        self.special_ids = special_ids
        self.decode_generic = decode_generic
        self._bytes: dict[int, bytes] = {}
        self._space = "▁"
        self.strip = 0  # how many leading spaces of the whole text are dropped
        self.first_bare = False  # whether the first token loses its "▁"
        self.kind = self._classify(_steps(decoder))

    def _classify(self, steps: list[dict[str, Any]]) -> str:
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return "byte_level"
        if kinds == ["Metaspace"]:
            self._space = steps[0].get("replacement", "▁")
            self.first_bare = steps[0].get("prepend_scheme", "always") != "never"
            return "metaspace"
        if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
            replace, strip = steps[0], steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
            pattern = replace.get("pattern", {}).get("String")
            if pattern and replace.get("content") == " " and strip["content"] == " " and strip["stop"] == 0:
                self._space, self.strip = pattern, strip["start"]
                return "byte_fallback"
        return "generic"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for inside a text; b"" for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)
        if token is None:
            return b""
        if self.kind == "byte_level":
            # A token with a character outside the alphabet (an added token with a space, say) is plain text.
            if all(character in _ALPHABET for character in token):
                return bytes(_ALPHABET[character] for character in token)
            return token.encode()
        if self.kind == "byte_fallback" and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self.kind == "generic":
            return self.decode_generic([token_id]).encode()
        return token.replace(self._space, " ").encode()

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; U+FFFD where the bytes are not UTF-8."""
        if self.kind == "generic":
            return self.decode_generic([i for i in ids if not (skip_special and i in self.special_ids)])
        stream = ByteStream(self, skip_special)
        return "".join([*(stream.step(int(i)) or "" for i in ids), stream.flush()])

    def stream(self, skip_special: bool = True) -> "ByteStream | WindowStream":
        return (WindowStream if self.kind == "generic" else ByteStream)(self, skip_special)


class ByteStream:
    """Incremental decoding by bytes: a character comes out with the token that completes it."""

    def __init__(self, detokenizer: Detokenizer, skip_special: bool):
        self._detokenizer = detokenizer
        self._skip = detokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = detokenizer.strip
        self._first = detokenizer.first_bare

    def step(self, token_id: int) -> str | None:
        """The text that this token completes, or None when it completes none."""
        if token_id in self._skip:
            return None
        data = self._detokenizer.token_bytes(token_id)
        if self._first:
            token = self._detokenizer._id_to_token(token_id)
            if token is not None:
                data, self._first = token.replace(self._detokenizer._space, "").encode(), False
        return self._finish(self._utf8.decode(data)) or None

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else ""."""
        return self._finish(self._utf8.decode(b"", final=True))

    def _finish(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class WindowStream:
    """Incremental decoding with the library's decoder: text is what a window of ids gains by the newest token.

    The window begins at the token before the last one that gave text, for decoders that join neighbours with spaces.
    """

    def __init__(self, detokenizer: Detokenizer, skip_special: bool):
        self._detokenizer = detokenizer
        self._skip = detokenizer.special_ids if skip_special else frozenset()
        self._window: list[int] = []
        self._known = 0  # ids at the front of the window whose text has been given out
        self._given = ""  # that text

    def step(self, token_id: int) -> str | None:
        """The text that this token adds, or None while it may still change."""
        if token_id in self._skip:
            return None
        self._window.append(token_id)
        text = self._detokenizer.decode_generic(self._window)
        if text.endswith("\ufffd"):
            return None
        return self._advance(text) or None

    def flush(self) -> str:
        """The text held back, at the end."""
        return self._advance(self._detokenizer.decode_generic(self._window)) if self._window else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._given) :]
        if not new:
            return ""  # the next token still joins to the last one with a text
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._given = self._detokenizer.decode_generic(self._window)
        return new
