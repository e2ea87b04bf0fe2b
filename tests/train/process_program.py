"""Trains as one of several processes, for test_processes.py: `python -m tests.train.process_program TASK PORT N I`.

TASK is JSON: "folder", "output", "plan", changes of the recipe, and "mishap". Writes to `<output>.said/`: each step's
metrics, and the shares of the state that this process's devices had when step 5 was saved and when one was restored.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.train.helpers import MODEL, small_recipe
from twinax.checkpoints import shared, store
from twinax.checkpoints.step import flatten
from twinax.sharding import processes
from twinax.train import loop
from twinax.train.recipe import CheckpointConfig, EvalConfig, Recipe


def recipe_of(task: dict, index: int) -> Recipe:
    model = dataclasses.replace(MODEL, num_layers=1, num_kv_heads=4, vocab_size=264)
    settings = {
        "model": model,
        "steps": 5,
        "batch_size": 8,
        "checkpoint": CheckpointConfig(every=task.get("every", 3)),
        "eval": EvalConfig(every=5, batches=2),
        "plan": task["plan"],
        "output": task["output"],
        "accumulation": task.get("accumulation", 1),
    }
    recipe = small_recipe(Path(task["folder"]), **settings)
    steps = task.get("steps", 5)
    if task.get("mishap") == "other settings" and index == 1:
        steps += 1
    return dataclasses.replace(recipe, steps=steps)


def keep_shares(said: Path, name: str, state: object) -> None:
    """The parts of each array that are on this process's devices, with where they belong."""
    parts: dict[str, np.ndarray] = {}
    for array_name, array in flatten(state).items():
        for number, shard in enumerate(array.addressable_shards):
            where = [list(part.indices(size)[:2]) for part, size in zip(shard.index, array.shape, strict=True)]
            parts[f"{array_name}|{json.dumps(where)}|{number}"] = np.asarray(shard.data)
    np.savez(said / name, **parts)


class FullDisk:
    """A write in the background, as Orbax has them, that fails."""

    def result(self, timeout: float | None = None) -> None:
        raise OSError(28, "No space left on device")


def cause(mishap: str, index: int, batch_of_step_3) -> None:
    """Something goes wrong, in process 1 alone."""
    if index != 1:
        return
    if mishap == "nan":
        put = loop.put_batch

        def poisoned(batch, step, *rest):
            if step == batch_of_step_3:
                batch = dataclasses.replace(batch, weights_BT=batch.weights_BT * np.nan)
            return put(batch, step, *rest)

        loop.put_batch = poisoned
    elif mishap == "full disk":
        handler, calls = ocp.type_handlers.ArrayHandler, []
        serialize = handler.serialize

        async def full(self, *rest, **options):
            calls.append(rest)
            written = await serialize(self, *rest, **options)
            return written if len(calls) > 1 else [*written, FullDisk()]

        handler.serialize = full
    elif mishap == "blind":
        shared._LAG, shared._read = 0.5, lambda path: None


def main() -> None:
    task, port, count, index = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    said = Path(task["output"] + ".said")
    said.mkdir(exist_ok=True)
    save, restore = store.CheckpointStore.save, store.CheckpointStore.restore

    def saving(self, step, state, *rest, **options):
        if step == 5:
            keep_shares(said, f"saved-{index}", state)
        save(self, step, state, *rest, **options)

    def restoring(self, *rest):
        restored = restore(self, *rest)
        keep_shares(said, f"restored-{index}", restored.state)
        return restored

    store.CheckpointStore.save, store.CheckpointStore.restore = saving, restoring
    cause(task.get("mishap", ""), index, batch_of_step_3=2)
    with processes.join(f"localhost:{port}", count, index, timeout=300) as job:
        assert len(jax.local_devices()) * count == jax.device_count()
        steps = []
        result = loop.train(recipe_of(task, index), on_step=lambda metrics: steps.append(metrics))
        outcome = {"steps": steps, "eval": result.eval_loss, "process": job.process}
        (said / f"{index}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
