"""paged_attention's GPU kernels: in Pallas's interpreter, or on a GPU where there is one, and through the compiler."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program
from tests.pallas_kernels import gpu_programs
from tests.pallas_kernels.test_paged_attention import Case, filled, make, run
from tests.pallas_kernels.test_paged_attention_tpu import check_bits
from twinax.pallas_kernels.paged_attention import OPERATION, SharedPrefixes, gpu, init_pages

GPU = jax.default_backend() == "gpu"
SLOW = pytest.mark.slow
SIZES = {"D": 16, "S": 16}
CASES = {
    "decodes": Case(((6, 1), (0, 0), (33, 1), (3, 1), (0, 1)), 5, H=4, **SIZES),
    "decodes, window, softcap": Case(((6, 1), (90, 1), (0, 1)), 3, H=3, K=1, window=40, softcap=1.5, **SIZES),
    "a prompt longer than a tile": Case(((3, 70), (0, 0)), 2, H=2, K=2, window=20, **SIZES),
    "a mix": Case(((19, 1), (0, 26), (0, 0), (2, 1), (35, 14)), 5, spare=4, H=6, **SIZES),
    "nobody": Case(((0, 0), (0, 0)), 2, spare=2, **SIZES),
}
QUICK = ("decodes, window, softcap", "a mix")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of two pages; interpreted, where there is no GPU."""
    monkeypatch.setattr(gpu, "PART", 32)
    if not GPU:
        monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
        monkeypatch.setattr(gpu.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
        monkeypatch.setattr(gpu.plgpu, "debug_barrier", lambda: None)  # one program after the other


@pytest.mark.parametrize("case", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CASES])
def test_against_the_reference(case):
    case = CASES[case]
    with jax.enable_x64(True):
        batch, num_pages = make(case)
        wanted, _ = run(batch, filled(case, num_pages, np.float64), "reference")
    batch, _ = make(case, np.float32)
    out, pages = run(batch, filled(case, num_pages, np.float32), "gpu")
    np.testing.assert_allclose(out, wanted, rtol=5e-6, atol=5e-6)
    of_xla = run(batch, filled(case, num_pages, np.float32), "xla")[1]
    jax.tree.map(np.testing.assert_array_equal, pages, of_xla)


OPTIONS = {
    "sinks": {},
    "heads of 80, sinks": {"D": 80},
    "int8": {"dtype": jnp.int8},
    "fp8": {"dtype": jnp.float8_e4m3fn},
    "latent, in groups of heads": {"D": 48, "latent": 32, "H": 24, "K": 1},
}


@pytest.mark.parametrize("what", [pytest.param(x, marks=() if "latent" in x else SLOW) for x in OPTIONS])
def test_options(what, monkeypatch):
    given = OPTIONS[what]
    monkeypatch.setattr(gpu, "WIDE", 40 if "latent" in what else 256)
    sizes = {name: x for name, x in given.items() if name in ("D", "H", "K")}
    case = dataclasses.replace(CASES["a mix"], **sizes)
    batch, num_pages = make(case, np.float32)
    rng = np.random.default_rng(5)
    dtype, latent = given.get("dtype", jnp.float32), given.get("latent")
    pages = init_pages(2, num_pages, 16, case.K, case.D, dtype, layout="split", latent=latent)
    if dtype != jnp.float32:
        fill = {"int8": lambda shape: rng.integers(-90, 90, shape), "float32": lambda shape: rng.random(shape) / 90}
        fill["float8_e4m3fn"] = lambda shape: 90 * rng.standard_normal(shape)
        pages = jax.tree.map(lambda x: jnp.asarray(fill[x.dtype.name](x.shape), x.dtype), pages)
    options = {**batch.options, "scale": 0.3, "prefixes": None, "window": 30, "layer": 1, "sinks_H": None}
    if "sinks" in what:
        options["sinks_H"] = jnp.asarray(rng.standard_normal(case.H), jnp.float32)
    q, k, v = map(jnp.nan_to_num, (batch.q, batch.k, batch.v))
    ragged = jax.tree.map(jnp.asarray, batch.ragged)
    v = None if latent else v
    gpu_out, xla_out = (
        jax.jit(partial(OPERATION.load(name), **options))(q, k, v, pages, **ragged)[0] for name in ("gpu", "xla")
    )
    np.testing.assert_allclose(gpu_out, xla_out, rtol=2e-5, atol=2e-5)


# Lengths of decodes whose tables begin alike (PART is two pages of 16): leaders, and pages that are shared.
SHARED = {
    "three, and one alone": ((70, 66, 40, 81), (0, 0, 2, 0), (4, 4, 0, 4), {}),
    "more than a tile, window": ((50,) * 9, (0,) * 9, (3,) * 9, {"window": 40}),
    "two groups, int8, an idle leader": ((0, 90, 70, 90, 65), (0, 0, 2, 0, 2), (4, 4, 3, 4, 3), {"dtype": jnp.int8}),
}


@pytest.mark.parametrize("what", [pytest.param(x, marks=() if "alone" in x else SLOW) for x in SHARED])
def test_a_shared_prefix_changes_no_bit(what, monkeypatch):
    lengths, leader, count, options = SHARED[what]
    monkeypatch.setattr(gpu, "ROWS", 16)
    R, M, S, K, H, D = len(lengths), 6, 16, 2, 4, 16
    rng = np.random.default_rng(3)
    table = np.arange(R * M).reshape(R, M)
    for r in range(R):
        table[r, : count[r]] = table[leader[r], : count[r]]
    dtype = options.get("dtype", jnp.float32)
    pages = init_pages(1, R * M, S, K, D, dtype, layout="split")
    whole = jnp.issubdtype(dtype, jnp.integer)
    fill = lambda x: rng.integers(-90, 90, x.shape) if x.dtype == jnp.int8 else rng.random(x.shape) / (90**whole)  # noqa: E731
    pages = jax.tree.map(lambda x: jnp.asarray(fill(x), x.dtype), pages)
    q, k, v = (jnp.asarray(rng.standard_normal((R, n, D)), jnp.float32) for n in (H, K, K))
    has = np.asarray(lengths) > 0

    def step(name, prefixes):
        given = (q, k, v, pages)
        arrays = {"page_table_RM": table, "lengths_R": np.asarray(lengths), "query_start_R": np.arange(R)}
        static = {"layer": 0, "decode_rows": R, "scale": 0.3, "softcap": None, "window": options.get("window")}
        arrays = jax.tree.map(jnp.asarray, {**arrays, "query_length_R": has.astype(int)})
        return OPERATION.load(name)(*given, **arrays, **static, sinks_H=None, prefixes=prefixes)

    prefixes = SharedPrefixes(jnp.asarray(leader), jnp.asarray(count))
    (out, kept), (alone, kept_alone), (wanted, kept_xla) = step("gpu", prefixes), step("gpu", None), step("xla", None)
    np.testing.assert_array_equal(out, alone)
    jax.tree.map(np.testing.assert_array_equal, (kept, kept), (kept_alone, kept_xla))
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)


@SLOW
@pytest.mark.parametrize("what", ["shared", "own"])
def test_shared_pages_are_read_where_the_leader_has_them(what, monkeypatch):
    """What a follower's own table says of a part that it shares is not looked at: its pages there are nan."""
    monkeypatch.setattr(gpu, "ROWS", 16)
    pages = init_pages(1, 8, 16, 1, 16, jnp.float32, layout="split")
    pages = jax.tree.map(lambda x: jnp.ones_like(x).at[:, 7].set(jnp.nan), pages)
    table = jnp.asarray([[0, 1, 2], [7, 7, 3]])
    x = jnp.ones((2, 1, 16))
    leader = jnp.asarray([0, 0 if what == "shared" else 1])
    out, _ = OPERATION.load("gpu")(
        x, x, x, pages, layer=0, page_table_RM=table, lengths_R=jnp.asarray([40, 40]), query_start_R=jnp.arange(2),
        query_length_R=jnp.ones(2, int), decode_rows=2, window=None, scale=1.0, softcap=None, sinks_H=None,
        prefixes=SharedPrefixes(leader, jnp.asarray([2, 2 if what == "shared" else 0])),
    )  # fmt: skip
    assert bool(jnp.isfinite(out[1]).all()) == (what == "shared")


@SLOW
def test_large_scores_stay_finite():
    case = CASES["a mix"]
    batch, num_pages = make(case, np.float32)
    batch.q[:], batch.k[:] = batch.q * 1e4, batch.k * 1e4
    out, _ = run(batch, filled(case, num_pages, np.float32), "gpu")
    assert np.isfinite(out).all()


@SLOW
def test_neighbours_change_no_bit():
    case = CASES["a mix"]
    batch, num_pages = make(case, np.float32)
    pages, mine = filled(case, num_pages, np.float32), batch.owner_rows(4)
    out, _ = run(batch, pages, "gpu")
    batch.ragged["query_length_R"] = np.where(np.arange(5) == 4, batch.ragged["query_length_R"], 0)
    np.testing.assert_array_equal(run(batch, pages, "gpu")[0][mine], out[mine])


@SLOW
@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("kept", [None, jnp.int8])
def test_a_request_gives_the_same_bits_in_any_company(kept):
    """With float32 and bfloat16 rows."""
    check_bits(kept, "gpu")


def build(target, dtype="bfloat16", H=32, K=8, D=128, latent=None, sinks=False, prefixes=False, **options):
    """For `benchmarks.static`: 8 decodes and 256 tokens of prompts, heads of Llama 3 8B if not told."""
    S, R, M, T = 64, 12, 32, 264
    x, i = partial(target.array, dtype="bfloat16"), partial(target.array, dtype="int32")
    pages = jax.eval_shape(lambda: init_pages(2, 512, S, K, D, jnp.dtype(dtype), layout="split", latent=latent))
    pages = jax.tree.map(lambda p: target.array(p.shape, p.dtype), pages)

    def step(q, k, v, pages, table, lengths, start, length, sinks_H):
        ragged = table, lengths, start, length
        softcap, sinks_H = options.get("softcap"), sinks_H if sinks else None
        v = None if latent else v
        shared = SharedPrefixes(length, length) if prefixes else None
        return gpu.attend(q, k, v, pages, 1, *ragged, 8, options.get("window"), 0.1, softcap, sinks_H, shared)

    inputs = (x((T, H, D)), x((T, K, D)), x((T, K, D)), pages, i((R, M)), i((R,)), i((R,)), i((R,)), x((H,)))
    return Program(step, inputs, 0.0, 1.0)


COMPILED = [
    {},
    {"prefixes": True},
    {"prefixes": True, "dtype": "int8", "sinks": True, "window": 500},
    {"prefixes": True, "H": 128, "K": 1, "D": 576, "latent": 512},
    {"dtype": "int8", "window": 500, "softcap": 20.0},
    {"dtype": "float8_e4m3fn", "sinks": True, "window": 500},
    {"H": 128, "K": 1, "D": 576, "latent": 512},
    {"H": 16, "K": 1, "D": 576, "latent": 512, "dtype": "float8_e4m3fn"},
    {"D": 80, "sinks": True},
    {"H": 64, "D": 64, "sinks": True, "window": 128},
    {"H": 16, "D": 256, "softcap": 50.0, "window": 500},
]


@SLOW
@pytest.mark.usefixtures("full_compile")
@gpu_programs.all_compile
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
def test_compiles_without_spills(chip):
    cases = [x for x in COMPILED if chip != "a100" or "float8" not in x.get("dtype", "")]
    gpu_programs.check(chip, [(__file__, case) for case in cases])
