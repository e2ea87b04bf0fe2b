"""Products with the weights first: the same values, and rows that round alike in all steps of an engine."""

import jax
import numpy as np
import pytest

from tests.serving.engines import engine_of, greedy, logprobs_of, prompts
from tests.serving.test_engine_prefixes import CONFIG
from twinax.layers.linear import FEWEST_OUTPUTS, LONGEST_SUM, product, weights_first
from twinax.serving import rounding
from twinax.serving.step_sizes import ROUND, step_sizes


@pytest.mark.parametrize("shape", [(30,), (9, 30), (2, 5, 30), (9, LONGEST_SUM + 1), (2, 9, LONGEST_SUM + 1)])
@pytest.mark.parametrize("outputs", [17, FEWEST_OUTPUTS])
def test_the_product_is_the_same(shape, outputs):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(shape, np.float32), rng.standard_normal((outputs, shape[-1]), np.float32)
    with weights_first():
        found = product(x, weight)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x.astype(float) @ weight.T.astype(float), rtol=1e-5, atol=1e-4)


def test_few_rows_of_long_sums_round_as_more_do():
    """XLA:CPU cuts sums of over 2,048 terms when there are fewer than 16 rows."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((16, 4864), np.float32), rng.standard_normal((128, 4864), np.float32)
    with weights_first():
        all_rows, few = (np.asarray(jax.jit(product)(x[:count], weight)) for count in (16, 8))
    np.testing.assert_array_equal(few, all_rows[:8])


@pytest.mark.parametrize("slots", [1, 2, 8, 24, 32, 57, 100, 256])
@pytest.mark.parametrize("chunk_tokens", [2, 64, 100, 256, 1000])
def test_sizes_of_steps_keep_off_what_rounds_in_another_way(slots, chunk_tokens):
    sizes = step_sizes(slots, chunk_tokens)
    assert max(rows for rows, _ in sizes) >= slots and max(chunk for _, chunk in sizes) >= chunk_tokens
    assert all(chunk % ROUND == 0 and (slots == 1 or rows % ROUND in (8, 16)) for rows, chunk in sizes)
    assert sizes == sorted(sizes, key=sum), "the cheapest first"


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")
def test_a_machine_that_rounds_unlike_gets_the_plain_product(monkeypatch):
    """What is tried is what decides; and the other way has its invariants, too."""
    counts = {rows + chunk for rows, chunk in step_sizes(6, 64)}
    engine = engine_of(CONFIG)
    assert engine.runner._made.weights_first == rounding.rounds_alike(counts, rounding.products_of(CONFIG))
    monkeypatch.setattr(rounding, "rounds_alike", lambda *_: False)
    plain = engine_of(CONFIG)
    assert not plain.runner._made.weights_first
    one, other = (some.generate(prompts(6), greedy()) for some in (engine, plain))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.token_ids == theirs.token_ids
        np.testing.assert_allclose(logprobs_of(mine), logprobs_of(theirs), rtol=2e-5, atol=2e-5)
    alone = [plain.generate([prompt], greedy())[0] for prompt in prompts(6)]
    assert [logprobs_of(done) for done in alone] == [logprobs_of(done) for done in other]
