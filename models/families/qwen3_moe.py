"""Qwen 3 with a mixture of experts in every layer (arXiv:2505.09388)."""

from typing import Any

from ...layers.moe_config import MoEConfig
from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import LAYER, table
from .llama import ignorable_tensors
from .mixtral import check_mixture
from .qwen2 import DEFAULTS, windows, write_windows

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

OWN = {
    **DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
EXPERTS = {
    "moe.router": "mlp.gate",
    "moe.gate": "mlp.experts.{}.gate_proj",
    "moe.up": "mlp.experts.{}.up_proj",
    "moe.down": "mlp.experts.{}.down_proj",
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("qwen3_moe", config, OWN)
    sizes = read.sizes(attention_bias="attention_bias")
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    pattern = windows(read, sizes["num_layers"])
    experts = read.take("num_experts", None)  # transformers 5 calls it num_local_experts
    moe = MoEConfig(
        num_experts=experts or read.take("num_local_experts", 128),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=read.take("moe_intermediate_size"),
        normalize=read.take("norm_topk_prob"),
        balance_loss=read.take("router_aux_loss_coef"),
        z_loss=0.0,
    )
    read.only("num_local_experts", moe.num_experts)
    read.only("decoder_sparse_step", 1)
    read.only("mlp_only_layers", [])
    read.only("hidden_act", "silu")
    read.ignore("output_router_logits")
    read.finish()
    return DecoderConfig(family="qwen3_moe", rope=rope, pattern=pattern, qk_norm="head", moe=moe, **heads, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    moe = check_mixture(config)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias"),
        **write_rope(config.rope, config.head_dim),
        **write_windows(config),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.normalize,
        "router_aux_loss_coef": moe.balance_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_mixture(config)
    return table(config, {**LAYER, **EXPERTS})
