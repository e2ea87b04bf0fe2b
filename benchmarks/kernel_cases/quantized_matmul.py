"""Products with quantised weights, 4096 x 14336: for the rows of decoding the time to read them once is the limit.

2,048 rows are a prompt's, whose limit is the products; on TPUs of weights of whole bytes with one scale a channel, as
the profiler takes minutes for the others' (on v5e for these, too).

The peer is what XLA makes of the plain way to write it: weights converted to bfloat16, multiplied, scaled.
"""

from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

INPUTS, OUTPUTS = 4096, 14336
ROWS, OF_A_PROMPT = (1, 16, 64, 256), 2048
# Format of the weights, inputs of a scale (None: all), zero points, format of the activations.
KINDS = (
    ("int8", None, False, None),
    ("int4", None, False, None),
    ("int4", 128, False, None),
    ("int4", 128, True, None),  # as AWQ's models come
    ("int8", None, False, "int8"),
    ("fp8_e4m3", None, False, None),
    ("fp8_e4m3", 128, False, None),  # as DeepSeek's models come: a scale is of 128 outputs too
    ("mxfp4", 32, False, None),
)

# On GPUs, int8 rows with one scale each are XLA's.
KINDS_ON_GPUS = (
    ("int8", None, False, None),
    ("int4", None, False, None),
    ("int4", 128, False, None),
    ("int4", 128, True, None),
    ("fp8_e4m3", None, False, None),
    ("mxfp4", 32, False, None),
    ("int8", 128, False, "int8"),
)


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        yield from _on_gpus()
        return
    for form, block, zeros, activations in KINDS:
        for M in (*ROWS, OF_A_PROMPT) if block is None and form != "int4" else ROWS:
            name, given = _named(M, form, block, zeros, activations)
            plain = () if block or activations or form != "int8" else (Kernel("plain", {"M": M}),)
            yield Case(
                "quantized_matmul", name, Kernel("ours", given), {"XLA": plain} if plain else {}, of_limit=1 / 1.15
            )


def _on_gpus() -> Iterator[Case]:
    """cuBLAS gets the same weights in bfloat16, XLA those that are quantised."""
    for form, block, zeros, activations in KINDS_ON_GPUS:
        for M in (*ROWS, OF_A_PROMPT):
            name, given = _named(M, form, block, zeros, activations)
            peers: dict[str, tuple[Kernel, ...]] = {
                "XLA": (Kernel("ours", {**given, "implementation": "xla"}),),
                "cuBLAS, bfloat16": (Kernel("cublas", {"M": M}),),
            }
            if form == "int8" and block is None and M >= 256:
                peers["pallas"] = tuple(
                    Kernel("pallas", {"M": M, "tile_m": m, "tile_n": n}) for m in (64, 128) for n in (64, 128)
                )
            ours = Kernel("ours", {**given, "implementation": "gpu"})
            yield Case("quantized_matmul", name, ours, peers, of_limit=1 / 1.15)


def _named(M: int, form: str, block: int | None, zeros: bool, activations: str | None) -> tuple[str, dict[str, Any]]:
    """A case's name, and the arguments of `ours`."""
    words = form if block is None else f"{form} in groups of {block}"
    name = f"{M} rows, {words}{' with zero points' if zeros else ''}, {activations or 'bfloat16'} rows"
    given: dict[str, Any] = {"M": M, "format": form, "block": block, "activations": activations}
    return name, given | ({"zeros": True} if zeros else {})


def ours(
    target: Any,
    M: int,
    format: str,
    block: int | None,
    activations: str | None,
    zeros: bool = False,
    implementation: str = "tpu",
) -> Program:
    import jax
    import jax.numpy as jnp

    from twinax.pallas_kernels.chips import target_chip
    from twinax.pallas_kernels.quantized_matmul import INPUTS_FIRST, quantize, quantized_matmul, with_inputs_first

    plain = jax.ShapeDtypeStruct((OUTPUTS, INPUTS), jnp.float32)
    # As a server keeps them for the chip.
    with target.context():
        order = with_inputs_first if target_chip() in INPUTS_FIRST else lambda w: w
    outputs = 128 if format == "fp8_e4m3" and block else 1
    made = jax.eval_shape(lambda w: order(quantize(w, format, block=(outputs, block), zero_points=zeros)), plain)
    weight = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)
    hbm_bytes = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(made))
    return Program(
        lambda x, w: quantized_matmul(x, w, activation_format=activations, implementation=implementation),
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


def cublas(target: Any, M: int) -> Program:
    """Of weights in bfloat16, which are twice the bytes of int8 ones; the limit is that of these."""
    import jax.numpy as jnp

    given = target.array((M, INPUTS)), target.array((OUTPUTS, INPUTS))
    return Program(lambda x, w: jnp.einsum("mi,oi->mo", x, w), given, *_work(M, OUTPUTS * INPUTS))


def pallas(target: Any, M: int, tile_m: int, tile_n: int) -> Program:
    """jax's own kernel for Hopper, of int8 outputs by bfloat16 rows; without scales, and the result turned."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as library

    config = library.TuningConfig(tile_m=tile_m, tile_n=tile_n, tile_k=64, max_concurrent_steps=4, grid_tile_width=8)
    given = target.array((OUTPUTS, INPUTS), "int8"), target.array((INPUTS, M))
    return Program(
        lambda w, x: library.mixed_matmul_kernel(w, x, out_dtype=jnp.dtype("bfloat16"), config=config),
        given,
        *_work(M, OUTPUTS * INPUTS),
    )


def _work(M: int, weight_bytes: int) -> tuple[float, float]:
    return 2.0 * M * INPUTS * OUTPUTS, float(weight_bytes)
