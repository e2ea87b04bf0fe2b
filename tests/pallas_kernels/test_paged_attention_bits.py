"""The invariant of serving: a token's result depends, bit for bit, on its own request alone.

One request's tokens go through the cache in several ways (chunks, rows, neighbours, places in the token rows), and all
must give the bits of the first: the whole prompt in one step, alone.
"""

from functools import partial

import jax
import numpy as np
import pytest

from tests.thorough import thorough
from twinax.pallas_kernels.paged_attention import init_pages, paged_attention

CANDIDATES = ["xla"]  # a TPU's kernels: test_paged_attention_tpu.py
# K, G, D, S, tokens, options: sizes that models have (heads of 64, 80 and 128; pages of 64, 48 and 16), and small ones.
SHAPES = {
    "64, pages of 64": (2, 1, 64, 64, 100, {}),
    "64, grouped, window": (2, 2, 64, 64, 100, {"window": 70}),
    "128, pages of 16": (1, 2, 128, 16, 70, {}),
    "80, pages of 48": (2, 1, 80, 48, 70, {"softcap": 5.0}),
    "tiny": (2, 1, 16, 8, 40, {"window": 20}),
}
R, CHUNK = 4, 110


@partial(jax.jit, static_argnames=("implementation", "options"))
def step(q, k, v, pages, ragged, implementation, options):
    return paged_attention(
        q, k, v, pages, layer=0, decode_rows=R, implementation=implementation, **ragged, **dict(options)
    )


class Cache:
    """Steps of one request in row `row`, among `neighbours` that take part in every step, over pages full of nan."""

    def __init__(self, shape, row, neighbours=(), at=0, seed=0):
        self.K, self.G, self.D, self.S, self.n, options = SHAPES[shape]
        self.step = partial(step, options=tuple(options.items()))
        rng = np.random.default_rng(seed)
        self.row, self.at, self.done = row, at, 0
        self.rng, self.neighbours = rng, neighbours
        M = -(-200 // self.S)
        self.table = rng.permutation(R * M).reshape(R, M).astype(np.int32)
        self.pages = jax.tree.map(lambda x: x * np.nan, init_pages(1, R * M, self.S, self.K, self.D))
        self.lengths = np.zeros(R, np.int32)

    def feed(self, tokens, count, implementation):
        """The next `count` tokens as a chunk (a decode if it is one), a decode of each neighbour beside them."""
        chunked = count > 1
        T = R + CHUNK if chunked else R
        batch = [np.full((T, *x.shape[1:]), np.nan, np.float32) for x in tokens]
        starts, news = np.zeros(R, np.int32), np.zeros(R, np.int32)
        for r in self.neighbours:
            starts[r], news[r] = r, 1
            for x in batch:
                x[r] = 10 * self.rng.standard_normal(x.shape[1:])
        starts[self.row], news[self.row] = (R + self.at if chunked else self.row), count
        mine = slice(starts[self.row], starts[self.row] + count)
        for x, y in zip(batch, tokens, strict=True):
            x[mine] = y[self.done : self.done + count]
        self.lengths += news
        ragged = {
            "page_table_RM": self.table,
            "lengths_R": self.lengths,
            "query_start_R": starts,
            "query_length_R": news,
        }
        out, self.pages = self.step(*batch, self.pages, ragged, implementation)
        self.done += count
        return np.asarray(out)[mine]

    def feed_all(self, tokens, counts, implementation):
        assert sum(counts) == self.n
        return np.concatenate([self.feed(tokens, count, implementation) for count in counts])


def tokens_of(shape):
    K, G, D, _, n, _ = SHAPES[shape]
    rng = np.random.default_rng(7)
    return [rng.standard_normal((n, heads, D)).astype(np.float32) for heads in (K * G, K, K)]


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("implementation", CANDIDATES)
@pytest.mark.parametrize("shape", thorough(SHAPES, quick=(1, 3)))
def test_a_request_gives_the_same_bits_in_any_company(shape, implementation):
    tokens = tokens_of(shape)
    n = len(tokens[0])
    wanted = Cache(shape, row=0).feed_all(tokens, [n], implementation)
    assert np.isfinite(wanted).all()

    # In chunks that end within pages, then decode by decode; in another row, other pages, with neighbours.
    ways = {
        "chunks": Cache(shape, row=0, seed=1).feed_all(tokens, [n - 33, 2, 31], implementation),
        "decodes at the end": Cache(shape, row=3, at=5).feed_all(tokens, [7, n - 19] + [1] * 12, implementation),
        "neighbours": Cache(shape, row=2, neighbours=(0, 1, 3), seed=2, at=1).feed_all(
            tokens, [n - 9, 3] + [1] * 6, implementation
        ),
    }
    for way, out in ways.items():
        np.testing.assert_array_equal(out, wanted, err_msg=way)


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("implementation", CANDIDATES)
def test_decodes_from_the_first_token_on(implementation):
    shape = "64, pages of 64"
    tokens = tokens_of(shape)
    n = len(tokens[0])
    wanted = Cache(shape, row=0).feed_all(tokens, [n], implementation)
    one_by_one = Cache(shape, row=1, neighbours=(2,)).feed_all(tokens, [1] * n, implementation)
    np.testing.assert_array_equal(one_by_one, wanted)
