"""A server's cache in 8 bits (`--cache-dtype`) beside one in float32: how quick, how exact, how roomy.

Speed is of random weights of 110M: requests that generate together, each after so many tokens, whose prompts are in the
cache already. In each round the kinds take turns; the median round counts. Exactness is of a model that has learned
something: the mean negative log-likelihood of a text's last tokens, in prompts as long as the model's context.

    make demo; python -m benchmarks.cache_dtype --model runs/demo/huggingface --text SOME_CODE.py
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from . import report

KINDS = (None, "int8", "float8")
GENERATED = 48
SEED = 3


def engine_of(model: Path, kind: str | None, **limits: Any) -> Any:
    from twinax.serving.engine import Engine, EngineConfig

    engine = Engine.from_path(model, EngineConfig(dtype="float32", cache_dtype=kind, **limits))
    engine.warmup()
    return engine


def decoded(engine: Any, prompts: list[list[int]]) -> float:
    """Tokens a second."""
    from twinax.serving.request import SamplingParams

    start = time.perf_counter()
    engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=GENERATED, ignore_eos=True))
    return len(prompts) * GENERATED / (time.perf_counter() - start)


def speeds(model: Path, slots: int, context: int, rounds: int) -> dict[str | None, float]:
    rng = np.random.default_rng(SEED)
    prompts = rng.integers(0, 30_000, (slots, context)).tolist()
    engines = {kind: engine_of(model, kind, max_running=slots) for kind in KINDS}
    for engine in engines.values():
        decoded(engine, prompts)  # which fills the prefix cache
    found = [{kind: decoded(engine, prompts) for kind, engine in engines.items()} for _ in range(rounds)]
    return {kind: statistics.median(one[kind] for one in found) for kind in KINDS}


def loss(model: Path, kind: str | None, text: str, most: int) -> tuple[float, int]:
    """Thousandths of a nat a token, and the number of tokens."""
    from twinax.serving.request import SamplingParams

    engine = engine_of(model, kind, prefix_cache="")
    length = engine.max_model_len - 1
    ids = engine.tokenizer.encode(text)[-most:]
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not windows:
        raise SystemExit(f"error: the text has {len(ids)} tokens, and the model's context is longer: {length}.")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = [
        -own.logprob
        for number in range(0, len(windows), 64)
        for done in engine.generate(windows[number : number + 64], params)
        for own in (done.prompt_logprobs or ())[1:]
        if own is not None
    ]
    return 1e3 * float(np.mean(found)), len(found)


def tokens_a_gib(kind: str | None) -> float:
    from twinax.models.cache import page_bytes
    from twinax.serving.engine import EngineConfig
    from twinax.serving.engine_sizes import cache_dtype_of

    from .model import CONFIG_110M

    config = EngineConfig(dtype="float32", cache_dtype=kind)
    return (1 << 30) * config.page_size / page_bytes(CONFIG_110M, config.page_size, cache_dtype_of(config))


def main() -> None:
    from .model import CONFIG_110M, write

    parser = report.arguments(str(__doc__).split("\n\n")[0], peer=False)
    parser.add_argument("--model", type=Path, help="a trained model's folder, to see how exact its numbers are")
    parser.add_argument("--text", type=Path, help="what the model reads for that; its end is what was not trained on")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text's end")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=900, help="tokens that each request has before it generates")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    if not 1 <= options.context <= CONFIG_110M.max_position_embeddings - GENERATED:
        parser.error(f"--context is from 1 to {CONFIG_110M.max_position_embeddings - GENERATED}; got {options.context}")
    with tempfile.TemporaryDirectory() as folder:
        found = speeds(write(Path(folder) / "model", CONFIG_110M), options.slots, options.context, options.rounds)
    case, peer = f"110M, {options.slots} at once after {options.context} tokens, ", "a cache of float32"
    rows = []
    for kind in KINDS[1:]:
        rows.append(report.Row("cache_dtype", case + str(kind), found[kind], found[None], peer, "tokens/s", None))
        room = tokens_a_gib(kind), tokens_a_gib(None)
        rows.append(report.Row("cache_dtype", f"110M, room, {kind}", *room, peer, "tokens a GiB", None))
    if options.model is not None:
        text = options.text.read_text()
        losses = {
            kind: loss(options.model, kind, text, options.tokens)
            for kind in track(KINDS, "reading the text", transient=True)
        }
        for kind in KINDS[1:]:
            (ours, count), (exact, _) = losses[kind], losses[None]
            case = f"trained model, {count:,} tokens of text, {kind}"
            rows.append(report.Row("cache_dtype", case, ours, exact, peer, "millinats a token", None, False))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
