"""Small states, step folders and Hugging Face folders for the checkpoint tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from twinax.checkpoints.safetensors import SafetensorsWriter, TensorSpec
from twinax.checkpoints.store import CheckpointStore, Description
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.models import families
from twinax.models.config import DecoderConfig
from twinax.models.decoder import param_shapes


def small_config(**changes: Any) -> DecoderConfig:
    sizes = {
        "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    return DecoderConfig(**{**sizes, **changes})


def random_params(config: DecoderConfig, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape.shape, np.float32).astype(dtype) for name, shape in param_shapes(config).items()
    }


def write_hugging_face(
    folder: Path,
    config: DecoderConfig,
    params: dict[str, np.ndarray],
    *,
    extra: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    tokenizer: bool = True,
    **config_changes: Any,
) -> Path:
    """A Hugging Face folder with these parameters (and `extra` tensors, without some)."""
    family = families.load(config.family)
    tensors = {
        entry.hf_name: params[entry.name][entry.index]
        for entry in family.tensor_table(config)
        if entry.hf_name not in without
    }
    tensors |= extra or {}
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    (folder / "config.json").write_text(json.dumps({**family.to_hf(config), **config_changes}))
    if tokenizer:
        Tokenizer.bytes().save(folder)
    return folder


def describe(config: DecoderConfig, **changes: Any) -> Description:
    given = {
        "family": config.family,
        "model": config.to_dict(),
        "tokenizer_files": Tokenizer.bytes().files(),
        "seed": 7,
    }
    return Description(**{**given, **changes})


def training_state(params: dict[str, np.ndarray], step: int = 0) -> dict[str, Any]:
    device = {name: jnp.asarray(array) for name, array in params.items()}
    return {"params": device, "optimizer": {"mu": jax.tree.map(lambda x: x + 1, device)}, "step": np.int32(step)}


def assert_same_bits(left: Any, right: Any) -> None:
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def run_python(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    command = [*prefix, sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    )


def make_run(folder: Path, *steps: int, config: DecoderConfig | None = None, **changes: Any) -> Path:
    """A run's output folder with these steps; `changes` are of the description."""
    config = config or small_config()
    with CheckpointStore(folder / "checkpoints", keep_last=None) as store:
        for step in steps:
            store.save(step, training_state(random_params(config, seed=step), step), describe(config, **changes))
    return folder


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
