"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows in the upper layers where asked for."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, pattern_of, write_rope, write_sizes
from ._table import table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def windows(read: Reader, layers: int) -> tuple[LayerKind, ...]:
    """`use_sliding_window` with `max_window_layers` (the first so many have none), or `layer_types`."""
    use, window, without = (
        read.take("use_sliding_window", False),
        read.take("sliding_window", 4096),
        read.take("max_window_layers", 28),
    )
    window = window if use else None
    default = ["full_attention" if window is None or i < without else "sliding_attention" for i in range(layers)]
    types = read.layer_types(layers, default)
    if window is None and "sliding_attention" in types:
        raise ValueError("layer_types has sliding_attention, and use_sliding_window is false or there is no window.")
    return pattern_of([LayerKind(window if one == "sliding_attention" else None) for one in types])


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `windows` reads."""
    found = [kind.window for kind in config.kinds]
    window = next((one for one in found if one is not None), None)
    types = ["full_attention" if one is None else "sliding_attention" for one in found]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": types.index("sliding_attention") if window is not None else config.num_layers,
        "layer_types": types,
    }


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("qwen2", config, DEFAULTS)
    sizes = read.sizes()
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    pattern = windows(read, sizes["num_layers"])
    read.only("hidden_act", "silu")
    read.finish()
    return DecoderConfig(
        family="qwen2", rope=rope, pattern=pattern, attention_bias=True, attention_out_bias=False, **heads, **sizes
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        **write_sizes(config),
        **write_rope(config.rope, config.head_dim),
        **write_windows(config),
    }


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config)
