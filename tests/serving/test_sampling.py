"""Sampling against numpy: filters by sorting, penalties by counting, frequencies by statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.serving import request, sampling
from twinax.serving.sampling import SamplingRows, SlotState, top_logprobs

V = 50
DEFAULTS = {
    "slot": 0, "flags": 0, "position": 0, "seed_high": 0, "seed_low": 0, "top_k": 0,
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0,
}  # fmt: skip


def rows(*settings: dict) -> SamplingRows:
    columns = {}
    for name, default in DEFAULTS.items():
        dtype = np.int32 if isinstance(default, int) else np.float32
        columns[name] = jnp.asarray(np.array([one.get(name, default) for one in settings], dtype))
    return SamplingRows(**columns)


def sample(logits, settings, state, allowed=None) -> jax.Array:
    nothing = np.zeros((len(logits), sampling.mask_words(logits.shape[1])), np.int32)
    return _sample(logits, settings, state, jnp.asarray(nothing if allowed is None else allowed))


_sample = jax.jit(sampling.sample)


def kept_by_sorting(logits, top_k, top_p, min_p):
    """The set that top-k, then top-p, then min-p keep, by the definition: walk down the sorted tokens."""
    order = np.argsort(-logits, kind="stable")
    kept = list(order[: top_k or len(order)])
    p = np.exp(logits[kept].astype(np.float64) - logits.max())
    if top_p < 1:
        before = np.concatenate([[0], np.cumsum(p / p.sum())[:-1]])
        kept = [token for token, mass in zip(kept, before, strict=True) if mass < top_p] or kept[:1]
    return {int(t) for t in kept if np.exp(np.float64(logits[t]) - np.float64(logits.max())) >= min_p}


def test_there_is_room_for_all_that_a_request_may_ask():
    assert (sampling.MAX_TOP, sampling.MAX_BIAS) == (request.MAX_LOGPROBS, request.MAX_BIAS)


def test_ordered_bits_order_as_floats_do():
    x = np.array([-np.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, np.inf], np.float32)
    bits = np.asarray(sampling.ordered_bits(jnp.asarray(x)))
    assert (np.diff(bits.astype(np.int64)) > 0).all()


def test_greedy_takes_the_likeliest_and_a_tiny_temperature_too():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, V)), jnp.float32)
    settings = [{"temperature": t, "seed_low": 7} for t in (0.0, 1e-38, 1e-6, 1e-3)]
    tokens = sample(logits, rows(*settings), SlotState.empty(4, V))
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(0)
    one = rng.standard_normal(8).astype(np.float32) * 1.5
    count = 4000
    settings = rows(*[{"seed_low": 3, "position": i, "temperature": 0.7, "top_k": 6} for i in range(count)])
    logits = jnp.broadcast_to(jnp.asarray(one), (count, 8))
    tokens = np.asarray(sample(logits, settings, SlotState.empty(1, 8)))
    p = np.exp(one / 0.7)
    p[np.argsort(one)[:2]] = 0
    p /= p.sum()
    seen = np.bincount(tokens, minlength=8)
    assert (seen[p == 0] == 0).all()
    live = p > 0
    chi_squared = ((seen[live] - count * p[live]) ** 2 / (count * p[live])).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001; the seed is fixed


FILTERS = {
    "none": {},
    "top_k": {"top_k": 20},
    "top_k_of_many": {"top_k": 150},
    "top_p": {"top_p": 0.8},
    "top_p_small": {"top_p": 0.05},  # most draws are left out
    "min_p": {"min_p": 0.2},
    "all": {"top_k": 40, "top_p": 0.7, "min_p": 0.1},
    "all_of_many": {"top_k": 200, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_what_the_filters_leave(name):
    """Of a vocabulary of several groups, the last one not full: the sorted definition's set and its frequencies."""
    size, count, filters = 300, 4000, FILTERS[name]
    one = np.random.default_rng(7).standard_normal(size).astype(np.float32)
    settings = rows(*[{"seed_low": 11, "position": i, "temperature": 0.8, **filters} for i in range(count)])
    tokens = np.asarray(sample(jnp.broadcast_to(jnp.asarray(one), (count, size)), settings, SlotState.empty(1, size)))
    scaled = (one - one.max()) / np.float32(0.8)
    kept = sorted(kept_by_sorting(scaled, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0)))
    assert set(tokens.tolist()) <= set(kept)
    p = np.exp(scaled[kept].astype(np.float64))
    expected = count * p / p.sum()
    seen = np.bincount(tokens, minlength=size)[kept]
    rare = expected < 5
    seen, expected = (np.append(x[~rare], x[rare].sum()) if rare.any() else x for x in (seen, expected))
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # The 0.999 quantile, by Wilson and Hilferty's approximation; the seed is fixed.
    assert chi_squared < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("seed", range(9))
def test_a_drawn_token_is_one_that_sorting_keeps(seed):
    rng = np.random.default_rng(seed)
    size = (100, 128, 700)[seed % 3]
    logits = (rng.standard_normal((16, size)) * rng.choice([0.1, 1, 5])).astype(np.float32)
    filters = [
        {
            "top_k": int(rng.choice([0, 1, 5, 64, 65, size, 5000])),
            "top_p": float(np.float32(rng.choice([1.0, 0.9, 0.3, 1e-6, 0.0]))),
            "min_p": float(np.float32(rng.choice([0.0, 0.1, 1.0]))),
            "seed_low": int(rng.integers(1000)),
        }
        for _ in logits
    ]
    state = SlotState.empty(16, size)
    tokens = np.asarray(sample(jnp.asarray(logits), rows(*filters), state))
    for row, one in enumerate(filters):
        scaled = logits[row] - logits[row].max()
        assert int(tokens[row]) in kept_by_sorting(scaled, min(one["top_k"], size), one["top_p"], one["min_p"])
    # Nor does it matter who is drawn beside it, or how many.
    for some in (slice(3, 4), slice(8, 16)):
        fewer = sample(jnp.asarray(logits[some]), rows(*filters[some]), state)
        np.testing.assert_array_equal(fewer, tokens[some])


@pytest.mark.parametrize("size", [5, 128, 130, 9000])
def test_likeliest_and_top_tokens_are_those_of_a_sort_ties_and_all(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(-40, 40, (5, size)).astype(np.float32)
    logits[1] = -np.inf
    logits[2] = 3.0
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), np.argmax(logits, -1))
    count = min(20, size)
    top, ids = sampling.top_tokens(jnp.asarray(logits), count)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, np.take_along_axis(logits, order, -1))


def packed(allowed_RV: np.ndarray) -> np.ndarray:
    """Bits of bools, as numpy packs them."""
    rows, size = allowed_RV.shape
    whole = np.zeros((rows, 32 * sampling.mask_words(size)), bool)
    whole[:, :size] = allowed_RV
    return np.packbits(whole, axis=-1, bitorder="little").view("<i4")


def test_a_grammar_leaves_what_its_bits_say_in_its_row_alone():
    rng = np.random.default_rng(3)
    raw = rng.standard_normal((6, V)).astype(np.float32)
    allowed = rng.random((6, V)) < 0.2
    allowed[:, 31] = True  # the sign of a word
    state = SlotState.empty(6, V)
    state = dataclasses.replace(state, bias_SV=jnp.where(jnp.asarray(allowed), 0.0, 100.0))
    flags = sampling.GRAMMAR | sampling.BIAS  # a bias brings nothing back
    greedy = {"temperature": 0.0, "flags": flags}
    drawn = [{"seed_low": n, "slot": n, "flags": flags, "top_k": 30 * (n % 2), "top_p": 0.9} for n in range(1, 5)]
    others = {"temperature": 0.0, "slot": 5}
    tokens = np.asarray(sample(jnp.asarray(raw), rows(greedy, *drawn, others), state, packed(allowed)))
    assert tokens[0] == np.argmax(np.where(allowed[0], raw[0], -np.inf))
    assert allowed[np.arange(5), tokens[:5]].all()
    assert tokens[5] == np.argmax(raw[5])
    for only in (0, 31, 32, V - 1):
        one = np.arange(V)[None] == only
        assert sample(jnp.asarray(raw[:1]), rows(greedy), state, packed(one)).tolist() == [only]


@pytest.mark.usefixtures("full_compile")
def test_a_row_does_not_feel_its_neighbours():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((3, V)), jnp.float32)
    plain = [{"seed_low": 5, "position": 9}, {"temperature": 0.0, "slot": 1}, {"seed_low": 6, "slot": 2}]
    state = SlotState.empty(3, V)
    state = dataclasses.replace(state, counts_SV=state.counts_SV.at[2].set(3))
    flags = sampling.PENALTIES | sampling.BIAS | sampling.GRAMMAR
    loud = dict(plain[2], flags=flags, top_k=3, top_p=0.5, frequency=1.0, repetition=2.0)
    alone = sample(logits, rows(*plain), state)
    beside = sample(logits, rows(*plain[:2], loud), state)
    np.testing.assert_array_equal(alone[:2], beside[:2])


def test_penalties_bias_and_held_back_stops_are_openais_formulas():
    rng = np.random.default_rng(2)
    raw = rng.standard_normal((1, V)).astype(np.float32)
    state = SlotState.empty(1, V)
    seen, counts = np.zeros((1, V), bool), np.zeros((1, V), np.int32)
    seen[0, [3, 4, 5]], counts[0, [5, 6, 7]] = True, [1, 2, 4]
    ids = np.full(sampling.MAX_BIAS, V, np.int32)
    values = np.zeros(sampling.MAX_BIAS, np.float32)
    ids[:2], values[:2] = [8, 9], [4.0, -100.0]
    stops = np.full(sampling.MAX_STOPS, V, np.int32)
    stops[0] = int(np.argmax(raw))
    state = sampling.setup_slot(state, jnp.int32(0), *map(jnp.asarray, (ids, values, stops, seen[0])))
    state = dataclasses.replace(state, counts_SV=jnp.asarray(counts))
    expected = raw[0].copy()
    met = seen[0] | (counts[0] > 0)
    expected[met] = np.where(expected[met] > 0, expected[met] / 1.5, expected[met] * 1.5)
    expected -= 0.25 * counts[0] + 0.5 * (counts[0] > 0)
    expected[8] += 4
    expected[9] -= 100
    expected[stops[0]] = -np.inf
    settings = {"temperature": 0.0, "repetition": 1.5, "frequency": 0.25, "presence": 0.5}
    settings["flags"] = sampling.PENALTIES | sampling.BIAS | sampling.HOLD_STOPS
    token = sample(jnp.asarray(raw), rows(settings), state)
    assert int(token[0]) == int(np.argmax(expected))
    # The order of all others too: ban the winner and look again.
    for _ in range(6):
        expected[int(token[0])] = -np.inf
        raw[0, int(token[0])] = -1e30
        token = sample(jnp.asarray(raw), rows(settings), state)
        assert int(token[0]) == int(np.argmax(expected))


EXTREMES = {
    "temperature": (0.0, 1e-45, 1e-38, 1.6, 3e38),
    "repetition": (1e-45, 1e-38, 1.0, 100.0),
    "top_p": (1e-45, 0.5, 1.0),
    "min_p": (0.0, 1e-45, 0.4, 1.0),
    "top_k": (0, 1, sampling.FEW, sampling.FEW + 1),
    "flags": (0, sampling.PENALTIES, sampling.PENALTIES | sampling.HOLD_STOPS),
}


@pytest.mark.parametrize("scale", [1e-38, 1.0, 3e38])
def test_whatever_a_request_asks_a_token_is_drawn_from_those_that_are_left(scale):
    """A penalty of 1e-63, which float32 rounds to 0, once made an infinite logit, and the draw never ended."""
    rng, vocab_size, count = np.random.default_rng(3), 2 * sampling.GROUP + 10, 400
    logits = (rng.uniform(-1, 1, (count, vocab_size)) * scale).astype(np.float32)
    logits[:, 5] = logits.max(1)  # a tie
    settings = [{name: rng.choice(values).item() for name, values in EXTREMES.items()} for _ in range(count)]
    settings = [one | {"slot": n, "seed_low": n, "presence": 2.0, "frequency": -2.0} for n, one in enumerate(settings)]
    held = rng.integers(0, vocab_size, (count, sampling.MAX_STOPS))
    state = dataclasses.replace(
        SlotState.empty(count, vocab_size),
        seen_SV=jnp.asarray(rng.random((count, vocab_size)) < rng.choice([0, 0.5, 1], (count, 1))),
        counts_SV=jnp.asarray(rng.integers(0, 3, (count, vocab_size)), jnp.int32),
        stops_SN=jnp.asarray(held, jnp.int32),
    )
    tokens = np.asarray(sample(jnp.asarray(logits), rows(*settings), state))
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    for token, one, stops in zip(tokens, settings, held, strict=True):
        assert not (one["flags"] & sampling.HOLD_STOPS and token in stops), (token, one)


def test_where_no_token_is_left_the_draw_still_ends():
    state = dataclasses.replace(SlotState.empty(2, V), stops_SN=jnp.arange(2 * sampling.MAX_STOPS).reshape(2, -1) % V)
    settings = [{"flags": sampling.HOLD_STOPS, "min_p": 0.5, "slot": n, "temperature": float(n)} for n in range(2)]
    tokens = np.asarray(sample(jnp.zeros((2, V)), rows(*settings), state))
    assert ((tokens >= 0) & (tokens < V)).all()


def test_fed_tokens_are_counted_for_those_who_pay_for_them():
    state = SlotState.empty(2, V)
    settings = rows({"slot": 0, "flags": sampling.PENALTIES}, {"slot": 1})
    token = jnp.asarray([3, 4, 4, 9], jnp.int32)
    slot = jnp.asarray([0, 0, 0, 2], jnp.int32)  # 2: padding
    generated = jnp.asarray([False, True, True, True])
    state = sampling.record_tokens(state, settings, token, slot, generated)
    assert np.flatnonzero(state.seen_SV[0]).tolist() == [3]
    assert state.counts_SV[0, 4] == 2
    assert int(jnp.sum(state.counts_SV)) == 2
    ids, values = np.full(sampling.MAX_BIAS, V, np.int32), np.zeros(sampling.MAX_BIAS, np.float32)
    stops, seen = np.full(sampling.MAX_STOPS, V, np.int32), np.arange(V) == 7
    state = sampling.setup_slot(state, jnp.int32(0), *map(jnp.asarray, (ids, values, stops, seen)))
    state = sampling.record_tokens(state, settings, token[:1], slot[:1], generated[:1])
    assert np.flatnonzero(state.seen_SV[0]).tolist() == [3, 7], "of the request before it is all forgotten"
    assert int(jnp.sum(state.counts_SV)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_told_and_spoil_one_row_only(bad):
    logits = np.zeros((2, V), np.float32)
    logits[0, 3], logits[1, 7] = bad, 1.0
    tokens = sample(jnp.asarray(logits), rows({}, {"temperature": 0.0}), SlotState.empty(2, V))
    assert tokens.tolist() == [-1, 7]


def test_logprobs_are_the_log_softmax():
    logits = np.random.default_rng(4).standard_normal((2, V)).astype(np.float32)
    own, ids, top = top_logprobs(jnp.asarray(logits), jnp.asarray([5, 6]))
    exact = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(own, exact[[0, 1], [5, 6]], rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-exact, axis=-1)[:, :20])
    np.testing.assert_allclose(top, -np.sort(-exact, axis=-1)[:, :20], rtol=1e-5)
