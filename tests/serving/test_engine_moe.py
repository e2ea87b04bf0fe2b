"""The engine with a mixture of experts: the trainer's numbers, and the same bits in any company."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.checkpoints.load import LoadedModel
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.contexts import PackedContext
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, init_params, weight_dtype
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import SamplingParams

TOKENIZER = Tokenizer.bytes()
SOFTMAX = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=64,
    intermediate_size=1,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_embeddings=True,
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_size=48),
)
SIGMOID = dataclasses.replace(
    SOFTMAX, moe=MoEConfig(num_experts=8, experts_per_token=3, expert_size=40, shared_experts=1, router="sigmoid")
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(SOFTMAX, id="softmax"), pytest.param(SIGMOID, id="sigmoid", marks=pytest.mark.slow)],
)
def served(request):
    """(config, parameters, engine)."""
    config, rng = request.param, np.random.default_rng(0)
    params = init_params(config, 0)
    for name in params:
        if name.endswith("router.bias"):
            params[name] = jnp.asarray(0.2 * rng.standard_normal(params[name].shape), jnp.float32)
    loaded = LoadedModel(config, params, TOKENIZER, "llama", {}, pathlib.Path("here"), "step")
    engine = Engine(loaded, EngineConfig(max_running=6, page_size=16, chunk_tokens=64, compile_cache="", max_waiting=9))
    engine.warmup()
    return config, params, engine


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(1, 90, count)]


def greedy(**more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=1, **more)


def test_tokens_and_logprobs_are_those_of_the_training_forward(served):
    config, params, engine = served
    model = functional(config)

    @jax.jit
    def forward(tokens, context):
        return jax.nn.log_softmax(model.unembed(params, model.hidden(params, tokens, context)[0]))

    for done in engine.generate(prompts(5), greedy()):
        ids = done.prompt_ids + done.token_ids
        tokens, place = np.zeros((1, 128), np.int32), np.arange(128, dtype=np.int32)[None]
        tokens[0, : len(ids)] = ids
        logprobs_TV = np.asarray(forward(tokens, PackedContext((place < len(ids)).astype(np.int32), place)))[0]
        assert done.token_ids == np.argmax(logprobs_TV[len(done.prompt_ids) - 1 : len(ids) - 1], -1).tolist()
        assert done.logprobs is not None and done.prompt_logprobs is not None
        for position, own in enumerate([*done.prompt_logprobs[1:], *done.logprobs]):
            assert own is not None
            assert own.logprob == pytest.approx(logprobs_TV[position, ids[position + 1]], abs=1e-4)


def test_a_request_gives_the_same_alone_and_among_neighbours(served):
    """(That the layer gives the same bits is a test of the layer: `test_a_served_token_has_the_same_bits`.)"""
    _, _, engine = served
    asked = prompts(6)
    for prompt, among in zip(asked, engine.generate(asked, greedy()), strict=True):
        (alone,) = engine.generate([prompt], greedy())
        assert alone.token_ids == among.token_ids
        assert [own.logprob for own in alone.prompt_logprobs[1:]] == [own.logprob for own in among.prompt_logprobs[1:]]
        got = [own.logprob for own in alone.logprobs]
        assert got == pytest.approx([own.logprob for own in among.logprobs], rel=1e-6)


def test_a_router_is_served_in_float32_whatever_the_model_computes_in():
    names = [name for name in init_params(SIGMOID, 0) if weight_dtype(name, jnp.bfloat16) == jnp.float32]
    assert names == ["blocks.moe.router.bias", "blocks.moe.router.weight"]
    assert weight_dtype("moe.router.weight", jnp.bfloat16) == jnp.float32
    assert weight_dtype("moe.gate.weight", jnp.bfloat16) == jnp.bfloat16
