"""How often, and how soon, a dead engine is started again."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 600.0
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 30.0


class RestartPolicy:
    """At most `most` restarts within `WINDOW_SECONDS`; the first at once, then after 1, 2, 4, ... 30 seconds.

    An engine that did something useful (`useful`) starts the waits from the beginning: they are for one that dies again
    and again without serving anybody.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0
        self._times: deque[float] = deque()
        self._in_vain = 0

    def useful(self) -> None:
        """The engine finished a request."""
        self._in_vain = 0

    def delay(self, now: float) -> float | None:
        """The engine died at `now` (seconds): how long to wait before it is started again, None for not again."""
        while self._times and self._times[0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.most:
            return None
        self._times.append(now)
        self.total += 1
        self._in_vain += 1
        return 0.0 if self._in_vain == 1 else min(_FIRST_DELAY * 2.0 ** (self._in_vain - 2), _LONGEST_DELAY)
