"""The contract of flash_attention, for every candidate.

The reference is held against loops in numpy, one row at a time; every other candidate against the reference in float64.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels.pairs import pairs
from tests.thorough import thorough
from twinax.pallas_kernels.flash_attention import OPERATION, flash_attention

# test_flash_attention_gpu.py runs "gpu", on an emulated one; test_flash_attention_tpu.py runs "tpu", interpreted.
CANDIDATES = [name for name in OPERATION.names() if name not in ("reference", "gpu", "tpu")]
ALL = pytest.mark.parametrize("implementation", CANDIDATES)

# B, T, S, H, K, D, options. With blocks of 16: one token, whole blocks, rests, and every pair of options somewhere.
CASES = {
    "one token": (1, 1, 1, 1, 1, 4, {}),
    "one query": (2, 1, 19, 2, 1, 4, {"q_offset": 18, "window": 5}),
    "causal": (2, 24, 24, 4, 4, 8, {}),
    "causal with rests": (1, 21, 21, 4, 2, 5, {"softcap": 1.5}),
    "all keys": (2, 10, 27, 6, 2, 4, {"causal": False}),
    "all keys of a segment": (2, 19, 19, 2, 2, 4, {"causal": False, "segments": True, "softcap": 0.7}),
    "window": (1, 43, 43, 3, 1, 4, {"window": 10, "scale": 0.9}),
    "window of one": (1, 11, 11, 2, 1, 4, {"window": 1, "segments": True}),
    "window both sides": (2, 20, 33, 2, 1, 4, {"window": 6, "causal": False, "q_offset": 7}),
    "segments": (3, 30, 30, 4, 2, 4, {"segments": True}),
    "segments and window": (2, 30, 30, 2, 2, 4, {"segments": True, "window": 7, "softcap": 2.0}),
    "a later piece of the rows": (2, 9, 40, 2, 1, 4, {"q_offset": 25}),
    "rows before the first key": (1, 26, 17, 2, 1, 4, {"q_offset": -12}),
    "offsets by row": (3, 13, 30, 4, 2, 4, {"q_offset": (17, -5, 3), "window": 9}),
    "offsets by row, segments": (2, 18, 18, 2, 1, 4, {"q_offset": (0, 4), "segments": True, "softcap": 1.0}),
    "all keys, offsets by row, window": (2, 9, 30, 2, 1, 4, {"q_offset": (2, 11), "window": 4, "causal": False}),
    "wider keys than values": (2, 21, 21, 4, 2, 6, {"value_size": 4, "segments": True, "sinks": True}),
    "wider values than keys": (1, 19, 19, 2, 1, 4, {"value_size": 7, "causal": False}),
    "sinks": (2, 19, 33, 4, 2, 4, {"sinks": True, "q_offset": 5, "window": 8}),
    "sinks, rows before the first key": (1, 18, 17, 2, 1, 4, {"sinks": True, "q_offset": -7, "softcap": 1.2}),
    "bias": (2, 21, 21, 4, 2, 4, {"bias": (2, 4), "softcap": 1.5}),
    "bias of every row and head": (2, 18, 27, 2, 2, 4, {"bias": (1, 1), "causal": False, "sinks": True}),
    "bias of every row": (3, 18, 18, 4, 2, 4, {"bias": (1, 4), "segments": True}),
    "bias of every head": (2, 12, 34, 4, 1, 4, {"bias": (2, 1), "q_offset": (22, 3), "window": 9, "sinks": True}),
}
OPTIONS = (
    *("all keys", "window", "softcap", "segments", "sinks", "bias", "offsets", "scale"),
    *("a rest", "grouped", "other values"),
)


def paired(length: int, rest: int, H: int = 4, D: int = 8) -> dict[str, tuple[Any, ...]]:
    """Cases in which every two options meet; `rest` tokens more are no whole blocks."""
    found = {}
    for has in pairs(OPTIONS):
        T, K = length + rest * ("a rest" in has), H // 2 if "grouped" in has else H
        options = {
            "all keys": {"causal": False},
            "window": {"window": length // 3},
            "softcap": {"softcap": 1.5},
            "segments": {"segments": True},
            "sinks": {"sinks": True},
            "bias": {"bias": (1, H) if "segments" in has else (2, 1) if "window" in has else (2, H)},
            "offsets": {"q_offset": (5, -3)},
            "scale": {"scale": 0.7},
            "other values": {"value_size": 2 * D},
        }
        given = {name: x for option, one in options.items() if option in has for name, x in one.items()}
        found[", ".join(option for option in OPTIONS if option in has) or "no option"] = (2, T, T, H, K, D, given)
    return found


def headed(length: int) -> dict[str, tuple[Any, ...]]:
    """Cases of the head sizes that models have; 192 and 128 are those of latent attention."""
    sizes = {64: 64, 80: 80, 96: 96, 128: 128, 192: 128, 256: 256}
    return {f"heads of {D}, {E}": (1, length, length, 2, 1, D, {"value_size": E}) for D, E in sizes.items()}


CASES |= paired(32, 5) | headed(21)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from twinax.pallas_kernels.flash_attention import xla

    monkeypatch.setattr(xla, "BLOCK", 16)


def make(case, dtype: Any = np.float64):
    """Inputs and options of a case; segment ids with padding in the middle, at the end, and for one whole row.

    A bias hides some keys, and all of one row.
    """
    B, T, S, H, K, D, options = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    options = dict(options)
    E = options.pop("value_size", D)
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, E))]
    if options.pop("sinks", False):
        options["sinks_H"] = rng.standard_normal(H).astype(dtype)
    if "bias" in options:
        bias = rng.standard_normal((*options.pop("bias"), T, S)).astype(dtype)
        options["bias_BHTS"] = np.where(rng.random(bias.shape) < 0.1, dtype(-np.inf), bias)
        options["bias_BHTS"][:, :, T // 2] = -np.inf
    if options.pop("segments", False):
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
        ids[ids == 2] = -1
        ids[:, T // 3 : T // 3 + 2] = 0
        ids[0, -5:] = 0
        ids[-1] = 0 if B > 2 else ids[-1]
        options["q_segment_ids_BT"] = options["kv_segment_ids_BS"] = ids.astype(np.int32)
    if isinstance(options.get("q_offset"), tuple):
        options["q_offset"] = np.asarray(options["q_offset"], np.int32)
    return inputs, options


def by_hand(q, k, v, options):
    """The same in numpy, row by row, from the words of the docstring."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    out, lse = np.zeros((B, T, H, v.shape[3])), np.full((B, T, H), -np.inf)
    bias, sinks = options.get("bias_BHTS", np.zeros((1, 1, T, S))), options.get("sinks_H", np.full(H, -np.inf))
    bias = np.broadcast_to(bias, (B, H, T, S))
    q_ids, k_ids = options.get("q_segment_ids_BT"), options.get("kv_segment_ids_BS")
    window, softcap = options.get("window"), options.get("softcap")
    for b, t, h in np.ndindex(B, T, H):
        p = t + int(np.broadcast_to(options.get("q_offset", 0), (B,))[b])
        keys = [s for s in range(S) if s <= p or not options.get("causal", True)]
        keys = [s for s in keys if window is None or abs(p - s) < window]
        keys = [s for s in keys if q_ids is None or (q_ids[b, t] == k_ids[b, s] != 0)]
        keys = [s for s in keys if bias[b, h, t, s] > -np.inf]
        lse[b, t, h] = sinks[h]
        if keys:
            kv_head = h // (H // K)
            scores = k[b, keys, kv_head] @ q[b, t, h] * options.get("scale", 1 / math.sqrt(D))
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            scores = scores + bias[b, h, t, keys]
            top = max(scores.max(), sinks[h])
            lse[b, t, h] = top + np.log(np.exp(scores - top).sum() + np.exp(sinks[h] - top))
            out[b, t, h] = np.exp(scores - lse[b, t, h]) @ v[b, keys, kv_head]
    return out, lse


def outputs_and_gradients(inputs, options, implementation):
    """out, lse (rows that see nothing: 0), and the gradients of a random function of both."""
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    learned = {name: options.pop(name) for name in ("bias_BHTS", "sinks_H") if name in options}
    rng = np.random.default_rng(0)
    d_out = rng.standard_normal((*inputs[0].shape[:3], inputs[2].shape[3])).astype(inputs[0].dtype)
    d_lse = rng.standard_normal(inputs[0].shape[:3]).astype(inputs[0].dtype)

    def loss(q, k, v, learned):
        out, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation, **options, **learned)
        seen = lse > -jnp.inf
        return (out * d_out).sum() + (jnp.where(seen, lse, 0) * d_lse).sum(), (out, jnp.where(seen, lse, 0), seen)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, (out, lse, seen)), (*gradients, d_learned) = step(*inputs, learned)
    return [np.asarray(x) for x in (seen, out, lse, *gradients, *jax.tree.leaves(d_learned))]


def check(got, wanted, tolerance):
    np.testing.assert_array_equal(got[0], wanted[0])
    names = ("out", "lse", "dq", "dk", "dv", "d_learned", "d_sinks")
    for name, x, y in zip(names[: len(got) - 1], got[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1, np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_does_what_the_docstring_says(case):
    with jax.enable_x64(True):
        inputs, options = make(case)
        out, lse = jax.jit(partial(flash_attention, return_lse=True, implementation="reference", **options))(*inputs)
        wanted_out, wanted_lse = by_hand(*inputs, options)
        np.testing.assert_allclose(out, wanted_out, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-12, atol=1e-12)


@ALL
@pytest.mark.parametrize("case", thorough(CASES, range(0, 24, 3)))
def test_forward_and_backward_in_float64(case, implementation):
    with jax.enable_x64(True):
        inputs, options = make(case)
        wanted = outputs_and_gradients(inputs, options, "reference")
        check(outputs_and_gradients(inputs, options, implementation), wanted, 1e-12)


@ALL
@pytest.mark.parametrize("case", ["segments and window", "offsets by row", "bias of every head"])
def test_forward_and_backward_in_float32(case, implementation):
    with jax.enable_x64(True):
        wanted = outputs_and_gradients(*make(case), "reference")
    check(outputs_and_gradients(*make(case, np.float32), implementation), wanted, 3e-6)


@ALL
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(implementation):
    inputs, options = make("causal with rests", jnp.bfloat16)
    out, lse = jax.jit(partial(flash_attention, return_lse=True, implementation=implementation, **options))(*inputs)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    wanted_out, wanted_lse = by_hand(*(np.asarray(x, np.float64) for x in inputs), options)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)  # products of bfloat16 are exact in float32
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted_out, atol=2**-6)


@ALL
def test_each_result_alone_has_its_gradient(implementation):
    check_gradients_of_one_result("causal with rests", implementation, 1e-12)


def check_gradients_of_one_result(case, implementation, tolerance, dtype=np.float64):
    """What nobody takes has no gradient, and a candidate is told so."""

    def gradients(inputs, options, implementation, which):
        def loss(*inputs):
            return jnp.square(
                flash_attention(*inputs, return_lse=True, implementation=implementation, **options)[which]
            ).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)

    for which in range(2):
        with jax.enable_x64(True):
            wanted = gradients(*make(case), "reference", which)
        with jax.enable_x64(dtype == np.float64):
            found = gradients(*make(case, dtype), implementation, which)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1, np.abs(y).max()))


def check_bfloat16_gradients(case, implementation):
    """Within what rounding inputs, weights and results to 8 bits makes, of the largest of each gradient."""
    inputs, options = make(case, jnp.bfloat16)
    if "sinks_H" in options:
        options["sinks_H"] = options["sinks_H"].astype(np.float32)
    d_out = np.random.default_rng(0).standard_normal((*inputs[0].shape[:3], inputs[2].shape[3]))
    d_out = np.asarray(d_out, jnp.bfloat16)
    learned = {name: options.pop(name) for name in ("bias_BHTS", "sinks_H") if name in options}
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}

    def gradients(given, d_out, implementation):
        def attend(inputs, learned):
            return flash_attention(*inputs, **learned, **options, implementation=implementation)

        return jax.tree.leaves(jax.jit(lambda given, d_out: jax.vjp(attend, *given)[1](d_out))(given, d_out))

    got = gradients((inputs, learned), d_out, implementation)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), ((inputs, learned), d_out))
        wanted = gradients(*wide, "reference")
    for x, y, like in zip(got, wanted, jax.tree.leaves((inputs, learned)), strict=True):
        assert x.dtype == like.dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=2**-6 * np.abs(y).max())


@ALL
@pytest.mark.parametrize("case", ["causal with rests", "sinks", "bias of every row"])
def test_gradients_of_bfloat16(case, implementation):
    check_bfloat16_gradients(case, implementation)


@ALL
@pytest.mark.parametrize("scales", ["one number", "one a head"])
def test_float8_is_its_numbers_times_their_scales(scales, implementation):
    """To the precision of a product whose probabilities are rounded to float8, at worst."""
    (q, k, v), options = make("segments", np.float32)
    rng, heads = np.random.default_rng(3), scales == "one a head"
    factors = [np.float32(rng.uniform(0.5, 2, x.shape[2]) if heads else rng.uniform(0.5, 2)) for x in (q, k, v)]
    q, k, v = (jnp.asarray(x, jnp.float8_e4m3fn) for x in (q, k, v))
    options |= dict(zip(("q_scale", "k_scale", "v_scale"), factors, strict=True))
    attend = jax.jit(partial(flash_attention, return_lse=True, implementation=implementation, **options))
    out, lse = attend(q, k, v)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    wide = [np.asarray(x, np.float64) * np.reshape(f, (-1, 1)) for x, f in zip((q, k, v), factors, strict=True)]
    wanted_out, wanted_lse = by_hand(*wide, options)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted_out, atol=2**-4 * np.abs(wanted_out).max())


@ALL
def test_float8_has_no_gradient(implementation):
    q = jnp.ones((1, 4, 1, 8), jnp.float8_e4m3fn)

    def loss(scale):
        x = (q.astype(jnp.float32) * scale).astype(jnp.float8_e4m3fn)
        return flash_attention(x, x, x, implementation=implementation).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.grad(loss)(1.0)


@pytest.mark.parametrize("implementation", [*CANDIDATES, "reference"])
def test_rows_that_see_nothing(implementation):
    """Padding, and a whole batch row of it: zeros, -inf, no gradient, whatever the padded inputs hold."""
    inputs, options = make("segments", np.float32)
    ids = options["q_segment_ids_BT"]
    assert (ids == 0).any(1).all() and (ids[-1] == 0).all()
    seen, out, lse, *gradients = outputs_and_gradients(inputs, options, implementation)
    np.testing.assert_array_equal(seen.all(2), ids != 0)
    assert not out[ids == 0].any()
    assert all(np.isfinite(g).all() and not g[ids == 0].any() for g in gradients)
    poor = [np.where((ids == 0)[:, :, None, None], np.float32(np.inf), x) for x in inputs]
    for x, y in zip(outputs_and_gradients(poor, options, implementation), (seen, out, lse, *gradients), strict=True):
        np.testing.assert_array_equal(x, y)


@ALL
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["", "softcap"])
def test_large_scores_stay_finite(implementation, options):
    (q, k, v), _ = make("causal", np.float32)
    results = outputs_and_gradients((q * 1e4, k * 1e4, v), options, implementation)
    assert all(np.isfinite(x).all() for x in results)
    if not options:
        np.testing.assert_allclose(results[1], by_hand(q * 1e4, k * 1e4, v, {})[0], atol=1e-5)


@ALL
def test_one_array_of_segments_serves_both(implementation):
    inputs, options = make("segments", np.float32)
    ids = options["q_segment_ids_BT"]
    attend = jax.jit(partial(flash_attention, implementation=implementation))
    wanted = attend(*inputs, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
    np.testing.assert_array_equal(attend(*inputs, q_segment_ids_BT=ids), wanted)
    np.testing.assert_array_equal(attend(*inputs, kv_segment_ids_BS=ids), wanted)


@pytest.mark.usefixtures("full_compile")
@ALL
def test_a_batch_row_does_not_depend_on_the_others(implementation):
    inputs, options = make("causal", np.float32)
    attend = jax.jit(partial(flash_attention, implementation=implementation, **options))
    np.testing.assert_array_equal(attend(*inputs)[1:], attend(*(x[1:] for x in inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 3, 8)}, "multiple of the key/value heads, got 3 and 2"),
        ({"k": (2, 4, 2, 4)}, "the same B and D"),
        ({"q": (2, 0, 2, 8)}, "no axis may be empty"),
        ({"q": (4, 2, 8)}, "takes q"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"q_segment_ids_BT": np.ones((2, 5), np.int32)}, r"integers of shape \(2, 4\)"),
        ({"kv_segment_ids_BS": np.ones((2, 4), np.float32)}, "integers of shape"),
        ({"q": (2, 3, 2, 8), "kv_segment_ids_BS": np.ones((2, 4), np.int32)}, "only if T == S, got T=3, S=4"),
        ({"q_offset": np.zeros(3, np.int32)}, r"q_offset must be an int or integers of shape \(2,\)"),
        ({"v": (2, 4, 1, 8)}, "the same B and D"),
        ({"bias_BHTS": np.zeros((2, 4, 4), np.float32)}, r"\(2, 2, 4, 4\) with 1 for B or H where they share it"),
        ({"bias_BHTS": np.zeros((2, 2, 1, 4), np.float32)}, "one float a score"),
        ({"sinks_H": np.zeros(3, np.float32)}, r"sinks are one float a query head, \(2,\)"),
        ({"k_scale": 2.0}, "k_scale and v_scale are for float8_e4m3fn inputs, got float32"),
        ({"implementation": "cuda"}, "no implementation 'cuda': choose one of"),
    ],
)
def test_bad_arguments(change, message):
    change = dict(change)
    q, k = jnp.zeros(change.pop("q", (2, 4, 2, 8))), jnp.zeros(change.pop("k", (2, 4, 2, 8)))
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, jnp.zeros(change.pop("v", (2, 4, 2, 8))), **change)


def test_mixed_dtypes():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="one floating dtype"):
        flash_attention(x, x.astype(jnp.bfloat16), x)
    low = x.astype(jnp.float8_e5m2)
    with pytest.raises(ValueError, match="takes float8_e4m3fn, got float8_e5m2"):
        flash_attention(low, low, low)
    low = x.astype(jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"q_scale is one number or one a head, \(1,\), got \(2,\)"):
        flash_attention(low, low, low, q_scale=np.ones(2))
