"""quantized_matmul on a TPU's matrix unit (Mosaic).

At the few rows of decoding, reading the weights is all that should take time, so they are not made floats: the unit
multiplies 8-bit values, and activations come in 8-bit pieces (`tpu_rows.py`), int8 where it multiplies those natively,
else float8. Four-bit codes become bytes by a mask and a shift of whole words: 0 to 15 are int8 as they are, and float8
too (below its normal numbers, in units of 2 ** -9); e2m1's bits, moved, are float8 in units of 2 ** -6. With many rows,
bfloat16 activations meet bfloat16 weights, as pieces would cost more than they save.

Blocks of inputs are summed apart and scaled in float32 (`apart`). Only packed weights with many rows are scaled before
they are multiplied, rounded to bfloat16 there (mxfp4's powers of two round nothing).

Shapes: M rows   R rows of the unit (pieces of M)   I inputs   O outputs   G blocks of inputs   T inputs of a tile
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from ..tuned import best
from .formats import FLOAT8, INTEGERS, PACKED, QuantizedWeight, expand, scales_of
from .quantize_rows import FORMATS, quantize_rows
from .tpu_kernel import Layout, kernel
from .tpu_rows import Operand, apart, evens_first, operand, split

# Not a kernel yet: XLA fuses the dequantisation into its product, which reads weights as they are kept as well.
from .xla import quantized_matmul_transposed as quantized_matmul_transposed

NATIVE_FLOAT8 = ("7x",)
DEEP = ("v6e", "7x")  # matrix units of 256, not 128
# Rows of the unit up to which pieces are faster than weights made bfloat16, by its depth.
PIECES_ROWS = {128: 96, 256: 192}
MOST_INPUTS = 1 << 14
VMEM_BYTES = 48 << 20


@dataclass(frozen=True)
class Plan:
    """How a product is cut: what the unit multiplies, rows a tile, inputs a tile, inputs and outputs a block."""

    operand: Operand
    scaled_first: bool
    rows: int
    tile: int
    inputs: int
    outputs: int


def plan(M: int, x_dtype: jnp.dtype, weight: QuantizedWeight, activation_format: str | None, chip: str | None) -> Plan:
    (O, I), size = weight.shape, weight.block_sizes[1]
    grouped, packed = weight.scales.shape[0] > 1, weight.format in PACKED
    if grouped and (size < 16 or (size < 128 and 128 % size) or (size >= 128 and size % 128)):
        raise NotImplementedError(f"blocks of inputs are 16, 32, 64 or multiples of 128, got {size}")
    if x_dtype.itemsize > 4:
        raise NotImplementedError(f"a TPU multiplies no {x_dtype}")
    deep = 256 if chip in DEEP else 128
    apart_by = -(-deep // size) if grouped else 1
    integers = weight.format in INTEGERS
    native = FLOAT8 if not integers or (chip in NATIVE_FLOAT8 and packed) else jnp.dtype(jnp.int8)
    if activation_format is not None:
        taken = Operand(FORMATS[activation_format][1], (1.0,))
    elif x_dtype == jnp.bfloat16 and (
        3 * M * apart_by > PIECES_ROWS[deep] or (native == jnp.int8 and chip in NATIVE_FLOAT8)
    ):
        taken = operand(jnp.dtype(jnp.bfloat16), x_dtype)
    else:
        taken = operand(native, x_dtype)
    scaled_first = grouped and packed and taken.dtype == jnp.bfloat16
    blocks = -(-I // MOST_INPUTS)
    # Blocks of inputs of which several make the weight start at whole tiles of scales.
    unit = max(deep, size if grouped and size >= 128 else 0)
    if blocks > 1:
        unit = max(1024, 8 * size) if grouped else 1024
    inputs = pl.cdiv(pl.cdiv(I, blocks), unit) * unit
    tile = size if grouped and size > deep else deep if grouped else inputs
    if scaled_first:
        tile = inputs
    apart_by = 1 if scaled_first else apart_by
    rows = max(16, (512 if taken.pieces == 1 else 192) // (taken.pieces * min(apart_by, 4)) // 16 * 16)
    wide = inputs // 2 if packed else inputs
    # Fast memory wants large blocks, as each step has its cost; a slow one small ones, as nothing hides the first.
    most = 1024 if min(M, rows) * taken.pieces <= 256 else 512
    outputs = max(128, min(most, ((1 << 22) if deep == 256 else (1 << 21)) // wide // 128 * 128))
    outputs = min(outputs, -(-O // 128) * 128)
    key = {"M": 1 << max(M - 1, 0).bit_length(), "I": I, "O": O, "format": weight.format, "grouped": grouped}
    found = best("quantized_matmul", chip, key) or {}
    return Plan(taken, scaled_first, min(M, found.get("rows", rows)), tile, inputs, found.get("outputs", outputs))


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
    (M, I), O = x_MI.shape, weight.shape[0]
    if M == 0:
        return jnp.zeros((0, O), out_dtype)
    cut = plan(M, x_MI.dtype, weight, activation_format, target_chip())
    size, G = weight.block_sizes[1], weight.scales.shape[0]
    grouped, packed, taken = G > 1, weight.format in PACKED, cut.operand
    sums_apart = grouped and not cut.scaled_first
    by_block = sums_apart and activation_format is not None
    tiles, steps = -(-M // cut.rows), -(-I // cut.inputs)
    padded = steps * cut.inputs
    G_all = padded // size if grouped else 1
    fill = [(0, tiles * cut.rows - M), (0, 0)]

    if activation_format is None:
        x_MI = _fill(x_MI, padded, cut.tile, packed)
        pieces, x_scales_MG = split(x_MI, taken)
        parts = [w * piece.astype(jnp.float32) for w, piece in zip(taken.weights, pieces, strict=True)]
        means_MI = sum(parts[1:], parts[0]) * x_scales_MG
    else:
        x_MGB, x_scales_MG = quantize_rows(x_MI, activation_format, size, scale)
        pieces = [_fill(x_MGB.reshape(M, -1)[:, :I], padded, cut.tile, packed)]
        steps_MGB = pieces[0].astype(jnp.float32)
        means_MI = steps_MGB * x_scales_MG if x_scales_MG.shape[1] == 1 else steps_MGB
    # [tiles, R, padded]: of a tile's rows all first pieces, then all second ones.
    x_PMI = jnp.pad(jnp.stack(pieces), [(0, 0), *fill])
    x_NRI = x_PMI.reshape(taken.pieces, tiles, cut.rows, padded).swapaxes(0, 1).reshape(tiles, -1, padded)
    R = -(-x_NRI.shape[1] // 8) * 8
    x_NRI = jnp.pad(x_NRI, [(0, 0), (0, R - x_NRI.shape[1]), (0, 0)])
    x_NRI = jax.vmap(lambda x_RI: apart(x_RI, cut.tile, size if sums_apart else cut.tile, packed))(x_NRI)

    scales_GO = weight.scales if weight.scales.dtype == jnp.uint8 else weight.scales.astype(jnp.float32)
    spread = lambda blocks_GP: jnp.pad(  # noqa: E731
        jnp.broadcast_to(expand(blocks_GP, (weight.block[0], 1), (O, G)).T, (G, O)), [(0, G_all - G), (0, 0)]
    )
    scales_GO = spread(scales_GO)
    # What the unit's weights have to be less, times the sums of the inputs: zero points, eight of float8 codes.
    shift_GO = None if weight.zeros is None else spread(weight.zeros.astype(jnp.float32))
    if weight.format == "int4" and taken.dtype == FLOAT8:
        shift_GO = jnp.full((G_all, O), 8.0) if shift_GO is None else shift_GO + 8
    totals_MG = None
    if shift_GO is not None and not cut.scaled_first:
        # Even and odd inputs of packed weights' tiles stand apart.
        means = means_MI.reshape(M, padded // cut.tile, 1 + packed, G_all * cut.tile // padded if grouped else 1, -1)
        totals_MG = jnp.sum(means, axis=(2, 4)).reshape(M, -1)
        totals_MG = totals_MG if grouped else jnp.sum(totals_MG, axis=1, keepdims=True)
        if by_block:
            totals_MG = totals_MG * jnp.pad(x_scales_MG, [(0, 0), (0, G_all - G)])
        totals_MG = jnp.pad(totals_MG, fill)
        shift_GO = shift_GO * scales_of(scales_GO, jnp.float32)

    layout = Layout(
        format=weight.format,
        operand=taken,
        tile=cut.tile,
        size=size if grouped else None,
        inputs=cut.inputs,
        rows=cut.rows,
        end=I if weight.format == "fp8_e4m3" and I % cut.inputs else None,
        sums_apart=sums_apart,
        scaled_first=cut.scaled_first,
        by_block=by_block,
        shifted=shift_GO is not None,
        bias=bias_O is not None,
        activation=activation,
        steps=steps,
    )
    G_step = cut.inputs // size if grouped else 1
    J_R, BO = x_NRI.shape[1], cut.outputs
    whole = lambda shape, index: pl.BlockSpec(shape, index)  # noqa: E731
    arguments, specs = [x_NRI], [whole((None, J_R, cut.inputs), lambda o, n, k: (n, 0, k))]
    if packed:
        specs.append(whole((cut.inputs // 2, BO), lambda o, n, k: (k, o)))
    else:
        specs.append(whole((BO, cut.inputs), lambda o, n, k: (o, k)))
    arguments += [weight.values, scales_GO]
    specs.append(whole((G_step, BO), lambda o, n, k: (k, o)))
    if by_block:
        # [tiles, R, G]: R is rows filled up to eights.
        x_scales = jnp.pad(x_scales_MG, [fill[0], (0, G_all - x_scales_MG.shape[1])]).reshape(tiles, cut.rows, G_all)
        arguments.append(jnp.pad(x_scales, [(0, 0), (0, R - cut.rows), (0, 0)]))
        specs.append(whole((None, R, G_all), lambda o, n, k: (n, 0, 0)))
    else:
        arguments.append(jnp.pad(x_scales_MG, fill))
        specs.append(whole((cut.rows, 1), lambda o, n, k: (n, 0)))
    if layout.shifted:
        assert shift_GO is not None
        arguments.append(shift_GO)
        specs.append(whole((shift_GO.shape[0] if not cut.scaled_first else G_step, BO),
                           (lambda o, n, k: (k, o)) if cut.scaled_first else (lambda o, n, k: (0, o))))  # fmt: skip
        if not cut.scaled_first:
            assert totals_MG is not None
            arguments.append(totals_MG)
            specs.append(whole((cut.rows, G_all), lambda o, n, k: (n, 0)))
    if bias_O is not None:
        arguments.append(bias_O.astype(jnp.float32)[None])
        specs.append(whole((1, BO), lambda o, n, k: (0, o)))
    sums = jnp.dtype(jnp.float32) if sums_apart else taken.sums
    y_MO = pl.pallas_call(
        lambda *refs: kernel(layout, *refs),
        grid=(-(-O // BO), tiles, steps),
        in_specs=specs,
        out_specs=whole((cut.rows, BO), lambda o, n, k: (n, o)),
        out_shape=jax.ShapeDtypeStruct((tiles * cut.rows, O), out_dtype),
        scratch_shapes=[pltpu.VMEM((R, BO), sums)] if steps > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name=f"quantized_matmul_{weight.format}",
    )(*arguments)
    return y_MO[:M]


def _fill(x_MI: jax.Array, size: int, tile: int, packed: bool) -> jax.Array:
    x_MI = jnp.pad(x_MI, [(0, 0), (0, size - x_MI.shape[1])])
    return evens_first(x_MI, tile) if packed else x_MI
