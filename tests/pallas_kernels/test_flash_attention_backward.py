"""The contract of flash_attention_backward, for every candidate: parts of a row add up to the whole row's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from twinax.pallas_kernels.flash_attention import BACKWARD, flash_attention, flash_attention_backward

# test_flash_attention_gpu.py and test_flash_attention_tpu.py run "gpu" and "tpu", interpreted.
ALL = pytest.mark.parametrize("implementation", [name for name in BACKWARD.names() if name not in ("gpu", "tpu")])
B, H, K, D = 2, 4, 2, 5
OPTIONS = {
    "causal": {},
    "window, softcap": {"window": 9, "softcap": 1.5, "scale": 0.8},
    "all keys": {"causal": False},
    "window both sides": {"causal": False, "window": 12},
    "segments": {"segments": True},
    "segments, window": {"segments": True, "window": 6, "softcap": 2.0},
    "values of another size": {"value_size": 3},
    "bias of every row": {"bias": (1, H), "softcap": 1.2},
    "bias of every head": {"bias": (B, 1), "causal": False, "segments": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from twinax.pallas_kernels.flash_attention import xla

    monkeypatch.setattr(xla, "BLOCK", 8)


def part(inputs, rows, keys, options, implementation):
    """dq, dk, dv (and that of the bias) of some of the queries and some of the keys."""
    q, k, v, d_out, lse, delta, ids, bias = inputs
    segments = {} if ids is None else {"q_segment_ids_BT": ids[:, rows], "kv_segment_ids_BS": ids[:, keys]}
    return flash_attention_backward(
        *(q[:, rows], k[:, keys], v[:, keys], d_out[:, rows], lse[:, rows], delta[:, rows]),
        bias_BHTS=None if bias is None else bias[:, :, rows, keys],
        **segments,
        **options,
        # Traced, as the ring's are: a device learns its place only when it runs.
        q_offset=jnp.asarray(rows.start - keys.start),
        implementation=implementation,
    )


@ALL
@pytest.mark.parametrize("case", thorough(OPTIONS, range(0, len(OPTIONS), 2)))
def test_parts_add_up_to_the_gradients_of_the_whole(case, implementation):
    check_parts(case, implementation)


def check_parts(case, implementation, T=37, dtype=jnp.float64, tolerance=1e-12):
    """Both the queries and the keys of a row of T tokens are cut in two, unevenly."""
    options, rng = dict(OPTIONS[case]), np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32) if options.pop("segments", False) else None
    cuts = [slice(0, 2 * T // 5), slice(2 * T // 5, T)]
    with jax.enable_x64(True):
        E = options.pop("value_size", D)
        bias = jnp.asarray(rng.standard_normal((*options.pop("bias"), T, T))) if "bias" in options else None
        q, k, v = (jnp.asarray(rng.standard_normal((B, T, *size))) for size in ((H, D), (K, D), (K, E)))
        d_out, d_lse = jnp.asarray(rng.standard_normal((B, T, H, E))), jnp.asarray(rng.standard_normal(q.shape[:3]))

        def attend(q, k, v, bias):
            more = {"bias_BHTS": bias, "q_segment_ids_BT": ids, "return_lse": True, "implementation": "reference"}
            return flash_attention(q, k, v, **options, **more)

        @jax.jit
        def whole(q, k, v, bias):
            (out, lse), pullback = jax.vjp(attend, q, k, v, bias)
            delta = (out * d_out).sum(-1) - jnp.where(lse > -jnp.inf, d_lse, 0)
            return lse, delta, pullback((d_out, jnp.where(lse > -jnp.inf, d_lse, 0)))

        lse, delta, wanted = whole(q, k, v, bias)
        narrow = [None if x is None else np.asarray(x, dtype) for x in (q, k, v, d_out, lse, delta, bias)]

    @jax.jit
    def by_parts(*arrays):
        inputs = (*arrays[:6], ids, arrays[6])
        grids = [[part(inputs, rows, keys, options, implementation) for keys in cuts] for rows in cuts]
        dq = jnp.concatenate([sum(column[0] for column in row) for row in grids], 1)
        dk, dv = (jnp.concatenate([sum(row[j][i] for row in grids) for j in range(len(cuts))], 1) for i in (1, 2))
        return dq, dk, dv, None if bias is None else jnp.block([[found[3] for found in row] for row in grids])

    with jax.enable_x64(dtype == jnp.float64):
        found = by_parts(*narrow)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@ALL
def test_gradients_of_bfloat16_are_not_rounded(implementation):
    q, k = jnp.ones((1, 9, 2, 4), jnp.bfloat16), jnp.ones((1, 7, 1, 4), jnp.bfloat16)
    rows = jnp.ones((1, 9, 2), jnp.float32)
    gradients = flash_attention_backward(q, k, k, q, rows, rows, implementation=implementation)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, jnp.float32) for x in (q, k, k)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": jnp.zeros((1, 3, 2, 4), jnp.bfloat16)}, "d_out is as the output, float32"),
        ({"lse": jnp.zeros((1, 3, 1))}, r"lse is one float32 a query and head, \(1, 3, 2\), got float32\(1, 3, 1\)"),
        ({"delta": jnp.zeros((1, 3, 2), jnp.bfloat16)}, "delta is one float32"),
    ],
)
def test_bad_arguments(change, message):
    q, k, rows = jnp.zeros((1, 3, 2, 4)), jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 3, 2))
    given = {"d_out": q, "lse": rows, "delta": rows, **change}
    with pytest.raises(ValueError, match=message):
        flash_attention_backward(q, k, k, *given.values())
