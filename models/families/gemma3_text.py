"""Gemma 3, text (arXiv:2503.19786): Gemma 2 with norms of queries and keys in place of softcaps, and two ropes."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope
from ._table import LAYER, table
from .gemma2 import DEFAULTS, NORMS, common, write_common
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

OWN = {
    **DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("gemma3_text", config, OWN)
    fields = common(read)
    if fields["attention_softcap"] is not None:
        raise ValueError(
            f"config.json has attn_logit_softcapping={fields['attention_softcap']}, and transformers' gemma3_text caps "
            "no scores whatever that key says: what is meant is not known. Make it null if scores are not capped."
        )
    layers, window = fields["num_layers"], read.take("sliding_window")
    own, private = (read.take(key, None) for key in ("sliding_window_pattern", "_sliding_window_pattern"))
    every = own or private or 6
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    types = read.layer_types(layers, default)
    kinds = {"sliding_attention": LayerKind(window, "local_rope"), "full_attention": LayerKind()}
    rope, local = read.ropes(fields["head_dim"], fields["max_position_embeddings"], 1e6, 1e4)
    read.finish()
    pattern = pattern_of([kinds[one] for one in types])
    local = local if any(kind.rope == "local_rope" for kind in pattern) else None
    return DecoderConfig(
        family="gemma3_text", rope=rope, local_rope=local, pattern=pattern, qk_norm="head", **fields
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **write_common(config),
        **write_rope(config.rope, config.head_dim),
        "rope_local_base_freq": 1e4 if config.local_rope is None else config.local_rope.theta,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, {**LAYER, **NORMS})
