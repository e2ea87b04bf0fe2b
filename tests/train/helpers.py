"""Small models, batches and runs that the tests of training share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twinax.models.decoder import DecoderConfig, functional, init_params, param_shardings
from twinax.sharding.plan import ONE_DEVICE, Plan
from twinax.sharding.rules import use
from twinax.train.data import Batch, DataConfig
from twinax.train.gradients import gradients
from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig
from twinax.train.step import put_batch

MODEL = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
WORDS = "the step of a run is a pure function of state and batch so that it resumes with the same bits".split(" ")  # noqa: SIM905




@functools.cache
def start_params(config: DecoderConfig, dtype: Any) -> Any:
    """Fresh parameters as host arrays: drawn on one device, as drawing them on each mesh compiles for each."""
    return jax.device_get(init_params(config, 0, dtype=dtype))


@functools.cache
def mean_gradients(
    config: DecoderConfig,
    plan: Plan = ONE_DEVICE,
    accumulation: int = 1,
    dtype: Any = jnp.float64,
    remat: str = "none",
) -> Any:
    """(gradients, loss, weight, statistics) of a random batch under a plan, as host arrays."""
    params = start_params(config, dtype)
    mesh, model = plan.mesh(), functional(config, dtype=dtype, remat=remat)
    placed = jax.device_put(params, param_shardings(config, mesh))
    batch = put_batch(random_batch(0), 0, accumulation, mesh)
    with use(mesh):
        find = jax.jit(functools.partial(gradients, model, plan=plan))
        return jax.device_get(find(placed, batch))


def difference(got: Any, want: Any) -> float:
    """The largest relative difference, by the norm, of any array."""
    least = np.finfo(np.float64).tiny
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), least)) for a, b in pairs)


def random_batch(seed: int, rows: int = 8, length: int = 16, vocabulary: int = 61) -> Batch:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length)).astype(np.int32)
    cut = rng.integers(4, 8, rows)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    second = place >= cut[:, None]
    padding = place >= length - rng.integers(0, 4, rows)[:, None]
    segments = np.where(padding, 0, np.where(second, 2, 1)).astype(np.int32)
    positions = np.where(padding, 0, np.where(second, place - cut[:, None], place)).astype(np.int32)
    weights = np.where(padding | (place == cut[:, None] - 1), 0, 1).astype(np.float32)
    return Batch(tokens, targets, segments, positions, weights)


def write_text(folder, words: int = 12000, seed: int = 0):
    """A file of text in `folder`."""
    rng = np.random.default_rng(seed)
    path = folder / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), words)))
    return path


def small_recipe(folder, **changes) -> Recipe:
    """A run of 20 short steps on a little text, all of it under `folder`."""
    text = folder / "text.txt"
    settings = {
        "model": MODEL,
        "data": DataConfig(path=str(text if text.exists() else write_text(folder)), cache_dir=str(folder / "cache")),
        "optimizer": OptimizerConfig(lr=3e-3),
        "schedule": ScheduleConfig(warmup_steps=2),
        "checkpoint": CheckpointConfig(every=10),
        "eval": EvalConfig(every=10, batches=2),
        "steps": 20,
        "batch_size": 4,
        "sequence_length": 32,
        "output": str(folder / "run"),
    }
    return Recipe(**{**settings, **changes})
