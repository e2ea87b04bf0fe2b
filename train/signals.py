"""Ctrl-C and SIGTERM ask a run to stop after the step it is in; a second Ctrl-C ends it at once."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Within the `with` block, `received` is the name of the signal that asked to stop, None until then.

    The handlers that were there before come back at the end. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
