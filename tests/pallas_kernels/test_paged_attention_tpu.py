"""The TPU kernels of paged_attention, in interpret mode on a CPU, with race detection, against the reference."""

import contextlib
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tests.thorough import thorough
from twinax.pallas_kernels.paged_attention import (
    SharedPrefixes,
    init_pages,
    paged_attention,
    tpu,
    tpu_block,
    tpu_decode,
)
from twinax.pallas_kernels.paged_attention.tpu_decode import divided


def in_turn(cases):
    """Each case in one mode of copies, the next in the other: interpreted on two cores each takes long."""
    return list(zip(cases, cycle(("on_wait", "eager"))))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few tokens are several blocks, and few rows several tiles."""
    monkeypatch.setattr(tpu, "BLOCK_TOKENS", (32, 32))
    monkeypatch.setattr(tpu, "tile_rows", lambda T, *_: min(16, -(-T // 16) * 16))


@contextlib.contextmanager
def interpreted(mode, cores=1):
    """What is not there yet is nan."""
    params = pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found


@dataclass(frozen=True)
class Case:
    """Requests as (tokens in the cache before, new tokens); a single new one is a decode if rows allow."""

    requests: tuple[tuple[int, int], ...]
    decode_rows: int
    spare: int = 0
    H: int = 2
    K: int = 1
    D: int = 16
    S: int = 16
    dtype: Any = jnp.float32
    kept: Any = None
    latent: int | None = None
    sinks: bool = False
    prefixes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def make(case, layout="joint"):
    """Arguments, and pages that hold something everywhere."""
    rng = np.random.default_rng(0)
    R, at = len(case.requests), case.decode_rows
    before, new = np.asarray(case.requests, np.int32).T
    start = np.zeros(R, np.int32)
    for r in range(R):
        decode = new[r] == 1 and r < case.decode_rows
        start[r], at = (r, at) if decode else (at, at + new[r])
    M = -(-int((before + new).max()) // case.S) + 1
    table = rng.permutation(R * M + 1)[: R * M].reshape(R, M).astype(np.int32)
    table[np.arange(M) >= -(-(before + new) // case.S)[:, None]] = -1
    arrays = {
        "page_table_RM": table,
        "lengths_R": before + new,
        "query_start_R": start,
        "query_length_R": new,
        "layer": jnp.int32(1),
    }
    if case.sinks:
        arrays["sinks_H"] = jnp.linspace(-1, 2, case.H)
    if case.prefixes is not None:
        leader, pages = map(np.asarray, case.prefixes)
        for r in range(R):
            table[r, : pages[r]] = table[leader[r], : pages[r]]
        arrays["prefixes"] = SharedPrefixes(leader, pages)
    kept = case.kept or case.dtype
    pages = init_pages(2, R * M + 1, case.S, case.K, case.D, kept, latent=case.latent, layout=layout)
    size = 40 if kept == jnp.int8 else 1
    shapes = [x.shape for x in jax.tree.leaves(pages)]
    tokens = len(shapes) - pages.quantised  # the scales come last
    leaves = [jnp.asarray(size * rng.standard_normal(shape), kept) for shape in shapes[:tokens]]
    leaves += [jnp.asarray(rng.uniform(0.005, 0.02, shape), jnp.float32) for shape in shapes[tokens:]]
    shapes = [(at + case.spare, heads, case.D) for heads in (case.H, case.K, case.K)]
    qkv = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for x in qkv:
        x[at:] = np.nan
    q, k, v = (jnp.asarray(x, case.dtype) for x in qkv)
    return (q, k, None if case.latent else v), jax.tree.unflatten(jax.tree.structure(pages), leaves), arrays


@partial(jax.jit, static_argnames=("decode_rows", "implementation", "options"))
def step(qkv, pages, arrays, decode_rows, implementation, options):
    return paged_attention(
        *qkv, pages, decode_rows=decode_rows, implementation=implementation, **arrays, **dict(options)
    )


def run(case, implementation, qkv, pages, arrays):
    return step(qkv, pages, arrays, case.decode_rows, implementation, tuple(case.options.items()))


QUICK = {
    "decodes": (Case(((6, 1), (0, 0), (69, 1), (31, 1)), 4, sinks=True), "eager"),
    "a prompt in tiles, window": (Case(((37, 39),), 0, spare=3, options={"window": 20}), "on_wait"),
    "latent int8 mix": (
        Case(((40, 1), (0, 5)), 2, D=48, S=32, K=1, H=3, kept=jnp.int8, latent=32, dtype=jnp.bfloat16),
        "on_wait",
    ),
}
A_MIX = ((40, 1), (0, 6), (9, 17), (0, 0), (64, 1))
SLOW = {
    "decodes, window": (
        Case(((70, 1), (3, 1), (95, 1), (0, 1)), 4, K=2, H=4, sinks=True, options={"window": 33}),
        "on_wait",
    ),
    "int8 decodes, window": (
        Case(
            ((70, 1), (3, 1), (129, 1), (0, 1)),
            4,
            S=32,
            K=2,
            H=4,
            kept=jnp.int8,
            dtype=jnp.bfloat16,
            sinks=True,
            options={"window": 97},
        ),
        "on_wait",
    ),
    "one token": (Case(((0, 1),), 1, dtype=jnp.bfloat16), "eager"),
    "nobody": (Case(((0, 0), (0, 0)), 2, spare=2), "on_wait"),
    "a mix": (Case(A_MIX, 5, K=2, H=6, spare=4, sinks=True, options={"softcap": 2.0}), "eager"),
    "a mix, on_wait": (Case(A_MIX, 5, K=2, H=6, D=64, spare=4, sinks=True), "on_wait"),
    "heads of 80": (Case(((33, 1), (8, 20)), 2, D=80, dtype=jnp.bfloat16), "on_wait"),
    "fp8": (Case(((33, 1), (40, 9)), 2, S=32, K=2, kept=jnp.float8_e4m3fn), "eager"),
    "int8, pages of 128": (Case(((33, 1), (100, 60)), 1, S=128, K=2, kept=jnp.int8, dtype=jnp.bfloat16), "on_wait"),
    "float32 over bfloat16": (Case(((33, 1), (40, 9)), 2, kept=jnp.bfloat16), "on_wait"),
    "prefixes": (
        Case(((70, 1), (66, 1), (40, 1), (81, 1)), 4, K=1, H=2, sinks=True, prefixes=((0, 0, 2, 0), (4, 4, 0, 4))),
        "eager",
    ),
    "prefixes, window, a mix": (
        Case(((70, 1), (66, 1), (40, 5), (81, 1)), 4, prefixes=((0, 1, 2, 1), (0, 4, 0, 4)), options={"window": 40}),
        "on_wait",
    ),
}


def check(case, mode, cores=1):
    arguments = make(case)
    with interpreted(mode, cores):
        out, pages = jax.block_until_ready(run(case, "tpu", *arguments))
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, np.float64) for x in arguments[0]]
        wanted, _ = run(case, "reference", wide, *arguments[1:])
    _, wanted_pages = run(case, "reference", *arguments)
    # float32: its rounding, of sums of some dozens; bfloat16: that of the weights and of the result.
    close = 2e-6 if case.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=close, rtol=close)
    jax.tree.map(np.testing.assert_array_equal, pages, wanted_pages)
    return out


@pytest.mark.parametrize("name", QUICK)
def test_against_the_reference(name):
    check(*QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_against_the_reference(name):
    check(*SLOW[name])


TWO_CORES = {
    "decodes": (Case(((6, 1), (0, 0), (69, 1)), 3, K=2, H=4), "on_wait"),
    "a mix": (Case(A_MIX, 5, K=2, H=6, spare=4, sinks=True), "eager"),
    "int8, prefixes": (
        Case(
            ((70, 1), (66, 1), (40, 5), (81, 1)), 4, K=2, H=4, S=32, kept=jnp.int8, dtype=jnp.bfloat16,
            prefixes=((0, 1, 2, 1), (0, 2, 0, 2)),
        ),
        "on_wait",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", thorough(TWO_CORES))
def test_two_cores_that_are_one_device_share_the_heads(name, monkeypatch):
    monkeypatch.setattr(tpu, "target_chip", lambda: "v5p")
    check(*TWO_CORES[name], cores=2)


DIVIDED = {
    "a latent": Case(((3, 1), (70, 1), (0, 0), (20, 1)), 4, D=48, H=4, latent=32),
    "a long one and short ones, sinks": Case(((150, 1), (3, 1), (0, 1), (20, 1), (15, 1)), 5, H=4, sinks=True),
    "short ones and a long one, int8": Case(
        ((3, 1), (0, 1), (40, 1), (200, 1)), 4, S=32, kept=jnp.int8, dtype=jnp.bfloat16
    ),
    "three key heads, window, softcap": Case(
        ((70, 1), (3, 1), (95, 1)), 3, K=3, H=6, options={"window": 33, "softcap": 2.0}
    ),
    "several steps, some without work": Case(
        ((130, 1), *[(n, 1) for n in range(7)], *[(0, 0)] * 8, *[(9, 1)] * 3, *[(0, 0)] * 6), 25, D=48, latent=32
    ),
    "a latent of int8, a mix, shared prefixes": Case(
        ((70, 1), (66, 1), (40, 5), (81, 1), (99, 1)), 5, D=48, S=32, H=3, kept=jnp.int8, dtype=jnp.bfloat16,
        latent=32, prefixes=((0, 0, 2, 0, 0), (2, 2, 0, 2, 2)),
    ),
    "shared prefixes, window": Case(
        ((70, 1), (66, 1), (40, 5), (81, 1)), 4, prefixes=((0, 1, 2, 1), (0, 4, 0, 4)), options={"window": 40}
    ),
    "only one": Case(((0, 0), (40, 1), (0, 0)), 3),
    "nobody": Case(((0, 0), (0, 0)), 2, D=48, latent=32),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), thorough(in_turn(DIVIDED)))
def test_two_cores_divide_the_requests_where_heads_cannot_be_halved(name, mode, monkeypatch):
    """And each request has the bits that one core gives it."""
    monkeypatch.setattr(tpu, "ROWS", 8)
    case = DIVIDED[name]
    alone = check(case, mode)
    monkeypatch.setattr(tpu, "target_chip", lambda: "v5p")
    np.testing.assert_array_equal(check(case, mode, cores=2), alone)


CUT = {
    "a latent": (32, Case(((3, 1), (120, 1), (0, 0), (20, 1)), 4, D=48, H=4, latent=32)),
    "int8, window, sinks": (
        64, Case(((225, 1), (40, 1)), 2, S=32, sinks=True, kept=jnp.int8, dtype=jnp.bfloat16, options={"window": 180}),
    ),
    "only one, three key heads, softcap": (64, Case(((0, 0), (127, 1)), 2, K=3, H=6, options={"softcap": 2.0})),
    "a mix, a prompt longer than a part, sinks": (
        64, Case(((140, 1), (9, 1), (60, 20), (0, 80), (1, 1)), 5, spare=3, sinks=True),
    ),
    "several steps, some without work": (
        32, Case(((20, 1), *[(0, 0)] * 15, (190, 1), *[(0, 0)] * 8, (9, 1)), 26, D=48, latent=32),
    ),
    "a latent of int8, a mix, shared prefixes": (
        64,
        Case(
            ((290, 1), (66, 1), (40, 5), (130, 1), (99, 1)), 5, D=48, S=32, H=3, kept=jnp.int8, dtype=jnp.bfloat16,
            latent=32, prefixes=((0, 0, 2, 0, 0), (2, 2, 0, 2, 2)),
        ),
    ),
    "shared prefixes within a part, sinks": (
        64, Case(((220, 1), (107, 1), (20, 1)), 3, sinks=True, prefixes=((0, 0, 2), (6, 6, 0))),
    ),
    "shared prefixes, window": (
        64, Case(((200, 1), (140, 1), (40, 5)), 3, prefixes=((0, 0, 2), (6, 6, 0)), options={"window": 130}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), thorough(in_turn(CUT), 2))
def test_two_cores_cut_a_request_between_its_parts(name, mode, monkeypatch):
    """And it has the bits that it has where one core takes the whole of it."""
    part, case = CUT[name]
    monkeypatch.setattr(tpu, "ROWS", 8)
    monkeypatch.setattr(tpu, "target_chip", lambda: "v5p")
    monkeypatch.setattr(tpu, "PART_TOKENS", part)
    before, new = np.asarray(case.requests).T
    lengths = np.where((new == 1) & (np.arange(len(new)) < case.decode_rows), before + new, 0)
    first = np.maximum(lengths - case.options.get("window", 10**6), 0) // case.S
    if case.prefixes is not None:
        of_block = 32 // case.S
        first = np.maximum(first, np.where(lengths > 0, case.prefixes[1], 0) // of_block * of_block)
    stop = -(-lengths // case.S)
    cut = np.asarray(divided(first, stop, part // case.S, 2))[1]
    is_cut = (first < cut) & (cut < stop)
    assert is_cut.any()
    step.clear_cache()
    out = check(case, mode, cores=2)
    # All of it by either core.
    cuts = np.stack([first, np.where(is_cut, first if mode == "eager" else stop, cut), stop])
    cuts = jnp.asarray(np.pad(cuts, ((0, 0), (0, -len(first) % 8))), jnp.int32)
    monkeypatch.setattr(tpu_decode, "divided", lambda *_: cuts)
    step.clear_cache()
    np.testing.assert_array_equal(check(case, mode, cores=2), out)
    step.clear_cache()


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50) | st.integers(0, 2_000)), min_size=1, max_size=64),
    st.integers(1, 100) | st.just(10_000),
    st.integers(1, 3),
)
def test_cores_have_equal_shares_but_for_half_of_a_part(requests, part, cores):
    first, pages = np.asarray(requests, np.int32).T
    cuts = np.asarray(divided(jnp.asarray(first), jnp.asarray(first + pages), part, cores))
    np.testing.assert_array_equal(cuts[[0, -1]], [first, first + pages])
    assert (np.diff(cuts, axis=0) >= 0).all()  # each page is one core's
    assert ((cuts % part == 0) | (cuts == first) | (cuts == first + pages)).all()
    taken = np.diff(cuts, axis=0)
    _, request = np.nonzero(taken)
    assert (np.diff(request) >= 0).all()  # a range of the requests each, of which at most one is cut at a border
    # Half of a part at either end of a range; the first and the last have but one such end.
    assert max(taken.sum(1)) <= sum(pages) / cores + min(part, max(pages)) / 2 * min(cores - 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, jnp.int8])
def test_large_scores_stay_finite(kept):
    case = Case(A_MIX, 5, K=2, H=4, S=32, kept=kept, sinks=True, prefixes=((0, 1, 2, 3, 0), (1, 0, 0, 0, 1)))
    (q, k, v), pages, arrays = make(case)
    with interpreted("on_wait"):
        out, _ = jax.block_until_ready(run(case, "tpu", (q * 1e4, k * 1e4, v), pages, arrays))
    assert np.isfinite(out).all()


def on_7x(monkeypatch):
    """Pages of 8 bits are taken in pairs of blocks, and float8 is multiplied as it is kept."""
    monkeypatch.setattr(tpu_block, "target_chip", lambda: "7x")


EIGHT_BITS = {"S": 32, "K": 2, "H": 4, "dtype": jnp.bfloat16}
PAIRS = {
    "float8, one block and three": (
        Case(((15, 1), (69, 1)), 2, kept=jnp.float8_e4m3fn, **EIGHT_BITS), "on_wait",
    ),
    "int8, some without work, sinks": (
        Case(((128, 1), (0, 0), (0, 1), (31, 1), (95, 1)), 5, sinks=True, kept=jnp.int8, **EIGHT_BITS), "eager",
    ),
}  # fmt: skip
MORE_PAIRS = {
    "float8, a mix, softcap": (
        Case(
            ((33, 1), (40, 9), (70, 1)), 3, kept=jnp.float8_e4m3fn, **EIGHT_BITS, options={"softcap": 2.0}
        ),
        "eager",
    ),
    "int8, window": (
        Case(((70, 1), (3, 1), (129, 1), (300, 1)), 4, kept=jnp.int8, **EIGHT_BITS, options={"window": 97}), "on_wait",
    ),
    "int8, several steps, some without work": (
        Case(((130, 1), *[(40 * n, 1) for n in range(7)], *[(0, 0)] * 8, *[(9, 1)] * 3, *[(0, 0)] * 6), 25,
             kept=jnp.int8, **EIGHT_BITS),
        "on_wait",
    ),
    "int8, nobody": (Case(((0, 0), (0, 0)), 2, kept=jnp.int8, **EIGHT_BITS), "on_wait"),
    "int8, prefixes": (
        Case(((70, 1), (66, 1), (40, 5), (181, 1)), 4, kept=jnp.int8, sinks=True, **EIGHT_BITS,
             prefixes=((0, 1, 2, 1), (0, 2, 0, 2))),
        "on_wait",
    ),
    "float8, prefixes, window": (
        Case(((70, 1), (166, 1), (40, 5), (181, 1)), 4, kept=jnp.float8_e4m3fn, **EIGHT_BITS,
             prefixes=((0, 1, 2, 1), (0, 2, 0, 2)), options={"window": 80}),
        "eager",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_blocks(name, monkeypatch):
    on_7x(monkeypatch)
    monkeypatch.setattr(tpu, "ROWS", 8)
    check(*PAIRS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PAIRS)
def test_more_pairs_of_blocks(name, monkeypatch):
    on_7x(monkeypatch)
    monkeypatch.setattr(tpu, "ROWS", 8)
    check(*MORE_PAIRS[name])


def feed(q, k, v, counts, *, row, neighbours, seed, before=0, shared=False, kept=None, implementation="tpu"):
    """One request's tokens through the cache in steps of `counts`, in request row `row` of three; its results.

    `before`: tokens that neighbours have already. `shared`: a neighbour's first pages are this request's, and its
    decodes are in one group with it.
    """
    rng = np.random.default_rng(seed)
    S, R, chunk = 16 if kept is None else 32, 3, len(q) + 9
    M = (len(q) + 28) // S
    table = rng.permutation(R * M).reshape(R, M).astype(np.int32)
    layout = "joint" if implementation == "tpu" else "split"
    pages = init_pages(1, R * M, S, 1, 16, kept or q.dtype, layout=layout)
    pages = jax.tree.map(lambda x: jnp.full_like(x, np.nan), pages)
    lengths, done, outs = np.zeros(R, np.int32), 0, []
    lengths[list(neighbours)] = before
    for count in counts:
        T = R + (chunk if count > 1 else 0)
        batch = [np.full((T, *x.shape[1:]), np.nan, x.dtype) for x in (q, k, v)]
        starts, news = np.zeros(R, np.int32), np.zeros(R, np.int32)
        for r in neighbours:
            starts[r], news[r] = r, 1
            for x in batch:
                x[r] = rng.standard_normal(x.shape[1:])
        starts[row], news[row] = (R + seed if count > 1 else row), count
        mine = slice(starts[row], starts[row] + count)
        for x, y in zip(batch, (q, k, v), strict=True):
            x[mine] = y[done : done + count]
        arrays = {"page_table_RM": table, "query_start_R": starts, "query_length_R": news, "layer": jnp.int32(0)}
        done += count
        if shared and count == 1:
            (other,) = neighbours
            same = 64 // S
            table[other, :same], lengths[other] = table[row, :same], max(lengths[other], 64)
            leader, alike = np.arange(R, dtype=np.int32), np.zeros(R, np.int32)
            leader[other], alike[[row, other]] = row, same
            arrays["prefixes"] = SharedPrefixes(leader, alike)
        lengths += news
        out, pages = step(batch, pages, {**arrays, "lengths_R": lengths.copy()}, R, implementation, ())
        outs.append(np.asarray(out)[mine])
    return np.concatenate(outs)


def tree_over_lanes(x):
    for shift in (64, 32, 16, 8, 4, 2, 1):
        x = x + jnp.roll(x, shift, 1)
    return x


WAYS = {
    "decodes": ((1, 1), {"row": 0, "neighbours": (), "seed": 0}),
    "chunks": ((8,), {"row": 2, "neighbours": (1,), "seed": 3}),
    "beside": ((1, 1), {"row": 2, "neighbours": (1,), "seed": 3}),
    "shared": ((1, 1), {"row": 0, "neighbours": (1,), "seed": 1, "shared": True}),
}


def check_bits(kept, implementation, tokens=68, ways=WAYS):
    """In chunks, decode by decode, beside a neighbour, and in one group with it: decodes and chunks are two kernels."""
    rng = np.random.default_rng(7)
    dtype = jnp.float32 if kept is None else jnp.bfloat16
    q, k, v = (np.asarray(jnp.asarray(rng.standard_normal((tokens, heads, 16)), dtype)) for heads in (2, 1, 1))
    go = partial(feed, q, k, v, kept=kept, implementation=implementation)
    alone = go([tokens - 28, 28], row=0, neighbours=(), seed=0)
    assert np.isfinite(np.asarray(alone, np.float32)).all()
    for way, (last, how) in ways.items():
        np.testing.assert_array_equal(go([tokens - sum(last), *last], **how), alone, err_msg=way)


@pytest.mark.usefixtures("full_compile")
@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, jnp.int8, jnp.float8_e4m3fn])
def test_a_request_gives_the_same_bits_in_any_company(kept, monkeypatch):
    """The CPU that stands in for a TPU rounds rows alike in products with 64 columns and more, but adds up a row in an
    order that hangs on how many there are. A TPU does that, for the 128 lanes at the end, by an instruction.
    """
    monkeypatch.setattr(tpu, "BLOCK_TOKENS", (64, 64))
    monkeypatch.setattr(tpu_block, "over_lanes", tree_over_lanes)
    on_7x(monkeypatch)
    with interpreted("on_wait"):
        check_bits(kept, "tpu")


@pytest.mark.usefixtures("full_compile")
@pytest.mark.slow
def test_a_request_that_two_cores_cut_gives_the_same_bits_in_any_company(monkeypatch):
    """Of two parts; its company moves the cut, and chunks are never cut. It takes a minute, so there is one."""
    monkeypatch.setattr(tpu, "BLOCK_TOKENS", (64, 64))
    monkeypatch.setattr(tpu, "PART_TOKENS", 64)
    monkeypatch.setattr(tpu, "target_chip", lambda: "v5p")
    monkeypatch.setattr(tpu, "tile_rows", lambda T, *_: min(64, -(-T // 16) * 16))
    monkeypatch.setattr(tpu_block, "over_lanes", tree_over_lanes)
    after_a_long_one = (1, 1), {"row": 2, "neighbours": (1,), "seed": 4, "before": 94}
    with interpreted("on_wait", cores=2):
        check_bits(None, "tpu", 100, {"after a long one": after_a_long_one})


def test_what_the_kernels_refuse():
    def refused(message, layout="joint", S=16, **kinds):
        pages = init_pages(1, 2, S, 1, 16, **kinds, layout=layout)
        x = jnp.zeros((2, 1, 16), jnp.float32)
        one = jnp.ones(1, jnp.int32)
        arrays = {"layer": 0, "lengths_R": one, "query_start_R": 0 * one, "query_length_R": one, "decode_rows": 1}
        with pytest.raises(NotImplementedError, match=message):
            paged_attention(x, x, x, pages, page_table_RM=jnp.zeros((1, 2), jnp.int32), implementation="tpu", **arrays)

    refused('layout "split"', layout="split")
    refused("a multiple of 8 is needed", S=4)
    refused("a multiple of 32 is needed", dtype=jnp.int8)
    refused("pages of float16", dtype=jnp.float16)
