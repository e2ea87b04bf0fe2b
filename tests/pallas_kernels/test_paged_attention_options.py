"""Options of paged_attention: sinks, quantised pages, latent attention, both layouts; reference against loops in numpy
or against plainer calls, and xla against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.pallas_kernels.paged_attention import SharedPrefixes, init_pages, paged_attention
from twinax.pallas_kernels.paged_attention.pages import quantise

R, S, T, ROWS = 4, 4, 16, 4
LENGTHS, NEW = np.array([7, 6, 9, 0], np.int32), np.array([1, 6, 4, 0], np.int32)
STARTS = np.array([0, 4, 11, 3], np.int32)
BOTH = pytest.mark.parametrize("layout", ["split", "joint"])


def inputs(H=4, K=2, D=8, latent=None, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((T, heads, D)) for heads in (H, K, K))
    return q, k, None if latent else v


def filled(pages, seed=1):
    """Something everywhere; scales are positive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.abs(rng.standard_normal(x.shape)) * (1 if x.dtype.itemsize > 1 else 9), x.dtype), pages
    )


@partial(jax.jit, static_argnames=("implementation", "options"))
def step(q, k, v, pages, arrays, implementation, options=()):
    table = jnp.asarray(np.random.default_rng(3).permutation(R * 3).reshape(R, 3))
    return paged_attention(
        q, k, v, pages, layer=1, page_table_RM=table, lengths_R=LENGTHS, query_start_R=STARTS, query_length_R=NEW,
        decode_rows=ROWS, implementation=implementation, **arrays, **dict(options),
    )  # fmt: skip


def make_pages(K=2, D=8, dtype=np.float64, **kinds):
    return filled(init_pages(2, R * 3, S, K, D, dtype, **kinds))


@pytest.mark.parametrize(("layout", "options"), [("split", ()), ("joint", (("window", 3), ("softcap", 2.0)))])
def test_sinks_against_the_reference(layout, options):
    with jax.enable_x64(True):
        arrays = {"sinks_H": np.linspace(-3, 5, 4)}
        wanted, wanted_pages = step(*inputs(), make_pages(layout=layout), arrays, "reference", options)
        out, pages = step(*inputs(), make_pages(layout=layout), arrays, "xla", options)
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, pages, wanted_pages)


def test_a_sink_is_a_key_without_a_value():
    """One token that sees itself alone: its value, by how its own score stands against the sink."""
    with jax.enable_x64(True):
        q, k, v = inputs()
        sinks = np.array([0.5, -1.0, 2.0, 30.0])
        out, _ = step(q, k, v, make_pages(), {"sinks_H": sinks}, "reference")
        first = STARTS[1]  # request 1 begins with this step
        for h in range(4):
            score = q[first, h] @ k[first, h // 2] / np.sqrt(8)
            np.testing.assert_allclose(out[first, h], v[first, h // 2] / (1 + np.exp(sinks[h] - score)), rtol=1e-12)


@pytest.mark.parametrize("kinds", [{}, {"latent": 6}, {"dtype": jnp.int8}], ids=["plain", "latent", "int8"])
def test_layouts_mean_the_same(kinds):
    """From empty pages, two steps: results and what the next step sees."""
    q, k, v = (x if x is None else x.astype(np.float32) for x in inputs(latent=kinds.get("latent")))
    outs = []
    for layout in ("split", "joint"):
        pages = init_pages(2, R * 3, S, 2, 8, **{"dtype": jnp.float32, **kinds}, layout=layout)
        _, pages = step(q, k, v, pages, {}, "reference")
        outs.append(step(q, k, v, pages, {}, "reference")[0])
    assert np.isfinite(outs[0]).all() and np.abs(outs[0]).max() > 0.1
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bits_are_the_numbers(implementation, dtype):
    """Of a pool of narrow numbers and of one that keeps their bits: the same results, and the same pool."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    found = []
    for layout in ("split", "bits"):
        pages = init_pages(2, R * 3, S, 2, 8, dtype, layout=layout)
        _, pages = step(q, k, v, pages, {}, implementation)
        out, pages = step(q, k, v, pages, {}, implementation)
        found.append((np.asarray(out, np.float32), *(np.asarray(x, np.float32) for x in pages.take(1, jnp.arange(R)))))
    assert np.abs(found[0][0]).max() > 0.1 and np.abs(found[0][1]).max() > 0.1
    for split, bits in zip(*found, strict=True):
        np.testing.assert_array_equal(bits, split)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(jnp.int8, "joint"), (jnp.float8_e4m3fn, "split"), (jnp.float8_e4m3fn, "bits")],
    ids=["int8", "fp8", "fp8 bits"],
)
def test_quantised_pages(dtype, layout):
    """As if the pages held, unquantised, what quantised numbers stand for; and each token's error is its own."""
    with jax.enable_x64(True):
        q, k, v = inputs()
        quantised = make_pages(dtype=dtype, layout=layout)
        wanted, wanted_pages = step(q, k, v, quantised, {}, "reference")
        out, pages = step(q, k, v, quantised, {}, "xla")
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, pages, wanted_pages)

        rows = np.arange(2 * R * 3)
        layers, ids = rows // (R * 3), rows % (R * 3)
        kept_k, kept_v = quantised.take(layers, ids)
        k_scale, v_scale = quantised.take_scales(layers, ids)
        plain = init_pages(2, R * 3, S, 2, 8, np.float64, layout="split")
        k_whole = kept_k.astype(np.float64) * k_scale[:, :, None]
        v_whole = kept_v.astype(np.float64) * v_scale[..., None]
        arrays = [k_whole.reshape(2, R * 3, 2, 8, S), v_whole.reshape(2, R * 3, 2, S, 8)]
        plain = jax.tree.unflatten(jax.tree.structure(plain), arrays)
        pairs = [quantise(x, dtype) for x in (k, v)]
        whole = [numbers.astype(np.float64) * scale[..., None] for numbers, scale in pairs]
        np.testing.assert_allclose(step(q, *whole, plain, {}, "reference")[0], wanted, rtol=1e-12, atol=1e-12)
        for x, y in zip((k, v), whole, strict=True):
            bound = np.abs(x).max(-1, keepdims=True) / (254 if dtype == jnp.int8 else 16)
            assert (np.abs(x - y) <= bound * (1 + 1e-6)).all()


def test_quantised_zeros_and_extremes():
    x = jnp.asarray([[[0.0, 0.0]], [[3e38, -1e-30]], [[1e-38, 0.0]]], jnp.float32)
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        values, scale = quantise(x, dtype)
        back = values.astype(jnp.float32) * scale[..., None]
        assert np.isfinite(back).all() and not back[0].any()
        np.testing.assert_allclose(back[1, 0, 0], 3e38, rtol=1e-6)


@BOTH
def test_latent_attention(layout):
    """One key for all heads, whose first numbers are its value."""
    with jax.enable_x64(True):
        q, k, _ = inputs(K=1, latent=6)
        pages = make_pages(K=1, latent=6, layout="joint")
        if layout == "split":  # which keeps the values a second time
            split = init_pages(2, R * 3, S, 1, 8, np.float64, latent=6, layout="split")
            rows = np.arange(2 * R * 3)
            kept = [x.reshape(2, -1, *x.shape[1:]) for x in pages.take(rows // (R * 3), rows % (R * 3))]
            pages = jax.tree.unflatten(jax.tree.structure(split), kept)
        out, _ = step(q, k, None, pages, {}, "xla")
        wanted, _ = step(q, k, k, make_whole(pages), {}, "reference")
        assert out.shape == (T, 4, 6)
        np.testing.assert_allclose(out, wanted[..., :6], rtol=1e-12, atol=1e-12)


def make_whole(latent):
    """Plain pages whose values are the whole keys of latent ones."""
    rows = np.arange(2 * R * 3)
    k, _ = latent.take(rows // (R * 3), rows % (R * 3))
    plain = init_pages(2, R * 3, S, 1, 8, np.float64, layout="split")
    kept = [x.reshape(2, -1, *x.shape[1:]) for x in (k, jnp.swapaxes(k, 2, 3))]
    return jax.tree.unflatten(jax.tree.structure(plain), kept)


def test_bad_options():
    q, k, v = (x.astype(np.float32) for x in inputs())
    latent = init_pages(2, 3, S, 2, 8, latent=6)
    with pytest.raises(ValueError, match="v is None if and only if"):
        step(q, k, v, latent, {}, "xla")
    with pytest.raises(ValueError, match="v is None if and only if"):
        step(q, k, None, make_pages(dtype=np.float32), {}, "xla")
    with pytest.raises(ValueError, match="one floating number a query head"):
        step(q, k, v, make_pages(dtype=np.float32), {"sinks_H": np.zeros(3, np.float32)}, "xla")
    prefixes = SharedPrefixes(np.zeros(3, np.int32), np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=r"prefixes.leader must be integers of shape \(4,\)"):
        step(q, k, v, make_pages(dtype=np.float32), {"prefixes": prefixes}, "xla")
    for message, arguments in (
        ("latent is how many", {"latent": 9}),
        ("layout is one of", {"layout": "other"}),
        ("pages are floats of 16 bits or more, or", {"dtype": jnp.int32}),
        ("or one of int8, float8_e4m3fn; got float8_e5m2", {"dtype": jnp.float8_e5m2}),
    ):
        with pytest.raises(ValueError, match=message):
            init_pages(1, 1, 1, 1, 8, **arguments)
