"""Phi-3, 3.5 and 4 (text; arXiv:2404.14219): Llama with q, k, v and gate, up in one tensor each, and LongRoPE."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import LAYER, table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
FUSED = {
    "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("phi3", config, DEFAULTS)
    sizes = read.sizes()
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"], parts=True)
    window = read.take("sliding_window")
    read.only("hidden_act", "silu")
    read.only("attention_bias", False)
    read.ignore("resid_pdrop", "embd_pdrop")
    read.finish()
    return DecoderConfig(family="phi3", rope=rope, pattern=(LayerKind(window=window),), **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    original = getattr(config.rope.scaling, "original_context", config.max_position_embeddings)
    found = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        **write_sizes(config),
        **write_rope(config.rope, config.head_dim, parts=True),
        "sliding_window": config.pattern[0].window,
        "original_max_position_embeddings": original,
    }
    if config.head_dim * config.num_heads == config.hidden_size:
        del found["head_dim"]  # which transformers derives, and does not know as a key
    return found


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, LAYER, fused=FUSED)
