"""Mamba-2 (arXiv:2405.21060): layers of a state space model and nothing else; no attention, no feed-forward."""

from typing import Any

from ...layers.mixer_config import Mamba2Config
from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader
from ._table import table

DEFAULTS = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "expand": 2,
    # A state has no longest context, and files name none. This is what a server takes by default.
    "max_position_embeddings": 1 << 18,
}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
}
MIXER = {
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "state_size": "state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
NO_ATTENTION = {"intermediate_size": 0, "num_heads": 0, "num_kv_heads": 0, "head_dim": 0}
PATTERN = (LayerKind(rope=None, mixer="mamba2", feed_forward=None),)
UNLIMITED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}], [0.0, "Infinity"], (0.0, float("inf")))
LAYER = {
    "attention_norm": "norm",
    "mamba2": "mixer",
    "mamba2.in_proj": "mixer.in_proj",
    "mamba2.conv": "mixer.conv1d",
    "mamba2.norm": "mixer.norm",
    "mamba2.out_proj": "mixer.out_proj",
}
OUTSIDE = {"embed": "backbone.embeddings", "final_norm": "backbone.norm_f", "unembed": "lm_head"}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("mamba2", config, DEFAULTS)
    sizes = {ours: read.take(theirs) for ours, theirs in SIZES.items()}
    mixer = Mamba2Config(**{ours: read.take(theirs) for ours, theirs in MIXER.items()})
    inner = sizes["hidden_size"] * (expand := read.take("expand"))
    if inner != mixer.inner_size:
        raise ValueError(
            f"hidden_size * expand is num_heads * head_dim; config.json has {sizes['hidden_size']} * {expand} and "
            f"{mixer.num_heads} * {mixer.head_dim}."
        )
    read.only("hidden_act", "silu")
    read.only("time_step_limit", *UNLIMITED)
    read.only("residual_in_fp32", True)
    read.only("rms_norm", True)
    read.only("intermediate_size", inner)
    # Of the initial weights; of how the products are cut into chunks; left from Mamba-1; and of old files, which
    # transformers never looked at.
    read.ignore("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "chunk_size")
    read.ignore("time_step_rank", "time_step_init_scheme", "time_step_scale", "norm_before_gate")
    read.finish()
    return DecoderConfig(family="mamba2", mamba2=mixer, pattern=PATTERN, **NO_ATTENTION, **sizes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """config.json; ValueError if the model has anything else than layers of Mamba-2."""
    mixer = _check(config)
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **{theirs: getattr(mixer, ours) for ours, theirs in MIXER.items()},
        "expand": mixer.inner_size // config.hidden_size,
        "residual_in_fp32": True,
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    _check(config)
    return table(config, LAYER, OUTSIDE, "backbone.layers.{}.")


def ignorable_tensors(config: DecoderConfig) -> tuple[str, ...]:
    return ("lm_head.weight",) if config.tie_embeddings else ()


def _check(config: DecoderConfig) -> Mamba2Config:
    mixer = config.mamba2
    if mixer is None or config.pattern != PATTERN or mixer.inner_size % config.hidden_size:
        raise ValueError(
            "The Hugging Face family 'mamba2' has layers of Mamba-2 alone, whose inner width is a multiple of "
            f"hidden_size; this model has {config.mixers}, {mixer}. It stays a Twinax checkpoint."
        )
    return mixer
