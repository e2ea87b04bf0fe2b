"""Prompts of real tokens: drawn one by one from a text, so that no two share a beginning unless the trace says so."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .traces import Arrival

_PAGE = 1 << 16  # characters of the text that are turned into tokens


def source_text(path: str | None) -> str:
    """The user's text, or English that every Python has: the help topics of its language reference.

    Raises ValueError for a text with fewer than 100 words, OSError.
    """
    if path is None:
        text = "\n".join(importlib.import_module("pydoc_data.topics").topics.values())
    else:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    if len(set(text[:_PAGE].split())) < 100:
        raise ValueError(f"{path} begins with fewer than 100 different words; prompts need a real text")
    return text[:_PAGE]


class Prompts:
    """Makes each request's prompt: of the same seed, arrival and number always the same one.

    Args:
        units: what prompts are drawn from: token ids, or words.
        seed: of the draws. A server's prefix cache knows the prompts of an earlier run with the same seed.
        block_tokens: as the trace's.
        per_token: units a token; 1 for ids.
        overhead: tokens that the server adds to each prompt (a chat template's, the beginning of the document).
    """

    def __init__(
        self,
        units: Sequence[int] | Sequence[str],
        seed: int,
        block_tokens: int,
        per_token: float = 1.0,
        overhead: int = 0,
    ):
        self._units = np.asarray(units)
        self._seed, self._per_token, self._overhead = seed, per_token, overhead
        self._block = max(1, round(block_tokens * per_token))
        self._blocks: dict[int, np.ndarray] = {}

    def make(self, number: int, arrival: Arrival) -> list[int] | str:
        """Token ids, or a text of about as many tokens as the arrival asks for."""
        size = max(1, round((arrival.prompt_tokens - self._overhead) * self._per_token))
        parts = [self._of_block(block) for block in arrival.blocks[: -(-size // self._block)]]
        left = size - sum(map(len, parts))
        if left > 0:
            parts.append(self._draw(1, number, left))
        units = np.concatenate(parts)[:size].tolist()
        return " ".join(units) if isinstance(units[0], str) else units

    def probe(self, number: int, units: int) -> list[int] | str:
        """A prompt that is no request's."""
        drawn = self._draw(2, number, units).tolist()
        return " ".join(drawn) if isinstance(drawn[0], str) else drawn

    def _of_block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            self._blocks[block] = self._draw(0, block, self._block)
        return self._blocks[block]

    def _draw(self, kind: int, number: int, size: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, kind, number])
        return self._units[rng.integers(0, len(self._units), size)]
