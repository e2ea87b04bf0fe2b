"""TPU kernels whose copies are Pallas's own, interpreted on two cores in both DMA modes: the same numbers, no races.

Two cores (v5p has them) find an axis of a grid that is said to be parallel and is not. What is not there yet is nan.
Kernels that start copies themselves, paged and ring attention, have tests of this in their own files.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels import test_cross_entropy as cross_entropy
from tests.pallas_kernels import test_flash_attention as flash
from tests.pallas_kernels import test_flash_attention_tpu as flash_tpu
from tests.pallas_kernels import test_grouped_matmul as grouped
from tests.pallas_kernels import test_quantized_matmul as quantized
from tests.thorough import thorough
from twinax.pallas_kernels.flash_attention import tpu

BOTH = pytest.mark.parametrize("mode", ["eager", "on_wait"])


@contextlib.contextmanager
def two_cores(mode):
    params = pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        ("causal, grouped, a rest", "eager"),
        ("causal, grouped, a rest", "on_wait"),
        ("segments, sinks, softcap", "on_wait"),
        ("bias of every head, offsets by row", "eager"),
    ],
)
def test_flash_attention_forward_and_backward(case, mode, monkeypatch):
    monkeypatch.setattr(tpu, "blocks", lambda *_: (128, 128))
    monkeypatch.setattr(flash, "CASES", flash_tpu.QUICK | flash_tpu.SLOW)
    with jax.enable_x64(True):
        wanted = flash.outputs_and_gradients(*flash.make(case), "reference")
    with two_cores(mode):
        got = flash.outputs_and_gradients(*flash.make(case, np.float32), "tpu")
    flash.check(got, wanted, 3e-6)


@pytest.mark.parametrize("mode", [pytest.param("eager", marks=pytest.mark.slow), "on_wait"])
@pytest.mark.parametrize("case", thorough(["int8, a channel", "int4, groups of 128 with a rest", "fp8 x fp8, blocks"]))
def test_quantized_matmul(case, mode):
    x, weight, bias, options = quantized.make(case)
    run = jax.jit(lambda given: quantized.product(*given, implementation="tpu", **options))
    with two_cores(mode):
        y = jax.block_until_ready(run((x, weight, bias)))
    quantized.check(x, weight, bias, options, y)


@pytest.mark.slow
@BOTH
def test_grouped_matmul(mode):
    arguments = grouped.make(grouped.LONGEST, np.float32)

    @jax.jit
    def products(x, weight, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes, implementation="tpu"), x, weight)
        return y, *pullback(dy)

    with two_cores(mode):
        got = jax.block_until_ready(products(*arguments))
    want = grouped.by_hand(*(a.astype(np.float64) for a in arguments[:3]), arguments[3])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max())


@pytest.mark.slow
@BOTH
def test_cross_entropy(mode):
    (*arguments, _), options = cross_entropy.make("all of it", np.float32)
    run = jax.jit(partial(cross_entropy.cross_entropy, implementation="tpu", **options))
    with two_cores(mode):
        loss = jax.block_until_ready(run(*arguments))
    want = cross_entropy.by_hand(*(a.astype(np.float64) for a in arguments[:2]), arguments[2], options)
    np.testing.assert_allclose(loss, want, rtol=3e-6, atol=3e-6)


def test_a_race_is_found():
    """Both cores write one block."""

    def kernel(x, y):
        y[...] = x[...]

    def write(x):
        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )(x)

    with pytest.raises(AssertionError), two_cores("eager"):
        jax.block_until_ready(jax.jit(write)(jnp.ones((16, 128))))
