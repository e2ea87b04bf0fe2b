"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, experts in groups and shared ones, weights in float8."""

import dataclasses
from typing import Any

from ...layers.mixer_config import LatentAttentionConfig
from ...layers.moe_config import MoEConfig
from ...layers.quantization_config import Quantization
from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import FEED_FORWARD, NORMS, table
from .llama import ignorable_tensors as _ignorable

DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "rope_interleave": True,
}
NORM_EPS = 1e-6  # of latents: rms_norm_eps is not theirs
LATENT = {
    "latent_attention.query_down": "self_attn.q_a_proj",
    "latent_attention.query_norm": "self_attn.q_a_layernorm",
    "latent_attention.query": "self_attn.q_b_proj",
    "latent_attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "latent_attention.kv_norm": "self_attn.kv_a_layernorm",
    "latent_attention.kv": "self_attn.kv_b_proj",
    "latent_attention.out": "self_attn.o_proj",
}
EXPERTS = {
    "moe.router": "mlp.gate",
    "moe.router.bias": "mlp.gate.e_score_correction_bias",
    "moe.gate": "mlp.experts.{}.gate_proj",
    "moe.up": "mlp.experts.{}.up_proj",
    "moe.down": "mlp.experts.{}.down_proj",
    "moe.shared.gate": "mlp.shared_experts.gate_proj",
    "moe.shared.up": "mlp.shared_experts.up_proj",
    "moe.shared.down": "mlp.shared_experts.down_proj",
}


def latents(read: Reader, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of latent attention, its rope, and which layers are dense."""
    latent = LatentAttentionConfig(
        query_rank=read.take("q_lora_rank"),
        kv_rank=read.take("kv_lora_rank"),
        nope_dim=read.take("qk_nope_head_dim"),
        rope_dim=read.take("qk_rope_head_dim"),
        value_dim=read.take("v_head_dim"),
        interleaved=bool(read.take("rope_interleave")),
        norm_eps=NORM_EPS,
    )
    head_dim = latent.nope_dim + latent.rope_dim
    read.only("head_dim", latent.rope_dim, None)
    read.only("qk_head_dim", head_dim)
    read.only("num_key_value_heads", sizes["num_heads"], None)
    rope = read.rope(latent.rope_dim, sizes["max_position_embeddings"])
    dense = min(read.take("first_k_dense_replace"), sizes["num_layers"])
    return {
        "latent": latent,
        "num_kv_heads": sizes["num_heads"],
        "head_dim": head_dim,
        "rope": dataclasses.replace(rope, size=latent.rope_dim),
        "pattern": pattern_of(_kinds(dense, sizes["num_layers"])),
    }


def _kinds(dense: int, layers: int) -> list[LayerKind]:
    """The first layers are dense, the others mixtures."""
    mixtures = [LayerKind(mixer="latent_attention")] * (layers - dense)
    return [LayerKind(mixer="latent_attention", feed_forward="mlp")] * dense + mixtures


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("deepseek_v3", config, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias")
    fields = latents(read, sizes)
    moe = MoEConfig(
        num_experts=read.take("n_routed_experts"),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=read.take("moe_intermediate_size"),
        shared_experts=read.take("n_shared_experts"),
        router="sigmoid",
        normalize=bool(read.take("norm_topk_prob")),
        route_scale=float(read.take("routed_scaling_factor")),
        groups=read.take("n_group"),
        groups_per_token=read.take("topk_group"),
        group_top=2,
        balance_loss=0.0,
        z_loss=0.0,
    )
    quantization = _quantization(read.take("quantization_config", None))
    common(read, moe)
    read.only("topk_method", "noaux_tc")
    read.only("scoring_func", "sigmoid")
    # Of training alone, and of layers that predict tokens further on, which are not read.
    read.ignore("aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers")
    read.finish()
    return DecoderConfig(family="deepseek_v3", moe=moe, quantization=quantization, **fields, **sizes)


def common(read: Reader, moe: MoEConfig) -> None:
    """Keys of both generations that must say what they say."""
    read.only("hidden_act", "silu")
    read.only("moe_layer_freq", 1)
    read.only("ep_size", 1)
    read.only("num_local_experts", moe.num_experts)
    read.ignore("output_router_logits")


def _quantization(given: dict[str, Any] | None) -> Quantization | None:
    if given is None:
        return None
    # How activations are rounded is not a part of the weights; here they are not rounded.
    known = {"quant_method": ("fp8",), "fmt": ("e4m3",), "activation_scheme": ("dynamic",), "scale_fmt": (None,)}
    others = [key for key in given if key != "weight_block_size"]
    wrong = [f"{key}={given[key]!r}" for key in others if given[key] not in known.get(key, ())]
    block = given.get("weight_block_size")
    if wrong or not isinstance(block, list) or given.get("quant_method") != "fp8":
        raise ValueError(
            "quantization_config of deepseek_v3 is fp8 (e4m3) with weight_block_size=[outputs, inputs] and dynamic "
            f"activations; config.json has {'; '.join(wrong) or given}."
        )
    return Quantization("fp8_e4m3", (block[0], block[1]), ("experts", "linear"))


def check_latent(config: DecoderConfig, router: str) -> tuple[LatentAttentionConfig, MoEConfig]:
    """Both parts; ValueError if the family cannot express the model."""
    latent, moe = config.latent, config.moe
    if latent is None or moe is None or moe.router != router or not moe.shared_experts or moe.bias:
        raise ValueError(
            f"The Hugging Face family {config.family!r} has latent attention and a mixture with shared experts and a "
            f"{router} router; this model has {latent} and {moe}. It stays a Twinax checkpoint."
        )
    if latent.norm_eps != NORM_EPS or [*config.kinds] != _kinds(len(config.layers_with("mlp")), config.num_layers):
        raise ValueError(
            f"The Hugging Face family {config.family!r} has dense layers before mixtures, and norms of latents with "
            f"an epsilon of {NORM_EPS}; this model has {config.pattern} and norm_eps={latent.norm_eps}. It stays a "
            "Twinax checkpoint."
        )
    return latent, moe


def write_latents(config: DecoderConfig, latent: LatentAttentionConfig, moe: MoEConfig) -> dict[str, Any]:
    """The keys of both generations."""
    sizes = write_sizes(config, attention_bias="attention_bias")
    dense = len(config.layers_with("mlp"))
    return {
        **{key: value for key, value in sizes.items() if key != "head_dim"},
        **write_rope(dataclasses.replace(config.rope, size=None), latent.rope_dim),
        "hidden_act": "silu",
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "moe_intermediate_size": moe.expert_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.route_scale,
        "first_k_dense_replace": dense,
    }


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    latent, moe = check_latent(config, "sigmoid")
    kept = config.quantization
    quantization = kept and {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(kept.block),
    }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **write_latents(config, latent, moe),
        "rope_interleave": latent.interleaved,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        **({"quantization_config": quantization} if quantization else {}),
    }


def layer_names(latent: LatentAttentionConfig) -> dict[str, str]:
    """Our modules to theirs. Without a latent for queries there is one product alone."""
    whole = {"latent_attention.query": "self_attn.q_proj"} if latent.query_rank is None else {}
    return {**LATENT, **whole, **FEED_FORWARD, **NORMS, **EXPERTS}


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    latent, _ = check_latent(config, "sigmoid")
    return table(config, layer_names(latent))


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """As Llama's, and the layers after the last, which predict tokens further on (multi-token prediction)."""
    return (*_ignorable(config), f"model.layers.{config.num_layers}.*")
