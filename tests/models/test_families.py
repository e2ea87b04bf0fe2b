"""Every family against the logits that transformers gave for a small random model of it (`tests/golden`)."""

import json
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.helpers import assert_same_bits
from tests.thorough import thorough
from twinax.checkpoints.convert import convert
from twinax.checkpoints.load import LoadedModel, load_model
from twinax.checkpoints.safetensors import SafetensorsFolder
from twinax.layers.contexts import PackedContext
from twinax.models import families
from twinax.models.decoder import functional

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "families"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npz"))
QUICK = ("gpt2", "phi3", "qwen3_moe")


def logits_of(model: LoadedModel, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32 of independent rows; those of padding are zero."""
    decoder = functional(model.config, dtype=jnp.float32)
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = (place < lengths[:, None]).astype(np.int32)

    @jax.jit
    def forward(params, tokens, context):
        return decoder.unembed(params, decoder.hidden(params, tokens, context)[0])

    with jax.default_matmul_precision("highest"):
        logits = forward(model.params, jnp.asarray(tokens), PackedContext(jnp.asarray(segments), jnp.asarray(place)))
    return np.asarray(logits) * segments[:, :, None]


def test_every_family_has_golden_files():
    found = {json.loads((GOLDEN / case / "config.json").read_text())["model_type"] for case in CASES}
    assert found == set(families.names())


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case):
    golden = np.load(GOLDEN / case / "logits.npz")
    model = load_model(GOLDEN / case, dtype="float32")
    logits = logits_of(model, golden["tokens"], golden["lengths"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", thorough(CASES, quick=[n for n, case in enumerate(CASES) if case in QUICK]))
def test_a_checkpoint_and_back_gives_the_same_bytes(case, tmp_path):
    convert(GOLDEN / case, tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "back", max_shard_bytes=30_000)
    convert(tmp_path / "back", tmp_path / "again")
    with SafetensorsFolder(GOLDEN / case) as before, SafetensorsFolder(tmp_path / "back") as after:
        config = load_model(GOLDEN / case).config
        computed = families.load(config.family).ignorable_tensors(config)
        kept = {name for name in before.specs() if not any(fnmatch(name, pattern) for pattern in computed)}
        assert kept == set(after.specs())
        for name in kept:
            assert_same_bits(before.read(name), after.read(name))
    first, back, again = (load_model(path) for path in (GOLDEN / case, tmp_path / "back", tmp_path / "again"))
    assert first.config == back.config == again.config
    for name, array in first.params.items():
        assert_same_bits(np.asarray(array), np.asarray(again.params[name]))
