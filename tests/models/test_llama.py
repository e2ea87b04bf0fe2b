"""The Llama family's config.json: read strictly, written back the same. (Its tensors: tests/checkpoints.)"""

import pytest

from twinax.models import families
from twinax.models.families import llama

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_both_spellings_of_rope_are_one_model():
    old = llama.from_hf({**BASE, "rope_scaling": LLAMA3})
    new = {**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    del new["rope_theta"]
    assert llama.from_hf(new) == old
    assert old.rope.scaling is not None
    assert old.rope.theta == 500000.0


@pytest.mark.parametrize(
    "change",
    [{}, {"rope_scaling": LLAMA3}, {"tie_word_embeddings": True}, {"head_dim": 32, "attention_bias": True}],
)
def test_written_and_read_again_is_the_same(change):
    config = llama.from_hf({**BASE, **change})
    assert llama.from_hf(llama.to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(only 'silu'\)"),
        ({"attention_multiplier": 2.0}, r"attention_multiplier=2.0 \(unknown key\)"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "power": 2}}, r"unknown in config.json: \['power'\]"),
        ({"rope_scaling": {**LLAMA3, "beta": 1}}, r"unknown in config.json: \['beta'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing: .*high_freq_factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, r"no further keys; config.json has \['factor'\]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "two values of rope_theta"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide"),
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"vocab_size": "many"}, "vocab_size is a whole number"),
    ],
)
def test_what_could_change_a_number_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        llama.from_hf({**BASE, **change})


def test_keys_that_change_nothing_pass():
    plain = llama.from_hf(BASE)
    described = {"torch_dtype": "bfloat16", "use_cache": True, "eos_token_id": [1, 2], "pretraining_tp": 1}
    assert llama.from_hf({**BASE, **described}) == plain


def test_an_unknown_family_names_the_nearest():
    assert families.load("llama") is llama
    with pytest.raises(ValueError, match="The nearest is 'llama'"):
        families.load("lama")
