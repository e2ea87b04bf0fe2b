"""Batches made ahead by one thread, while the device computes."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from .config import DataError
from .dataset import Batch, Dataset, Part

_POLL = 0.1  # seconds between looks at whether to stop


class Prefetch(Iterator[Batch]):
    """Yields `make(step)` for step = start, start + 1, ..., made ahead by a thread.

    - An error of `make` is raised where its batch would have come, and ends the iteration.
    - `close()`, leaving a `with` block, or dropping the iterator ends the thread.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, depth: int = 2):
        if depth < 1:
            raise DataError(f"prefetch depth must be at least 1, not {depth}")
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread must not hold `self`, or a dropped iterator would never end it.
        arguments = (make, start, self._queue, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="twinax-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> Batch:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            return item
        raise StopIteration

    def close(self) -> None:
        """Ends the thread and waits for it; calling it again does nothing."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _work(make: Callable[[int], Batch], step: int, results: queue.Queue[Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            item: Batch | BaseException = make(step)
        except BaseException as error:  # handed to the consumer, who raises it
            item = error
        while not stop.is_set():
            try:
                results.put(item, timeout=_POLL)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        step += 1


def batches(
    dataset: Dataset, start_step: int, batch_size: int, part: Part | None = None, depth: int = 2
) -> Prefetch:
    """`dataset.batch(step, batch_size, part)` for step = start_step, start_step + 1, ..., up to `depth` made ahead."""
    return Prefetch(lambda step: dataset.batch(step, batch_size, part), start_step, depth)
