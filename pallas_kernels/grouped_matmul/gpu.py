"""Grouped products on NVIDIA GPUs: the first of these kernels that takes the arguments.

| chip | kernel | what |
|---|---|---|
| H100, H200 | `gpu_hopper.py`, `gpu_hopper_dweight.py` (Mosaic GPU) | bfloat16, float16; I and O multiples of 64 |
| H100, H200 | `../quantized_matmul/gpu_hopper.py` | the same with quantised weights, but for zero points |
| B200, GB200 | `gpu_blackwell.py` (Mosaic GPU) | as `gpu_hopper.py`; the gradient of weights from 128 outputs on |
| any | `gpu_triton.py`, `../quantized_matmul/gpu_triton.py` | and float32, quantised weights, any sizes |

The gradient of rows takes quantised weights as floats, all of them in memory (training over quantised experts).

There was no GPU when this was written: numbers are those of an emulated one (in `tests/pallas_kernels/`) and of
Pallas's interpreter, registers and spills are ptxas's, and nothing has been timed.
"""

from collections.abc import Callable

import jax

from ..chips import target_chip
from ..quantized_matmul import QuantizedWeight, dequantize
from ..quantized_matmul.gpu import BLACKWELL, HOPPER, check_platform, check_rows


def grouped_matmul(x_NI: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    return _product(x_NI, weight_GOI, sizes_G, contract=1)


def grouped_matmul_dx(dy_NO: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    if isinstance(weight_GOI, QuantizedWeight):
        weight_GOI = dequantize(weight_GOI, dy_NO.dtype)
    return _product(dy_NO, weight_GOI, sizes_G, contract=0)


def grouped_matmul_dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    check_platform()
    check_rows(x_NI.dtype)

    def hopper() -> jax.Array:
        from .gpu_hopper_dweight import dweight

        return dweight(x_NI, dy_NO, sizes_G)

    def blackwell() -> jax.Array:
        from .gpu_blackwell import dweight

        return dweight(x_NI, dy_NO, sizes_G)

    def triton() -> jax.Array:
        from .gpu_triton import dweight

        return dweight(x_NI, dy_NO, sizes_G)

    return _first({"hopper": hopper, "blackwell": blackwell, "triton": triton})


def _product(x_NA: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array, contract: int) -> jax.Array:
    check_platform()
    check_rows(x_NA.dtype, weight_GOI.format if isinstance(weight_GOI, QuantizedWeight) else None)

    def hopper() -> jax.Array:
        if isinstance(weight_GOI, QuantizedWeight):
            from ..quantized_matmul import gpu_hopper

            return gpu_hopper.product(x_NA, weight_GOI, None, None, x_NA.dtype, sizes_E=sizes_G)
        from .gpu_hopper import product

        return product(x_NA, weight_GOI, sizes_G, contract)

    def blackwell() -> jax.Array:
        if isinstance(weight_GOI, QuantizedWeight):
            raise NotImplementedError("the Blackwell kernel takes weights of 16 bits")
        from .gpu_blackwell import product

        return product(x_NA, weight_GOI, sizes_G, contract)

    def triton() -> jax.Array:
        from ..quantized_matmul.gpu_triton import product

        return product(x_NA, weight_GOI, sizes_E=sizes_G, contract=contract)

    return _first({"hopper": hopper, "blackwell": blackwell, "triton": triton})


CHIPS = {"hopper": HOPPER, "blackwell": BLACKWELL}


def _first(kernels: dict[str, Callable[[], jax.Array]]) -> jax.Array:
    """Of the first kernel that is for the chip and does not refuse."""
    reasons, chip = [], target_chip()
    for name, run in kernels.items():
        if name in CHIPS and chip not in CHIPS[name]:
            continue
        try:
            return run()
        except (NotImplementedError, ImportError) as error:  # JAX deprecates its Triton backend
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(reasons))
