"""A model with quantised weights as one with floats, for what cannot take them: training."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..layers.quantized import dequantize, quantized
from .config import DecoderConfig
from .decoder import Params, param_shapes, param_shardings


def dequantized(
    config: DecoderConfig, params: Mapping[str, jax.Array], dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> tuple[DecoderConfig, Params]:
    """The config without quantisation, and its parameters: quantised weights as what they stand for, in `dtype`.

    Args:
        mesh: where the new arrays live, as `param_shardings` has it; by default beside the old ones.
    """
    kept = config.quantization
    if kept is None:
        return config, dict(params)
    plain = dataclasses.replace(config, quantization=None)
    places = {} if mesh is None else param_shardings(plain, mesh)
    found: Params = {}

    def meant(values: jax.Array, scales: jax.Array) -> jax.Array:
        return dequantize(quantized(kept, values, scales), dtype)

    for name in param_shapes(plain):
        if name in params:
            found[name] = params[name]
            continue
        stem = name.removesuffix("weight")
        make = jax.jit(meant, out_shardings=places.get(name))
        found[name] = make(params[f"{stem}values"], params[f"{stem}scales"])
    return plain, found
