"""Mamba-2 and MiniMax: configs as they were released, and what of them could go wrong in silence."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from twinax.checkpoints.errors import CheckpointError
from twinax.checkpoints.load import load_model
from twinax.layers.mixer_config import LightningConfig, Mamba2Config
from twinax.models import families
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import param_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "families"
CODESTRAL = {
    "architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0,
    "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
    "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 8,
    "norm_before_gate": True, "num_heads": 128, "num_hidden_layers": 64, "pad_token_id": 0,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
    "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
    "time_step_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0", "use_bias": False,
    "use_cache": True, "use_conv_bias": True, "vocab_size": 32768,
}  # fmt: skip
MINIMAX = {
    "architectures": ["MiniMaxForCausalLM"], "attention_dropout": 0.0, "block_size": 256, "bos_token_id": None,
    "eos_token_id": None, "full_attn_alpha_factor": 3.5565588200778455, "full_attn_beta_factor": 1.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 9216,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10, "linear_attn_alpha_factor": 3.5565588200778455,
    "linear_attn_beta_factor": 1.0, "max_position_embeddings": 10240000, "mlp_alpha_factor": 3.5565588200778455,
    "mlp_beta_factor": 1.0, "model_type": "minimax", "num_attention_heads": 64, "num_experts_per_tok": 2,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "postnorm": True, "rms_norm_eps": 1e-05, "rope_theta": 10000000, "rotary_dim": 64, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 200064,
}  # fmt: skip


def read(values: dict, **changes) -> DecoderConfig:
    return families.load(values["model_type"]).from_hf({**values, **changes})


def test_codestral_mamba_as_mistral_wrote_it():
    config = read(CODESTRAL)
    assert config.mamba2 == Mamba2Config(num_heads=128, head_dim=64, state_size=128, groups=8)
    assert (config.num_heads, config.intermediate_size, config.pattern[0].feed_forward) == (0, 0, None)
    count = sum(like.size for like in param_shapes(config, jnp.bfloat16).values())
    assert count / 1e9 == pytest.approx(7.285, abs=5e-4)  # as its model card says
    assert read(families.load("mamba2").to_hf(config)) == config


def test_minimax_01_as_it_was_released():
    config = read(MINIMAX)
    assert config.lightning == LightningConfig(num_heads=64, head_dim=128)
    assert len(config.pattern) == 8
    alpha = 3.5565588200778455
    assert config.kinds[7] == LayerKind(mixer_scales=(alpha, 1.0), feed_forward_scales=(alpha, 1.0))
    assert config.kinds[8].mixer == "lightning_attention"
    assert config.rope.size == 64
    count = sum(like.size for like in param_shapes(config, jnp.bfloat16).values())
    assert count / 1e9 == pytest.approx(456, abs=0.5)  # as its paper says
    assert read(families.load("minimax").to_hf(config)) == config


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (CODESTRAL, {"time_step_limit": [0.001, 0.1]}, r"time_step_limit=\[0.001, 0.1\]"),
        (CODESTRAL, {"residual_in_fp32": False}, "residual_in_fp32=False"),
        (CODESTRAL, {"expand": 3}, "hidden_size \\* expand is num_heads \\* head_dim"),
        (CODESTRAL, {"n_groups": 7}, "groups that divide num_heads"),
        (CODESTRAL, {"conv_kernel": 1}, "conv_width from 2 up"),
        (CODESTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (MINIMAX, {"layer_types": ["linear_attention"] * 79}, "for each of 80 layers"),
        (MINIMAX, {"layer_types": ["sliding_attention"] * 80}, "sliding_attention"),
        (MINIMAX, {"postnorm": False}, "postnorm=False"),
        (MINIMAX, {"shared_intermediate_size": 9216}, "shared_intermediate_size=9216"),
        (MINIMAX, {"mlp_alpha_factor": float("nan")}, "mlp_alpha_factor is a finite number"),
        (MINIMAX, {"layernorm_mlp_alpha": 2.0}, "layernorm_mlp_alpha=2.0"),
    ],
)
def test_what_could_change_a_number_is_refused(values, changes, message):
    with pytest.raises(ValueError, match=message):
        read(values, **changes)


def test_layers_need_the_sizes_of_their_mixer():
    config = read(CODESTRAL).to_dict()
    with pytest.raises(ValueError, match="layers of mamba2, and mamba2 is None"):
        DecoderConfig.from_dict({**config, "mamba2": None})
    with pytest.raises(ValueError, match="num_heads is a whole number from 1 up"):
        DecoderConfig.from_dict({**config, "pattern": [{"mixer": "attention", "feed_forward": None}]})


def test_slopes_that_are_not_those_of_the_layer_are_refused(tmp_path):
    source = GOLDEN / "minimax"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.slope_rate"
    assert tensors[name].shape == (4, 1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file({**tensors, name: (tensors[name].astype(np.float32) * 1.1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"contradiction: {name}"):
        load_model(tmp_path)


def test_constants_of_the_state_may_be_float32_in_a_bfloat16_file(tmp_path):
    source = GOLDEN / "mamba2"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    wide = {
        name: tensor.astype(np.float32) if name.endswith(("A_log", "D", "dt_bias")) else tensor
        for name, tensor in tensors.items()
    }
    save_file(wide, tmp_path / "model.safetensors")
    params = load_model(tmp_path).params
    assert params["blocks.mamba2.A_log"].dtype == jnp.float32
    assert params["blocks.mamba2.in_proj.weight"].dtype == jnp.bfloat16


def test_old_files_without_what_is_the_default():
    values = json.loads((GOLDEN / "minimax" / "config.json").read_text())
    types = ["full_attention" if layer % 2 == 0 else "linear_attention" for layer in range(5)]
    short = {key: value for key, value in values.items() if key not in ("layer_types", "sliding_window")}
    assert read(short) == read(values, layer_types=types)
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert read({**old, "rope_theta": 1e6, "rope_scaling": None}) == read(values)
