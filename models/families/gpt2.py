"""GPT-2: learned positions, LayerNorms, biases everywhere, and weights kept as [in, out] with q, k and v in one."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader
from ._table import table
from .llama import check_dense

DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
OUTSIDE = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "unembed": "lm_head",
}
LAYER = {
    "attention_norm": "ln_1",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
FUSED = {"attn.c_attn": ("attention.query", "attention.key", "attention.value")}
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("gpt2", config, DEFAULTS)
    width, heads = read.take("n_embd"), read.take("n_head")
    if heads < 1 or width % heads:
        raise ValueError(f"n_embd={width} does not divide by n_head={heads}.")
    context = read.take("n_positions")
    read.only("n_ctx", context)
    read.only("scale_attn_weights", True)
    read.only("scale_attn_by_inverse_layer_idx", False)
    # Of training alone, of a classifier's head, or of the order of two products in float16.
    read.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop", "gradient_checkpointing", "reorder_and_upcast_attn")
    read.ignore(*(f"summary_{word}" for word in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")))
    fields = {
        "vocab_size": read.take("vocab_size"),
        "intermediate_size": read.take("n_inner") or 4 * width,
        "num_layers": read.take("n_layer"),
        "norm_eps": read.take("layer_norm_epsilon"),
        "tie_embeddings": read.take("tie_word_embeddings"),
        "activation": read.activation("activation_function"),
    }
    read.finish()
    return DecoderConfig(
        family="gpt2",
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=context,
        pattern=(LayerKind(rope=None),),
        learned_positions=True,
        norm="layer",
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        **fields,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, LAYER, OUTSIDE, "transformer.h.{}.", FUSED, TRANSPOSED)


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns (fnmatch) of tensors without effect: masks of causality, and a tied copy of the embedding."""
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias", *tied)
