"""config.json of the families: both spellings, defaults of old files, and refusals by name."""

import json
from pathlib import Path

import pytest

from twinax.layers.rope_config import LinearScaling, LongRopeScaling, RopeConfig, YarnScaling
from twinax.models import families
from twinax.models.config import DecoderConfig, LayerKind

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "families"
CASES = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists())


def config_json(case: str, **changes) -> dict:
    found = {**json.loads((GOLDEN / case / "config.json").read_text()), **changes}
    return {key: value for key, value in found.items() if value is not ...}


def read(case: str, **changes) -> DecoderConfig:
    values = config_json(case, **changes)
    return families.load(values["model_type"]).from_hf(values)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same_model(case):
    config = read(case)
    family = families.load(config.family)
    assert family.from_hf(family.to_hf(config)) == config
    assert family.from_hf(json.loads(json.dumps(family.to_hf(config)))) == config
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_key_is_refused_by_name(case):
    with pytest.raises(ValueError, match=r"frobnicate=3 \(unknown key\)"):
        read(case, frobnicate=3)


def test_gemma_3_as_transformers_4_wrote_it():
    old = read(
        "gemma3",
        rope_parameters=...,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=...,
        sliding_window_pattern=2,
        cache_implementation="hybrid",
    )
    assert old == read("gemma3")
    assert old.rope == RopeConfig(1e6, LinearScaling(8.0))
    assert old.local_rope == RopeConfig(1e4)
    assert old.pattern == (LayerKind(8, "local_rope"), LayerKind())


def test_gemma_3_without_a_pattern_has_five_windows_to_one():
    config = read("gemma3", layer_types=..., num_hidden_layers=8)
    assert [kind.window for kind in config.kinds] == [8, 8, 8, 8, 8, None, 8, 8]


def test_phi_3_as_microsoft_wrote_it():
    factors = config_json("phi3_longrope")["rope_parameters"]
    short, long = factors["short_factor"], factors["long_factor"]
    config = read(
        "phi3_longrope",
        rope_parameters=...,
        rope_theta=10000.0,
        rope_scaling={"type": "su", "short_factor": short, "long_factor": long},
        original_max_position_embeddings=16,
    )
    assert config == read("phi3_longrope")
    scaling = config.rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.attention_factor == pytest.approx((1 + 3 / 4) ** 0.5)  # 128 / 16 = 2^3, 16 = 2^4


def test_yarn_as_qwen_writes_it():
    config = read(
        "qwen2",
        rope_parameters=...,
        rope_theta=1e6,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    )
    scaling = config.rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert (scaling.factor, scaling.original_context, scaling.beta_fast) == (4.0, 32, 32.0)
    assert scaling.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral", {"hidden_act": "gelu"}, r"hidden_act='gelu' \(only 'silu'\)"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is one of"),
        ("gemma2", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("gemma2", {"layer_types": ["full_attention", "chunked", "full_attention"]}, "chunked"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "experts_per_token=9 is more than"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "one number for each of 4 layers"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"n_embd": 30}, "does not divide by n_head=4"),
        ("granite", {"residual_multiplier": 0}, "residual_scale is a positive number"),
        ("phi3_longrope", {"rope_parameters": {"type": "longrope", "short_factor": [1]}}, "missing: .'long_factor"),
        ("mistral", {"sliding_window": 0}, "A window is a whole number"),
        ("olmo2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_could_change_a_number_is_refused(case, changes, message):
    with pytest.raises(ValueError, match=message):
        read(case, **changes)


def test_longrope_factors_for_another_head_are_an_error():
    from twinax.layers.rope import frequencies

    config = read("phi3_longrope")
    with pytest.raises(ValueError, match="each of the 8 pairs of a head; got 4"):
        frequencies(config.rope, 16)
