"""Llamas of transformers give their logits here, and ours give theirs there."""

import importlib.util
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.helpers import assert_same_bits
from twinax.checkpoints.convert import convert
from twinax.checkpoints.load import LoadedModel, load_model
from twinax.checkpoints.safetensors import SafetensorsFolder
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.contexts import PackedContext
from twinax.models.decoder import functional

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("llama_*.npz"))


def logits_of(model: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32 of independent rows."""
    decoder = functional(model.config, dtype=jnp.float32)
    ids = jnp.asarray(tokens)
    context = PackedContext(jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    with jax.default_matmul_precision("highest"):
        hidden, *_ = decoder.hidden(model.params, ids, context)
        return np.asarray(decoder.unembed(model.params, hidden))


def test_there_are_golden_files():
    assert len(CASES) == 4


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    model = load_model(GOLDEN / case, dtype="float32")
    assert model.kind == "hugging_face"
    assert model.generation["eos_token_id"] == 2
    np.testing.assert_allclose(logits_of(model, golden["tokens"]), golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_golden_logits_through_a_checkpoint_and_back(case, tmp_path):
    golden = np.load(GOLDEN / f"{case}.npz")
    convert(GOLDEN / case, tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "back", max_shard_bytes=30_000)
    with SafetensorsFolder(GOLDEN / case) as before, SafetensorsFolder(tmp_path / "back") as after:
        assert set(before.specs()) == set(after.specs())
        for name in before.specs():
            assert_same_bits(before.read(name), after.read(name))
    for folder in ("step", "back"):
        model = load_model(tmp_path / folder, dtype="float32")
        np.testing.assert_allclose(logits_of(model, golden["tokens"]), golden["logits"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def maker(transformers):
    """The script that made the golden files."""
    spec = importlib.util.spec_from_file_location("make_llama", GOLDEN / "make_llama.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["make_llama"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_live_both_ways(case, tmp_path, maker, transformers):
    dtype, changes = maker.CASES[case]
    theirs = maker.random_llama(100, dtype, vocab_size=300, **changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")  # sharded
    Tokenizer.bytes().save(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, 300, (3, 60), dtype=np.int32)
    expected = maker.logits_of(theirs, tokens)

    ours = load_model(tmp_path / "theirs", dtype="float32")
    np.testing.assert_allclose(logits_of(ours, tokens), expected, rtol=0, atol=1e-4)

    convert(tmp_path / "theirs", tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "exported", max_shard_bytes=50_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=dtype)
    assert again.config.eos_token_id == theirs.config.eos_token_id
    for name, parameter in theirs.to(dtype).state_dict().items():
        assert again.state_dict()[name].equal(parameter), name
    np.testing.assert_array_equal(maker.logits_of(again, tokens), expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer("Grüße").input_ids == list("Grüße".encode())
    assert tokenizer.eos_token_id == Tokenizer.bytes().eos_id


def test_golden_folders_are_what_the_script_makes(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "HERE", tmp_path)
    maker.main()
    for case in CASES:
        with SafetensorsFolder(GOLDEN / case) as kept, SafetensorsFolder(tmp_path / case) as made:
            for name in kept.specs():
                assert_same_bits(kept.read(name), made.read(name))
        np.testing.assert_allclose(
            np.load(GOLDEN / f"{case}.npz")["logits"], np.load(tmp_path / f"{case}.npz")["logits"], rtol=0, atol=1e-5
        )
        shutil.rmtree(tmp_path / case)
