"""Llama 2, 3, 3.1 and 3.2 (text), and every checkpoint whose config.json says `"model_type": "llama"`."""

from typing import Any

from ...layers.rope_config import Llama3Scaling, RopeConfig
from ..config import DecoderConfig
from . import TensorEntry

# Hugging Face's key -> ours. Read and written; a missing key takes transformers' default.
SIZES = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
# Keys that describe, or act only outside of the forward pass: they cannot change a logit. The token ids are kept in
# generation_config.json and the tokenizer's files.
WITHOUT_EFFECT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "id2label", "label2id",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "is_encoder_decoder", "_attn_implementation", "_attn_implementation_autoset", "auto_map",
}  # fmt: skip
# Keys that would change the numbers, accepted at the one value that does not.
ONLY = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "is_decoder": (True, False),
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "pruned_heads": ({}, None),
}
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads"}
LLAMA3_KEYS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _rope(config: dict[str, Any]) -> RopeConfig:
    """Reads transformers 4's `rope_theta` and `rope_scaling`, and 5's `rope_parameters`."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
    theta = float(given.pop("rope_theta", config.get("rope_theta") or 10000.0))
    if "rope_theta" in config and config["rope_theta"] and float(config["rope_theta"]) != theta:
        raise ValueError(f"config.json gives two values of rope_theta: {config['rope_theta']} and {theta}. Keep one.")
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    kind = kinds.pop() if len(kinds) == 1 else ("default" if not kinds else " and ".join(sorted(map(str, kinds))))
    if kind == "default":
        if given:
            raise ValueError(f"Rope of type 'default' takes no further keys; config.json has {sorted(given)}.")
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise ValueError(f"Rope scaling of type {kind!r} is not supported for Llama; 'default' and 'llama3' are.")
    if set(given) != LLAMA3_KEYS:
        raise ValueError(
            f"Rope scaling of type 'llama3' has the keys {sorted(LLAMA3_KEYS)}; unknown in config.json: "
            f"{sorted(set(given) - LLAMA3_KEYS)}, missing: {sorted(LLAMA3_KEYS - set(given))}."
        )
    scaling = Llama3Scaling(
        factor=float(given["factor"]),
        low_frequency_factor=float(given["low_freq_factor"]),
        high_frequency_factor=float(given["high_freq_factor"]),
        original_context=int(given["original_max_position_embeddings"]),
    )
    return RopeConfig(theta=theta, scaling=scaling)


def _refusals(config: dict[str, Any]) -> list[str]:
    """What of config.json is not understood and may change a number."""
    refused = []
    for key, value in config.items():
        if key in ONLY:
            allowed = ONLY[key] if isinstance(ONLY[key], tuple) else (ONLY[key],)
            if value not in allowed:
                refused.append(f"{key}={value!r} (only {' or '.join(map(repr, allowed))})")
        elif key not in SIZES and key not in ROPE_KEYS and key not in WITHOUT_EFFECT:
            refused.append(f"{key}={value!r} (unknown key)")
    return refused


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """The decoder that config.json describes; ValueError lists every key that is not understood."""
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"This is the family 'llama'; config.json says model_type={config['model_type']!r}.")
    if refused := _refusals(config):
        raise ValueError(
            "config.json has keys that Twinax does not know to be harmless for Llama: " + "; ".join(refused) + ". "
            "Remove those that you know change nothing, or ask for support."
        )
    sizes = {ours: config.get(key, default) for key, (ours, default) in SIZES.items()}
    heads = sizes["num_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    if head_dim is None and sizes["hidden_size"] % heads:
        raise ValueError(f"hidden_size={sizes['hidden_size']} does not divide by num_attention_heads={heads}.")
    return DecoderConfig(
        family="llama",
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=sizes["hidden_size"] // heads if head_dim is None else head_dim,
        rope=_rope(config),
        **sizes,
    )


def _check_dense(config: DecoderConfig) -> None:
    if config.moe is not None:
        raise ValueError(
            f"The Hugging Face family 'llama' has no mixture of experts, and this model has {config.moe.num_experts} "
            "experts a layer. It stays a Twinax checkpoint: `twinax serve` and `twinax train` take it as it is."
        )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """config.json for `config`, in the spelling of transformers 4 (which 5 reads too); ValueError if it has experts."""
    _check_dense(config)
    scaling = config.rope.scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{key: getattr(config, ours) for key, (ours, _) in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    """Every tensor of the family, in file order; ValueError if the model has experts."""
    _check_dense(config)
    entries = [TensorEntry("model.embed_tokens.weight", "embed.weight")]
    projections = {
        "self_attn.q_proj": ("attention.query", config.attention_bias),
        "self_attn.k_proj": ("attention.key", config.attention_bias),
        "self_attn.v_proj": ("attention.value", config.attention_bias),
        "self_attn.o_proj": ("attention.out", config.attention_bias),
        "mlp.gate_proj": ("mlp.gate", config.mlp_bias),
        "mlp.up_proj": ("mlp.up", config.mlp_bias),
        "mlp.down_proj": ("mlp.down", config.mlp_bias),
        "input_layernorm": ("attention_norm", False),
        "post_attention_layernorm": ("mlp_norm", False),
    }
    for layer in range(config.num_layers):
        for theirs, (ours, bias) in projections.items():
            for part in ("weight", "bias") if bias else ("weight",):
                entries.append(TensorEntry(f"model.layers.{layer}.{theirs}.{part}", f"blocks.{ours}.{part}", layer))
    entries.append(TensorEntry("model.norm.weight", "final_norm.weight"))
    if not config.tie_embeddings:
        entries.append(TensorEntry("lm_head.weight", "unembed.weight"))
    return tuple(entries)


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns (fnmatch) of tensors without effect: recomputed frequencies, and a tied copy of the embedding."""
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", *tied)
