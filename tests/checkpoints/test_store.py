"""The store: bits, shardings, asynchrony, donation, keep policies, mismatches."""

import threading
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.checkpoints.helpers import (
    assert_same_bits,
    describe,
    flip_bit,
    make_run,
    random_params,
    run_python,
    small_config,
    training_state,
)
from twinax.checkpoints import step as step_module
from twinax.checkpoints.errors import CheckpointError, DamagedCheckpoint, MismatchedCheckpoint, NoCheckpoint, SaveError
from twinax.checkpoints.files import TMP_PREFIX, make_locked
from twinax.checkpoints.store import CheckpointStore, Description

NOTHING = Description("llama", {})


def like(tree):
    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(one, tree)


def mesh_of(*shape: int, names: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


def test_every_bit_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    odd_floats = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45, 0.1], np.float32)
    odd_floats.view(np.uint32)[0] |= 0x1234  # a NaN with a payload
    params = {
        "f32": jnp.asarray(odd_floats),
        "bf16": jnp.asarray(rng.integers(0, 2**16, 64, dtype=np.uint16).view(ml_dtypes.bfloat16)),
        "f16": jnp.ones((2, 3), jnp.float16),
        "f8": jnp.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)),
        "i8": jnp.arange(-5, 5, dtype=jnp.int8),
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(3.25),
    }
    state = {
        "params": params,
        "optimizer": optax.adamw(1e-3).init({"w": jnp.ones((4, 4))}),
        "step": np.int32(3),
        "position": np.arange(3, dtype=np.int64),
        "key": jax.random.key_data(jax.random.key(5)),
    }
    description = describe(small_config(), data={"position": 12, "files": ["a"]}, plan={"fsdp": 4}, recipe={"lr": 1e-3})
    with CheckpointStore(tmp_path) as store:
        store.save(3, state, description)
        restored = store.restore(like(state))
    assert restored.step == 3
    assert restored.description == description
    assert restored.skipped == ()
    assert_same_bits(restored.state, state)
    assert isinstance(restored.state["position"], np.ndarray)
    assert isinstance(restored.state["params"]["f32"], jax.Array)


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(), P(("data", "fsdp"))])
def test_saved_on_one_mesh_restored_on_another(tmp_path, spec):
    values = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
    saved = NamedSharding(mesh_of(2, 2, names=("data", "fsdp")), spec)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jax.device_put(values, saved)}, NOTHING)
        for sharding in (
            NamedSharding(mesh_of(4, names=("other",)), P(None, "other")),
            NamedSharding(mesh_of(2, names=("other",)), P("other")),
            jax.sharding.SingleDeviceSharding(jax.devices()[3]),
            None,
        ):
            wanted = jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=sharding)
            found = store.restore({"x": wanted}).state["x"]
            assert found.tobytes() == values.tobytes()
            assert sharding is None or found.sharding == sharding


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax takes it from its own file
def test_plain_orbax_reads_the_arrays(tmp_path):
    sharding = NamedSharding(mesh_of(4, names=("fsdp",)), P("fsdp"))
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": {"a.b": jax.device_put(values, sharding)}, "step": np.int32(4)}, NOTHING, wait=True)
        read = ocp.PyTreeCheckpointer().restore(store.path(1) / "arrays")
    assert np.asarray(read["params.a.b"]).tobytes() == values.tobytes()
    assert int(read["step"]) == 4


def test_donated_and_changed_arrays_are_saved_as_they_were(tmp_path):
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    x, host = jnp.arange(100_000, dtype=jnp.float32), np.arange(1000)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": x, "host": host}, NOTHING)
        for _ in range(3):
            x = double(x)
        host[:] = -1
        store.wait()
        wanted = {"x": jax.ShapeDtypeStruct((100_000,), jnp.float32), "host": host}
        found = store.restore(wanted).state
    assert_same_bits(found["x"], jnp.arange(100_000, dtype=jnp.float32))
    assert_same_bits(found["host"], np.arange(1000))


def test_save_returns_before_it_is_written(tmp_path, monkeypatch):
    gate, finish = threading.Event(), step_module.StepWriter.finish
    monkeypatch.setattr(step_module.StepWriter, "finish", lambda *a: gate.wait(60) and finish(*a))
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.ones(3)}, NOTHING)
    assert store.steps() == []  # the writer waits for us
    gate.set()
    store.wait()
    assert store.steps() == [1]


def test_keep_last_and_keep_every(tmp_path):
    with CheckpointStore(tmp_path, keep_last=2, keep_every=4) as store:
        for step in range(1, 10):
            store.save(step, {"x": jnp.float32(step)}, NOTHING)
        store.wait()
        assert store.steps() == [4, 8, 9]
        assert store.latest() == 9
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000008", "step_00000009"]


def test_nothing_is_deleted_before_the_newer_step_is_committed(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path, keep_last=1) as store:
        store.save(1, {"x": jnp.ones(3)}, NOTHING, wait=True)

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(step_module.StepWriter, "finish", fail)
        with pytest.raises(SaveError, match=r"step 2 was not saved .*No space left.*steps \[1\] are untouched"):
            store.save(2, {"x": jnp.ones(3)}, NOTHING, wait=True)
        monkeypatch.undo()
        assert store.steps() == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        store.wait()  # the failure was reported once
        store.save(2, {"x": jnp.ones(3)}, NOTHING, wait=True)
        assert store.steps() == [2]


def test_failure_is_raised_at_the_next_save(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(step_module.StepWriter, "finish", lambda *_: 1 / 0)
    store.save(1, {"x": jnp.ones(3)}, NOTHING)
    with pytest.raises(SaveError, match="step 1 was not saved"):
        store.save(2, {"x": jnp.ones(3)}, NOTHING)


def test_saving_a_step_again_replaces_it(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for value in (1.0, 2.0):
            store.save(5, {"x": jnp.float32(value)}, NOTHING)
        assert store.restore({"x": jnp.float32(0)}).state["x"] == 2.0
        assert store.steps() == [5]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.float32(1)}, NOTHING)
    (tmp_path / "step_00000005").rename(tmp_path / ".replaced_step_00000005")
    assert CheckpointStore(tmp_path).steps() == [5]


def test_leftovers_of_killed_saves_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = tmp_path / f"{TMP_PREFIX}step_00000007"
    (dead / "arrays").mkdir(parents=True)
    make_locked(tmp_path / f"{TMP_PREFIX}step_00000008")  # ours, still open: somebody is writing it
    store = CheckpointStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{TMP_PREFIX}step_00000008"]
    with pytest.raises(SaveError, match="another process"):
        store.save(8, {"x": jnp.ones(3)}, NOTHING)


def test_exit_without_waiting_still_commits(tmp_path):
    code = """
import sys, numpy as np
from twinax.checkpoints.store import CheckpointStore, Description
CheckpointStore_kept = store = CheckpointStore(sys.argv[1])
store.save(1, {"x": np.ones((2000, 1000))}, Description("llama", {}))
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert CheckpointStore(tmp_path).steps() == [1]


# What restore refuses


def test_nothing_to_restore(tmp_path):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(NoCheckpoint, match="has no checkpoints"):
            store.restore({})
        store.save(1, {"x": jnp.ones(3)}, NOTHING)
        with pytest.raises(NoCheckpoint, match=r"no step 2; it has \[1\]"):
            store.restore({"x": jnp.ones(3)}, step=2)


def test_checkpoint_of_another_model_names_what_differs(tmp_path):
    run = make_run(tmp_path, 1)
    other = training_state(random_params(small_config(hidden_size=20, num_layers=2, tie_embeddings=True)))
    with pytest.raises(MismatchedCheckpoint) as caught:
        CheckpointStore(run / "checkpoints").restore(other)
    text = str(caught.value)
    assert "another model" in text
    assert (
        "  params.blocks.attention.key.weight: float32[3, 8, 16] in the checkpoint, wanted float32[2, 8, 20]\n" in text
    )
    assert "params.embed.weight" not in text  # the first few are enough
    assert "... and " in text


def test_absent_and_unwanted_arrays_are_named(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.ones(3), "old": jnp.ones(2)}, NOTHING)
        with pytest.raises(MismatchedCheckpoint) as caught:
            store.restore({"x": jnp.ones(3), "new": jnp.ones(2)})
    assert "new: absent in the checkpoint, wanted float32[2]" in str(caught.value)
    assert "old: float32[2] in the checkpoint, not wanted" in str(caught.value)


def test_damaged_newest_step_is_passed_over_and_reported(tmp_path):
    run = make_run(tmp_path, 1, 2, 3)
    (run / "checkpoints/step_00000003/twinax.json").unlink()
    flip_bit(run / "checkpoints/step_00000002/arrays/params.embed.weight/0.0", 100)
    state = training_state(random_params(small_config(), seed=1), 1)
    with CheckpointStore(run / "checkpoints") as store:
        with pytest.warns(UserWarning, match="step 1 is used instead") as warned:
            restored = store.restore(state)
        assert restored.step == 1
        assert_same_bits(restored.state, state)
        assert [bad for bad, _ in restored.skipped] == [3, 2]
        assert "no twinax.json" in str(warned[0].message)
        assert "arrays/params.embed.weight/0.0: its bytes have changed" in str(warned[0].message)
        with pytest.raises(DamagedCheckpoint, match="its bytes have changed"):
            store.restore(state, step=2)
        # A good step is never deleted in favour of a bad one.
        store._keep_last = 2
        store.save(4, state, describe(small_config()), wait=True)
        assert 1 in store.steps()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store.restore(state).step == 4


def test_all_damaged(tmp_path):
    run = make_run(tmp_path, 1, 2)
    for folder in (run / "checkpoints").iterdir():
        flip_bit(folder / "tokenizer/tokenizer.json", 5)
    with pytest.raises(DamagedCheckpoint, match=r"no good checkpoint among steps \[2, 1\]"):
        CheckpointStore(run / "checkpoints").restore(training_state(random_params(small_config())))


# What save refuses


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no arrays"),
        ({"x": 3}, r"x is a int; .*np.int32"),
        ({"x": "text"}, "x is a str"),
        ({"x": np.zeros((0, 3))}, "without elements"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, "same dotted path"),
        ({"a/b": np.ones(1)}, "slash"),
        ({"..": np.ones(1)}, "dot"),
    ],
)
def test_states_that_cannot_be_stored(tmp_path, state, message):
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match=message):
        store.save(1, state, NOTHING)
    assert list(tmp_path.iterdir()) == []


def test_typed_random_key_is_refused(tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match="key_data"):
        store.save(1, {"key": jax.random.key(0)}, NOTHING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"x": np.ones(2)}}, r"description.data.x is a ndarray"),
        ({"recipe": {"a": [1, {2: 3}]}}, r"description.recipe.a\[1\] has the key 2"),
        ({"tokenizer_files": {"../evil": b""}}, "evil"),
    ],
)
def test_descriptions_that_cannot_be_stored(tmp_path, changes, message):
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match=message):
        store.save(1, {"x": jnp.ones(1)}, Description("llama", {}, **changes))


@pytest.mark.parametrize("policy", [{"keep_last": 0}, {"keep_every": -1}])
def test_policies_that_keep_nothing(tmp_path, policy):
    with pytest.raises(CheckpointError, match="at least 1"):
        CheckpointStore(tmp_path, **policy)
