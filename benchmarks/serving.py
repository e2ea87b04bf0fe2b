"""Serving against llama.cpp's server and transformers' continuous batching: a trace at saturation, and one stream.

All sides have the same random weights and greedy sampling; we and transformers compute in --dtype. Servers are asked
over HTTP by `twinax bench serve`'s own client, transformers within its process. In each round all sides are measured
one after another, with prompts that no earlier round had; the row shows the round whose ratio is the median. In
float32 llama.cpp's tokens are compared with ours before. Beside them stands what nobody can pass: all tokens multiplied
with all weights, at the speed at which numpy (float32) or torch (bfloat16) multiplies two large matrices in the same
round.

llama.cpp: build `llama-server` and name it with --llama-server; --gguf-python is a Python with the gguf package, which
writes the model's files.
"""

import contextlib
import dataclasses
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from twinax.models.config import DecoderConfig
from twinax.models.parameters import BLOCKS, param_shapes
from twinax.serving.bench.config import BenchConfig
from twinax.serving.bench.local import local_server
from twinax.serving.bench.main import load_of, measure
from twinax.serving.bench.summary import Summary
from twinax.serving.bench.traces import Trace

from . import model, report

SLOTS, THREADS = 8, 2
# Of llama.cpp's weights, by the dtype that we compute in; the first has a goal.
KINDS = {"float32": ("F32", "F16", "Q8_0"), "bfloat16": ("BF16", "F32", "F16")}
SIZES = {"110M": model.CONFIG_110M, "500M": model.CONFIG_500M}
STREAM = {"requests": 3, "concurrency": 1, "prompt_tokens": "32", "output_tokens": "128"}
PEER = Path(__file__).parent / "peers"


@contextlib.contextmanager
def llama(binary: str, file: Path, slots: int, context: int) -> Iterator[str]:
    """The URL of llama.cpp's server, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    sizes = ["-np", str(slots), "-c", str(slots * context), "-t", str(THREADS)]
    words = [binary, "-m", str(file), *sizes, "--no-ui", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            while not _ready(url):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{binary} ended with status {process.returncode}:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def ours(folder: Path, slots: int, dtype: str) -> contextlib.AbstractContextManager[str]:
    return local_server(str(folder), {"max_running": slots, "dtype": dtype})


def same_tokens(a: str, b: str, vocab_size: int) -> tuple[int, int]:
    """How many greedy tokens of two servers are the same, until the first that is not; of how many."""
    rng, same, count = np.random.default_rng(0), 0, 32
    prompts = [rng.integers(256, vocab_size - 3, size).tolist() for size in (3, 20, 90, 300)]
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        texts = []
        for url in (a, b):
            name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            answer = httpx.post(f"{url}/v1/completions", json={"model": name, **body}, timeout=600).raise_for_status()
            texts.append(answer.json()["choices"][0]["text"].split())
        same += next((i for i, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), min(map(len, texts)))
    return same, count * len(prompts)


def throughput(summary: Summary) -> float:
    """Generated tokens a second. Raises RuntimeError unless each request got all its tokens."""
    if summary.errors or summary.ended_early:
        raise RuntimeError(f"not every request got its tokens: {summary.errors}, {summary.ended_early} too short")
    return summary.output_rate


def speed(summary: Summary) -> float:
    """Tokens a second of one stream, after the first."""
    throughput(summary)
    return 1 / summary.per_token.mean


@dataclasses.dataclass
class Comparison:
    """Measurements of both sides, a round each."""

    case: str
    peer_name: str
    goal: float | None
    pairs: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def row(self) -> report.Row:
        pair = sorted(self.pairs, key=lambda pair: pair[0] / pair[1])[(len(self.pairs) - 1) // 2]
        return report.Row("serving", self.case, pair[0], pair[1], self.peer_name, "tokens/s", self.goal)


def compare(rounds: int, sides: dict[str, Callable[[int], float]], comparisons: dict[str, Comparison]) -> None:
    """Runs all sides in each round; the first is ours. Every second round runs backwards."""
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        found = {name: sides[name](number) for name in names}
        mine = found.pop(next(iter(sides)))
        for name, value in found.items():
            comparisons[name].pairs.append((mine, value))
            print(
                f"round {number + 1}: {comparisons[name].case}: {mine:.1f}, {comparisons[name].peer_name} {value:.1f}"
            )


def product_flops(options: Any) -> float:
    """Floating-point operations a second of a product of two large matrices in --dtype, the best of three."""
    size, seconds = 4096, []
    if options.dtype != "float32":  # which numpy has not
        return _ask_torch(options, "multiply", {"size": size, "dtype": options.dtype})["flops"]
    a_NN = np.random.default_rng(0).standard_normal((size, size), np.float32)
    for _ in range(3):
        start = time.perf_counter()
        np.matmul(a_NN, a_NN)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def most(config: DecoderConfig, trace: Trace, flops: float) -> float:
    """Generated tokens a second if products with weights were all there is to do, and ran at `flops` a second."""
    weights = [x for name, x in param_shapes(config).items() if name.startswith(BLOCKS) and x.ndim == 3]
    blocks, head = sum(math.prod(x.shape) for x in weights), config.vocab_size * config.hidden_size
    generated = sum(one.output_tokens for one in trace.arrivals)
    # The last token of a request is not fed again.
    fed = sum(one.prompt_tokens + one.output_tokens - 1 for one in trace.arrivals)
    return generated / (2 * (fed * blocks + generated * head) / flops)


def saturation(options: Any, folder: Path, files: dict[str, Path], version: str) -> list[report.Row]:
    """The trace, all requests at once."""
    settings: dict[str, Any] = {
        "trace": options.trace,
        "requests": options.requests,
        "scale": options.scale,
        "rate": "inf",
    }
    case = f"{_model(options)}, {options.requests} requests of {Path(options.trace).name}, lengths x {options.scale}"
    context = SIZES[options.size].max_position_embeddings
    comparisons: dict[str, Comparison] = {}
    with contextlib.ExitStack() as stack:
        urls = {"ours": stack.enter_context(ours(folder, SLOTS, options.dtype))}
        for kind, file in files.items():
            urls[kind] = stack.enter_context(llama(options.llama_server, file, SLOTS, context))
            goal = 1.0 if kind == KINDS[options.dtype][0] else None
            comparisons[kind] = Comparison(f"{case}, {SLOTS} slots", f"{version} {kind}", goal)
        # In bfloat16 every side rounds in other places, and tokens of a random model soon differ.
        if "F32" in urls and options.dtype == "float32":
            same, of = same_tokens(urls["ours"], urls["F32"], SIZES[options.size].vocab_size)
            print(f"greedy tokens the same as llama.cpp's F32: {same} of {of}")
            if same < 0.9 * of:
                raise RuntimeError("llama.cpp computes another model than ours; nothing was timed")
        sides: dict[str, Callable[[int], float]] = {
            name: lambda seed, url=url: throughput(measure(BenchConfig(url=url, seed=seed, **settings)).summary)
            for name, url in urls.items()
        }
        has_torch = report.peer_has(options.peer_python, "torch", "transformers")
        if has_torch:
            comparisons["transformers"] = Comparison(f"{case}, {SLOTS} running", "transformers", 3.0)
            sides["transformers"] = lambda seed: transformers(options, folder, settings, seed)
        if has_torch or options.dtype == "float32":
            whose = "numpy's" if options.dtype == "float32" else "torch's"
            comparisons["most"] = Comparison(case, f"the most that {options.dtype} allows: {whose} product", None)
            sides["most"] = lambda seed: most(
                SIZES[options.size],
                load_of(BenchConfig(url="http://none", seed=seed, **settings)),
                product_flops(options),
            )
        compare(options.rounds, sides, comparisons)
    return [one.row() for one in comparisons.values()]


def transformers(options: Any, folder: Path, settings: dict[str, Any], seed: int) -> float:
    """Tokens a second of continuous batching within one process, which has no HTTP to do."""
    trace, rng = load_of(BenchConfig(url="http://none", seed=seed, **settings)), np.random.default_rng(seed)
    requests = [
        {"prompt": rng.integers(0, 256, one.prompt_tokens).tolist(), "tokens": one.output_tokens}
        for one in trace.arrivals
    ]
    sizes = {"batch": SLOTS, "chunk": 256, "dtype": options.dtype}
    question = {"model": str(folder), "requests": requests, **sizes}
    answer = _ask_torch(options, "serve", question)
    if [len(tokens) for tokens in answer["tokens"]] != [one["tokens"] for one in requests]:
        raise RuntimeError("transformers did not produce the tokens that were asked for")
    return sum(one["tokens"] for one in requests) / answer["seconds"]


def _ask_torch(options: Any, job: str, question: dict[str, Any]) -> dict[str, Any]:
    return report.run_json([options.peer_python, str(PEER / "torch_llama.py"), job], question)


def one_stream(options: Any, folder: Path, files: dict[str, Path], version: str) -> list[report.Row]:
    """One request at a time, of servers with one slot; and what the many-slot server makes of it."""
    context = SIZES[options.size].max_position_embeddings
    with contextlib.ExitStack() as stack:
        urls = {"ours": stack.enter_context(ours(folder, 1, options.dtype))}
        for kind, file in files.items():
            urls[kind] = stack.enter_context(llama(options.llama_server, file, 1, context))
        urls["many"] = stack.enter_context(ours(folder, SLOTS, options.dtype))
        case = f"{_model(options)}, one stream"
        comparisons = {
            kind: Comparison(case, f"{version} {kind}", 1.0 if kind == KINDS[options.dtype][0] else None)
            for kind in files
        } | {"many": Comparison(case, f"ours with {SLOTS} slots", None)}
        sides: dict[str, Callable[[int], float]] = {
            name: lambda seed, url=url: speed(measure(BenchConfig(url=url, seed=seed, **STREAM)).summary)
            for name, url in urls.items()
        }
        compare(options.rounds, sides, comparisons)
    return [one.row() for one in comparisons.values()]


def llama_files(options: Any, folder: Path) -> tuple[dict[str, Path], str]:
    """The model in llama.cpp's format, by kind of weights, and its version; none when it is not here."""
    binary = options.llama_server
    if binary is None or subprocess.run([binary, "--version"], capture_output=True, check=False).returncode:
        print(f"skipped: llama.cpp's server, {binary or 'which --llama-server names'}")
        return {}, ""
    if not report.peer_has(options.gguf_python, "gguf"):
        return {}, ""
    kinds = options.kinds.split(",") if options.kinds else KINDS[options.dtype]
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    for kind, file in files.items():
        if file.exists():
            continue
        subprocess.run([options.gguf_python, str(PEER / "gguf_model.py"), str(folder), str(file), kind], check=True)
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    words = (said.stdout + said.stderr).split()
    return files, "llama.cpp " + (words[words.index("version:") + 1] if "version:" in words else "")


def _model(options: Any) -> str:
    """What rows call the model: the dtype is named where it is not float32."""
    return options.size if options.dtype == "float32" else f"{options.size} in {options.dtype}"


def main() -> None:
    parser = report.arguments(str(__doc__))
    parser.add_argument("--trace", required=True, help="Azure's CSV, BurstGPT's CSV or Mooncake's JSON lines")
    parser.add_argument("--requests", type=int, default=200, help="of the trace")
    parser.add_argument("--scale", default="1/16", help="of the trace's lengths")
    parser.add_argument("--size", choices=SIZES, default="110M", help="of the model")
    parser.add_argument("--models", type=Path, help="folder that keeps the models' files for further runs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--only", choices=("saturation", "stream"), help="one of the two comparisons")
    parser.add_argument("--dtype", choices=KINDS, default="float32", help="of the model, of ours and transformers")
    parser.add_argument("--kinds", help="weights of llama.cpp, with commas; by default what fits --dtype")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server")
    parser.add_argument("--gguf-python", default=sys.executable, help="Python that has the gguf package")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = (options.models or Path(folder)).absolute() / _model(options).replace(" in ", "-")
        if not (path / "model.safetensors").exists():
            model.write(path, SIZES[options.size], options.dtype)
        files, version = llama_files(options, path)
        if options.only != "stream":
            rows += saturation(options, path, files, version)
        if options.only != "saturation":
            rows += one_stream(options, path, files, version)
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
