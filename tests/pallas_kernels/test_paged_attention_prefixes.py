"""Pages that requests share are read once for all of them, and no bit of a result changes for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from twinax.pallas_kernels.paged_attention import SharedPrefixes, init_pages, paged_attention

ROWS = 6
# K, G, D, S, dtype of the pages, options.
SHAPES = {
    "64, pages of 64": (2, 3, 64, 64, np.float32, {}),
    "64, window": (1, 2, 64, 16, np.float32, {"window": 40}),
    "80, pages of 48, sinks": (2, 1, 80, 48, np.float32, {"sinks_H": (-1.0, 2.0)}),
    "int8, softcap": (2, 2, 32, 16, np.int8, {"softcap": 5.0}),
}
# Which row each follows, and how many pages they share: all; half; two groups of half; one whose leader is idle; none.
GROUPS = {
    "all": ([0] * 6, [3] * 6),
    "half": ([0, 1, 0, 3, 0, 5], [2, 0, 2, 0, 2, 0]),
    "two groups": ([0, 1, 0, 1, 0, 1], [1, 3, 1, 3, 1, 3]),
    "an idle leader": ([4] * 6, [3] * 6),
    "too few": ([0, 0, 2, 3, 4, 5], [3, 3, 0, 0, 0, 0]),
    "nobody": ([0, 1, 2, 3, 4, 5], [0] * 6),
}


@partial(jax.jit, static_argnames=("options",))
def step(q, k, v, pages, table, lengths, new, prefixes, options):
    arrays = {name: jnp.asarray(x, jnp.float32) if name == "sinks_H" else x for name, x in options}
    return paged_attention(
        q, k, v, pages, layer=0, page_table_RM=table, lengths_R=lengths, query_start_R=jnp.arange(ROWS),
        query_length_R=new, decode_rows=ROWS, implementation="xla", prefixes=prefixes, **arrays,
    )[0]  # fmt: skip


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("shape", thorough(SHAPES, quick=(1, 2)))
def test_a_shared_prefix_changes_no_bit(shape):
    K, G, D, S, dtype, options = SHAPES[shape]
    rng = np.random.default_rng(4)
    pages = init_pages(1, ROWS * 6, S, K, D, dtype)
    pages = jax.tree.map(
        lambda x: jnp.asarray(np.abs(rng.standard_normal(x.shape)) * (9 if x.dtype == np.int8 else 1), x.dtype), pages
    )
    q, k, v = (jnp.asarray(rng.standard_normal((ROWS, heads, D)), jnp.float32) for heads in (K * G, K, K))
    lengths = rng.integers(3 * S + 1, 5 * S, ROWS).astype(np.int32)
    options = tuple(options.items())
    for name, (leader, shared) in GROUPS.items():
        new = np.ones(ROWS, np.int32)
        if name == "an idle leader":
            new[4] = 0
        table = rng.permutation(ROWS * 6).reshape(ROWS, 6).astype(np.int32)
        for row in range(ROWS):
            table[row, : shared[row]] = table[leader[row], : shared[row]]
        given = SharedPrefixes(np.asarray(leader, np.int32), np.asarray(shared, np.int32))
        wanted = step(
            q, k, v, pages, table, lengths, new, SharedPrefixes(np.arange(ROWS), np.zeros(ROWS, int)), options
        )
        found = step(q, k, v, pages, table, lengths, new, given, options)
        np.testing.assert_array_equal(found, wanted, err_msg=name)
        assert np.isfinite(wanted).all()


def test_each_shared_page_is_read_once():
    """Counted by what the pages hold: a page that is damaged for all but its leader's table is never looked at."""
    K, D, S = 1, 64, 16
    rng = np.random.default_rng(5)
    pages = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), init_pages(1, 40, S, K, D))
    q, k, v = (jnp.asarray(rng.standard_normal((ROWS, 1, D)), jnp.float32) for _ in range(3))
    table = np.arange(ROWS * 5).reshape(ROWS, 5).astype(np.int32)
    table[:, :3] = table[0, :3]
    lengths, new = np.full(ROWS, 4 * S, np.int32), np.ones(ROWS, np.int32)
    prefixes = SharedPrefixes(np.zeros(ROWS, np.int32), np.full(ROWS, 3, np.int32))
    wanted = step(q, k, v, pages, table, lengths, new, prefixes, ())
    elsewhere = table.copy()
    elsewhere[1:, :3] = 39
    np.testing.assert_array_equal(step(q, k, v, pages, elsewhere, lengths, new, prefixes, ()), wanted)
    none = SharedPrefixes(np.arange(ROWS), np.zeros(ROWS, np.int32))
    assert not np.array_equal(step(q, k, v, pages, elsewhere, lengths, new, none, ()), wanted)
