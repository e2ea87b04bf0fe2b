"""Shows compilations as they go on: a line each on a terminal, plain lines anywhere else. On the standard error."""

import threading
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .workload import Layout


class CompileDisplay:
    """Use it as a context manager; call it with each layout and stage.

    Args:
        topology: what is compiled for, in words.
        enabled: False shows nothing.
    """

    def __init__(self, topology: str, *, enabled: bool = True, console: Console | None = None):
        self._console = console or Console(stderr=True, quiet=not enabled, highlight=False)
        self._topology, self._since = topology, {}
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._tasks: dict[Layout, int] = {}
        if enabled and self._console.is_terminal:
            words = TextColumn("{task.description}"), TextColumn("[dim]{task.fields[stage]}")
            self._bar = Progress(SpinnerColumn(), *words, TimeElapsedColumn(), console=self._console, transient=True)

    def __enter__(self) -> "CompileDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, layout: Layout, stage: str) -> None:
        with self._lock:
            name = f"{self._topology} {layout.plan} remat {layout.remat}"
            if self._bar is None:
                since = self._since.setdefault(layout, time.perf_counter())
                self._console.print(f"{name}: {stage} after {time.perf_counter() - since:.0f} s", soft_wrap=True)
                return
            if layout not in self._tasks:
                self._tasks[layout] = self._bar.add_task(name, total=None, stage=stage)
            task = self._tasks[layout]
            self._bar.update(task, stage=stage)  # type: ignore[arg-type]
            if stage == "done":
                self._bar.update(task, total=1, completed=1)  # type: ignore[arg-type]
