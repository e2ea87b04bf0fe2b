"""Every two options of quantized_matmul together, for every candidate, against the reference in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tests.pallas_kernels.pairs import pairs
from tests.pallas_kernels.test_quantized_matmul import BF16, F32, check, exact, floats, product, quantized, run
from tests.thorough import thorough
from twinax.pallas_kernels.quantized_matmul import ACTIVATIONS, gpu, gpu_triton, with_inputs_first, xla

OPTIONS = (
    *("four bits", "float", "groups", "zero points", "quantised rows", "static scale", "bfloat16"),
    *("no bias", "activation", "a rest", "inputs first"),
)
FORMATS = {(False, False): "int8", (True, False): "int4", (False, True): "fp8_e4m3", (True, True): "mxfp4"}
# Where rows' scales are from is nothing to a gradient; what many rows go through may be.
OF_GRADIENTS = tuple("many rows" if option == "static scale" else option for option in OPTIONS)


def named(options: tuple[str, ...]) -> dict[str, frozenset[str]]:
    return {", ".join(option for option in options if option in has) or "no option": has for has in pairs(options)}


CASES, GRADIENTS = named(OPTIONS), named(OF_GRADIENTS)


def make(name: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """What a format has not is left out: floats' zero points, mxfp4's other blocks and quantised rows."""
    cases = CASES if name in CASES else GRADIENTS
    has, rng = cases[name], np.random.default_rng(list(cases).index(name))
    form = FORMATS["four bits" in has, "float" in has]
    M = 150 if "many rows" in has else 20 if "inputs first" in has else 3
    I, O = 256 - 56 * ("a rest" in has), 128 - 28 * ("a rest" in has)
    block = (1, 32) if form == "mxfp4" else (128 if form == "fp8_e4m3" else 1, 64) if "groups" in has else (1, None)
    zeros = "zero points" in has and form in ("int8", "int4")
    w = jnp.asarray(rng.standard_normal((O, I)) + 0.5 * zeros, jnp.float32)
    weight = quantized(w, form, block, zeros)
    if "inputs first" in has:
        weight = with_inputs_first(weight)
    x = jnp.asarray(rng.standard_normal((M, I)) * np.geomspace(1, 30, M)[:, None], BF16 if "bfloat16" in has else F32)
    options: dict[str, Any] = {"activation": "gelu" if "activation" in has else None, "activation_format": None}
    if "quantised rows" in has and form != "mxfp4":
        options["activation_format"] = "fp8" if form == "fp8_e4m3" else "int8"
        if "static scale" in has:
            options["activation_scale"] = np.float32(0.05 if form == "fp8_e4m3" else 0.2)
    bias = None if "no bias" in has else jnp.asarray(rng.standard_normal(O), jnp.float32)
    return x, weight, bias, options


@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_xla_and_tpu(name, implementation):
    x, weight, bias, options = make(name)
    check(x, weight, bias, options, run(product, implementation, x, weight, bias, **options))


@pytest.mark.parametrize("name", CASES)
def test_xla_on_accelerators(name, monkeypatch):
    """Its own products of int8 and float8, which GPUs take where rows have one scale each."""
    monkeypatch.setattr(xla, "known_platform", lambda: None)
    x, weight, bias, options = make(name)
    check(x, weight, bias, options, run(product, "xla", x, weight, bias, **options))


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="for Pallas's interpreter")
@pytest.mark.parametrize("name", CASES)
def test_gpu(name, monkeypatch):
    monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
    monkeypatch.setattr(gpu_triton.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    x, weight, bias, options = make(name)
    if options["activation_format"] and weight.scales.shape[0] == 1 and weight.format in ("int8", "fp8_e4m3"):
        with pytest.raises(NotImplementedError, match="XLA's own product"):
            run(product, "gpu", x, weight, bias, **options)
        return
    check(x, weight, bias, options, run(product, "gpu", x, weight, bias, **options))


def gradients(x, weight, bias, dy, implementation, **options):
    """Of x, and of the bias where there is one."""
    given = (x,) if bias is None else (x, bias)
    return jax.vjp(lambda x, b=None: product(x, weight, b, implementation=implementation, **options), *given)[1](dy)


def check_gradients(name: str, implementation: str) -> None:
    """Against the dequantised weight in float64. Roundings go both ways: a row's error is as small as one element's."""
    x, weight, bias, options = make(name)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((len(x), weight.shape[0])), x.dtype)
    got = run(gradients, implementation, x, weight, bias, dy, **options)
    z = exact(product, x, weight, bias, **{**options, "activation": None})
    with jax.enable_x64(True):
        activation = ACTIVATIONS.get(options["activation"], lambda z: z)
        dz = np.asarray(jax.vjp(activation, jnp.asarray(z))[1](jnp.asarray(np.asarray(dy, np.float64)))[0])
    wants = dz @ np.asarray(floats(weight), np.float64), dz.sum(0)
    for grad, want, like in zip(got, wants, (x, bias), strict=False):
        assert grad.dtype == like.dtype and grad.shape == like.shape
        error = np.linalg.norm(np.asarray(grad, np.float64) - want, axis=-1) / np.linalg.norm(want, axis=-1)
        assert error.max() <= (2.0**-8 if grad.dtype == jnp.bfloat16 else 2.0**-16)


@pytest.mark.parametrize("name", thorough(GRADIENTS, 4))
def test_gradients_by_xla(name):
    check_gradients(name, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_on_tpus(name):
    check_gradients(name, "tpu")


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="for Pallas's interpreter")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_on_gpus(name, monkeypatch):
    """By XLA's products, too, as for GPUs."""
    monkeypatch.setattr(xla, "known_platform", lambda: None)
    monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
    monkeypatch.setattr(gpu_triton.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    _, weight, _, options = make(name)
    by_xla = options["activation_format"] and weight.scales.shape[0] == 1 and weight.format in ("int8", "fp8_e4m3")
    check_gradients(name, "xla" if by_xla else "gpu")
