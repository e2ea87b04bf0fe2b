"""Gemma 2 (arXiv:2408.00118): norms on both sides, every other layer with a window, softcaps, scaled embeddings."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import LAYER, table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def common(read: Reader) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, as fields of DecoderConfig."""
    sizes = read.sizes(attention_bias="attention_bias")
    # Both keys are in old files, where the second one is the one that is used.
    read.ignore("hidden_act")
    read.only("use_bidirectional_attention", None, False)
    return {
        **sizes,
        **read.heads(sizes["hidden_size"], sizes["num_heads"]),
        "norm": "rms_offset",
        "norm_placement": "both",
        "activation": read.activation("hidden_activation"),
        "attention_scale": read.positive("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": read.take("attn_logit_softcapping"),
        "logit_softcap": read.take("final_logit_softcapping"),
        "embedding_scale": sizes["hidden_size"] ** 0.5,
    }


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `common` reads, and the layers'."""
    assert config.attention_scale is not None
    scalar = config.attention_scale**-2
    types = ["full_attention" if kind.window is None else "sliding_attention" for kind in config.kinds]
    return {
        **write_sizes(config, attention_bias="attention_bias"),
        "hidden_activation": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": next((kind.window for kind in config.pattern if kind.window is not None), 4096),
        "layer_types": types,
    }


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("gemma2", config, DEFAULTS)
    fields = common(read)
    layers, window = fields["num_layers"], read.take("sliding_window")
    types = read.layer_types(layers, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    pattern = pattern_of([LayerKind(window if one == "sliding_attention" else None) for one in types])
    rope = read.rope(fields["head_dim"], fields["max_position_embeddings"])
    read.finish()
    return DecoderConfig(family="gemma2", rope=rope, pattern=pattern, **fields)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **write_common(config),
        **write_rope(config.rope, config.head_dim),
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, {**LAYER, **NORMS})
