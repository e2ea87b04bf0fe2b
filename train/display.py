"""What a run shows: a live line on a terminal, plain lines at intervals anywhere else."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

INTERVAL = 10.0  # seconds between plain lines


class Display:
    """Progress of a run of `total` steps. Use it as a context manager.

    Args:
        total: steps in all.
        enabled: False shows nothing at all.
        console: where to; by default the standard output.
    """

    def __init__(self, total: int, *, enabled: bool = True, console: Console | None = None):
        self._console = console or Console(quiet=not enabled, highlight=False)
        self._total, self._enabled = total, enabled
        self._values: dict[str, Any] = {}
        self._shown_at, self._shown_step = -INTERVAL, -1
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            bar = BarColumn(bar_width=None, complete_style="cyan", finished_style="green")
            self._bar = Progress(TextColumn("[bold]{task.description}"), bar, TextColumn("{task.percentage:>3.0f}%"))
            self._task = self._bar.add_task("training", total=total)
            self._live = Live(self._render(), console=self._console, refresh_per_second=8, transient=False)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows the newest values; `values` may hold loss, eval_loss, lr, tokens_per_second, mfu, seconds_left."""
        self._values = {**self._values, **values, "step": step}
        now = time.monotonic()
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._live.update(self._render())
        elif step != self._shown_step and (now - self._shown_at >= INTERVAL or step >= self._total):
            self._shown_at, self._shown_step = now, step
            self._console.print("  ".join(f"{name} {text}" for name, text in self._texts()), soft_wrap=True)

    def _texts(self) -> list[tuple[str, str]]:
        values = self._values
        texts = [("step", f"{values.get('step', 0)}/{self._total}")]
        for key, name, form in (
            ("loss", "loss", "{:.4f}"),
            ("eval_loss", "eval", "{:.4f}"),
            ("lr", "lr", "{:.2e}"),
            ("tokens_per_second", "tokens/s", "{:,.0f}"),
            ("mfu", "MFU", "{:.1%}"),
        ):
            if values.get(key) is not None:
                texts.append((name, form.format(values[key])))
        if values.get("seconds_left") is not None:
            texts.append(("left", clock(values["seconds_left"])))
        return texts

    def _render(self) -> Table:
        line = Table.grid(padding=(0, 3, 0, 0))
        line.add_row(*(f"[dim]{name}[/] {text}" for name, text in self._texts()))
        whole = Table.grid(expand=True)
        whole.add_row(self._bar)
        whole.add_row(line)
        return whole


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:02:01."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
