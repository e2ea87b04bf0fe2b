"""Continue a prompt with a model, streaming the text to the terminal.

PATH is a run folder (its newest good step), one of its steps, or a Hugging Face folder.

examples:
  twinax generate runs/demo "def main("
  twinax generate runs/demo "import " --max-tokens 200 --temperature 0.7 --seed 1
  cat prompt.txt | twinax generate hf-folder -          # `-` reads the prompt from standard input
  twinax generate hf-folder "What is RoPE?" --chat      # through the model's chat template
  twinax generate runs/demo --input requests.jsonl --output answers.jsonl

A file of requests has the lines of OpenAI's batches, for /v1/completions, /v1/chat/completions, /v1/responses or
/v1/embeddings, a line's sampling settings in its body:
  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "def "}}
Requests that begin alike run together and compute what they share once. Answers come in the order in which they are
ready, a line each. Stopped at any moment, the same command goes on with what has no answer yet. Needs the extra
`serve`.

The same prompt, options and --seed give the same text, here and from `twinax serve`.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..overrides import UsageError, apply, existing
from ..parser import Parser

USAGE = """twinax generate PATH PROMPT [--max-tokens N] [--temperature X] [--seed N] ...
       twinax generate PATH --input FILE --output FILE [--max-running N] ..."""
# Of the server's settings, those that a file of requests goes with.
FOR_FILES = (
    "max_running", "max_model_len", "page_size", "num_pages", "cache_bytes", "host_cache_bytes",
    "chunk_tokens", "prefix_cache", "plan", "compile_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How to continue.

    Attributes:
        max_tokens: new tokens, at most.
        temperature: 0 takes the likeliest token always, 1 samples as trained.
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the likeliest tokens that together have probability p; 1: all.
        min_p: leave out tokens whose probability is below p times that of the likeliest; 0: none.
        stop: end before this text; several as a JSON list.
        seed: makes the text repeatable.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: str | tuple[str, ...] = ()
    seed: int | None = None


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="text to continue; `-` reads it from standard input"
    )
    parser.add_argument("--input", metavar="FILE", type=str, help="a file of requests in place of PROMPT")
    parser.add_argument("--output", metavar="FILE", type=str, help="where the answers to --input go")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    parser.add_argument(
        "--dtype", metavar="TYPE", type=str, default=None, help="float32 or bfloat16; by default what suits the device"
    )
    parser.add_dataclass(Sampling, dashes=True)
    from ..serving.http.config import ServeConfig

    others = tuple(field.name for field in fields(ServeConfig) if field.name not in FOR_FILES)
    parser.add_dataclass(ServeConfig, skip=others, dashes=True)


def run(options: Namespace, given: set[str]) -> int:
    path = existing(options.path, "The model")
    if options.input is not None or options.output is not None:
        return _run_file(options, given, path)
    if options.prompt is None:
        raise UsageError("PROMPT must be given, or a file of requests by --input and --output.")
    if wrong := sorted(given & set(FOR_FILES)):
        raise UsageError(f"--{wrong[0].replace('_', '-')} goes with --input; leave it out.")
    from ..notebook import load

    model = load(path, dtype=options.dtype)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.chat:
        prompt = model.chat_prompt([{"role": "user", "content": prompt}])
    sampling = {name: getattr(options, name) for name in Sampling.__dataclass_fields__}
    stop = sampling.pop("stop")
    pieces = model.stream(prompt, stop=[stop] if isinstance(stop, str) else list(stop), **sampling)
    if not options.chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _run_file(options: Namespace, given: set[str], path: Path) -> int:
    if options.input is None or options.output is None:
        raise UsageError("--input and --output go together: requests come from one file, answers go to the other.")
    if options.prompt is not None or options.chat:
        raise UsageError("--input takes the place of PROMPT and --chat; leave these out.")
    if wrong := sorted(given & {field.name for field in fields(Sampling)}):
        raise UsageError(f"--{wrong[0].replace('_', '-')} is said in the body of each request; leave it out.")
    from ..serving.http.config import ServeConfig
    from ..serving.http.request_file import plan_file, run_file

    source, answers = existing(options.input, "The file of requests"), Path(options.output).expanduser()
    work = plan_file(source, answers, ServeConfig.max_body_bytes)
    # Whatever the file calls its model, that at PATH is meant.
    config = ServeConfig(model=str(path), dtype=options.dtype, max_running=32, served_model_name=work.model)
    config = apply(config, {name: getattr(options, name) for name in given})
    failed = work.failed
    if work.left:
        failed += _with_progress(lambda done, say: run_file(config, work, source, answers, done, say), work)
    print(
        f"{len(work.places)} answers in {answers}" + (f", {failed} of them errors" if failed else ""), file=sys.stderr
    )
    return 1 if failed else 0


def _with_progress(run: Any, work: Any) -> int:
    """Shows how far `run(done, say)` is; returns how many requests failed."""
    from rich import progress as rich
    from rich.console import Console

    failed = tokens = 0
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[tokens]:,} tokens"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as progress:
        before = len(work.places) - len(work.left)
        task = progress.add_task("starting", total=len(work.places), completed=before, tokens=0)

        def done(status: int, body: dict[str, Any]) -> None:
            nonlocal failed, tokens
            failed += status != 200
            usage = body.get("usage") or {}
            tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0
            progress.update(task, advance=1, tokens=tokens, description="answering")

        def say(text: str) -> None:
            progress.update(task, description=text.partition("\n")[0][:60])

        run(done, say)
    return failed
