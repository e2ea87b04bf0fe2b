"""Products with quantised weights on NVIDIA GPUs: the first of these kernels that takes the arguments.

| chip | kernel | what |
|---|---|---|
| H100, H200 | `gpu_hopper.py` (Mosaic GPU) | every format, 16-bit rows; I and O multiples of 64 |
| B200, GB200 | `gpu_blackwell.py` (Mosaic GPU) | 8 bits, 16-bit rows; I a multiple of 128, O of 64 |
| any | `gpu_triton.py` | every format, any rows; quantised rows where XLA's own product would not do |

Quantised rows with one scale each, and weights of whole bytes, are XLA's: there its own product of int8 or float8 reads
no more than it must, and its autotuner knows cuBLAS. So is the product with the transposed weight, which is a large one
(training), beside which dequantising is little.

There was no GPU when this was written: numbers are those of an emulated one (in `tests/pallas_kernels/`) and of
Pallas's interpreter, registers and spills are ptxas's, and nothing has been timed.
"""

import jax
import jax.numpy as jnp

from ..chips import known_platform, target_chip
from .formats import PACKED, QuantizedWeight
from .quantize_rows import quantize_rows

# Not a kernel: see above.
from .xla import quantized_matmul_transposed as quantized_matmul_transposed

HOPPER, BLACKWELL = ("h100", "h200"), ("b200", "gb200", "b300", "gb300")


def quantized_matmul(
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    scale: jax.Array | None,
    *,
    activation: str | None,
    activation_format: str | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    check_platform()
    check_rows(x_MI.dtype, weight.format)
    rows, x_scales_MG = x_MI, None
    if activation_format is not None:
        if weight.scales.shape[0] == 1 and weight.format not in PACKED:
            raise NotImplementedError(f"{activation_format} rows with one scale each are XLA's own product")
        x_MGB, x_scales_MG = quantize_rows(x_MI, activation_format, weight.block_sizes[1], scale)
        rows = x_MGB.reshape(len(x_MI), -1)
    reasons = []
    if target_chip() in (*HOPPER, *BLACKWELL) and activation_format is None:
        from . import gpu_blackwell, gpu_hopper

        kernel = gpu_hopper if target_chip() in HOPPER else gpu_blackwell
        try:
            return kernel.product(x_MI, weight, bias_O, activation, out_dtype)
        except NotImplementedError as error:
            reasons.append(str(error))
    try:
        from . import gpu_triton
    except ImportError as error:  # JAX deprecates its Triton backend
        raise NotImplementedError("; ".join([*reasons, str(error)])) from error
    options = {"bias_C": bias_O, "activation": activation, "out_dtype": out_dtype}
    return gpu_triton.product(rows, weight, x_scales_MG=x_scales_MG, **options)


def check_platform() -> None:
    platform = known_platform()
    if platform not in (None, "cuda"):
        raise NotImplementedError(f"these kernels are for NVIDIA GPUs, and this program is for a {platform}")


def check_rows(dtype: jnp.dtype, weight_format: str | None = None) -> None:
    if weight_format == "fp8_e4m3" and target_chip() == "a100":
        raise NotImplementedError("an A100 converts no float8")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the GPU kernels take rows of bfloat16, float16 and float32, got {dtype}")
