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
hooks = "{hooks}"

[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 413, 429]
"""
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one run.

    Attributes:
        counts: of each operation, what benchmarks/fuzz_counts.py writes.
        complete: it came to its end within its time.
        text: how to do again what failed.
    """

    cases: int
    operations: int
    counts: dict[str, dict[str, Any]]
    complete: bool
    failures: list[str]
    text: str


def fuzz(
    url: str,
    *,
    examples: int,
    phases: tuple[str, ...] = PHASES,
    only: tuple[str, ...] = (),
    seed: int = 0,
    minutes: float | None = None,
) -> Findings:
    """Up to `examples` requests an operation in the phases that draw at random; of operations like `GET /`, or all.

    Raises RuntimeError if it can't run.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, found = Path(folder) / "schemathesis.toml", Path(folder) / "report.json"
        config.write_text(_CONFIG.format(hooks=Path(__file__).with_name("fuzz_counts.py")))
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", f"{url}/openapi.json"]
        command += ["--checks", "all", "--mode", "all", "--phases", ",".join(phases), "--max-examples", examples]
        command += ["--seed", seed, "--continue-on-failure", "--generation-database", "none", "--no-color"]
        command += ["--suppress-health-check", "all", "--request-timeout", 300, "--report-json-path", found]
        for name in only:
            command += ["--include-name", name]
        if minutes is not None:
            command += ["--max-time", round(minutes * 60)]
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
        if not found.exists():
            raise RuntimeError(f"schemathesis ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
        counts = json.loads((Path(folder) / "counts.json").read_text())
        return _findings(json.loads(found.read_text()), counts, done.stdout)


def _findings(found: dict[str, Any], counts: dict[str, dict[str, Any]], text: str) -> Findings:
    failures = [json.dumps(failure) for failure in found["failures"] + found["errors"]]
    cases, tested = found["test_cases"]["generated"], found["operations"]["tested"]
    return Findings(cases, tested, counts, found["stop_reason"] == "completed", failures, text)


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--examples", type=int, default=2000, help="requests an operation, drawn at random")
    parser.add_argument("--phases", default=",".join(PHASES), help="of schemathesis")
    parser.add_argument("--only", action="append", default=[], help="an operation, like `GET /`; may be repeated")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "model", TINY)
        (model / "chat_template.jinja").write_text(_TEMPLATE)
        flags = ["--files", f"{folder}/files", "--max-model-len", "128", "--page-size", "16"]
        with running(model, *flags) as server:
            url = f"http://{server.host}:{server.port}"
            found = fuzz(
                url,
                examples=options.examples,
                phases=tuple(options.phases.split(",")),
                only=tuple(options.only),
                seed=options.seed,
                minutes=options.minutes,
            )
            left = server.wait_idle()
        status = server.process.returncode
    rows = []

    def add(case: str, ours: float, unit: str, goal: float | None = None) -> None:
        rows.append(report.Row("fuzz", case, ours, None, "", unit, goal, higher_is_better=False))

    add("operations", found.operations, "operations")
    add("requests", found.cases, "requests")
    add("complete", found.complete, "")
    for name, count in sorted(found.counts.items()):
        phases = ", ".join(f"{phase} {number}" for phase, number in sorted(count["phases"].items()))
        add(f"{name}: {phases}", sum(count["phases"].values()), "requests")
        statuses = ", ".join(f"{status}: {number}" for status, number in sorted(count["statuses"].items()))
        add(f"{name}: {statuses}; longest answer", count["longest"], "s")
        valid = sum(count["valid"].values())
        add(f"{name}: accepted of {valid} that the document allows", count["valid"].get("accepted", 0), "requests")
    server_errors = sum(
        number for count in found.counts.values() for status, number in count["statuses"].items() if status >= "500"
    )
    add("answers of 5xx", server_errors, "answers", 0)
    for name, count in collections.Counter(found.failures).items():
        add(name, count, "failures", 0)
    add("failures", len(found.failures), "failures", 0)
    add("engine restarts", left["restarts"], "restarts", 0)
    add("compiled after warm-up", left["stats"]["compiles_after_warmup"], "programs", 0)
    add("pages in use at the end", left["stats"]["pages_used"], "pages", 0)
    add("exit status", status, "", 0)
    report.finish(rows, options.json)
    for name, count in sorted(found.counts.items()):
        print(f"{name}, {count['seconds']:.1f} s: {json.dumps(count['valid'])}")
    if found.failures:
        print(found.text)


if __name__ == "__main__":
    main()
