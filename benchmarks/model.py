"""The model that both sides run: 60M parameters, Llama shape, float32, random weights, in a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np

from twinax.checkpoints.safetensors import SafetensorsWriter, TensorSpec
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.models.config import DecoderConfig
from twinax.models.decoder import init_params
from twinax.models.families import llama

CONFIG = DecoderConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=14,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=1024,
    tie_embeddings=True,
)


def write(folder: Path) -> Path:
    """Writes the model to `folder` and returns it."""
    params = {name: np.asarray(value) for name, value in init_params(CONFIG, 0).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**llama.to_hf(CONFIG), "torch_dtype": "float32"}))
    Tokenizer.bytes().save(folder)
    tensors = {
        entry.hf_name: params[entry.name][entry.index]
        for entry in llama.tensor_table(CONFIG)
    }
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return folder
