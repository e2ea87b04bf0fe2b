"""The contract of paged_attention, for every candidate.

The reference is held against loops in numpy, one request at a time; every other candidate against the reference.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from twinax.pallas_kernels.paged_attention import init_pages, paged_attention

# Those that take any shape and dtype; the kernels, which do not, are tested in files of their own.
CANDIDATES = ["xla"]
ALL = pytest.mark.parametrize("implementation", CANDIDATES)
BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])


@dataclass(frozen=True)
class Case:
    """Requests as (tokens in the cache before, new tokens), row by row; one new token is a decode if rows allow."""

    requests: tuple[tuple[int, int], ...]
    decode_rows: int
    spare: int = 0  # token rows at the end that nobody owns
    H: int = 2
    K: int = 2
    D: int = 8
    S: int = 4
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


CASES = {
    "one token": Case(((0, 1),), 1),
    "decodes": Case(((6, 1), (0, 0), (12, 1), (3, 1), (0, 1)), 5, H=4),
    "decodes, window": Case(((6, 1), (30, 1), (0, 1)), 3, H=3, K=1, window=5),
    "decodes, window of one, softcap": Case(((8, 1), (7, 1)), 2, window=1, softcap=1.5),
    "a prompt": Case(((0, 11),), 0, H=4, scale=0.4),
    "a prompt that fills its pages": Case(((0, 8),), 0, spare=3),
    "a prompt longer than a tile": Case(((3, 150), (0, 0)), 2, S=16, D=4, window=40),
    "prompts": Case(((0, 5), (0, 0), (7, 9), (16, 2)), 0, K=1, softcap=2.0),
    "a mix": Case(((9, 1), (0, 6), (0, 0), (2, 1), (5, 4)), 5, spare=4, H=6),
    "a mix, window": Case(((9, 1), (0, 17), (21, 1), (13, 3)), 4, spare=1, window=6, scale=1.0),
    "more rows than requests": Case(((4, 1), (2, 5)), 6),
    "a last token outside the decode rows": Case(((4, 1), (2, 5), (8, 1)), 1, spare=2),
    "nobody": Case(((0, 0), (0, 0)), 2, spare=2),
}


@dataclass
class Batch:
    """The arguments of a step, and where each request's new tokens are."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    ragged: dict[str, np.ndarray]
    options: dict[str, object]

    def owner_rows(self, r):
        start, length = self.ragged["query_start_R"][r], self.ragged["query_length_R"][r]
        return slice(int(start), int(start + length))

    def owned(self):
        owned = np.zeros(len(self.q), bool)
        for r in range(len(self.ragged["lengths_R"])):
            owned[self.owner_rows(r)] = True
        return owned


def make(case: Case, dtype=np.float64) -> tuple[Batch, int]:
    """A batch with random inputs (nan in rows that nobody owns), and the number of pages it needs."""
    rng = np.random.default_rng(0)
    R = len(case.requests)
    start, at = np.zeros(R, np.int32), case.decode_rows
    for r, (_, new) in enumerate(case.requests):
        decode = new == 1 and r < case.decode_rows
        start[r], at = (r, at) if decode else (at, at + new)
    T = at + case.spare
    before, length = np.asarray(case.requests, np.int32).T
    M = max(-(-int((before + length).max()) // case.S), 1) + 1
    num_pages = R * M + 2
    ragged = {
        "page_table_RM": rng.permutation(num_pages)[: R * M].reshape(R, M).astype(np.int32),
        "lengths_R": before + length,
        "query_start_R": start,
        "query_length_R": length,
    }
    used = -(-ragged["lengths_R"] // case.S)
    ragged["page_table_RM"][np.arange(M) >= used[:, None]] = -1
    batch = Batch(
        *(rng.standard_normal((T, heads, case.D)).astype(dtype) for heads in (case.H, case.K, case.K)),
        ragged,
        {"decode_rows": case.decode_rows, "window": case.window, "softcap": case.softcap, "scale": case.scale},
    )
    for x in (batch.q, batch.k, batch.v):
        x[~batch.owned()] = np.nan
    return batch, num_pages


@partial(jax.jit, static_argnames=("options", "layer", "implementation"))
def step(q, k, v, pages, ragged, options, layer, implementation):
    return paged_attention(q, k, v, pages, layer=layer, implementation=implementation, **ragged, **dict(options))


def run(batch, pages, implementation, layer=1):
    options = tuple(batch.options.items())
    return step(batch.q, batch.k, batch.v, pages, batch.ragged, options, layer, implementation)


def filled(case, num_pages, dtype):
    """Pages of two layers that hold something everywhere, as after other requests."""
    rng = np.random.default_rng(1)
    pages = init_pages(2, num_pages, case.S, case.K, case.D, dtype)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), pages)


def by_hand(case, q, k, v):
    """Attention of the last tokens of one request over all of it, in numpy: a row of q for each of them."""
    out = np.zeros(q.shape)
    for t, h in np.ndindex(q.shape[:2]):
        p = len(k) - len(q) + t
        sees = slice(0 if case.window is None else max(0, p - case.window + 1), p + 1)
        head = h // (case.H // case.K)
        scores = k[sees, head] @ q[t, h] * (case.D**-0.5 if case.scale is None else case.scale)
        scores = case.softcap * np.tanh(scores / case.softcap) if case.softcap else scores
        weights = np.exp(scores - scores.max())
        out[t, h] = weights / weights.sum() @ v[sees, head]
    return out


@pytest.mark.parametrize("case", CASES)
def test_the_reference_does_what_the_docstring_says(case):
    """The tokens before go in by one step, as prompts, and those of the case by the next."""
    case = CASES[case]
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        batch, num_pages = make(case)
        before = np.asarray([before for before, _ in case.requests], np.int32)
        ends = np.cumsum(before, dtype=np.int32)
        k, v = (rng.standard_normal((max(1, before.sum()), case.K, case.D)) for _ in "kv")
        ragged = {**batch.ragged, "lengths_R": before, "query_start_R": ends - before, "query_length_R": before}
        prompts = Batch(np.zeros((len(k), case.H, case.D)), k, v, ragged, {"decode_rows": 0})
        _, pages = run(prompts, filled(case, num_pages, np.float64), "reference")
        out, _ = run(batch, pages, "reference")
        assert out.shape == batch.q.shape and not np.asarray(out)[~batch.owned()].any()
        for r, end in enumerate(ends):
            rows, past = batch.owner_rows(r), slice(end - before[r], end)
            whole = (np.concatenate([k[past], batch.k[rows]]), np.concatenate([v[past], batch.v[rows]]))
            np.testing.assert_allclose(out[rows], by_hand(case, batch.q[rows], *whole), rtol=1e-12, atol=1e-12)


@ALL
@pytest.mark.parametrize("case", thorough(CASES, range(0, len(CASES), 2)))
def test_against_the_reference(case, implementation):
    case = CASES[case]
    with jax.enable_x64(True):
        batch, num_pages = make(case)
        pages = filled(case, num_pages, np.float64)
        wanted, wanted_pages = run(batch, pages, "reference")
        out, new_pages = run(batch, pages, implementation)
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, new_pages, wanted_pages)
        changed = sum(
            int((x != y).any(axis=(2, 3, 4)).sum())
            for x, y in zip(*map(jax.tree.leaves, (pages, new_pages)), strict=True)
        )
        assert (changed > 0) == batch.owned().any()


@ALL
@pytest.mark.parametrize("case", ["a prompt longer than a tile", "a mix, window"])
def test_in_float32(case, implementation):
    case = CASES[case]
    with jax.enable_x64(True):
        batch, num_pages = make(case)
        wanted, _ = run(batch, filled(case, num_pages, np.float64), "reference")
    batch, _ = make(case, np.float32)
    out, _ = run(batch, filled(case, num_pages, np.float32), implementation)
    np.testing.assert_allclose(out, wanted, rtol=2e-6, atol=2e-6)


@BOTH
def test_pages_and_inputs_may_differ_in_dtype(implementation):
    case = CASES["a mix"]
    batch, num_pages = make(case, np.float32)
    out, pages = run(batch, filled(case, num_pages, jnp.bfloat16), implementation)
    assert out.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(pages)} == {jnp.dtype(jnp.bfloat16)}
    wanted, _ = run(
        batch, jax.tree.map(lambda x: x.astype(jnp.float32), filled(case, num_pages, jnp.bfloat16)), "reference"
    )
    np.testing.assert_allclose(out, wanted, atol=2e-2)


@BOTH
def test_what_others_left_in_the_pages_does_no_harm(implementation):
    """Even nan: in pages of others, and in the slots of its own last page after the last token."""
    case = Case(((0, 1), (0, 6), (0, 0)), 3, spare=2)
    batch, num_pages = make(case, np.float32)
    clean, _ = run(batch, init_pages(2, num_pages, case.S, case.K, case.D), implementation)
    poisoned = jax.tree.map(lambda x: x * jnp.nan, init_pages(2, num_pages, case.S, case.K, case.D))
    dirty, _ = run(batch, poisoned, implementation)
    np.testing.assert_array_equal(dirty, clean)
    assert np.isfinite(clean).all()


@BOTH
def test_large_scores_stay_finite(implementation):
    batch, num_pages = make(CASES["a mix"], np.float32)
    batch.q[:], batch.k[:] = batch.q * 1e4, batch.k * 1e4
    out, _ = run(batch, init_pages(2, num_pages, 4, 2, 8), implementation)
    assert np.isfinite(out).all()


@pytest.mark.usefixtures("full_compile")
@ALL
def test_in_a_scan_over_layers_and_unrolled(implementation):
    """Pages as the carry with a traced layer, or layers written out: the same bits, and each layer's own pages."""
    case = CASES["a mix"]
    batch, num_pages = make(case, np.float32)
    pages = filled(case, num_pages, np.float32)
    q, k, v = (np.nan_to_num(x) for x in (batch.q, batch.k, batch.v))

    def block(carry, layer):
        x, pages = carry
        out, pages = paged_attention(
            x, k, v, pages, layer=layer, implementation=implementation, **batch.ragged, **batch.options
        )
        return (x + out, pages), None

    scanned = jax.jit(lambda carry: jax.lax.scan(block, carry, jnp.arange(2))[0])((q, pages))

    @jax.jit
    def unrolled(carry):
        for layer in range(2):
            carry, _ = block(carry, layer)
        return carry

    jax.tree.map(np.testing.assert_array_equal, scanned, unrolled((q, pages)))
    alone, _ = run(batch, pages, implementation, layer=0)
    first = jax.jit(lambda carry: block(carry, 0)[0])((q, pages))[0] - q
    np.testing.assert_allclose(first, alone, atol=1e-5)


@ALL
@pytest.mark.parametrize("decode_rows", [4, 12], ids=["a mix", "decodes"])
def test_temporary_memory_does_not_grow_with_the_pool(decode_rows, implementation):
    """The update is in place: in a scan over layers with the pages donated, whatever the number of pages."""

    def temporary(num_pages):
        def step(q, k, v, pages, ragged):
            def block(carry, layer):
                out, pages = paged_attention(
                    carry[0],
                    k,
                    v,
                    carry[1],
                    layer=layer,
                    decode_rows=decode_rows,
                    implementation=implementation,
                    **ragged,
                )
                return (out, pages), None

            return jax.lax.scan(block, (q, pages), jnp.arange(3))[0]

        R, M, i32 = 12, 5, jnp.int32
        ragged = {name: jax.ShapeDtypeStruct((R,), i32) for name in ("lengths_R", "query_start_R", "query_length_R")}
        ragged["page_table_RM"] = jax.ShapeDtypeStruct((R, M), i32)
        pages = jax.eval_shape(lambda: init_pages(3, num_pages, 16, 2, 32))
        x = [jax.ShapeDtypeStruct((12, heads, 32), jnp.float32) for heads in (4, 2, 2)]
        compiled = jax.jit(step, donate_argnums=3).lower(*x, pages, ragged).compile()
        assert compiled.memory_analysis().alias_size_in_bytes >= 4 * sum(x.size for x in jax.tree.leaves(pages))
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(500) == temporary(20) < 2**20


@ALL
def test_without_a_chunk_region_no_chunk_program(implementation):
    sizes = []
    for decode_rows in (3, 2):
        batch, num_pages = make(Case(((4, 1), (5, 1), (0, 0)), 3), np.float32)
        batch.options["decode_rows"] = decode_rows
        step = jax.jit(lambda pages, batch=batch: run(batch, pages, implementation))
        sizes.append(step.lower(init_pages(2, num_pages, 4, 2, 8)).as_text().count("stablehlo.dot_general"))
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((4, 3, 8), np.float32)}, "multiple of the key/value heads, got 3 and 2"),
        ({"k": np.zeros((4, 2, 4), np.float32)}, "same T and D"),
        (
            {"q": np.zeros((4, 2, 4), np.float32), "k": np.zeros((4, 2, 4)), "v": np.zeros((4, 2, 4))},
            "pages hold 2 heads",
        ),
        ({"v": np.zeros((4, 2, 8), np.float16)}, "one floating dtype"),
        ({"page_table_RM": np.zeros(3, np.int32)}, "page_table must be"),
        ({"lengths_R": np.zeros(3, np.float32)}, r"lengths must be integers of shape \(2,\)"),
        ({"query_start_R": np.zeros(3, np.int32)}, "query_start must be"),
        ({"decode_rows": 5}, r"decode_rows must lie in \[0, 4\]"),
        ({"layer": 2}, r"layer must lie in \[0, 2\)"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"implementation": "gpu2"}, "no implementation 'gpu2': choose one of"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        **{name: np.zeros((4, 2, 8), np.float32) for name in "qkv"},
        **{name: np.zeros(2, np.int32) for name in ("lengths_R", "query_start_R", "query_length_R")},
        **{"page_table_RM": np.zeros((2, 3), np.int32), "decode_rows": 2, "layer": 0},
        **change,
    }
    q, k, v = (jnp.asarray(arguments.pop(name)) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        paged_attention(q, k, v, init_pages(2, 3, 4, 2, 8), **arguments)


def test_pages_tell_their_shape():
    pages = init_pages(2, 3, 4, 5, 6, jnp.bfloat16)
    assert (pages.num_layers, pages.num_pages, pages.page_size, pages.num_kv_heads, pages.head_dim) == (2, 3, 4, 5, 6)
    assert pages.dtype == jnp.bfloat16 and {x.dtype.itemsize for x in jax.tree.leaves(pages)} == {2}
    assert {x.dtype for x in jax.tree.leaves(init_pages(2, 3, 4, 5, 6))} == {jnp.dtype(jnp.float32)}
    assert init_pages(2, 3, 4, 5, 6, jnp.float8_e4m3fn, layout="bits").dtype == jnp.float8_e4m3fn
    with pytest.raises(ValueError, match="'bits' are bfloat16 or float8_e4m3fn, got float32"):
        init_pages(2, 3, 4, 5, 6, layout="bits")
    with pytest.raises(ValueError, match="must be positive"):
        init_pages(2, 0, 4, 5, 6)
