"""One vector for a prompt, from the hidden states that its chunks bring. Shapes: N positions, D the model's width."""

import numpy as np

from .request import Pooling


class Pooled:
    """What is pooled of one request so far.

    Invariants: the sum is made position by position in float64, so the chunks in which they come make no difference;
    positions that come again, as those of a preempted request, count once.
    """

    def __init__(self, kind: Pooling):
        self._kind = kind
        self._end = 0
        self._total_D = np.zeros(0)

    def first_of(self, start: int, end: int, is_last: bool) -> int:
        """The first position before `end` that is needed of a chunk that begins at `start`; `end` if none is."""
        if self._kind == "mean":
            return start
        return end - 1 if is_last else end

    def add(self, start: int, hidden_ND: np.ndarray) -> None:
        """The final hidden states of positions `start ..`, after what came before (or was in the prefix cache)."""
        new_ND = hidden_ND[max(self._end - start, 0) :]
        if not len(new_ND):
            return
        if self._kind == "last":
            self._total_D = new_ND[-1].copy()
        else:
            before_ND = self._total_D[None] if self._end else new_ND[:0]
            self._total_D = np.add.reduce(np.concatenate([before_ND, new_ND], dtype=np.float64), axis=0)
        self._end = start + len(hidden_ND)

    def result(self) -> bytes:
        """The vector [D], as little-endian float32: of the last position, or the mean of all."""
        mean_D = self._total_D if self._kind == "last" else self._total_D / self._end
        return mean_D.astype("<f4").tobytes()
