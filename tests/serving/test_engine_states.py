"""The engine with mixers that keep a state: the trainer's numbers, and the same in any company, chunks and slots."""

import jax.numpy as jnp
import pytest

from tests.serving.engines import (
    TOKENIZER,
    check_against_training,
    engine_of,
    greedy,
    loaded,
    logprobs_of,
    prompts,
    twin,
)
from twinax.layers.mixer_config import LightningConfig, Mamba2Config
from twinax.models.cache import init_cache, page_bytes
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import init_params, weight_dtype
from twinax.serving.engine import Engine, EngineConfig
from twinax.sharding.plan import PlanError

COMMON = {"vocab_size": TOKENIZER.vocab_size + 1, "hidden_size": 32, "max_position_embeddings": 128}
MAMBA = DecoderConfig(
    **COMMON,
    intermediate_size=0,
    num_layers=2,
    num_heads=0,
    num_kv_heads=0,
    head_dim=0,
    mamba2=Mamba2Config(num_heads=4, head_dim=8, state_size=8, groups=2),
    pattern=(LayerKind(rope=None, mixer="mamba2", feed_forward=None),),
)
# Three mixers of which each has layers of its own, in the cache too.
HYBRID = DecoderConfig(
    **COMMON,
    intermediate_size=64,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mamba2=Mamba2Config(num_heads=4, head_dim=8, state_size=8),
    lightning=LightningConfig(num_heads=2, head_dim=16),
    norm_placement="residual",
    pattern=(
        LayerKind(rope=None, mixer="lightning_attention", mixer_scales=(2.0, 0.5)),
        LayerKind(rope=None, mixer="mamba2", feed_forward=None),
        LayerKind(window=20),
        LayerKind(rope=None, mixer="lightning_attention", feed_forward_scales=(1.5, 1.0)),
    ),
)


@pytest.fixture(scope="module")
def served():
    return HYBRID, engine_of(HYBRID)


def test_tokens_and_logprobs_are_those_of_the_training_forward(served):
    check_against_training(*served)


def test_a_request_gives_the_same_bits_alone_among_neighbours_and_in_other_slots(served):
    _, engine = served
    asked = prompts(9)  # more than there are slots, so these are used again
    among = engine.generate(asked, greedy(prompt_logprobs=0))
    backwards = engine.generate(asked[::-1], greedy(prompt_logprobs=0))[::-1]
    for prompt, one, other in zip(asked, among, backwards, strict=True):
        (alone,) = engine.generate([prompt], greedy(prompt_logprobs=0))
        assert alone.token_ids == one.token_ids == other.token_ids
        assert logprobs_of(alone) == logprobs_of(one) == logprobs_of(other)


@pytest.mark.slow
def test_chunks_and_preemption_change_no_bit(served):
    _, roomy = served
    asked = prompts(6)
    want = roomy.generate(asked, greedy(max_tokens=30))
    small, crowded = twin(roomy, chunk_tokens=7), twin(roomy, max_running=4, num_pages=12)
    assert [logprobs_of(one) for one in small.generate(asked, greedy(max_tokens=30))] == list(map(logprobs_of, want))
    found = crowded.generate(asked, greedy(max_tokens=30))
    assert crowded.stats().preemptions > 0
    assert [one.token_ids for one in found] == [one.token_ids for one in want]
    assert [logprobs_of(one) for one in found] == list(map(logprobs_of, want))


def test_what_is_kept_of_a_request():
    cache = init_cache(HYBRID, num_pages=3, page_size=16, slots=5, dtype=jnp.dtype(jnp.bfloat16))
    assert {name: (state.shape, state.dtype) for name, state in cache.states.items()} == {
        "lightning_attention.state": ((2, 5, 2, 16, 16), jnp.float32),
        "mamba2.inputs": ((1, 5, 3, 48), jnp.float32),
        "mamba2.state": ((1, 5, 4, 8, 8), jnp.float32),
    }
    assert page_bytes(MAMBA, 16, jnp.dtype(jnp.float32)) == 0
    names = [name for name in init_params(MAMBA, 0) if weight_dtype(name, jnp.bfloat16) == jnp.float32]
    assert [name.rpartition(".")[2] for name in sorted(names)] == ["A_log", "D", "dt_bias"]


@pytest.mark.parametrize("config", [MAMBA, HYBRID], ids=["mamba2", "hybrid"])
def test_a_mesh_is_refused(config):
    with pytest.raises(PlanError, match="served by one device"):
        Engine(loaded(config), EngineConfig(plan="tensor=2", compile_cache=""))
