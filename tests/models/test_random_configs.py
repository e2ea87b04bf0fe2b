"""Models of transformers with random configs: ours is the same one, or refused by name, never another one.

A config that a person wrote may hold anything. Each key that transformers' class of the family knows is drawn, some are
then spelled as transformers 4 did, left out or made null; what transformers reads from that file is the model.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.models.test_families import logits_of
from tests.models.test_families_live import MAKER
from tests.thorough import thorough
from twinax.checkpoints.convert import convert
from twinax.checkpoints.load import load_model
from twinax.checkpoints.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = Tokenizer.bytes().vocab_size + 3
EACH = 5  # models of a test
EXACT = {"dtype": torch.float32, "experts_implementation": "eager"}  # the others know no float64
# What may stand in a config, and how often it is drawn. A class that does not know a key is spared it.
KEYS = {
    "rms_norm_eps": (1e-6, 1e-2), "layer_norm_epsilon": (1e-6, 1e-2), "norm_epsilon": (1e-6, 1e-2),
    "tie_word_embeddings": (True, False), "attention_bias": (True, False), "mlp_bias": (True, False),
    "use_bias": (True, False), "hidden_act": ("silu", "gelu", "relu"), "hidden_activation": ("gelu", "silu"),
    "activation_function": ("gelu", "relu", "gelu_new", "tanh"), "n_inner": (None, 40), "n_layer": (1, 4),
    "scale_attn_weights": (True, False), "sliding_window": (None, 4, 16), "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 5), "no_rope_layer_interval": (1, 3), "attn_logit_softcapping": (None, 5.0),
    "final_logit_softcapping": (None, 3.0), "query_pre_attn_scalar": (16, 100), "embedding_multiplier": (0.5, 2.0),
    "logits_scaling": (0.5, 2.0), "residual_multiplier": (0.5, 2.0), "attention_multiplier": (0.5, 2.0),
    "num_local_experts": (2, 8), "num_experts": (2, 8), "norm_topk_prob": (True, False),
    "decoder_sparse_step": (1, 2), "swiglu_limit": (1.0, 7.0), "moe_intermediate_size": (16,),
    "q_lora_rank": (None, 12), "kv_lora_rank": (8, 20), "v_head_dim": (8, 16), "routed_scaling_factor": (1.0, 2.5),
    "n_shared_experts": (1, 3), "first_k_dense_replace": (0, 2), "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "noaux_tc"),
    "rope_interleave": (True, False), "use_conv_bias": (True, False), "conv_kernel": (2, 4), "rms_norm": (True, False),
}  # fmt: skip


def drawn(rng: random.Random, name: str) -> dict:
    """Changes to the config of a case."""
    kind, own = MAKER.CASES[name]
    known = getattr(transformers, MAKER.NAMES.get(kind, (f"{kind}Config",))[0])().to_dict()
    found = {key: rng.choice(values) for key, values in KEYS.items() if key in known and rng.random() < 0.25}
    if "num_attention_heads" in known and "kv_lora_rank" not in known and kind not in ("GPT2", "Mamba2"):
        heads = rng.choice((2, 4, 8))
        found |= {"num_attention_heads": heads, "num_key_value_heads": rng.choice((1, 2, heads))}
        found |= {"head_dim": rng.choice((8, 12, 16))} if "head_dim" in known else {}
    if "rope_parameters" in known and kind != "Gemma3" and rng.random() < 0.6:
        rope = {"rope_type": rng.choice(("default", "linear", "dynamic", "yarn", "llama3")), "rope_theta": 1000.0}
        if rope["rope_type"] != "default":
            rope["factor"] = rng.choice((1.0, 4.0))
        if rope["rope_type"] in ("yarn", "llama3"):
            rope["original_max_position_embeddings"] = 16
        if rope["rope_type"] == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if rope["rope_type"] == "default" and rng.random() < 0.3:
            rope["partial_rotary_factor"] = 0.5
        found["rope_parameters"] = rope
    if "layer_types" in known and kind != "MiniMax" and rng.random() < 0.4:
        count = found.get("num_hidden_layers", own.get("num_hidden_layers", MAKER.SMALL["num_hidden_layers"]))
        found["layer_types"] = [rng.choice(("sliding_attention", "full_attention")) for _ in range(count)]
    return found


def respell(rng: random.Random, path: Path) -> None:
    """As transformers 4 wrote it, or with a key left out or null."""
    config, how = json.loads(path.read_text()), rng.choice(("as it is", "old", "without"))
    rope = config.get("rope_parameters")
    if how == "old" and rope and not any(isinstance(value, dict) for value in rope.values()):
        rope = dict(config.pop("rope_parameters"))
        config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        scaled = rope.pop("rope_type") if rope.get("rope_type") != "default" else None
        config["rope_scaling"] = None if scaled is None else {rng.choice(("type", "rope_type")): scaled, **rope}
    if how == "without":
        for key in rng.sample(sorted(config.keys() - {"model_type", "architectures"}), 2):
            if rng.random() < 0.7:
                del config[key]
            else:
                config[key] = None
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("seed", thorough(list(range(9)), quick=[0]))
def test_a_random_model_is_read_as_it_is_or_refused(seed, tmp_path):
    rng, same = random.Random(seed), 0
    for name in rng.sample(list(MAKER.CASES), len(MAKER.CASES)) * 2:
        if same == EACH:
            break
        number = rng.randrange(1 << 30)
        changes, folder = drawn(rng, name), tmp_path / str(number)
        try:  # what transformers makes nothing of is no model
            made = MAKER.exact(MAKER.random_model(name, number, vocab_size=VOCABULARY, **changes))
            made.save_pretrained(folder)
            respell(rng, folder / "config.json")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **EXACT).eval()
            tokens, lengths = MAKER.batch(number, VOCABULARY)
            expected = MAKER.logits_of(theirs, tokens, lengths)
            # Some models make much of a rounding; so much may ours.
            rounding = np.abs(MAKER.logits_of(theirs.double(), tokens, lengths) - expected).max()
        except Exception:  # of any kind: their code is not what is tested
            continue
        if not np.isfinite(rounding):
            continue
        Tokenizer.bytes().save(folder)
        try:
            ours = load_model(folder, dtype="float32")
        except ValueError:
            continue
        atol, what = 10 * rounding + 1e-6 * np.abs(expected).max(), f"{name} {changes}"
        np.testing.assert_allclose(logits_of(ours, tokens, lengths), expected, rtol=0, atol=atol, err_msg=what)
        same += 1
        if same == 1 and not hasattr(theirs.config, "block_size"):
            convert(folder, folder / "step")
            try:
                convert(folder / "step", folder / "out")
            except ValueError:
                continue  # what their family can't say
            again = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", **EXACT).eval()
            exported = MAKER.logits_of(again, tokens, lengths)
            np.testing.assert_allclose(exported, expected, rtol=0, atol=atol / 10, err_msg=what)
    assert same == EACH, "most models that transformers makes are read"
