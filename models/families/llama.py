"""Llama 2, 3, 3.1 and 3.2 (text), and every checkpoint whose config.json says `"model_type": "llama"`."""

from typing import Any

from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import table

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """The decoder that config.json describes; ValueError lists every key that is not understood."""
    read = Reader("llama", config, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias", mlp_bias="mlp_bias")
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    read.only("hidden_act", "silu")
    read.only("use_sliding_window", False)
    read.only("sliding_window", None)
    read.finish()
    return DecoderConfig(family="llama", rope=rope, **heads, **sizes)


def check_dense(config: DecoderConfig) -> None:
    if config.moe is not None:
        raise ValueError(
            f"The Hugging Face family {config.family!r} has no mixture of experts, and this model has "
            f"{config.moe.num_experts} experts a layer. It stays a Twinax checkpoint, which `twinax serve` and `twinax "
            "train` take as it is; one that was trained with model.family=mixtral can be exported."
        )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """config.json for `config`, in the spelling of transformers 4 (which 5 reads too); ValueError if it has experts."""
    check_dense(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias", mlp_bias="mlp_bias"),
        **write_rope(config.rope, config.head_dim),
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    """Every tensor of the family, in file order; ValueError if the model has experts."""
    check_dense(config)
    return table(config)


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns (fnmatch) of tensors without effect: recomputed frequencies, and a tied copy of the embedding."""
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", *tied)
