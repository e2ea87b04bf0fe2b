"""SmolLM 3: Llama in which every fourth layer has no rotary embedding (NoPE, arXiv:2501.18795)."""

import dataclasses
from typing import Any

from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import table
from .llama import check_dense, ignorable_tensors
from .qwen2 import windows, write_windows

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("smollm3", config, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias", mlp_bias="mlp_bias")
    layers = sizes["num_layers"]
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"], theta=2e6)
    every, turned = read.positive("no_rope_layer_interval", 4), read.take("no_rope_layers", None)
    # Whatever its name says, a 1 is a layer with rope.
    if turned is None:
        turned = [int((layer + 1) % every != 0) for layer in range(layers)]
    if len(turned) != layers or any(one not in (0, 1) for one in turned):
        raise ValueError(f"no_rope_layers has one number for each of {layers} layers, 0 or 1; config.json: {turned}.")
    base = DecoderConfig(family="smollm3", rope=rope, pattern=windows(read, layers), **heads, **sizes)
    read.only("hidden_act", "silu")
    read.finish()
    kinds = [dataclasses.replace(k, rope="rope" if one else None) for k, one in zip(base.kinds, turned, strict=True)]
    return dataclasses.replace(base, pattern=pattern_of(kinds))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias", mlp_bias="mlp_bias"),
        **write_rope(config.rope, config.head_dim),
        **write_windows(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.kinds],
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config)
