"""Turns a request's tokens into text as they come, and looks for its stop strings.

The engine knows nothing of text: who shows it makes it, in the server the HTTP process.

Invariants:
- the pieces put together are the decoding of the whole output, up to the first stop string;
- no part of a stop string is ever given out: text that may be the beginning of one is held back.
"""

from typing import Any

from ..checkpoints.tokenizer import Tokenizer
from .request import Output, SamplingParams


class Detokenizer:
    """The text of one request."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._stream: Any = tokenizer.stream(params.skip_special_tokens)
        self._stop = list(params.stop)
        self._held = ""

    def fill(self, output: Output) -> bool:
        """Gives an output of the engine its text. True if that ends the request, which the engine is to be told."""
        stop, ended = None, output.finish_reason
        for token in output.token_ids[: len(output.token_ids) - output.stop_token]:
            piece, stop = self.push(token)
            output.text += piece
            if stop is not None:
                break
        else:
            if ended in ("stop", "length"):
                piece, stop = self.finish()
                output.text += piece
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        return ended is None and stop is not None

    def push(self, token: int) -> tuple[str, str | None]:
        """The text that `token` settles, and the stop string it completes (text before it is given, itself not)."""
        return self._settle(self._stream.step(token) or "")

    def finish(self) -> tuple[str, str | None]:
        """What is left when the output ends: held text and an unfinished character; may still complete a stop."""
        text, stop = self._settle(self._stream.flush() or "")
        held, self._held = self._held, ""
        return (text, stop) if stop else (text + held, None)

    def _settle(self, piece: str) -> tuple[str, str | None]:
        text = self._held + piece
        if not self._stop:
            self._held = ""
            return text, None
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, stop = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:start], stop
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that begin `stop` (less than all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
