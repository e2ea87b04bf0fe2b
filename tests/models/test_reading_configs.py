"""config.json of the families: both spellings, defaults of old files, and refusals by name."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from twinax.layers.rope_config import LinearScaling, LongRopeScaling, RopeConfig, YarnScaling
from twinax.models import families
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import param_shapes

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


JUNK = (
    None, "x", "1", -1, 0, 1, 1.5, True, [], [1], [[]], ["full_attention"], {}, {"a": 1}, float("nan"), float("inf"),
    10**12, 10**400,
)  # fmt: skip
BESIDE = ("head_dim", "num_key_value_heads", "layer_types", "rope_scaling", "rope_theta", "sliding_window")


@pytest.mark.parametrize("case", CASES)
def test_a_value_of_any_kind_is_read_or_refused(case):
    """Whatever a key holds: a model of positive sizes, or the family's ValueError."""
    found = config_json(case)
    changes = [{key: value} for key in {*found, *BESIDE} - {"model_type"} for value in JUNK]
    if rope := found.get("rope_parameters"):
        keys = (*rope, "factor", "partial_rotary_factor")
        changes += [{"rope_parameters": {**rope, key: value}} for key in keys for value in JUNK]
    refused = 0
    for change in changes:
        try:
            config = read(case, **change)
        except ValueError:
            refused += 1
        else:
            assert min(config.num_layers, config.hidden_size, config.vocab_size) > 0, change
    assert refused > len(changes) / 4


def places(values):
    """(container, key) of all that there is in plain values, at any depth."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield values, key
        if isinstance(value, dict | list):
            yield from places(value)


@pytest.mark.parametrize("case", CASES)
def test_our_own_config_is_read_or_refused(case):
    """As a step keeps it: another version's, or one that a person changed."""
    plain = json.loads(json.dumps(read(case).to_dict()))
    for inside, key in list(places(plain)):
        kept = inside[key]
        for value in (None, "x", -1, 1.5, [[]], {"a": 1}, float("inf")):
            inside[key] = value
            with contextlib.suppress(ValueError):
                assert DecoderConfig.from_dict(plain).num_layers > 0
        inside[key] = kept
        if isinstance(kept, dict):
            kept["frobnicate"] = 3
            with pytest.raises(ValueError, match="frobnicate"):
                DecoderConfig.from_dict(plain)
            del kept["frobnicate"]
    assert DecoderConfig.from_dict(plain) == read(case)


@pytest.mark.parametrize("spelling", ["inside", "beside"])
@pytest.mark.parametrize("case", [case for case in CASES if "rope_parameters" in config_json(case)])
def test_a_rope_of_a_part_of_each_head_is_read_where_transformers_reads_it(case, spelling):
    """Of our families Phi 3 alone: the others of transformers turn whole heads, whatever the key says."""
    part, rope = {"partial_rotary_factor": 0.5}, {"rope_type": "default", "rope_theta": 1000.0}
    change = {"rope_parameters": {**rope, **part}} if spelling == "inside" else {"rope_parameters": rope, **part}
    if case.startswith("phi3"):
        config = read(case, **change)
        assert config.rope.size == config.head_dim // 2
        assert families.load("phi3").from_hf(families.load("phi3").to_hf(config)) == config
    else:
        with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5|takes no further keys"):
            read(case, **change)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_a_rope_of_a_part_of_each_head_is_not_exported_where_it_would_be_passed_over(name):
    config = read("llama_linear")
    config = dataclasses.replace(config, family=name, rope=RopeConfig(1e4, None, config.head_dim // 2))
    with pytest.raises(ValueError, match="transformers turns whole heads"):
        families.load(name).to_hf(config)


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
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0, and transformers"),
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
        ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}, "not_conv"),
        ("deepseek_v3_fp8", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt='e5m2'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"n_group": 4}, "groups must divide num_experts"),
        ("deepseek_v3", {"topk_group": 1}, "fewer than experts_per_token=3"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ],
)
def test_what_could_change_a_number_is_refused(case, changes, message):
    with pytest.raises(ValueError, match=message):
        read(case, **changes)


RELEASED = {
    # As OpenAI and DeepSeek wrote them, without the keys of tokens and of training.
    "gpt-oss-20b": {
        "attention_bias": True, "attention_dropout": 0.0, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "rope_theta": 150000,
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "DeepSeek-V3": {
        "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
    "DeepSeek-V2-Lite": {
        "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-oss-20b", 20.91), ("DeepSeek-V3", 671.03), ("DeepSeek-V2-Lite", 15.71)]
)
def test_released_configs_make_models_of_their_size(name, billions):
    """In parameters, as the model cards count them."""
    family = families.load(RELEASED[name]["model_type"])
    config = family.from_hf(RELEASED[name])
    assert family.from_hf(family.to_hf(config)) == config
    shapes = param_shapes(config, jnp.bfloat16)
    packed = config.quantization is not None and config.quantization.format == "mxfp4"
    count = sum(
        like.size * (2 if packed and path.endswith(".values") else 1)
        for path, like in shapes.items()
        if not path.endswith(".scales")
    )
    assert count / 1e9 == pytest.approx(billions, abs=0.006)
    table = family.tensor_table(config)
    assert {entry.name for entry in table} == set(shapes)


def test_longrope_factors_for_another_head_are_an_error():
    from twinax.layers.rope import frequencies

    config = read("phi3_longrope")
    with pytest.raises(ValueError, match="each of the 8 pairs of a head; got 4"):
        frequencies(config.rope, 16)
