"""StarCoder 2 (arXiv:2402.19173): LayerNorms, biases everywhere, a plain feed-forward, a window."""

from typing import Any

from ..config import DecoderConfig, LayerKind
from . import TensorEntry
from ._reader import Reader, write_rope, write_sizes
from ._table import LAYER, table
from .llama import check_dense, ignorable_tensors

__all__ = ["from_hf", "ignorable_tensors", "tensor_table", "to_hf"]

DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window": None,
}
SIZES = {"norm_eps": "norm_epsilon", "attention_bias": "use_bias"}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    read = Reader("starcoder2", config, DEFAULTS)
    sizes = read.sizes(**SIZES)
    heads = read.heads(sizes["hidden_size"], sizes["num_heads"])
    rope = read.rope(heads["head_dim"], sizes["max_position_embeddings"])
    activation, window = read.activation("hidden_act"), read.take("sliding_window")
    read.ignore("residual_dropout", "embedding_dropout", "attention_dropout", "mlp_type", "norm_type")
    read.finish()
    return DecoderConfig(
        family="starcoder2",
        rope=rope,
        pattern=(LayerKind(window=window),),
        norm="layer",
        activation=activation,
        gated=False,
        mlp_bias=sizes["attention_bias"],
        **heads,
        **sizes,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    check_dense(config)
    found = {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        **write_sizes(config, **SIZES),
        **write_rope(config.rope, config.head_dim),
        "sliding_window": config.pattern[0].window,
    }
    if config.head_dim * config.num_heads == config.hidden_size:
        del found["head_dim"]  # which transformers derives, and does not know as a key
    return found


def tensor_table(config: DecoderConfig) -> tuple[TensorEntry, ...]:
    check_dense(config)
    return table(config, {**LAYER, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"})
