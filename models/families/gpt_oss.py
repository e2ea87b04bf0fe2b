"""gpt-oss (arXiv:2508.10925): attention sinks, every other layer a window, experts with biases and clamped SwiGLU.

The experts' weights are in mxfp4, and stay so; a model that transformers has dequantised has them in bfloat16.
"""

from typing import Any

from ...layers.moe_config import MoEConfig
from ...layers.quantization_config import Quantization
from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import BLOCKS, LAYER, table
from .llama import ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip
DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
# What mxfp4 leaves out, by the patterns that its files give: just what we keep as it is.
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MODULES = {
    **LAYER,
    "moe.router.weight": "mlp.router.weight",
    "moe.router.logit_bias": "mlp.router.bias",
    "attention.sinks": "self_attn.sinks",
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    given = config if config.get("rope_parameters") or config.get("rope_scaling") else {**config, "rope_scaling": YARN}
    read = Reader("gpt_oss", given, DEFAULTS)
    sizes = read.sizes(attention_bias="attention_bias")
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"], theta=150000.0)
    window, count = read.take("sliding_window"), sizes["num_layers"]
    types = read.layer_types(count, ("full_attention" if n % 2 else "sliding_attention" for n in range(count)))
    experts = read.take("num_experts", None)  # of some copies; transformers calls it num_local_experts
    moe = MoEConfig(
        num_experts=experts or read.take("num_local_experts"),
        experts_per_token=read.take("num_experts_per_tok"),
        expert_size=sizes["intermediate_size"],
        router_bias=True,
        bias=True,
        clamp=float(read.take("swiglu_limit")),
        gate_slope=float(read.take("swiglu_alpha")),
        up_offset=1.0,
        balance_loss=read.take("router_aux_loss_coef"),
        z_loss=0.0,
    )
    read.only("num_local_experts", moe.num_experts)
    read.only("experts_per_token", moe.experts_per_token)
    read.only("initial_context_length", 4096)  # stands in rope's keys too
    quantization = _quantization(read.take("quantization_config", None))
    read.only("hidden_act", "silu")
    read.ignore("output_router_logits")
    read.finish()
    kinds = [LayerKind(window if kind == "sliding_attention" else None) for kind in types]
    return DecoderConfig(
        family="gpt_oss",
        rope=rope,
        pattern=pattern_of(kinds),
        sinks=True,
        moe=moe,
        quantization=quantization,
        **heads,
        **sizes,
    )


def _quantization(given: dict[str, Any] | None) -> Quantization | None:
    if given is None:
        return None
    known = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED, "dequantize": False}
    wrong = [f"{key}={value!r}" for key, value in given.items() if key not in known or value not in (known[key], None)]
    if wrong or "quant_method" not in given:
        raise ValueError(
            f"quantization_config of gpt_oss is mxfp4 of the experts, {known}; config.json has {'; '.join(wrong)}."
        )
    return Quantization("mxfp4", (1, 32), ("experts",))


def _check(config: DecoderConfig) -> MoEConfig:
    moe = config.moe
    if moe is None or not (moe.bias and moe.router_bias and moe.clamp and moe.up_offset == 1 and config.sinks):
        raise ValueError(
            "The Hugging Face family 'gpt_oss' has attention sinks, and experts and a router with biases, a clamp and "
            f"up_offset=1; this model has sinks={config.sinks} and {moe}. It stays a Twinax checkpoint."
        )
    return moe


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    moe = _check(config)
    windows = [kind.window for kind in config.kinds]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        **write_sizes(config, attention_bias="attention_bias"),
        **write_rope(config.rope, config.head_dim),
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "swiglu_alpha": moe.gate_slope,
        "swiglu_limit": moe.clamp,
        "router_aux_loss_coef": moe.balance_loss,
        **({} if config.quantization is None else {"quantization_config": quantization}),
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    """One tensor has all experts of a layer; rows of gate and up take turns in it."""
    moe = _check(config)
    size = 2 * moe.expert_size

    def entry(begin: str, name: str, index: int) -> TensorEntry | None:
        short = name.removeprefix(BLOCKS)
        own, _, kind = short.rpartition(".")
        if short == "attention.sinks":
            return TensorEntry(f"{begin}self_attn.sinks", name, (index,))
        if own not in ("moe.gate", "moe.up", "moe.down"):
            return None
        theirs = "down_proj" if own == "moe.down" else "gate_up_proj"
        end = {"weight": "", "bias": "_bias", "values": "_blocks", "scales": "_scales"}[kind]
        # After turning around: quantised weights have inputs first here, and plain ones there.
        rows = None if own == "moe.down" else (int(own == "moe.up"), size, 2)
        axis = 2 if kind in ("values", "scales") else 1
        groups = 16 if kind == "values" else None
        hf_name = f"{begin}mlp.experts.{theirs}{end}"
        return TensorEntry(hf_name, name, (index,), rows, kind != "bias", axis, groups)

    return table(config, MODULES, entry=entry)
