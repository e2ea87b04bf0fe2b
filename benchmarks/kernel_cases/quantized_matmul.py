"""Products with quantised weights at the rows of decoding, against XLA's own fusion of dequantisation and product.

JAX has no kernel for these. What counts is the time to read the weights, with their scales, once.
"""

from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

ROWS = (1, 16, 64, 256)
SHAPE = (4096, 14336)  # inputs and outputs: the wide product of Llama-3-8B
# Format, outputs and inputs that share a scale, zero points, format of the activations.
WEIGHTS: dict[str, tuple[str, tuple[int | None, int | None], bool, str | None]] = {
    "int8": ("int8", (1, None), False, None),
    "int8 x int8": ("int8", (1, None), False, "int8"),
    "int4 in 128s": ("int4", (1, 128), False, None),
    "int4 in 32s, zeros": ("int4", (1, 32), True, None),
    "fp8": ("fp8_e4m3", (1, None), False, None),
    "fp8 x fp8 in blocks": ("fp8_e4m3", (128, 128), False, "fp8"),
    "mxfp4": ("mxfp4", (1, 32), False, None),
}


def cases(chip: str) -> Iterator[Case]:
    for name in WEIGHTS:
        for rows in ROWS:
            shape: dict[str, Any] = {"M": rows, "I": SHAPE[0], "O": SHAPE[1], "kind": name}
            yield Case(
                "quantized_matmul",
                f"{name}, {rows} x {SHAPE[0]} x {SHAPE[1]}",
                Kernel("product", shape),
                {"xla": (Kernel("product", {**shape, "implementation": "xla"}),)},
                1.0,
                1 / 1.15,
            )


def product(
    target: Any, M: int, I: int, O: int, kind: str, implementation: str = "tpu", dtype: str = "bfloat16"
) -> Program:
    import jax

    from twinax.pallas_kernels.quantized_matmul import quantize, quantized_matmul

    format, block, zeros, activation_format = WEIGHTS[kind]
    shapes = jax.eval_shape(
        lambda w: quantize(w, format, block=block, zero_points=zeros), jax.ShapeDtypeStruct((O, I), "float32")
    )
    weight = jax.tree.map(lambda x: target.array(x.shape, x.dtype), shapes)
    bytes_read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    peak = {"int8": "int8", "fp8": "float8", None: "bfloat16"}[activation_format]
    return Program(
        lambda x, weight: quantized_matmul(
            x, weight, activation_format=activation_format, implementation=implementation
        ),
        (target.array((M, I), dtype), weight),
        2.0 * M * I * O,
        bytes_read + 2.0 * M * (I + O),
        peak,
    )
