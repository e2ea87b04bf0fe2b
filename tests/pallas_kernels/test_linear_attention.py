"""The contract of linear_attention, for every candidate: values and gradients against numpy, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.pallas_kernels.linear_attention import OPERATION, RAGGED, linear_attention, ragged_linear_attention

ALL = pytest.mark.parametrize("implementation", OPERATION.names())
SIZES = {"G": 2, "H": 6, "N": 5, "P": 3}


def make(ids_BT: np.ndarray, seed: int, dtype=np.float64, strongest=2.0):
    """q, k, v and log_decay of so many rows and tokens."""
    G, H, N, P = SIZES.values()
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((*ids_BT.shape, *s)).astype(dtype) for s in ((G, N), (G, N), (H, P)))
    log_decay = -strongest * rng.random((*ids_BT.shape, H)) ** 3
    return q, k, v, log_decay.astype(np.promote_types(dtype, np.float32))


def by_hand(q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, ids_BT):
    """The recurrence in numpy, a document at a time."""
    y = np.zeros(v_BTHP.shape)
    B, T, H, P = v_BTHP.shape
    q_BTHN, k_BTHN = (np.repeat(x, H // x.shape[2], axis=2) for x in (q_BTGN, k_BTGN))
    for b in range(B):
        for t in range(T):
            if t == 0 or ids_BT[b, t] != ids_BT[b, t - 1]:
                state = np.zeros((H, q_BTHN.shape[3], P))
            state = np.exp(log_decay_BTH[b, t])[:, None, None] * state
            state = state + k_BTHN[b, t, :, :, None] * v_BTHP[b, t, :, None]
            y[b, t] = 0 if ids_BT[b, t] == 0 else np.einsum("hn,hnp->hp", q_BTHN[b, t], state)
    return y


def documents(total: int, seed: int) -> np.ndarray:
    """A row each: one document; many, with padding between and after; two that have the same id; padding alone."""
    rng = np.random.default_rng(seed)
    many = np.repeat(np.arange(1, total + 1), rng.integers(1, 30, total))[:total]
    many[many % 4 == 3] = 0
    again = np.where(np.arange(total) // 7 % 3 == 1, 2, 1)
    return np.stack([np.ones(total), many, again, np.zeros(total)]).astype(np.int32)


@ALL
@pytest.mark.parametrize("total", [1, 50, 150])  # a part of a chunk, one, and several
def test_values_and_gradients(implementation, total):
    ids = documents(total, seed=total)
    with jax.enable_x64(True):
        arguments, dy = make(ids, total), np.random.default_rng(1).standard_normal((*ids.shape, 6, 3))
        function = jax.jit(partial(linear_attention, segment_ids_BT=jnp.asarray(ids), implementation=implementation))
        got, pullback = jax.vjp(function, *arguments)
        np.testing.assert_allclose(got, by_hand(*arguments, ids), rtol=0, atol=1e-12)
        gradients = pullback(dy)
        assert all(np.all(np.asarray(one)[ids == 0] == 0) for one in gradients[:3])
        # Along a random direction, against a difference quotient of the plain sum; linear in q, k and v each.
        for nth, (own, gradient) in enumerate(zip(arguments, gradients, strict=True)):
            way = np.random.default_rng(nth).standard_normal(own.shape)
            near = [[*arguments[:nth], own + sign * 1e-5 * way, *arguments[nth + 1 :]] for sign in (1, -1)]
            plus, minus = (np.sum(by_hand(*one, ids) * dy) for one in near)
            assert np.sum(np.asarray(gradient) * way) == pytest.approx((plus - minus) / 2e-5, rel=1e-6, abs=1e-6)


@ALL
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_sums_and_states_are_float32(implementation, dtype):
    ids = documents(150, seed=3)
    arguments = make(ids, 3, dtype, strongest=20.0)
    got = linear_attention(*arguments, segment_ids_BT=jnp.asarray(ids), implementation=implementation)
    assert got.dtype == dtype
    want = by_hand(*(np.asarray(x, np.float64) for x in arguments), ids)
    # What rounds: the result, or decays, by the sum of 64 of their logarithms, each about 20 / 4; ten such products.
    rounding = 2**-9 if dtype == jnp.bfloat16 else 2**-24 * 64 * 5
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rounding, atol=10 * rounding)


def flat(arguments, states, requests, implementation):
    """`requests` are (slot, start, length, whether it is new)."""
    slot, start, length, new = map(np.asarray, zip(*requests, strict=True))
    run = jax.jit(partial(ragged_linear_attention, implementation=implementation))
    return run(*arguments, states, layer=1, slot_R=slot, start_R=start, length_R=length, is_new_R=new)


@pytest.mark.parametrize("implementation", RAGGED.names())
def test_a_request_in_pieces_among_others_has_the_bits_that_it_has_alone(implementation):
    G, H, N, P = SIZES.values()
    slots, lengths = 4, [23, 1, 9]
    ids = np.ones((3, 23), np.int32)
    arguments = make(ids, 5, np.float32)
    garbage = jnp.full((2, slots, H, N, P), 3.0, jnp.float32)

    def step(parts, states, decodes):
        """Rows of (request, start, end), each in slot 3 - request: single ones and idle rows first, then the others."""
        rows, requests = [None] * decodes, []
        for nth, (request, start, end) in enumerate(parts):
            at = nth if end - start == 1 else len(rows)
            rows[at : at + end - start] = [(request, place) for place in range(start, end)]
            requests.append((3 - request, at, end - start, start == 0))
        rows += [None] * 3
        requests += [(slots, 0, 0, True)] * 2
        take = lambda x: jnp.stack([jnp.asarray(x[row]) if row else jnp.full(x.shape[2:], 7.0) for row in rows])  # noqa: E731
        y, states = flat([take(x) for x in arguments], states, requests, implementation)
        assert not np.any(np.asarray(y)[[row is None for row in rows]])
        return {row: np.asarray(y)[n] for n, row in enumerate(rows) if row}, states

    alone, states = {}, garbage
    for request, length in enumerate(lengths):
        found, states = step([(request, 0, length)], states, 1)
        alone |= found
    together, others = {}, garbage
    for parts in ([(1, 0, 1), (0, 0, 9)], [(0, 9, 10), (2, 0, 3)], [(2, 3, 9), (0, 10, 23)]):
        found, others = step(parts, others, 5)
        together |= found
    assert alone.keys() == together.keys()
    for row, numbers in alone.items():
        assert np.array_equal(numbers, together[row]), row
    np.testing.assert_array_equal(states, others)
    np.testing.assert_array_equal(states[0], garbage[0])  # another layer
    want = by_hand(*(np.asarray(x, np.float64) for x in arguments), ids)
    for (request, at), numbers in alone.items():
        np.testing.assert_allclose(numbers, want[request, at], rtol=0, atol=2e-5)


def test_an_accelerator_takes_decodes_together(monkeypatch):
    """(Here on a CPU, as if it were one: the same numbers but for rounding.)"""
    from twinax.pallas_kernels.linear_attention import xla

    arguments = [jnp.asarray(x[0]) for x in make(np.ones((1, 12), np.int32), 6, np.float32)]
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 5, 3)), jnp.float32)
    requests = [(2, 0, 1, True), (4, 0, 0, True), (0, 2, 1, False), (1, 3, 5, False), (3, 9, 2, True)]
    want = flat(arguments, states, requests, "reference")
    monkeypatch.setattr(xla, "known_platform", lambda: None)
    got = flat(arguments, states, requests, "xla")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": np.zeros((1, 4, 5, 3))}, "H a multiple of G"),
        ({"log_decay": np.zeros((1, 4, 5))}, "log_decay"),
        ({"log_decay": np.zeros((1, 4, 6), np.float16)}, "float32 or wider"),
        ({"k": np.zeros((1, 4, 2, 6))}, "q and k"),
        ({"ids": np.ones((1, 5), np.int32)}, "segment_ids is int32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    ids = np.ones((1, 4), np.int32)
    given = {**dict(zip(("q", "k", "v", "log_decay"), make(ids, 0, np.float32), strict=True)), "ids": ids, **change}
    with pytest.raises(ValueError, match=message):
        linear_attention(*[given[name] for name in ("q", "k", "v", "log_decay")], segment_ids_BT=given["ids"])


def test_states_of_another_shape_are_refused():
    q, k, v, log_decay = (jnp.asarray(x[0]) for x in make(np.ones((1, 4), np.int32), 0, np.float32))
    requests = {name: np.zeros(2, np.int32) for name in ("slot_R", "start_R", "length_R")}
    requests["is_new_R"] = np.zeros(2, bool)
    with pytest.raises(ValueError, match=r"states is \[L, S, H, N, P\]"):
        ragged_linear_attention(q, k, v, log_decay, jnp.zeros((1, 2, 6, 3, 5)), layer=0, **requests)
