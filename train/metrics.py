"""Metrics of a run: one JSON object a line, flushed, and TensorBoard events if asked for.

A line has `kind` ("train" or "eval") and `step`, the number of updates made when it was measured, so the lines of a
resumed run go on where the checkpoint ends: what an earlier process wrote beyond it is cut off.
"""

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to `path`, and to TensorBoard events in `tensorboard_dir` if given; without a path it writes nothing.

    Attributes:
        notice: why no TensorBoard events are written although they were asked for, else None.
    """

    def __init__(self, path: Path | None, *, resume_step: int = 0, tensorboard_dir: Path | None = None):
        self.path, self.notice, self._board, self._file = path, None, None, None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard_dir is not None:
            try:
                writer = importlib.import_module("tensorboardX").SummaryWriter
            except ImportError:
                self.notice = "No TensorBoard events: tensorboardX is not installed (pip install 'twinax[train]')."
            else:
                self._board = writer(str(tensorboard_dir), purge_step=resume_step + 1 if resume_step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes one line, at once visible to readers. A number that is not finite becomes null: JSON has none such."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes everything; calling it again does nothing."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that a killed process left unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def _cut(path: Path, step: int) -> None:
    """Drops what is beyond `step`, replacing the file in one move so that a kill loses nothing."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    draft = path.with_name(path.name + ".draft")
    draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(draft, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
