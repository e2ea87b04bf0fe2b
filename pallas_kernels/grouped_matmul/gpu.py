"""Grouped products on NVIDIA GPUs: the first of these kernels that takes the arguments.

| chip | kernel | what |
|---|---|---|
| any | `gpu_triton.py`, `../quantized_matmul/gpu_triton.py` | floats and quantised weights |

The gradient of rows takes quantised weights as floats, all of them in memory (training over quantised experts).

There was no GPU when this was written: numbers are those of Pallas's interpreter, registers and spills are ptxas's, and
nothing has been timed.
"""

import jax

from ..quantized_matmul import QuantizedWeight, dequantize
from ..quantized_matmul.gpu import check_platform, check_rows


def grouped_matmul(x_NI: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    return _product(x_NI, weight_GOI, sizes_G, contract=1)


def grouped_matmul_dx(dy_NO: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    if isinstance(weight_GOI, QuantizedWeight):
        weight_GOI = dequantize(weight_GOI, dy_NO.dtype)
    return _product(dy_NO, weight_GOI, sizes_G, contract=0)


def grouped_matmul_dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    check_platform()
    check_rows(x_NI.dtype)
    from .gpu_triton import dweight

    return dweight(x_NI, dy_NO, sizes_G)


def _product(x_NA: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array, contract: int) -> jax.Array:
    check_platform()
    check_rows(x_NA.dtype, weight_GOI.format if isinstance(weight_GOI, QuantizedWeight) else None)
    from ..quantized_matmul.gpu_triton import product

    return product(x_NA, weight_GOI, sizes_E=sizes_G, contract=contract)
