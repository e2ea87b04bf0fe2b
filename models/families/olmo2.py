"""OLMo 2 (arXiv:2501.00656): norms after attention and feed-forward, and over all of a token's queries and keys."""

from typing import Any

from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import LAYER, table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
NORMS = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("olmo2", config, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias")
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    read.only("hidden_act", "silu")
    read.finish()
    return DecoderConfig(family="olmo2", rope=rope, norm_placement="after", qk_norm="all", **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    found = {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias"),
        **write_rope(config.rope, config.head_dim),
    }
    if config.head_dim * config.num_heads == config.hidden_size:
        del found["head_dim"]  # which transformers derives, and does not know as a key
    return found


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, {**LAYER, **NORMS})
