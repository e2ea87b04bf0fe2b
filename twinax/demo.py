"""The main job, start to end: train, get interrupted, resume, export, serve, ask. `make demo` runs this.

Each stage is the very command that a user would type, in a process of its own. Everything it makes is in the folder
that `--output` names. Run it again to start over.
"""

import argparse
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.py"
PROMPTS = (
    "def __init__(self",
    "import os\nimport ",
    "class Test",
    "    for i in range(",
    '"""Return the ',
    "if __name__ == ",
    "# This ",
    "try:\n    from ",
)
TOKENS = 96
console = Console(highlight=False)


@dataclass
class Answer:
    """One streamed completion: its text, when its pieces came (seconds after it was asked), and how it ended."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    tokens: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twinax.demo", description=__doc__)
    parser.add_argument("--data", help="file, folder or pattern of text to train on (default: Python's own library)")
    parser.add_argument("--output", default="runs/demo", help="folder for all that is made (default: runs/demo)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of recipes/demo.py)")
    options = parser.parse_args()
    data = options.data or f"{sysconfig.get_paths()['stdlib']}/**/*.py"
    output = Path(options.output)
    try:
        run(data, output, options.steps)
    except DemoError as error:
        console.print(f"[bold red]The demo stopped:[/] {error}", markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        return 130
    return 0


class DemoError(Exception):
    """A stage that failed; its own output says why."""


def run(data: str, output: Path, steps: int | None) -> None:
    """All stages in turn; raises DemoError at the first that fails."""
    start = time.perf_counter()
    if not RECIPE.is_file():
        raise DemoError(f"{RECIPE} is missing: run the demo from a checkout of the repository.")
    if output.exists():
        if any(output.iterdir()) and not (output / "demo.json").is_file():
            raise DemoError(f"{output} holds something else than a demo; name another folder with --output.")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / "demo.json").write_text(json.dumps({"data": data}) + "\n")
    train = ["train", str(RECIPE), "--data.path", data, "--output", str(output / "run")]
    train += ["--steps", str(steps)] if steps else []

    stage("1. Train, until a SIGTERM in the middle, as a preempted machine gets it")
    interrupted = train_until_interrupted(train, output / "run")
    stage(f"2. Resume from step {interrupted}, bit for bit where it stopped")
    command([*train, "--resume", "must"])
    check_resumed(output / "run" / "metrics.jsonl", interrupted)
    stage("3. Export to a Hugging Face folder, and look at it")
    command(["convert", str(output / "run"), str(output / "huggingface")])
    command(["inspect", str(output / "huggingface")])
    stage(f"4. Serve the checkpoint, and ask {len(PROMPTS)} times at once")
    with server(output) as (address, ready_seconds):
        answers, seconds = ask_all(address)
    console.print("The server has stopped cleanly.\n")
    report(answers, seconds, ready_seconds)
    stage("What was made")
    for path, what in (
        (output / "run" / "loss.svg", "loss curve"),
        (output / "run" / "metrics.jsonl", "every step's metrics"),
        (output / "run" / "checkpoints", "checkpoints, to resume, serve or convert"),
        (output / "huggingface", "the same model for transformers"),
        (output / "completions.json", "what the model answered"),
        (output / "server.log", "the server's log"),
    ):
        if path.name == "completions.json":
            path.write_text(json.dumps([answer.text for answer in answers], indent=1) + "\n")
        if not path.exists():
            raise DemoError(f"{path} is missing.")
        console.print(f"  {path}  [dim]{what}[/]", soft_wrap=True)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    console.print(f"Next: twinax generate {output / 'run'} 'def ' or twinax serve {output / 'run'}", markup=False)


def stage(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left")


def twinax(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "twinax", *arguments]


def command(arguments: list[str]) -> None:
    console.print(f"$ twinax {' '.join(arguments)}", style="dim", markup=False, soft_wrap=True)
    status = subprocess.run(twinax(arguments), check=False).returncode
    if status:
        raise DemoError(f"`twinax {arguments[0]}` ended with status {status}; its message is above.")


def losses(metrics: Path) -> dict[int, float]:
    """Training loss by step, of the lines that are complete."""
    if not metrics.exists():
        return {}
    rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train_until_interrupted(arguments: list[str], run_folder: Path) -> int:
    """Trains, sends SIGTERM halfway, and returns the step that was saved."""
    console.print(f"$ twinax {' '.join(arguments)}", style="dim", markup=False, soft_wrap=True)
    steps = recipe_steps(arguments)
    process = subprocess.Popen(twinax(arguments))
    try:
        while process.poll() is None and max(losses(run_folder / "metrics.jsonl"), default=0) < steps // 2:
            time.sleep(0.2)
        if process.poll() is not None:
            raise DemoError("training ended before it could be interrupted; its message is above.")
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    saved = sorted(path.name for path in (run_folder / "checkpoints").glob("step_*"))
    if not saved:
        raise DemoError(f"training was interrupted (status {status}) and saved nothing.")
    return int(saved[-1].removeprefix("step_"))


def recipe_steps(arguments: list[str]) -> int:
    if "--steps" in arguments:
        return int(arguments[arguments.index("--steps") + 1])
    from .train.recipe import load_recipe

    return load_recipe(RECIPE).steps


def check_resumed(metrics: Path, interrupted: int) -> None:
    """The run must have gone on where it stopped: each step once, none missing."""
    steps = sorted(losses(metrics))
    if steps != list(range(steps[0], steps[0] + len(steps))) or steps[-1] <= interrupted:
        raise DemoError(f"after the resume at step {interrupted}, {metrics} does not hold every step once.")
    console.print(f"{metrics} holds each of the {len(steps)} steps once, {steps[-1] - interrupted} of them resumed.")


@contextmanager
def server(output: Path) -> Iterator[tuple[str, float]]:
    """A server of the newest checkpoint on a free port; gives its address and the seconds until it was ready."""
    arguments = ["serve", str(output / "run"), "--port", "0", "--served-model-name", "demo"]
    console.print(f"$ twinax {' '.join(arguments)}", style="dim", markup=False, soft_wrap=True)
    start = time.perf_counter()
    with (output / "server.log").open("w") as log:
        process = subprocess.Popen(twinax(arguments), stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                console.print(line.rstrip(), markup=False, soft_wrap=True)
                if found := re.search(r"ready at http://([^/]+)/", line):
                    break
            else:
                raise DemoError(f"the server ended with status {process.wait()}; see {output / 'server.log'}.")
            # It says a line when it stops; a full pipe must not keep it from that.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield found[1], time.perf_counter() - start
            process.send_signal(signal.SIGTERM)
            if status := process.wait(timeout=60):
                raise DemoError(f"the server stopped with status {status}; see {output / 'server.log'}.")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def ask_all(address: str) -> tuple[list[Answer], float]:
    """All prompts at once, streamed; returns the answers and the seconds for all of them."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: ask(address, prompt), PROMPTS)), time.perf_counter() - start


def ask(address: str, prompt: str) -> Answer:
    """One streaming request in the OpenAI format."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.7, "top_p": 0.9, "seed": 1}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = Answer()
    connection = http.client.HTTPConnection(address, timeout=120)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DemoError(f"the server answered {response.status}: {response.read().decode()}")
    for raw in response:
        line = raw.decode().strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            answer.text += choice["text"]
            answer.times.append(time.perf_counter() - start)
    connection.close()
    return answer


def report(answers: list[Answer], seconds: float, ready_seconds: float) -> None:
    table = Table(show_lines=True, title="Completions (a small model, minutes old: it knows the shape, not the sense)")
    table.add_column("prompt", overflow="fold", ratio=2)
    table.add_column("completion", overflow="fold", ratio=6)
    table.add_column("first token", justify="right")
    table.add_column("tokens", justify="right")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        first = f"{answer.times[0] * 1e3:.0f} ms" if answer.times else "-"
        table.add_row(prompt, answer.text, first, str(answer.tokens))
    console.print(table, markup=False)
    total = sum(answer.tokens for answer in answers)
    firsts = sorted(answer.times[0] for answer in answers if answer.times)
    if not firsts:
        raise DemoError("no completion had any text.")
    console.print(
        f"Server ready in {ready_seconds:.1f} s. Time to first token: {firsts[len(firsts) // 2] * 1e3:.0f} ms median, "
        f"{firsts[-1] * 1e3:.0f} ms worst. {total} tokens in {seconds:.1f} s: {total / seconds:.0f} tokens/s together."
    )


if __name__ == "__main__":
    sys.exit(main())
