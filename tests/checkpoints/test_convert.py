"""Conversion: bits both ways, every tensor accounted for, folders that appear whole or not at all."""

import json
import os

import numpy as np
import pytest

from tests.checkpoints.helpers import (
    assert_same_bits,
    flip_bit,
    make_run,
    random_params,
    small_config,
    write_hugging_face,
)
from twinax.checkpoints import convert as convert_module
from twinax.checkpoints.convert import convert
from twinax.checkpoints.errors import CheckpointError, DamagedCheckpoint, NoCheckpoint, SaveError
from twinax.checkpoints.load import load_model
from twinax.checkpoints.safetensors import INDEX_NAME, SafetensorsFolder
from twinax.checkpoints.store import CheckpointStore
from twinax.checkpoints.stream import Copy
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.moe_config import MoEConfig

CONFIG = small_config()


def tensors_of(folder):
    with SafetensorsFolder(folder) as tensors:
        return {name: np.array(tensors.read(name)) for name in sorted(tensors.specs())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_to_twinax_and_back(tmp_path, dtype, tied):
    config = small_config(tie_embeddings=tied, attention_bias=tied)
    params = random_params(config, dtype)
    params["embed.weight"].reshape(-1)[:3] = [np.nan, -0.0, np.inf]
    source = write_hugging_face(tmp_path / "hf", config, params, eos_token_id=9)
    there = convert(source, tmp_path / "twinax")
    assert (there.direction, there.dtypes, there.notes) == ("to_twinax", (dtype,), ())
    assert_same_bits(
        {n: np.asarray(a) for n, a in load_model(there.target).params.items()}, dict(sorted(params.items()))
    )

    back = convert(there.target, tmp_path / "back", max_shard_bytes=20_000)
    assert back.direction == "to_hugging_face"
    assert back.tensors == there.tensors == len(tensors_of(source))
    assert back.parameters == sum(array.size for array in params.values())
    assert back.bytes == sum(array.nbytes for array in params.values())
    assert INDEX_NAME in back.files
    assert_same_bits(tensors_of(back.target), tensors_of(source))
    for name, data in Tokenizer.bytes().files().items():
        assert (back.target / name).read_bytes() == data
    exported = json.loads((back.target / "config.json").read_text())
    assert exported["torch_dtype"] == dtype
    assert exported["eos_token_id"] == 9
    assert exported["bos_token_id"] is None
    assert json.loads((back.target / "generation_config.json").read_text()) == {"eos_token_id": 9}
    assert sorted(os.listdir(tmp_path)) == ["back", "hf", "twinax"]


def test_twinax_to_hugging_face_and_back(tmp_path):
    run = make_run(tmp_path / "run", 3, 8)
    report = convert(run, run / "exported")
    assert report.source.name == "step_00000008"
    assert report.notes == ("13 arrays of training state (optimizer, step) have no place in a Hugging Face folder",)
    generation = json.loads((report.target / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}  # the tokenizer's
    again = load_model(convert(report.target, tmp_path / "again").target)
    before = load_model(run)
    assert again.config == before.config
    assert_same_bits(
        {n: np.asarray(a) for n, a in again.params.items()}, {n: np.asarray(a) for n, a in before.params.items()}
    )


def test_every_file_of_a_tokenizer_comes_along(tmp_path):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ documents }}")
    (source / "special_tokens_map.json").write_bytes(b'{"eos_token":   "<|eos|>"}')
    back = convert(convert(source, tmp_path / "step").target, tmp_path / "back").target
    for path in source.rglob("*"):
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            assert (back / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_converted_step_restores_in_a_store(tmp_path):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    convert(source, tmp_path / "checkpoints" / "step_00000012")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        restored = store.restore({"params": random_params(CONFIG, seed=1)})
    assert restored.step == 12
    assert_same_bits(restored.state["params"], random_params(CONFIG))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cast(tmp_path, dtype):
    params = random_params(CONFIG, "float32" if dtype != "float32" else "bfloat16")
    source = write_hugging_face(tmp_path / "hf", CONFIG, params)
    step = convert(source, tmp_path / "step", dtype=dtype)
    assert step.dtypes == (dtype,)
    straight = {name: array.astype(dtype) for name, array in tensors_of(source).items()}
    assert_same_bits(tensors_of(convert(step.target, tmp_path / "back").target), straight)
    uncast = convert(source, tmp_path / "uncast").target
    assert_same_bits(tensors_of(convert(uncast, tmp_path / "cast", dtype=dtype).target), straight)


def test_cast_that_overflows(tmp_path):
    params = random_params(CONFIG)
    params["blocks.mlp.up.weight"][1, 0, 0] = 1e6
    source = write_hugging_face(tmp_path / "hf", CONFIG, params)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight has numbers too large for float16"):
        convert(source, tmp_path / "step", dtype="float16")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense"])
def test_dtypes_that_no_model_has(tmp_path, dtype):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
        convert(source, tmp_path / "step", dtype=dtype)


def test_every_wrong_tensor_is_listed_at_once(tmp_path):
    extra = {
        "model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32),
        "model.norm.weight": np.ones(17, np.float32),
        "model.layers.1.mlp.up_proj.weight": np.ones((24, 16), np.int8),
        "model.layers.2.mlp.up_proj.weight": np.ones((24, 16), np.float16),
    }
    without = ("lm_head.weight", "model.layers.1.input_layernorm.weight")
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), extra=extra, without=without)
    for attempt in (lambda: convert(source, tmp_path / "step"), lambda: load_model(source)):
        with pytest.raises(CheckpointError, match="6 problems") as caught:
            attempt()
        for problem in (
            "unknown: model.layers.0.self_attn.q_norm.weight [4]",
            "wrong shape: model.norm.weight is [17], the config makes it [16]",
            "wrong dtype: model.layers.1.mlp.up_proj.weight is int8",
            "mixed dtypes: model.layers.2.mlp.up_proj.weight is float16",
            "missing: lm_head.weight [264, 16]",
            "missing: model.layers.1.input_layernorm.weight [16]",
        ):
            assert problem in str(caught.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_harmless_tensors_are_left_out_and_noted(tmp_path):
    config = small_config(tie_embeddings=True)
    params = random_params(config)
    extra = {
        "lm_head.weight": params["embed.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    source = write_hugging_face(tmp_path / "hf", config, params, extra=extra)
    report = convert(source, tmp_path / "step")
    assert [note.split()[0] for note in report.notes] == sorted(extra)
    assert set(tensors_of(convert(report.target, tmp_path / "back").target)) == set(tensors_of(source)) - set(extra)


def test_tied_head_that_differs_is_a_contradiction(tmp_path):
    config = small_config(tie_embeddings=True)
    params = random_params(config)
    head = params["embed.weight"].copy()
    head[-1, -1] = np.nextafter(head[-1, -1], 2)
    source = write_hugging_face(tmp_path / "hf", config, params, extra={"lm_head.weight": head})
    with pytest.raises(
        CheckpointError, match=r"contradiction: .*lm_head.weight differs from model.embed_tokens.weight"
    ):
        convert(source, tmp_path / "step")


def test_unknown_config_keys_are_refused(tmp_path):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), logit_scale=2.0)
    with pytest.raises(CheckpointError, match="logit_scale"):
        convert(source, tmp_path / "step")


def test_a_mixture_of_experts_has_no_hugging_face_form_in_a_dense_family(tmp_path):
    config = small_config(moe=MoEConfig(num_experts=4, experts_per_token=2, expert_size=8))
    run = make_run(tmp_path, 1, config=config)
    with pytest.raises(ValueError, match=r"family 'llama' has no mixture of experts, and this model has 4 experts"):
        convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_mixture_of_experts_is_exported_as_mixtral(tmp_path):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_size=CONFIG.intermediate_size, balance_loss=0.5)
    config = small_config(moe=moe, family="mixtral")
    convert(make_run(tmp_path, 1, config=config), tmp_path / "out")
    assert load_model(tmp_path / "out").config.without_training() == config.without_training()


def test_what_a_family_cannot_express_is_not_exported(tmp_path):
    run = make_run(tmp_path, 1, config=small_config(family="mistral", attention_bias=True))
    with pytest.raises(CheckpointError, match=r"'mistral' cannot express this model: attention_bias=True"):
        convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer(tmp_path):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), tokenizer=False)
    there = convert(source, tmp_path / "step")
    assert there.notes == ("the folder has no tokenizer.json, so the checkpoint has no tokenizer",)
    back = convert(there.target, tmp_path / "back")
    assert back.notes == ("the checkpoint has no tokenizer, so the folder has none",)
    assert sorted(back.files) == ["config.json", "model.safetensors"]


def test_existing_targets(tmp_path):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    step = tmp_path / "step"
    convert(source, step)
    with pytest.raises(CheckpointError, match="exists; overwrite=True"):
        convert(source, step)
    (step / "old").touch()
    convert(source, step, overwrite=True)
    assert not (step / "old").exists()
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").touch()
    (tmp_path / "file").touch()
    for precious in ("thesis", "file"):
        with pytest.raises(CheckpointError, match="not a model folder, so it is not overwritten"):
            convert(source, tmp_path / precious, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").exists()


def test_targets_that_would_destroy_the_source(tmp_path):
    source = write_hugging_face(tmp_path / "a" / "hf", CONFIG, random_params(CONFIG))
    for target in (source, tmp_path / "a", tmp_path, source / ".." / "hf"):
        with pytest.raises(CheckpointError, match="holds the source"):
            convert(source, target, overwrite=True)
    step = make_run(tmp_path / "run", 1) / "checkpoints" / "step_00000001"
    with pytest.raises(CheckpointError, match="lies in the step folder"):
        convert(step, step / "hf")
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(tmp_path / "run", tmp_path / "run" / "checkpoints", overwrite=True)


def test_source_that_is_not_there(tmp_path):
    with pytest.raises(NoCheckpoint, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "target")
    with pytest.raises(NoCheckpoint, match="holds no model"):
        convert(tmp_path, tmp_path / "target")


def test_damaged_sources_are_not_converted(tmp_path):
    run = make_run(tmp_path / "run", 1)
    step = run / "checkpoints" / "step_00000001"
    flip_bit(step / "arrays/params.unembed.weight/0.0", 77)
    with pytest.raises(DamagedCheckpoint, match="unembed"):
        convert(step, tmp_path / "hf")
    source = write_hugging_face(tmp_path / "source", CONFIG, random_params(CONFIG))
    whole = (source / "model.safetensors").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (source / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match="truncated"):
            convert(source, tmp_path / "step")
    assert sorted(os.listdir(tmp_path)) == ["run", "source"]


@pytest.mark.parametrize("direction", ["to_twinax", "to_hugging_face"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug")])
def test_failing_halfway_leaves_everything_as_it_was(tmp_path, monkeypatch, direction, error):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    if direction == "to_hugging_face":
        source = convert(source, tmp_path / "twinax").target
    target = tmp_path / "target"
    convert(source, target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    names = sorted(os.listdir(tmp_path))

    def fail(*_):
        raise error

    monkeypatch.setattr(Copy, "verify", fail)
    with pytest.raises(SaveError if isinstance(error, OSError) else type(error)):
        convert(source, target, overwrite=True)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("direction", ["to_twinax", "to_hugging_face"])
def test_what_was_written_is_read_again(tmp_path, monkeypatch, direction):
    """A disk that stores something else than it was given is noticed before the folder gets its name."""
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    if direction == "to_hugging_face":
        source = convert(source, tmp_path / "twinax").target
    verify = Copy.verify

    def damage_first(copy):
        name = "arrays/params.embed.weight/0.0" if direction == "to_twinax" else "model.safetensors"
        flip_bit(copy.folder / name, -1)
        verify(copy)

    monkeypatch.setattr(Copy, "verify", damage_first)
    with pytest.raises(DamagedCheckpoint, match="was not written as it is"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_no_room(tmp_path, monkeypatch):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(SaveError, match="10 bytes free and the conversion takes"):
        convert(source, tmp_path / "step")


def test_progress(tmp_path, capfd):
    source = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    told = []
    convert(source, tmp_path / "step", progress=lambda *seen: told.append(seen))
    assert told[-1][1] == told[-1][2] == 2 * sum(array.nbytes for array in random_params(CONFIG).values())
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    capfd.readouterr()
    convert(tmp_path / "step", tmp_path / "back", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "verify" in shown.err
