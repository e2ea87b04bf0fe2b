"""Schemathesis against our own /openapi.json: valid and invalid requests of every operation, in all its phases.

Looks for answers of 5xx, statuses and bodies that the document does not describe, invalid requests that are accepted,
and for an engine that dies or compiles. It stops by itself after --minutes; the rows say how far it came.
"""

import collections
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import report
from .disconnects import TINY
from .live_server import running
from .model import write

PHASES = ("examples", "coverage", "fuzzing", "stateful")
# A valid request may still be refused: prompts have to fit the context, names have to exist, the queue may be full.
_CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 413, 429]
"""
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one run. `complete`: it came to its end within its time. `text`: how to do again what failed."""

    cases: int
    operations: int
    complete: bool
    failures: list[str]
    text: str


def fuzz(
    url: str, *, examples: int, phases: tuple[str, ...] = PHASES, seed: int = 0, minutes: float | None = None
) -> Findings:
    """Up to `examples` requests an operation in the phases that draw at random. Raises RuntimeError if it can't run."""
    with tempfile.TemporaryDirectory() as folder:
        config, found = Path(folder) / "schemathesis.toml", Path(folder) / "report.json"
        config.write_text(_CONFIG)
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", f"{url}/openapi.json"]
        command += ["--checks", "all", "--mode", "all", "--phases", ",".join(phases), "--max-examples", examples]
        command += ["--seed", seed, "--continue-on-failure", "--generation-database", "none", "--no-color"]
        command += ["--suppress-health-check", "all", "--request-timeout", 120, "--report-json-path", found]
        if minutes is not None:
            command += ["--max-time", round(minutes * 60)]
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
        if not found.exists():
            raise RuntimeError(f"schemathesis ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return _findings(json.loads(found.read_text()), done.stdout)


def _findings(found: dict[str, Any], text: str) -> Findings:
    failures = [json.dumps(failure) for failure in found["failures"] + found["errors"]]
    cases, tested = found["test_cases"]["generated"], found["operations"]["tested"]
    return Findings(cases, tested, found["complete"], failures, text)


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--examples", type=int, default=2000, help="requests an operation, drawn at random")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "model", TINY)
        (model / "chat_template.jinja").write_text(_TEMPLATE)
        flags = ["--files", f"{folder}/files", "--max-model-len", "128", "--page-size", "16"]
        with running(model, *flags) as server:
            url = f"http://{server.host}:{server.port}"
            found = fuzz(url, examples=options.examples, seed=options.seed, minutes=options.minutes)
            left = server.wait_idle()
        status = server.process.returncode
    rows = []

    def add(case: str, ours: float, unit: str, goal: float | None = None) -> None:
        rows.append(report.Row("fuzz", case, ours, None, "", unit, goal, higher_is_better=False))

    add("operations", found.operations, "operations")
    add("requests", found.cases, "requests")
    add("complete", found.complete, "")
    for name, count in collections.Counter(found.failures).items():
        add(name, count, "failures", 0)
    add("failures", len(found.failures), "failures", 0)
    add("engine restarts", left["restarts"], "restarts", 0)
    add("compiled after warm-up", left["stats"]["compiles_after_warmup"], "programs", 0)
    add("pages in use at the end", left["stats"]["pages_used"], "pages", 0)
    add("exit status", status, "", 0)
    report.finish(rows, options.json)
    if found.failures:
        print(found.text)


if __name__ == "__main__":
    main()
