"""Our side of the comparisons, in a process of its own: `python -m benchmarks.ours decode|train QUESTION ANSWER`."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def decode(question: dict[str, Any]) -> dict[str, Any]:
    """All requests given to the engine at once; it runs `batch` of them at a time."""
    from twinax.serving.engine import Engine, EngineConfig
    from twinax.serving.request import SamplingParams

    size, requests = question["batch"], question["requests"]
    longest = max(len(one["prompt"]) + one["tokens"] for one in requests)
    engine = Engine.from_path(question["model"], EngineConfig(max_running=size, max_model_len=longest + 1))
    engine.warmup()
    prompts = [one["prompt"] for one in requests]
    params = [SamplingParams(temperature=0.0, max_tokens=one["tokens"], ignore_eos=True) for one in requests]
    engine.generate(prompts[:size], params[:size])
    before, start = engine.stats(), time.perf_counter()
    done = engine.generate(prompts, params)
    seconds, after = time.perf_counter() - start, engine.stats()
    steps = after.steps - before.steps
    return {
        "seconds": seconds,
        "tokens": [one.token_ids for one in done],
        "steps": steps,
        "host_seconds_per_step": (after.host_seconds - before.host_seconds) / steps,
        "compiles": after.compiles_after_warmup,
    }


def train(question: dict[str, Any]) -> dict[str, Any]:
    """The trainer's own step on given rows of tokens; the median of the steps after the first two."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinax.checkpoints.load import load_model
    from twinax.sharding.plan import Plan
    from twinax.train import schedules
    from twinax.train.data.dataset import Batch
    from twinax.train.recipe import OptimizerConfig, ScheduleConfig
    from twinax.train.step import init_state, make_step, put_batch

    loaded = load_model(question["model"])
    mesh = Plan().mesh()
    optimizer = OptimizerConfig(lr=1e-4)
    schedule = schedules.make(ScheduleConfig(name="cosine", warmup_steps=0), optimizer.lr, 10**6)
    state = init_state(loaded.config, 0, mesh, loaded.params)
    step = make_step(loaded.config, optimizer, schedule, mesh, dtype=jnp.float32, remat="none")
    seconds, losses = [], []
    for number, rows in enumerate(question["batches"]):
        ids = np.asarray(rows, np.int32)
        targets = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], 1)
        weights = np.ones(ids.shape, np.float32)
        weights[:, -1] = 0  # as transformers' loss does, the last token predicts nothing
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        batch = Batch(ids, targets, np.ones_like(ids), positions, weights)
        start = time.perf_counter()
        state, metrics = step(state, put_batch(batch, number, 1, mesh))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    jax.block_until_ready(state)
    return {"seconds": statistics.median(seconds[2:]), "losses": losses}


if __name__ == "__main__":
    job, question_file, answer_file = sys.argv[1:]
    answer = {"decode": decode, "train": train}[job](json.loads(Path(question_file).read_text()))
    answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(answer_file).write_text(json.dumps(answer))
