"""Granite 3: Llama with multipliers on embeddings, scores, residuals and logits (as in muP)."""

from typing import Any

from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import table
from .llama import DEFAULTS, check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

OWN = {**DEFAULTS, **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), 1.0)}
SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
}
SIZES = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias", **SCALES}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("granite", config, OWN)
    sizes = read.sizes(**SIZES)
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    divisor = read.positive("logits_scaling", 1.0)
    read.only("hidden_act", "silu")
    read.finish()
    return DecoderConfig(family="granite", rope=rope, logit_scale=1 / divisor, **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    divisor = 1 / config.logit_scale
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_act": "silu",
        **write_sizes(config, **SIZES),
        **write_rope(config.rope, config.head_dim),
        "logits_scaling": float(round(divisor)) if abs(divisor - round(divisor)) < 1e-9 * divisor else divisor,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config)
