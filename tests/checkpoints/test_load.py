"""Loading: three kinds of folder, meshes, dtypes, and everything that is not a model."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.helpers import (
    assert_same_bits,
    describe,
    flip_bit,
    make_run,
    random_params,
    run_python,
    small_config,
    write_hugging_face,
)
from twinax.checkpoints import step
from twinax.checkpoints.errors import CheckpointError, DamagedCheckpoint, MismatchedCheckpoint, NoCheckpoint
from twinax.checkpoints.load import load_model
from twinax.checkpoints.store import CheckpointStore
from twinax.checkpoints.tokenizer import Tokenizer, TokenizerError
from twinax.sharding.plan import Plan, PlanError

CONFIG = small_config()


def host(params):
    return {name: np.asarray(array) for name, array in params.items()}


def test_the_same_model_from_every_kind_of_folder(tmp_path):
    run = make_run(tmp_path / "run", 1, 5, config=CONFIG, generation={"eos_token_id": 257})
    params = random_params(CONFIG, seed=5)
    folder = write_hugging_face(tmp_path / "hf", CONFIG, params)
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_00000005", folder, str(folder)):
        model = load_model(path)
        assert model.config == CONFIG
        assert model.family == "llama"
        assert model.tokenizer is not None
        assert model.tokenizer.files() == Tokenizer.bytes().files()
        assert_same_bits(host(model.params), dict(sorted(params.items())))
    newest = load_model(run)
    assert (newest.kind, newest.step, newest.source.name) == ("step", 5, "step_00000005")
    assert newest.generation == {"eos_token_id": 257}
    assert newest.description is not None
    assert newest.description.seed == 7
    assert load_model(folder).step is None


def test_a_step_folder_may_be_moved_and_renamed(tmp_path):
    run = make_run(tmp_path / "run", 1)
    moved = shutil.copytree(run / "checkpoints/step_00000001", tmp_path / "my model")
    assert load_model(moved).step == 1


@pytest.mark.parametrize("kind", ["run", "hf"])
@pytest.mark.parametrize("plan", ["fsdp=4", "data=2,fsdp=2"])
def test_on_a_mesh(tmp_path, kind, plan):
    make_run(tmp_path / "run", 0)
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    alone, spread = load_model(tmp_path / kind), load_model(tmp_path / kind, plan=plan)
    assert_same_bits(host(spread.params), host(alone.params))
    query = spread.params["blocks.attention.query.weight"]
    assert len(query.sharding.device_set) == 4
    assert query.addressable_shards[0].data.shape[2] == CONFIG.hidden_size // int(plan[-1])


@pytest.mark.parametrize("kind", ["run", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.float16])
def test_cast(tmp_path, kind, dtype):
    make_run(tmp_path / "run", 0)
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    params = load_model(tmp_path / kind, dtype=dtype).params
    expected = {name: array.astype(dtype) for name, array in random_params(CONFIG).items()}
    assert_same_bits(host(params), dict(sorted(expected.items())))


def test_progress(tmp_path):
    told = []
    load_model(make_run(tmp_path, 0), progress=lambda *seen: told.append(seen))
    assert [done for _, done, _ in told] == list(range(1, 13))
    assert {total for _, _, total in told} == {12}


def test_params_can_be_donated_and_the_files_removed(tmp_path):
    run = make_run(tmp_path, 0)
    params = load_model(run).params
    shutil.rmtree(run)
    expected = {name: array * 2 for name, array in random_params(CONFIG).items()}
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(params)
    assert_same_bits(host(doubled), dict(sorted(expected.items())))


def test_loading_needs_neither_orbax_nor_torch():
    code = """
import sys
import twinax.checkpoints.load, twinax.checkpoints.store, twinax.checkpoints.convert, twinax.checkpoints.inspect
print([name for name in ("orbax", "torch", "transformers", "tensorstore") if name in sys.modules])
"""
    assert run_python(code).stdout == "[]\n"  # a server starts without waiting for them


# What is not a model


def test_path_that_does_not_exist_names_the_nearest(tmp_path):
    make_run(tmp_path / "my_run", 1)
    with pytest.raises(NoCheckpoint, match=r"my_rum does not exist.*nearest name in it is 'my_run'"):
        load_model(tmp_path / "my_rum")
    with pytest.raises(NoCheckpoint, match=r"nearest name in it is 'step_00000001'"):
        load_model(tmp_path / "my_run/checkpoints/step_0000002")
    with pytest.raises(NoCheckpoint, match=r"my_run exists and holds checkpoints"):
        load_model(tmp_path / "my_run/zzz/zzz")


def test_folder_without_a_model_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(NoCheckpoint, match=r"twinax.json.*step_00000010.*config.json.*found notes.txt"):
        load_model(tmp_path)


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NoCheckpoint, match="is a file; give the folder"):
        load_model(tmp_path / "model.safetensors")


def test_a_run_that_has_not_saved(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(NoCheckpoint, match="has not saved a step yet"):
        load_model(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*refused.*save_pretrained"):
        load_model(folder)


def test_weights_under_another_name(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(NoCheckpoint, match=r"there is weights.safetensors, rename it"):
        load_model(folder)


def test_truncated_weights(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    message = f"model.safetensors is truncated: .* {len(whole)} bytes, the file has {len(whole) - 100}"
    with pytest.raises(DamagedCheckpoint, match=message):
        load_model(folder)


def test_tokenizer_larger_than_the_model(tmp_path):
    config = small_config(vocab_size=258)
    folder = write_hugging_face(tmp_path / "hf", config, random_params(config))
    with pytest.raises(TokenizerError, match="needs vocab_size >= 259"):
        load_model(folder)
    with pytest.raises(TokenizerError, match="needs vocab_size >= 259"):
        load_model(make_run(tmp_path / "run", 1, config=config))


def test_without_a_tokenizer(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), tokenizer=False)
    assert load_model(folder).tokenizer is None
    assert load_model(make_run(tmp_path / "run", 1, tokenizer_files={})).tokenizer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "no model family 'mamba'"),
        ({"model_type": None}, "no model_type"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"frobnicate": 3}, "frobnicate"),
        ({"num_attention_heads": 3}, "num_kv_heads must divide"),
    ],
)
def test_configs_that_are_not_understood(tmp_path, changes, message):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}'])
def test_config_that_is_no_json_object(tmp_path, text):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    (folder / "config.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"config\.json"):
        load_model(folder)


def test_damaged_newest_step_of_a_run(tmp_path):
    run = make_run(tmp_path, 1, 2)
    flip_bit(run / "checkpoints/step_00000002/arrays/params.embed.weight/0.0", 9)
    with pytest.warns(UserWarning, match=r"step_00000001 is used instead"):
        assert load_model(run).step == 1
    with pytest.raises(DamagedCheckpoint, match=r"params.embed.weight/0.0: its bytes have changed"):
        load_model(run / "checkpoints/step_00000002")
    assert load_model(run / "checkpoints/step_00000002", verify=False).step == 2


def test_training_state_is_not_read(tmp_path):
    run = make_run(tmp_path, 1)
    shutil.rmtree(run / "checkpoints/step_00000001/arrays/optimizer.mu.embed.weight")
    assert load_model(run).step == 1


def test_parameters_that_do_not_fit_the_config(tmp_path):
    params = random_params(CONFIG)
    del params["embed.weight"]
    params["more"] = params.pop("final_norm.weight")
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": params}, describe(CONFIG))
    with pytest.raises(MismatchedCheckpoint) as caught:
        load_model(tmp_path)
    assert "embed.weight: absent, the config makes it [264, 16]" in str(caught.value)
    assert "more: not a parameter" in str(caught.value)


def test_config_of_another_version(tmp_path):
    description = describe(CONFIG, model=CONFIG.to_dict() | {"new_knob": 1})
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": random_params(CONFIG)}, description)
    with pytest.raises(ValueError, match="new_knob"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "given", ["x", -1, 1.5, True, [[]], {}, [1, None], [True], CONFIG.vocab_size, 10**12], ids=repr
)
def test_a_text_ends_with_tokens_of_the_model(tmp_path, given):
    """Whatever else stands there would reach the sampler."""
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG, seed=5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    run = make_run(tmp_path / "run", 1, config=CONFIG, generation={"eos_token_id": given})
    for path in (folder, run):
        with pytest.raises(MismatchedCheckpoint, match=r"eos_token_id is a token of the model, from 0 to"):
            load_model(path)


def test_generation_comes_from_config_json_where_it_has_no_file_of_its_own(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG), eos_token_id=[1, 2], pad_token_id=None)
    assert load_model(folder).generation == {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.5}))
    assert load_model(folder).generation == {"eos_token_id": 5, "temperature": 0.5}


def test_a_dtype_for_each_parameter(tmp_path):
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    params = load_model(tmp_path / "hf", dtype=lambda name: "float32" if "norm" in name else "bfloat16").params
    expected = {n: a if "norm" in n else a.astype("bfloat16") for n, a in random_params(CONFIG).items()}
    assert_same_bits(host(params), dict(sorted(expected.items())))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5), (2, 1, 7)])
@pytest.mark.parametrize("limit", [1, 40, 10**6])
def test_copies_in_blocks(monkeypatch, shape, limit):
    monkeypatch.setattr(step, "_COPY_BYTES", limit)
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    stored = SimpleNamespace(shape=shape, dtype=array.dtype, read=lambda index: array[index])
    found = step.to_device(stored, None, "float32")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array)
    assert step._aligned(shape, array.dtype).ctypes.data % 64 == 0


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_a_mesh_for_the_config(tmp_path, kind):
    """The mesh is asked for with the config in hand, and what it refuses is refused before numbers are read."""
    make_run(tmp_path / "run", 0)
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    spread = load_model(tmp_path / kind, mesh=lambda config: Plan(fsdp=config.num_kv_heads).mesh())
    assert len(spread.params["embed.weight"].sharding.device_set) == 2
    alone = load_model(tmp_path / kind, mesh=lambda _: None)
    assert len(alone.params["embed.weight"].sharding.device_set) == 1
    assert_same_bits(host(spread.params), host(alone.params))

    def refuse(_):
        raise PlanError("not this one")

    with pytest.raises(PlanError, match="not this one"):
        load_model(tmp_path / kind, mesh=refuse)
