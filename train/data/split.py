"""Which documents are held out for evaluation.

- Whole documents, chosen by the hash of their text: the choice does not depend on the seed, on the other documents or
  on the order of files, and copies of a document are on one side.
- Where that gives less than half or more than twice the share asked for (one document, or a few of very different
  lengths), the end of the tokens is held out instead, cutting one document in two.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .cache import TokenCache


@dataclass(frozen=True)
class Split:
    """Documents, or parts of them, as spans of the cached tokens; D of them, none empty.

    Attributes:
      begins_D: int64, where each begins in the cache.
      ends: int64 [D + 1], where each begins and ends when they are laid one after the other.
      held_out: how the two splits were told apart: "documents", "tail", or "nothing" when all is for training.
    """

    begins_D: np.ndarray
    ends: np.ndarray
    held_out: Literal["documents", "tail", "nothing"]

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1])

    def spans(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What tokens low..high-1 of the split are, n = high - low.

        Returns:
          Three int64 arrays [n]: the document, from 0 for the first one seen; the position within the document's part
          that is seen; the index in the cache.
        """
        first = int(np.searchsorted(self.ends, low, side="right")) - 1
        last = int(np.searchsorted(self.ends, high, side="left"))
        bounds = np.clip(self.ends[first : last + 1], low, high)
        counts = np.diff(bounds)
        document = np.repeat(np.arange(last - first), counts)
        position = np.arange(low, high) - bounds[document]
        shift = self.begins_D[first:last] - self.ends[first:last]
        return document, position, np.arange(low, high) + shift[document]


def split_documents(cache: TokenCache, eval_fraction: float) -> tuple[Split, Split]:
    """(train, eval) of a cache; either may be empty of tokens."""
    starts, lengths = cache.starts[:-1], np.diff(cache.starts)
    none = np.zeros(len(starts), dtype=bool)
    if eval_fraction == 0:
        return _pick(starts, lengths, ~none, "nothing"), _pick(starts, lengths, none, "nothing")
    held = cache.hashes < np.uint64(int(eval_fraction * 2.0**64))
    share = lengths[held].sum() / lengths.sum()
    if eval_fraction / 2 <= share <= eval_fraction * 2:
        return _pick(starts, lengths, ~held, "documents"), _pick(starts, lengths, held, "documents")
    total = int(cache.starts[-1])
    cut = total - max(1, round(eval_fraction * total))
    before = np.clip(cut - starts, 0, lengths)  # how much of each document comes before the cut
    train = _pick(starts, before, before > 0, "tail")
    return train, _pick(starts + before, lengths - before, lengths > before, "tail")


def _pick(
    starts: np.ndarray, lengths: np.ndarray, which: np.ndarray, held_out: Literal["documents", "tail", "nothing"]
) -> Split:
    return Split(starts[which], np.concatenate([[0], np.cumsum(lengths[which], dtype=np.int64)]), held_out)
