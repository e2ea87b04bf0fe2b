"""What tests of the engine over several kinds of models share."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.quick import full_compile
from twinax.checkpoints.load import LoadedModel
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.contexts import PackedContext
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, init_params
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import SamplingParams
from twinax.serving.scheduler import Scheduler

TOKENIZER = Tokenizer.bytes()


def loaded(config: DecoderConfig) -> LoadedModel:
    return LoadedModel(config, init_params(config, 0), TOKENIZER, "llama", {}, pathlib.Path("here"), "step")


def engine_of(config: DecoderConfig, bits: bool = True, **limits) -> Engine:
    """A warm engine, compiled as for a user if its `bits` are asked for."""
    limits = {"max_running": 6, "page_size": 16, "chunk_tokens": 64, "max_waiting": 9, "compile_cache": "", **limits}
    model = loaded(config)  # whose random numbers take longer to compile than a step, and need not be a user's
    with full_compile() if bits else contextlib.nullcontext():
        engine = Engine(model, EngineConfig(**limits))
        engine.warmup()
    return engine


def twin(engine: Engine, **limits) -> Engine:
    """Another engine that runs the programs of a warm one, so that nothing compiles.

    `limits`: changes of its scheduler's config, none of them larger, as the programs' shapes are those of the first.
    """
    other = Engine(engine.loaded, engine.config)
    other.scheduler = Scheduler(dataclasses.replace(engine.scheduler.config, **limits))
    mine, theirs = other.runner, engine.runner
    mine._programs = theirs._programs
    # With whatever the first one left in them: the programs consume their own.
    mine._cache, mine._state = jax.tree.map(jnp.copy, (theirs._cache, theirs._state))
    other._compiles.reset()
    return other


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(1, 90, count)]


def greedy(**more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, "logprobs": 2, **more})


def logprobs_of(done) -> list[float]:
    """Of the prompt, if they were asked for, and of what was generated."""
    return [own.logprob for own in [*(done.prompt_logprobs or [None])[1:], *done.logprobs]]


def check_against_training(config: DecoderConfig, engine: Engine) -> None:
    """Tokens and log-probabilities of the engine are those of the forward pass that trains."""
    off, likeliest = against_forward(config, engine, PackedContext)
    np.testing.assert_allclose(off, 0, rtol=0, atol=2e-5)
    assert likeliest


def against_forward(
    config: DecoderConfig, engine: Engine, context: Callable[..., PackedContext]
) -> tuple[np.ndarray, bool]:
    """How far the engine's log-probabilities are from those of the model's forward pass in a context, and whether each
    token is the likeliest there."""
    model, params = functional(config), engine.loaded.params

    @jax.jit
    def forward(tokens, context):
        return jax.nn.log_softmax(model.unembed(params, model.hidden(params, tokens, context)[0]))

    off, likeliest = [], True
    for done in engine.generate(prompts(5), greedy(prompt_logprobs=0)):
        ids = done.prompt_ids + done.token_ids
        tokens, place = np.zeros((1, 128), np.int32), np.arange(128, dtype=np.int32)[None]
        tokens[0, : len(ids)] = ids
        logprobs_TV = np.asarray(forward(tokens, context((place < len(ids)).astype(np.int32), place)))[0]
        off.append(np.abs(np.asarray(logprobs_of(done)) - logprobs_TV[np.arange(len(ids) - 1), ids[1:]]))
        likeliest &= done.token_ids == np.argmax(logprobs_TV[len(done.prompt_ids) - 1 : len(ids) - 1], -1).tolist()
    return np.concatenate(off), likeliest
