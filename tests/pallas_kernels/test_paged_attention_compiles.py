"""paged_attention's TPU kernels through libtpu's compiler, with every option, for chips that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from benchmarks.static import Program, Request, compile_all
from twinax.pallas_kernels.paged_attention import SharedPrefixes, init_pages, paged_attention

SLOW = pytest.mark.slow
pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
CHIPS = ("v5e", "v5p", "v6e", "7x")
CASES = {
    "bfloat16": {},
    "fp8, softcap, sinks": {"dtype": "float8_e4m3fn", "softcap": 30.0, "sinks": True},
    "latent": {"H": 16, "K": 1, "D": 576, "latent": 512},
    "int8, window": {"dtype": "int8", "window": 100},
    "shared prefixes, window": {"prefixes": True, "window": 200, "chunk": 0},
    "latent int8, sinks": {"H": 8, "K": 1, "D": 576, "latent": 512, "dtype": "int8", "sinks": True},
    "latent fp8": {"H": 8, "K": 1, "D": 576, "latent": 512, "dtype": "float8_e4m3fn"},
    "fp8, shared prefixes, sinks": {"dtype": "float8_e4m3fn", "prefixes": True, "sinks": True, "chunk": 0},
    "heads of 64, window, sinks": {"H": 16, "K": 2, "D": 64, "window": 128, "sinks": True},
    "heads of 80, softcap": {"D": 80, "softcap": 50.0},
    "heads of 256": {"D": 256, "softcap": 50.0, "window": 100},
    "one key head for each, pages of 48": {"H": 4, "K": 4, "S": 48},
    "latent, long tables, sinks": {"H": 16, "K": 1, "D": 576, "latent": 512, "M": 70, "sinks": True},
    "one key head, int8, long tables, shared prefixes, window": {
        "H": 8, "K": 1, "dtype": "int8", "M": 70, "window": 3000, "prefixes": True, "chunk": 0,
    },
    "float32": {"q": "float32", "dtype": "float32"},
    "float32 over fp8": {"q": "float32", "dtype": "float8_e4m3fn"},
    "int8, pages of 128": {"dtype": "int8", "S": 128, "K": 4},
}  # fmt: skip


def build(
    target,
    H=8,
    K=2,
    D=128,
    S=64,
    M=10,
    latent=None,
    dtype="bfloat16",
    q="bfloat16",
    sinks=False,
    prefixes=False,
    chunk=24,
    num_pages=99,
    **options,
):
    """For `benchmarks.static`: a step of 8 decodes, and of `chunk` tokens of prompts."""
    R, rows = 9, 8
    pages = jax.eval_shape(lambda: init_pages(2, num_pages, S, K, D, jnp.dtype(dtype), latent=latent, layout="joint"))
    pages = jax.tree.map(lambda x: target.array(x.shape, x.dtype), pages)
    qkv = [target.array((rows + chunk, heads, D), q) for heads in (H, K, K)]
    of_each = target.array((R,), "int32")
    arrays = dict.fromkeys(("lengths_R", "query_start_R", "query_length_R"), of_each)
    arrays |= {"layer": target.array((), "int32"), "page_table_RM": target.array((R, M), "int32")}
    if sinks:
        arrays["sinks_H"] = target.array((H,), "float32")
    if prefixes:
        arrays["prefixes"] = SharedPrefixes(of_each, of_each)

    def step(qkv, pages, arrays):
        qkv = (*qkv[:2], None) if latent else qkv
        return paged_attention(*qkv, pages, decode_rows=rows, implementation="tpu", **arrays, **options)

    return Program(jax.jit(step, donate_argnums=1), (qkv, pages, arrays), 0.0, 0.0)


def compiles(chip, names, **more):
    found = compile_all([Request(chip, f"{__file__}:build", {**CASES[name], **more}) for name in names], profiled=False)
    assert {name: x.failed for name, x in zip(names, found, strict=True)} == dict.fromkeys(names)
    for name, x in zip(names, found, strict=True):
        assert x.spills is not None and x.temp_bytes is not None, name
        # A chunk's scores are more than there are registers, and lie in memory whoever puts them there; so do the many
        # products of float32, whose pages are for tests.
        rest = sum(n for operation, n in x.spilled.items() if not operation.startswith("paged_chunk"))
        assert "float32" in name or rest <= 300, (name, x.spilled)
        assert x.temp_bytes < 3 * 2**20, (name, x.temp_bytes)  # the smallest pool has twice as many


def test_compiles_and_copies_no_pool_of_pages():
    """Nor the pool of scales, whatever their number: here they are 131 and 4 MB."""
    compiles("v5e", ["int8, window"], num_pages=2000)


@SLOW
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_with_every_option(chip):
    """The plain case for every chip, the others for one of them in turn: all for all take a quarter of an hour.

    Latents and long tables for v5p too, whose two cores divide the requests, and cut long ones.
    """
    place = CHIPS.index(chip)
    names = [name for n, name in enumerate(CASES) if n == 0 or n % len(CHIPS) == place]
    more = [name for name in CASES if chip == "v5p" and ("latent" in name or "long tables" in name)]
    compiles(chip, list(dict.fromkeys(names + more)))


@SLOW
@pytest.mark.parametrize("chip", ["v6e"])
def test_many_rows_fit_beside_what_the_kernel_may_use(chip):
    """XLA brings what is small enough into the kernel's memory, and counts what the kernel may use and does use."""
    given = {"H": 32, "K": 8, "M": 40, "num_pages": 2000, "chunk": 2040}
    (found,) = compile_all([Request(chip, f"{__file__}:build", given)], profiled=False)
    assert found.failed is None
