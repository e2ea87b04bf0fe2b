"""The engine in bfloat16 on a CPU: the numbers of the model that trains, alone or in company, in half of the memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import full_compile
from tests.serving.engines import engine_of, greedy, logprobs_of, prompts, twin
from tests.serving.test_engine import CONFIG as MODEL
from twinax.layers.contexts import PackedContext
from twinax.models.decoder import functional
from twinax.serving.batch import Bucket
from twinax.serving.engine import Engine
from twinax.serving.request import SamplingParams

# Of three layers, so that no other array has the pool's shape.
CONFIG = dataclasses.replace(MODEL, num_layers=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(CONFIG, dtype="bfloat16")


def test_log_probabilities_are_the_training_forward_s_as_far_as_bfloat16_goes(engine):
    """The same weights in float32 and in bfloat16: the engine is as near to the first as training in the second is."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), engine.loaded.params)

    def forward(dtype, tokens, context):
        model = functional(CONFIG, dtype=dtype)
        return jax.nn.log_softmax(model.unembed(rounded, model.hidden(rounded, tokens, context)[0]).astype(jnp.float32))

    forward = jax.jit(forward, static_argnums=0)
    errors: dict[str, list[float]] = {"engine": [], "training": []}
    for done in engine.generate(prompts(5), greedy(prompt_logprobs=0)):
        ids = done.prompt_ids + done.token_ids
        tokens, place = np.zeros((1, 128), np.int32), np.arange(128, dtype=np.int32)[None]
        tokens[0, : len(ids)] = ids
        context = PackedContext((place < len(ids)).astype(np.int32), place)
        exact, training = (
            np.asarray(forward(jnp.dtype(dtype), tokens, context))[0][np.arange(len(ids) - 1), ids[1:]]
            for dtype in (jnp.float32, jnp.bfloat16)
        )
        errors["engine"] += (np.asarray(logprobs_of(done)) - exact).tolist()
        errors["training"] += (training - exact).tolist()
    mine, theirs = (np.sqrt(np.mean(np.square(errors[side]))) for side in ("engine", "training"))
    assert 1e-4 < mine < 1.2 * theirs, (mine, theirs)


def test_tokens_and_log_probabilities_are_the_same_alone_and_among_neighbours(engine):
    """Alone, with others, and where so few pages are left that requests push each other out."""
    asked, params = prompts(6), greedy(prompt_logprobs=0, max_tokens=30)
    together = engine.generate(asked, params)
    small = twin(engine, max_running=4, num_pages=9)
    for others in ([engine.generate([one], params)[0] for one in asked], small.generate(asked, params)):
        assert [one.token_ids for one in others] == [one.token_ids for one in together]
        assert [logprobs_of(one) for one in others] == [logprobs_of(one) for one in together]
    assert small.stats().preemptions


def test_pages_are_copied_for_choices_of_one_prompt(engine):
    prompt = prompts(1)[0] * 2
    params = [SamplingParams(temperature=1.0, seed=n, max_tokens=8, ignore_eos=True) for n in range(3)]
    together = engine.generate([prompt] * 3, params)
    assert [one.token_ids for one in together] == [engine.generate([prompt], [own])[0].token_ids for own in params]
    assert len({tuple(one.token_ids) for one in together}) == 3


def test_no_step_makes_the_pool_float32(engine):
    """What XLA:CPU does where it is told to write bfloat16 into a pool, at a hundred times the cost of a step."""
    programs = engine.runner._made
    pool = programs.like.cache.pages.k_LPKDS
    assert pool.dtype.itemsize == 2
    with full_compile():
        texts = [
            programs.lower("blocks", (bucket, programs.kinds_of(programs.calls_of(bucket)[0]))).compile().as_text()
            for bucket in (Bucket(8, 0), Bucket(8, 64))
        ]
    shape = ",".join(map(str, pool.shape))
    for text in texts:
        assert f"u16[{shape}]" in text
        assert not re.search(rf"(bf16|f32)\[{shape}\]", text)
