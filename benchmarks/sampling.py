"""What drawing a step's tokens takes, against transformers' processors: 8 rows of made-up logits.

The logits fall off as a language model's do, by Zipf's law. The median of many draws, each with another seed.
"""

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from twinax.serving import sampling

from . import report

PEER = Path(__file__).parent / "peers" / "torch_sampling.py"
ROWS, ROUNDS = 8, 50
VOCABULARIES = {"Llama 2": 32_000, "Qwen 2": 151_936}
CASES = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "temperature 0.8": {"temperature": 0.8, "top_k": 0, "top_p": 1.0},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
    "temperature 0.7, top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "temperature 1, top_p 0.05": {"temperature": 1.0, "top_k": 0, "top_p": 0.05},
}


def logits(vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    falling = -1.2 * np.log(np.arange(1, vocab_size + 1)) + 0.3 * rng.standard_normal((ROWS, vocab_size))
    return rng.permuted(falling, axis=1).astype(np.float32)


def milliseconds(logits_RV: np.ndarray, case: dict[str, float]) -> float:
    rows, vocab_size = logits_RV.shape
    names = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
    values = {"repetition": 1.0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0, **case}
    floats = {name: jnp.full(rows, values[name], jnp.float32) for name in names}
    zeros = jnp.zeros(rows, jnp.int32)
    top_k = jnp.full(rows, case["top_k"], jnp.int32)
    state = sampling.SlotState.empty(rows, vocab_size)
    allowed = jnp.zeros((rows, sampling.mask_words(vocab_size)), jnp.int32)
    draw, given, taken = jax.jit(sampling.sample), jnp.asarray(logits_RV), []
    for nth in range(ROUNDS + 1):
        seed = jnp.arange(rows, dtype=jnp.int32) + nth * rows
        settings = sampling.SamplingRows(
            slot=jnp.arange(rows), flags=zeros, position=zeros, seed_high=zeros, seed_low=seed, top_k=top_k, **floats
        )
        jax.block_until_ready((given, settings))
        start = time.perf_counter()
        draw(given, settings, state, allowed).block_until_ready()
        taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken[1:]))  # the first one compiles


def main() -> None:
    options = report.arguments(str(__doc__)).parse_args()
    has_peer = report.peer_has(options.peer_python, "torch", "transformers")
    rows = []
    for name, vocab_size in VOCABULARIES.items():
        logits_RV = logits(vocab_size)
        theirs = None
        if has_peer:
            with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                np.save(file.name, logits_RV)
                question = {"logits": file.name, "settings": list(CASES.values()), "rounds": ROUNDS}
                theirs = report.run_json([options.peer_python, str(PEER)], question)
        for nth, (case, settings) in enumerate(CASES.items()):
            peer = 1e3 * theirs["seconds"][nth] if theirs else None
            label = f"{ROWS} x {vocab_size:,} ({name}), {case}"
            version = theirs["version"] if theirs else "transformers"
            rows.append(
                report.Row("sampling", label, milliseconds(logits_RV, settings), peer, version, "ms", None, False)
            )
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
