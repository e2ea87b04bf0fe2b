"""The models that both sides run: Llama shape, random weights, in a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from twinax.checkpoints.safetensors import SafetensorsWriter, TensorSpec
from twinax.checkpoints.tokenizer import SPECIAL_TOKENS, Tokenizer
from twinax.models.config import DecoderConfig
from twinax.models.decoder import init_params
from twinax.models.families import llama

CONFIG = DecoderConfig(  # 60M parameters
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
# 110M and 0.5B parameters, as GPT-2 small's and Qwen2.5 0.5B's shapes, the latter without its biases.
CONFIG_110M = dataclasses.replace(
    CONFIG, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_kv_heads=12
)
CONFIG_500M = dataclasses.replace(
    CONFIG,
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
)


def tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, and a word for each further id, so that whatever a random model says can be seen coming."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"Ġt{number}" for number in range(len(pieces), vocab_size - len(SPECIAL_TOKENS))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_backend(backend)


def write(folder: Path, config: DecoderConfig = CONFIG, dtype: str = "float32") -> Path:
    """Writes the model to `folder` and returns it."""
    params = {name: np.asarray(value, jnp.dtype(dtype)) for name, value in init_params(config, 0).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**llama.to_hf(config), "torch_dtype": dtype}))
    tokenizer(config.vocab_size).save(folder)
    tensors = {entry.hf_name: params[entry.name][entry.index] for entry in llama.tensor_table(config)}
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return folder
