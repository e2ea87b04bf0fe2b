"""Small models, batches and runs that the tests of training share."""

import numpy as np

from twinax.train.data import Batch, DataConfig
from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig

MODEL = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
WORDS = "the step of a run is a pure function of state and batch so that it resumes with the same bits".split(" ")  # noqa: SIM905


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
