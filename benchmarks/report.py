"""Rows of a benchmark: a table for people, JSON for programs. A ratio above 1 is better for us."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        ours, peer: measured in `unit`; peer is None where there is nothing to compare with.
        higher_is_better: of ours and peer.
        goal: the ratio to reach, or, without a peer, the value of `ours` to stay on the good side of.
    """

    benchmark: str
    case: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    goal: float | None
    higher_is_better: bool = True

    @property
    def ratio(self) -> float | None:
        if self.peer is None:
            return None
        return self.ours / self.peer if self.higher_is_better else self.peer / self.ours

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        if self.ratio is not None:
            return self.ratio >= self.goal
        return self.ours >= self.goal if self.higher_is_better else self.ours <= self.goal

    def to_json(self) -> dict[str, Any]:
        row = {**dataclasses.asdict(self), "ratio": self.ratio, "met": self.met}
        del row["higher_is_better"]
        return row


def arguments(description: str, peer: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one JSON object a line")
    if peer:
        parser.add_argument("--peer-python", default=sys.executable, help="Python that has torch and transformers")
    return parser


def finish(rows: list[Row], json_file: Path | None) -> None:
    """Prints the table and writes the file."""
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}")
    for column in ("case", "ours", "peer", "unit", "ratio", "goal", "met"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right", overflow="fold")
    for row in rows:
        peer = "-" if row.peer is None else f"{row.peer:,.2f} ({row.peer_name})"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        goal = "-" if row.goal is None else f"{row.goal:g}"
        met = {None: "-", True: "yes", False: "NO"}[row.met]
        table.add_row(row.case, f"{row.ours:,.2f}", peer, row.unit, ratio, goal, met)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


def run_json(command: list[str], given: Any) -> dict[str, Any]:
    """Runs a program that reads a JSON file, named by its last argument, and writes JSON beside it."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(given))
        subprocess.run([*command, str(question), str(answer)], check=True)
        return json.loads(answer.read_text())


def peer_has(python: str, *modules: str) -> bool:
    """Whether the peer's Python has these modules; says so by name when it has not."""
    found = subprocess.run([python, "-c", f"import {', '.join(modules)}"], capture_output=True, check=False)
    if found.returncode:
        print(f"skipped: {' and '.join(modules)} cannot be imported by {python}; name another with --peer-python")
    return found.returncode == 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
