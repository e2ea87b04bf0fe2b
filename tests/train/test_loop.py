"""Whole runs: what is resumed, refused, saved and left behind."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.train.helpers import MODEL, WORDS, small_recipe, write_text
from twinax.checkpoints import manifest
from twinax.checkpoints.errors import SaveError
from twinax.checkpoints.load import load_model
from twinax.checkpoints.store import CheckpointStore
from twinax.sharding.plan import Plan
from twinax.train import loop
from twinax.train.data import DataConfig, DataError
from twinax.train.loop import NotFiniteError, ResumeError, train
from twinax.train.metrics import read_metrics
from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, RecipeError
from twinax.train.step import state_like


def state_of(result):
    config = load_model(result.checkpoint).config
    with CheckpointStore(result.checkpoint.parent) as store:
        restored = store.restore(state_like(config, Plan().mesh()), result.step)
    return jax.device_get(restored.state)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def facts(lines):
    """Lines without what the clock decides."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 20 steps without a break: its folder, recipe and result."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = small_recipe(folder)
    return folder, recipe, train(recipe, display=False)


@pytest.fixture
def copy(straight, tmp_path):
    """A folder with the same text and run, to be gone on with."""
    folder, recipe, _ = straight
    shutil.copytree(folder / "run", tmp_path / "run")
    return dataclasses.replace(recipe, output=str(tmp_path / "run"))


def back_to(recipe, step):
    """As if the process had been killed after saving `step`."""
    for path in (loop.Path(recipe.output) / "checkpoints").iterdir():
        if path.name > f"step_{step:08}":
            shutil.rmtree(path)


def test_a_run_leaves_what_it_says(straight):
    _, recipe, result = straight
    assert (result.step, result.interrupted) == (20, None)
    assert 0 < result.unigram_entropy < np.log(len(set("".join(WORDS))) + 1)
    assert result.tokens_per_second > 0
    assert sorted(path.name for path in result.output.iterdir()) == ["checkpoints", "loss.svg", "metrics.jsonl"]
    assert sorted(path.name for path in result.checkpoint.parent.iterdir()) == ["step_00000010", "step_00000020"]
    lines = read_metrics(result.metrics)
    assert result.loss < lines[0]["loss"] - 1
    assert result.eval_loss < lines[0]["loss"] - 1
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 21))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20]
    assert len({line["batch"] for line in lines if line["kind"] == "train"}) == 20
    assert "unigram entropy" in result.curve.read_text()
    described = json.loads((result.checkpoint / "twinax.json").read_text())
    assert (described["data"]["next_step"], described["data"]["next_row"]) == (20, 80)
    assert described["recipe"]["optimizer"]["lr"] == recipe.optimizer.lr
    loaded = load_model(result.checkpoint)
    assert loaded.tokenizer.encode("a") == [97]
    assert loaded.config == recipe.model.decoder(259, 32)


def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(straight, copy):
    _, _, want = straight
    back_to(copy, 10)
    got = train(copy, display=False)
    assert same(state_of(got), state_of(want))
    assert facts(read_metrics(got.metrics)) == facts(read_metrics(want.metrics))
    assert len(jax.tree.leaves(state_of(got)["optimizer"])) > 20


def test_a_resumed_run_may_have_other_devices_and_micro_batches(straight, copy):
    _, _, want = straight
    back_to(copy, 10)
    got = train(dataclasses.replace(copy, plan="fsdp=2", accumulation=2), display=False)
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    batches = [[line.get("batch") for line in read_metrics(result.metrics)] for result in (got, want)]
    assert batches[0] == batches[1]


def test_a_damaged_checkpoint_is_passed_over(straight, copy, capsys):
    _, _, want = straight
    arrays = loop.Path(copy.output) / "checkpoints" / "step_00000020" / "arrays"
    largest = max((path for path in arrays.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    with pytest.warns(UserWarning, match="passed over"):
        got = train(copy)
    shown = capsys.readouterr().out
    assert "Step 20 is damaged" in shown
    assert "Resuming after step 10" in shown
    assert same(state_of(got), state_of(want))


def test_a_finished_run_has_nothing_to_do(straight, copy, capsys):
    before = read_metrics(straight[2].metrics)
    result = train(copy)
    assert "Nothing to do: 20 steps are made and the recipe asks for 20" in capsys.readouterr().out
    assert (result.step, result.loss, result.tokens_per_second) == (20, None, None)
    assert read_metrics(result.metrics) == before


def test_never_moves_the_old_run_aside(copy, capsys):
    output = loop.Path(copy.output)
    again = dataclasses.replace(copy, steps=3, eval=EvalConfig(every=0), seed=5)
    result = train(again, resume="never")
    assert result.step == 3
    assert [line["step"] for line in read_metrics(result.metrics)] == [1, 2, 3]
    assert load_model(output / "before-1" / "checkpoints").step == 20
    assert "is now in" in capsys.readouterr().out


def test_must_needs_a_checkpoint(tmp_path):
    with pytest.raises(ResumeError, match=r"There is no checkpoint in .*run/checkpoints to resume from"):
        train(small_recipe(tmp_path), resume="must", display=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="resume is one of auto, never, must; got 'maybe'"):
        train(small_recipe(tmp_path), resume="maybe", display=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": dataclasses.replace(MODEL, hidden_size=64, num_layers=3)},
            r"model.hidden_size is 32 in the checkpoint and 64 here\n  model.num_layers is 2 in the checkpoint and 3",
        ),
        ({"seed": 1}, r"\n  seed is 0 in the checkpoint and 1 here\nSet these as they were"),
        ({"batch_size": 8}, r"batch_size is 4 in the checkpoint and 8 here"),
        (
            {"sequence_length": 16, "model": dataclasses.replace(MODEL, max_position_embeddings=32)},
            r"\n  sequence_length is 32 in the checkpoint and 16 here\nSet",
        ),
    ],
)
def test_another_model_or_order_of_data_is_refused_by_name(changes, message, copy):
    with pytest.raises(ResumeError, match=message):
        train(dataclasses.replace(copy, **changes), display=False)
    assert load_model(copy.output).step == 20


def test_other_text_or_another_tokenizer_is_refused(copy, tmp_path):
    from twinax.train.data import train_bpe

    other = write_text(tmp_path, seed=1)
    data = dataclasses.replace(copy.data, path=str(other))
    with pytest.raises(
        ResumeError, match=r"data.path is .*\n  the text of data.path is not the same: [\d,]+ "
    ):
        train(dataclasses.replace(copy, data=data), display=False)
    train_bpe(str(other), 300, tmp_path / "bpe")
    model = dataclasses.replace(copy.model, vocab_size=400)
    changed = dataclasses.replace(copy, model=model, data=dataclasses.replace(data, tokenizer=str(tmp_path / "bpe")))
    with pytest.raises(ResumeError, match=r"model.vocab_size is 259 .*\n  data.tokenizer \(its fingerprint\) is"):
        train(changed, display=False)


def test_nan_stops_before_the_update_and_saves_nothing_after_it(straight, copy, monkeypatch):
    back_to(copy, 10)
    bad = 14  # the batch of step 15
    seen, original = [], loop.put_batch

    def poisoned(batch, step, accumulation, mesh):
        placed = original(batch, step, accumulation, mesh)
        return {**placed, "weights_BT": placed["weights_BT"] * np.nan} if step == bad else placed

    monkeypatch.setattr(loop, "put_batch", poisoned)
    hashes = {line["step"]: line.get("batch") for line in read_metrics(straight[2].metrics) if line["kind"] == "train"}
    with pytest.raises(NotFiniteError, match=r"step 15: the loss is nan .* rows 56 to 59 of the data, hash") as caught:
        train(copy, display=False, on_step=lambda metrics: seen.append(metrics["step"]))
    assert hashes[15] in str(caught.value)
    assert seen == [11, 12, 13, 14]
    assert sorted(p.name for p in (loop.Path(copy.output) / "checkpoints").iterdir()) == ["step_00000010"]
    monkeypatch.setattr(loop, "put_batch", original)
    assert same(state_of(train(copy, display=False)), state_of(straight[2]))


def test_an_absurd_learning_rate_is_stopped(tmp_path):
    recipe = small_recipe(tmp_path, optimizer=OptimizerConfig(lr=1e30), eval=EvalConfig(every=0))
    with pytest.raises(NotFiniteError, match=r"The learning rate was .*lower optimizer.lr"):
        train(recipe, display=False)


def test_a_failing_save_is_a_warning_and_a_failing_last_one_an_error(tmp_path, monkeypatch, capsys):
    recipe = small_recipe(tmp_path, checkpoint=CheckpointConfig(every=5), eval=EvalConfig(every=0))
    write, full = manifest.write, {5, 15}

    def disk(folder, step, *arguments):
        if step in full:
            raise OSError(28, "No space left on device")
        return write(folder, step, *arguments)

    monkeypatch.setattr(manifest, "write", disk)
    train(recipe)
    shown = capsys.readouterr().out
    assert shown.count("WARNING: step 5 was not saved") == shown.count("WARNING: step 15 was not saved") == 1
    assert "No space left on device" in shown
    folder = loop.Path(recipe.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000020"]
    full.add(24)
    with pytest.raises(SaveError, match=r"step 24 was not saved .*No space left on device"):
        train(dataclasses.replace(recipe, steps=24), display=False)
    assert load_model(folder).step == 20


def test_training_goes_on_from_another_model(straight, tmp_path):
    _, recipe, before = straight
    changed = dataclasses.replace(
        recipe,
        model=ModelConfig(init_from=str(before.output)),
        output=str(tmp_path / "more"),
        eval=EvalConfig(every=1, batches=2),
        optimizer=OptimizerConfig(lr=1e-12),
        steps=2,
    )
    result = train(changed, display=False)
    assert result.eval_loss == pytest.approx(before.eval_loss, rel=1e-6)
    assert load_model(result.checkpoint).config == load_model(before.checkpoint).config


def test_a_run_that_began_elsewhere_resumes_when_that_is_gone(straight, tmp_path):
    _, recipe, before = straight
    shutil.copytree(before.checkpoint, tmp_path / "begin")
    changed = dataclasses.replace(
        recipe, model=ModelConfig(init_from=str(tmp_path / "begin")), output=str(tmp_path / "more"), steps=2
    )
    train(changed, display=False)
    shutil.rmtree(tmp_path / "begin")
    assert train(dataclasses.replace(changed, steps=4), display=False).step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "fsdp=3"}, r"rows of 4 cannot be cut over data x fsdp x expert.* = 3.*nearest plan .* is one device"),
        ({"plan": "tensor=4"}, r"kv_heads of 2 cannot be cut over tensor = 4.*nearest plan that works is"),
        ({"plan": "expert=2"}, r"expert=2 needs a mixture of experts"),
        ({"plan": "fsdp=16", "batch_size": 16}, r"takes 16 devices and there are 8"),
        ({"model": dataclasses.replace(MODEL, vocab_size=100)}, r"the tokenizer does not fit the model"),
        ({"model": ModelConfig(init_from="nowhere")}, r"nowhere does not exist"),
        ({"data": DataConfig()}, r"data.path is not set"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(small_recipe(tmp_path, **changes), display=False)
    assert not (tmp_path / "run").exists()


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(DataError):
        train(small_recipe(tmp_path), display=False)


def test_an_output_without_permission_says_so(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(SaveError, match=r"checkpoints cannot be kept in .*run/checkpoints"):
        train(small_recipe(tmp_path), display=False)
