"""Decoding throughput against transformers' `generate` on torch: same 60M model, float32, same prompts, greedy."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from . import report
from .model import CONFIG, write

PEER = Path(__file__).parent / "peers" / "torch_llama.py"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    requests: int
    batch: int
    goal: float


CASES = (
    Case("8 requests at once, mixed lengths", 8, 8, 3.0),
    Case("48 requests, 8 at a time, mixed lengths", 48, 8, 3.0),
    Case("one stream", 3, 1, 1.0),
)


def requests(count: int, seed: int) -> list[dict]:
    """Prompts of 16 to 256 tokens and answers of 16 to 256, each log-uniform: most are short, some are long."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(16), np.log(256), count)).astype(int)
    tokens = np.exp(rng.uniform(np.log(16), np.log(256), count)).astype(int)
    return [
        {"prompt": rng.integers(0, CONFIG.vocab_size, int(p)).tolist(), "tokens": int(t)}
        for p, t in zip(prompts, tokens, strict=True)
    ]


def main() -> None:
    options = report.arguments(str(__doc__)).parse_args()
    peer = report.peer_has(options.peer_python, "torch", "transformers")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(write(Path(folder)))
        for seed, case in enumerate(CASES):
            question = {"model": model, "requests": requests(case.requests, seed), "batch": case.batch}
            total = sum(one["tokens"] for one in question["requests"])
            ours = report.run_json([sys.executable, "-m", "benchmarks.ours", "decode"], question)
            theirs = report.run_json([options.peer_python, str(PEER), "decode"], question) if peer else None
            if [len(row) for row in ours["tokens"]] != [one["tokens"] for one in question["requests"]]:
                raise RuntimeError("The engine did not produce the tokens that were asked for.")
            name = theirs["version"] if theirs else "transformers"
            speed = total / theirs["seconds"] if theirs else None
            rows.append(report.Row("decode", case.name, total / ours["seconds"], speed, name, "tokens/s", case.goal))
            if theirs:
                same = [a[0] == b[0] for a, b in zip(ours["tokens"], theirs["tokens"], strict=True)]
                print(f"{case.name}: first token the same in {sum(same)} of {len(same)} requests")
            if case.requests == case.batch == 8:
                host = ours["host_seconds_per_step"] * 1e3
                rows.append(report.Row("decode", "host time a step, 8 running", host, None, "", "ms", 1.0, False))
            rows.append(report.Row("decode", f"compiles, {case.name}", ours["compiles"], None, "", "", 0, False))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
