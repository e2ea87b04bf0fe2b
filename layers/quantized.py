"""Weights of layers that are kept quantised: two parameters, `values` and `scales`, in the place of one.

Shapes: O outputs, I inputs, as `quantized_matmul.QuantizedWeight` has them.
"""

import jax
from flax import nnx

from ..pallas_kernels.quantized_matmul import PACKED, QuantizedWeight, dequantize, quantize, with_inputs_first
from ..sharding.rules import current
from .quantization_config import Quantization

__all__ = ["dequantize", "quantized", "quantized_params", "quantized_weight"]


def quantized_params(
    draw_OI: jax.Array, quantization: Quantization, axes: tuple[str | None, ...]
) -> tuple[nnx.Param, nnx.Param]:
    """Values and scales of the nearest quantised weight [..., O, I], whose logical axes are `axes`."""
    weight = quantize(draw_OI, quantization.format, block=quantization.block)
    weight = with_inputs_first(weight) if quantization.inputs_first else weight
    *stack, out, into = axes
    order = (into, out) if quantization.format in PACKED or quantization.inputs_first else (out, into)
    return nnx.Param(weight.values, axes=(*stack, *order)), nnx.Param(weight.scales, axes=(*stack, None, None))


def quantized_weight(quantization: Quantization, values: nnx.Param, scales: nnx.Param) -> QuantizedWeight:
    """The weight that `quantized_params` took apart."""
    if current() is not None:
        raise NotImplementedError(
            f"Weights in {quantization.format} are used by one device so far, and a mesh of several is in use. Leave "
            "out the plan."
        )
    return quantized(quantization, values[...], scales[...])


def quantized(quantization: Quantization, values: jax.Array, scales: jax.Array) -> QuantizedWeight:
    """The weight [..., O, I] of these arrays."""
    return QuantizedWeight(values, scales, None, quantization.format, quantization.block, quantization.inputs_first)
