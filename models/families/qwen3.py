"""Qwen 3: Llama with RMSNorms on each head of queries and keys."""

from typing import Any

from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import table
from .llama import check_dense, ignorable_tensors
from .qwen2 import DEFAULTS, windows, write_windows

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("qwen3", config, {**DEFAULTS, "head_dim": 128, "attention_bias": False})
    sizes = read.sizes(attention_bias="attention_bias")
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    pattern = windows(read, sizes["num_layers"])
    read.only("hidden_act", "silu")
    read.finish()
    return DecoderConfig(family="qwen3", rope=rope, pattern=pattern, qk_norm="head", **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias"),
        **write_rope(config.rope, config.head_dim),
        **write_windows(config),
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config)
