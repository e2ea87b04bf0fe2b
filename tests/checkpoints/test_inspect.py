"""What `inspect` says of each kind of folder, and what it finds odd."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.helpers import flip_bit, make_run, random_params, small_config, write_hugging_face
from twinax.checkpoints.errors import NoCheckpoint
from twinax.checkpoints.inspect import inspect, render
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig
from twinax.models.decoder import param_shapes

CONFIG = small_config()
PARAMETERS = sum(array.size for array in random_params(CONFIG).values())


def test_step(tmp_path):
    step = make_run(tmp_path, 4, data={"position": 512}) / "checkpoints" / "step_00000004"
    found = inspect(step, verify=True)
    assert found["kind"] == "Twinax step"
    assert found["parameters"]["total"] == PARAMETERS
    assert found["parameters"]["embedding"] == 264 * 16
    assert sum(found["parameters"].values()) == 2 * PARAMETERS
    assert found["dtypes"] == {"float32": 12}
    assert (found["step"], found["context"], found["vocabulary"], found["seed"]) == (4, 64, 264, 7)
    assert found["data"] == {"position": 512}
    assert found["tokenizer"]["vocabulary"] == 259
    assert found["bytes"] == sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert found["checksums"] == "verified"
    assert found["odd"] == []
    json.dumps(found)
    text = render(found)
    for part in ("Twinax step", f"{PARAMETERS:,}", "3 layers", "step          4", "verified", "nothing odd", "512"):
        assert part in text
    assert "--verify" in inspect(step)["checksums"]


def test_a_mixture_of_experts(tmp_path):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_size=8, shared_experts=1)
    text = render(inspect(make_run(tmp_path, 1, config=small_config(moe=moe))))
    assert "width 16, 4 experts of 8, 2 a token and 1 shared, 4 heads" in text


def test_run_with_a_damaged_step(tmp_path):
    run = make_run(tmp_path, 1, 2, 3)
    (run / "checkpoints/.tmp_step_00000004").mkdir()
    flip_bit(run / "checkpoints/step_00000003/arrays/params.embed.weight/0.0", 5)
    found = inspect(run, verify=True)
    assert found["kind"] == "Twinax training run"
    assert found["steps"] == [1, 2, 3]
    assert found["newest_good_step"] == found["step"] == 2
    assert len(found["odd"]) == 2
    assert "step 3: " in found["odd"][0]
    assert "params.embed.weight/0.0" in found["odd"][0]
    assert "killed" in found["odd"][1]
    assert "newest good   2" in render(found)
    assert inspect(run)["newest_good_step"] == 3  # nobody asked to look


def test_run_without_a_good_step(tmp_path):
    run = make_run(tmp_path, 1)
    flip_bit(run / "checkpoints/step_00000001/twinax.json", 50)
    found = inspect(run)
    assert found["newest_good_step"] is None
    assert "digest does not match" in render(found)


def test_hugging_face_folder(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG, "bfloat16"))
    found = inspect(folder, verify=True)
    assert found["kind"] == "Hugging Face folder"
    assert found["parameters"]["total"] == PARAMETERS
    assert found["parameters"]["output"] == 264 * 16
    assert found["dtypes"] == {"bfloat16": 30}
    assert found["odd"] == []
    assert "bfloat16 (30 arrays)" in render(found)
    json.dumps(found)


def test_odd_things_are_said_and_do_not_stop_it(tmp_path):
    config = small_config(vocab_size=258)
    params = random_params(config)
    params["embed.weight"][0, :2] = [np.nan, np.inf]
    extra = {"mystery": np.ones(2, np.float32), "model.rotary_emb.inv_freq": np.ones(2, np.float32)}
    folder = write_hugging_face(tmp_path / "hf", config, params, extra=extra)
    (folder / "pytorch_model.bin").touch()
    found = inspect(folder, verify=True)
    odd = "\n".join(found["odd"])
    assert "unknown: mystery" in odd
    assert "model.embed_tokens.weight: 2 of 4,128 numbers are NaN or infinite" in odd
    assert found["notes"] == ["pytorch_model.bin: a pickle, which is never opened"]
    assert "needs vocab_size >= 259" in odd

    step = make_run(tmp_path / "run", 1, tokenizer_files={}) / "checkpoints/step_00000001"
    (step / "notes.txt").touch()
    odd = "\n".join(inspect(step)["odd"])
    assert "not part of the checkpoint: notes.txt" in odd
    assert "no tokenizer" in odd
    (step / "arrays/params.embed.weight/0.0").unlink()
    assert "lacks files: arrays/params.embed.weight/0.0" in inspect(step)["odd"][0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_broken_hugging_face_folders(tmp_path, name):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    found = inspect(folder)
    assert any(name in text for text in found["odd"])
    assert name in render(found)


def test_nothing_there(tmp_path):
    with pytest.raises(NoCheckpoint, match="holds no model"):
        inspect(tmp_path)


def test_what_is_unusual_is_noted_and_is_not_odd(tmp_path):
    config = small_config(tie_embeddings=True)
    params = random_params(config)
    extra = {"lm_head.weight": params["embed.weight"], "model.rotary_emb.inv_freq": np.ones(2, np.float32)}
    found = inspect(write_hugging_face(tmp_path / "hf", config, params, extra=extra))
    assert found["odd"] == []
    assert found["notes"] == [
        "no numbers were read: --verify looks for NaN and infinities",
        "lm_head.weight: a second copy of the embedding, to which it is tied (16,896 bytes)",
        "model.rotary_emb.inv_freq: not used, and provably without effect",
        "the vocabulary is padded: 5 of its 264 rows belong to no token",
    ]
    assert found["parameters"]["total"] == sum(array.size for array in params.values())
    assert "note: the vocabulary is padded" in render(found)
    assert "output" not in found["parameters"]
    run = inspect(make_run(tmp_path / "run", 1, 2))
    assert run["notes"] == [found["notes"][0], found["notes"][3]]
    assert inspect(tmp_path / "run", verify=True)["notes"] == [found["notes"][3]]


GOLDEN = Path(__file__).parent.parent / "golden" / "families"


@pytest.mark.parametrize(
    ("family", "parts", "shown"),
    [
        ("mamba2", {"mamba2", "embedding", "output", "norms"}, "mamba2 in 3"),
        ("gpt2", {"attention", "mlp", "embedding", "positions", "norms"}, "layers"),
        ("gpt_oss_mxfp4", {"attention", "experts", "embedding", "output", "norms"}, "quantised, mxfp4"),
        ("deepseek_v3_fp8", {"latent attention", "experts", "mlp", "embedding", "output", "norms"}, "fp8_e4m3"),
    ],
)
def test_parts_of_every_kind_of_model(family, parts, shown):
    found = inspect(GOLDEN / family)
    assert set(found["parameters"]) == {"total", *parts}
    assert shown in render(found)


@pytest.mark.parametrize("family", ["gpt_oss_mxfp4", "deepseek_v3_fp8"])
def test_quantised_weights_are_counted_as_numbers(family):
    """As many as the same model has unquantised."""
    found = inspect(GOLDEN / family)
    plain = dataclasses.replace(DecoderConfig.from_dict(found["model"]), quantization=None)
    assert found["parameters"]["total"] == sum(like.size for like in param_shapes(plain).values())
