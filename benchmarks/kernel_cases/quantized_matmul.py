"""Products with quantised weights, for the rows of decoding: the time to read 4096 x 14336 weights once is the limit.

The peer is what XLA makes of the plain way to write it: weights converted to bfloat16, multiplied, scaled.
"""

from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

INPUTS, OUTPUTS = 4096, 14336
ROWS = (1, 16, 64, 256)
# Format of the weights, inputs of a scale (None: all), format of the activations.
KINDS = (("int8", None, None), ("int4", 128, None), ("int8", None, "int8"), ("fp8_e4m3", None, None))


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        return  # no kernel for GPUs yet
    for form, block, activations in KINDS:
        for M in ROWS:
            given: dict[str, Any] = {"M": M, "format": form, "block": block, "activations": activations}
            words = form if block is None else f"{form} in groups of {block}"
            name = f"{M} rows, {words}{', bfloat16 rows' if activations is None else f', {activations} rows'}"
            plain = () if block or activations or form != "int8" else (Kernel("plain", {"M": M}),)
            yield Case(
                "quantized_matmul", name, Kernel("ours", given), {"XLA": plain} if plain else {}, of_limit=1 / 1.15
            )


def ours(target: Any, M: int, format: str, block: int | None, activations: str | None) -> Program:
    import jax
    import jax.numpy as jnp

    from twinax.pallas_kernels.quantized_matmul import quantize, quantized_matmul, with_inputs_first

    plain = jax.ShapeDtypeStruct((OUTPUTS, INPUTS), jnp.float32)
    # As a server keeps them for the chip.
    order = with_inputs_first if target.chip.name in ("v6e", "tpu7x") else lambda w: w
    made = jax.eval_shape(lambda w: order(quantize(w, format, block=(1, block))), plain)
    weight = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)
    hbm_bytes = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(made))
    return Program(
        lambda x, w: quantized_matmul(x, w, activation_format=activations, implementation="tpu"),
        (target.array((M, INPUTS)), weight),
        *_work(M, hbm_bytes),
        dtype="bfloat16" if activations is None else "int8",
    )


def plain(target: Any, M: int) -> Program:
    import jax.numpy as jnp

    given = target.array((M, INPUTS)), target.array((OUTPUTS, INPUTS), "int8"), target.array((OUTPUTS,), "float32")

    def product(x: Any, w: Any, scale: Any) -> Any:
        y = jnp.einsum("mi,oi->mo", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * scale).astype(x.dtype)

    return Program(product, given, *_work(M, OUTPUTS * INPUTS))


def _work(M: int, weight_bytes: int) -> tuple[float, float]:
    return 2.0 * M * INPUTS * OUTPUTS, float(weight_bytes)
