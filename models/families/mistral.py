"""Mistral, and what shares its form: Llama with a sliding window in every layer."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("mistral", config, DEFAULTS)
    sizes = read.sizes()
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    window = read.take("sliding_window")
    read.only("hidden_act", "silu")
    read.finish()
    return DecoderConfig(family="mistral", rope=rope, pattern=(LayerKind(window=window),), **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        **write_sizes(config),
        **write_rope(config.rope, config.head_dim),
        "sliding_window": config.pattern[0].window,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config)
