"""MiniMax-01 (arXiv:2501.08313): lightning attention and softmax attention in turn, each with a mixture of experts.

Every norm's result goes on as the residual stream, as in a model that norms after its additions.
"""

import dataclasses
from typing import Any

import numpy as np

from ...layers.mixer_config import LightningConfig
from ...layers.moe_config import MoEConfig
from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import LAYER, table
from .mixtral import DEFAULTS, EXPERTS, check_mixture

TYPES = {"full_attention": "full_attn", "linear_attention": "linear_attn"}  # and what begins the names of its factors
ROUNDING = 2**-6  # of slopes that were computed in bfloat16
LIGHTNING = {
    "lightning_attention.qkv": "self_attn.qkv_proj",
    "lightning_attention.gate": "self_attn.output_gate",
    "lightning_attention.norm": "self_attn.norm",
    "lightning_attention.out": "self_attn.out_proj",
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("minimax", config, DEFAULTS)
    sizes = read.sizes()
    layers, heads = sizes["num_layers"], read.heads(sizes["hidden_size"], sizes["num_heads"])
    # MiniMax's own code turns the first rotary_dim numbers of a head; transformers passes the key over and turns all.
    turned = read.take("rotary_dim", heads["head_dim"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"], theta=1e6)
    rope = dataclasses.replace(rope, size=turned) if turned != heads["head_dim"] else rope
    factors = {name: _factors(read, name) for name in (*TYPES.values(), "mlp")}
    of_type = {
        "full_attention": {"window": read.take("sliding_window"), "mixer_scales": factors["full_attn"]},
        "linear_attention": {
            "rope": None,
            "mixer": "lightning_attention",
            "mixer_scales": factors["linear_attn"],
        },
    }
    types = read.layer_types(layers, (list(TYPES)[layer % 2] for layer in range(layers)), tuple(TYPES))
    moe = MoEConfig(
        num_experts=read.take("num_local_experts"),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=sizes["intermediate_size"],
        balance_loss=read.take("router_aux_loss_coef"),
        z_loss=0.0,
    )
    read.only("hidden_act", "silu")
    read.only("postnorm", True)
    read.only("shared_intermediate_size", 0)
    # How lightning attention's products are cut; of experts that there are none of; and what acts on training alone.
    read.ignore("block_size", "shared_moe_mode", "output_router_logits", "router_jitter_noise")
    read.finish()
    return DecoderConfig(
        family="minimax",
        rope=rope,
        pattern=pattern_of([LayerKind(**of_type[one], feed_forward_scales=factors["mlp"]) for one in types]),
        norm_placement="residual",
        lightning=LightningConfig(sizes["num_heads"], heads["head_dim"]),
        moe=moe,
        **heads,
        **sizes,
    )


def _factors(read: Reader, name: str) -> tuple[float, float]:
    return float(read.take(f"{name}_alpha_factor", 1.0)), float(read.take(f"{name}_beta_factor", 1.0))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    moe, kinds = _check(config), {"full_attention": None, "linear_attention": None}
    types = ["full_attention" if kind.mixer == "attention" else "linear_attention" for kind in config.kinds]
    kinds |= dict(zip(types, config.kinds, strict=True))
    factors = {"mlp": config.pattern[0].feed_forward_scales}
    factors |= {TYPES[one]: kind.mixer_scales for one, kind in kinds.items() if kind is not None}
    full = kinds["full_attention"]
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "hidden_act": "silu",
        **write_sizes(config),
        **write_rope(dataclasses.replace(config.rope, size=None), config.head_dim),
        **({} if config.rope.size is None else {"rotary_dim": config.rope.size}),
        "sliding_window": full and full.window,
        "layer_types": types,
        **{f"{name}_alpha_factor": alpha for name, (alpha, _) in factors.items()},
        **{f"{name}_beta_factor": beta for name, (_, beta) in factors.items()},
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.balance_loss,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    _check(config)
    return table(config, {**LAYER, **EXPERTS, **LIGHTNING})


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """What transformers computes from the config and saves all the same; and a tied copy of the embedding."""
    computed = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return (*(f"model.layers.*.self_attn.{name}" for name in computed), *tied)


def contradiction(config: DecoderConfig, name: str, tensor: np.ndarray) -> str | None:
    """Why a tensor that would be ignored is not what the config makes it; None if it is."""
    if not name.endswith("slope_rate"):
        return None  # powers of the slopes
    from ...layers.mixers.lightning_attention import slopes

    number = int(name.split(".")[2])
    expected = np.asarray(slopes(config.num_heads, number, config.num_layers))
    found = tensor.astype(np.float32).reshape(-1)
    if found.shape == expected.shape and np.allclose(found, expected, rtol=ROUNDING, atol=0):
        return None
    return f"contradiction: {name} is {found[:4]}..., and the layer's number makes it {expected[:4]}..."


def _check(config: DecoderConfig) -> MoEConfig:
    """The mixture; ValueError for a model that the family cannot express."""
    lightning = config.lightning
    of_mixer = {kind.mixer: kind for kind in config.pattern}
    right = (
        lightning == LightningConfig(config.num_heads, config.head_dim)
        and config.norm_placement == "residual"
        and set(of_mixer) <= {"attention", "lightning_attention"}
        and all(kind == of_mixer[kind.mixer] for kind in config.pattern)
        and len({kind.feed_forward_scales for kind in config.pattern}) == 1
    )
    if not right:
        raise ValueError(
            "The Hugging Face family 'minimax' has layers of attention, all alike, and of lightning attention with as "
            "many heads of the same size, and norms whose results are the residual stream; this model has "
            f"{config.pattern}, {lightning}, norm_placement={config.norm_placement!r}. It stays a Twinax checkpoint."
        )
    return check_mixture(config)
