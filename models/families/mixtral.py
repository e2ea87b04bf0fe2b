"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts."""

from typing import Any

from ...layers.moe_config import MoEConfig
from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import LAYER, table
from .llama import ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
}
EXPERTS = {
    "moe.router": "block_sparse_moe.gate",
    "moe.gate": "block_sparse_moe.experts.{}.w1",
    "moe.up": "block_sparse_moe.experts.{}.w3",
    "moe.down": "block_sparse_moe.experts.{}.w2",
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("mixtral", config, DEFAULTS)
    sizes = read.sizes()
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"], theta=1e6)
    window = read.take("sliding_window")
    moe = MoEConfig(
        num_experts=read.take("num_local_experts"),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=sizes["intermediate_size"],
        balance_loss=read.take("router_aux_loss_coef"),
        z_loss=0.0,
    )
    read.only("hidden_act", "silu")
    read.ignore("output_router_logits", "router_jitter_noise")
    read.finish()
    return DecoderConfig(family="mixtral", rope=rope, pattern=(LayerKind(window=window),), moe=moe, **heads, **sizes)


def check_mixture(config: DecoderConfig) -> MoEConfig:
    """The mixture; ValueError if the model has none, or one that the family cannot express."""
    moe = config.moe
    if moe is None or moe.router != "softmax" or moe.shared_experts or moe.route_scale != 1:
        raise ValueError(
            f"The Hugging Face family {config.family!r} is a mixture of experts with a softmax router, no shared "
            f"experts and route_scale=1; this model has {moe}. It stays a Twinax checkpoint."
        )
    return moe


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    moe = check_mixture(config)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        **write_sizes(config),
        **write_rope(config.rope, config.head_dim),
        "sliding_window": config.pattern[0].window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.balance_loss,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_mixture(config)
    return table(config, {**LAYER, **EXPERTS})
