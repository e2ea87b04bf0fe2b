"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, softmax router, with groups in the large one."""

from typing import Any

from ...layers.moe_config import MoEConfig
from ..config import DecoderConfig
from . import TensorEntry
from ._reader import Reader
from ._table import table
from .deepseek_v3 import check_latent, common, latents, layer_names, write_latents
from .llama import ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "rope_interleave": True,  # always so; no key of theirs
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("deepseek_v2", config, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias")
    fields = latents(read, sizes)
    method, groups, best = (read.take(key) for key in ("topk_method", "n_group", "topk_group"))
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method is 'greedy' or 'group_limited_greedy'; config.json has {method!r}.")
    grouped = method == "group_limited_greedy"
    moe = MoEConfig(
        num_experts=read.take("n_routed_experts"),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=read.take("moe_intermediate_size"),
        shared_experts=read.take("n_shared_experts"),
        normalize=False,
        route_scale=float(read.take("routed_scaling_factor")),
        groups=groups if grouped else 1,
        groups_per_token=best if grouped else 1,
        balance_loss=0.0,
        z_loss=0.0,
    )
    common(read, moe)
    read.only("norm_topk_prob", False)
    read.only("scoring_func", "softmax")
    read.only("mlp_bias", False)
    read.only("num_experts", moe.num_experts)
    read.ignore("aux_loss_alpha", "seq_aux")  # of training alone
    read.finish()
    return DecoderConfig(family="deepseek_v2", moe=moe, **fields, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    latent, moe = check_latent(config, "softmax")
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **write_latents(config, latent, moe),
        "topk_method": "greedy" if moe.groups == 1 else "group_limited_greedy",
        "scoring_func": "softmax",
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    latent, _ = check_latent(config, "softmax")
    return table(config, layer_names(latent))
