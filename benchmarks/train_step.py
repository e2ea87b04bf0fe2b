"""A training step against torch: same 60M model, float32, AdamW with clipping, 8 rows of 512 tokens."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from . import report
from .model import CONFIG, write

PEER = Path(__file__).parent / "peers" / "torch_llama.py"


def main() -> None:
    parser = report.arguments(str(__doc__))
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="steps, of which the first two do not count")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps is from 3 up, as the first two do not count; got {options.steps}")
    rng = np.random.default_rng(0)
    shape = (options.steps, options.rows, options.length)
    with tempfile.TemporaryDirectory() as folder:
        question = {"model": str(write(Path(folder))), "batches": rng.integers(0, CONFIG.vocab_size, shape).tolist()}
        ours = report.run_json([sys.executable, "-m", "benchmarks.ours", "train"], question)
        theirs = None
        if report.peer_has(options.peer_python, "torch", "transformers"):
            theirs = report.run_json([options.peer_python, str(PEER), "train"], question)
    name = theirs["version"] if theirs else "transformers"
    tokens = options.rows * options.length
    case = f"training step, {options.rows} x {options.length}"
    speed = tokens / theirs["seconds"] if theirs else None
    memory = theirs["peak_bytes"] / 2**20 if theirs else None
    if theirs:
        print("losses, ours:  ", " ".join(f"{loss:.5f}" for loss in ours["losses"]))
        print("losses, theirs:", " ".join(f"{loss:.5f}" for loss in theirs["losses"]))
    rows = [
        report.Row("train_step", case, tokens / ours["seconds"], speed, name, "tokens/s", 1.0),
        report.Row("train_step", "peak memory", ours["peak_bytes"] / 2**20, memory, name, "MiB", None, False),
    ]
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
