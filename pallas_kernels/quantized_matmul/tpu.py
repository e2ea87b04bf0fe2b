"""quantized_matmul on a TPU's matrix unit (Mosaic).

At the few rows of decoding, reading the weights is all that should take time, so they are not made floats. The unit
multiplies bfloat16 by float8 as it is, which float8 weights are and four-bit codes become by masks and shifts of whole
words (`tpu_codes.py`). By int8 it multiplies int8 only, of which activations are three pieces (`tpu_rows.py`); with
many rows these would cost more than they save, and int8 weights become bfloat16.

Blocks of inputs are summed apart and scaled in float32 (`apart`), which takes as many rows of the unit as blocks fill
it. With many rows packed weights, and others where the chip computes in bfloat16, are scaled before they are
multiplied, rounded to bfloat16 there (mxfp4's powers of two round nothing).

Shapes: M rows   R rows of the unit (pieces of M)   I inputs   O outputs   G blocks of inputs   T inputs of a tile
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import CORES, target_chip
from ..float8 import NATIVE
from ..tuned import best
from .formats import FLOAT8, PACKED, QuantizedWeight, expand, scales_of
from .quantize_rows import FORMATS, quantize_rows
from .tpu_codes import NARROW, narrow
from .tpu_inside import PARTS
from .tpu_kernel import CODES_OFF, OUTPUTS, Layout, kernel
from .tpu_rows import Operand, apart, evens_first, operand, split

# Not a kernel yet: XLA fuses the dequantisation into its product, which reads weights as they are kept as well.
from .xla import quantized_matmul_transposed as quantized_matmul_transposed

DEEP = ("v6e", "7x")  # matrix units of 256, not 128
# Rows of the unit up to which int8 pieces are faster than weights made bfloat16, by its depth.
PIECES_ROWS = {128: 96, 256: 192}
# Of so few rows of the unit sums are scaled sooner than weights, and rows' results cost little beside the weights.
FEW_ROWS = 128
MOST_INPUTS = 1 << 14
VMEM_BYTES = 48 << 20


@dataclass(frozen=True)
class Plan:
    """How a product is cut: what the unit multiplies, rows a tile, inputs a tile, inputs and outputs a block.

    `weights`: what the unit's weights are.
    `several`: whether a large block's weights come by several copies at the same time.
    """

    operand: Operand
    weights: jnp.dtype
    scaled_first: bool
    rows: int
    tile: int
    inputs: int
    outputs: int
    several: bool

    @property
    def copies(self) -> int:
        return self.outputs // OUTPUTS if self.several and self.outputs in range(1024, 4097, OUTPUTS) else 1


def plan(M: int, x_dtype: jnp.dtype, weight: QuantizedWeight, activation_format: str | None, chip: str | None) -> Plan:
    (O, I), size = weight.shape, weight.block_sizes[1]
    grouped, packed = weight.scales.shape[0] > 1, weight.format in PACKED
    if grouped and (size < 16 or (size < 128 and 128 % size) or (size >= 128 and size % 128)):
        raise NotImplementedError(f"blocks of inputs are 16, 32, 64 or multiples of 128, got {size}")
    if x_dtype.itemsize > 4:
        raise NotImplementedError(f"a TPU multiplies no {x_dtype}")
    deep = 256 if chip in DEEP else 128
    apart_by = -(-deep // size) if grouped else 1
    bfloat16 = jnp.dtype(jnp.bfloat16)
    if activation_format is not None:
        taken = Operand(FORMATS[activation_format][1], (1.0,))
    elif weight.format == "int8" and not (x_dtype == bfloat16 and chip in NATIVE):
        taken = operand(jnp.dtype(jnp.int8), x_dtype)
        if x_dtype == bfloat16 and taken.pieces * M * apart_by > PIECES_ROWS[deep]:
            taken = operand(bfloat16, x_dtype)
    else:
        taken = operand(bfloat16, x_dtype)
    # Rounded to it, then. Of whole bytes only where bfloat16 is computed with: in float32, sums are sooner scaled.
    scaled_first = grouped and taken.dtype == bfloat16 and taken.pieces == 1
    scaled_first = scaled_first and (packed or (weight.inputs_first and deep == 256))
    if weight.format != "int8" and M * apart_by <= FEW_ROWS:
        scaled_first = False
    weights = taken.dtype
    if weights == bfloat16 and weight.format != "int8" and not scaled_first:
        weights = narrow(weight.format)
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
    most_rows = 512 if taken.pieces == 1 else 192
    rows = max(16, most_rows // (taken.pieces * min(apart_by, 4)) // 16 * 16)
    wide = inputs // 2 if packed else inputs
    # Fast memory wants large blocks, as each step has its cost; a slow one small ones, as nothing hides the first.
    most = 1024 if min(M, rows) * taken.pieces <= 256 else 512
    if packed and M <= FEW_ROWS and O >= 1 << 13:
        most = 2048
    # One copy is slower than the memory. Several take their time to begin, which shows where the products, or what
    # makes weights floats, take longer than the memory.
    several = M <= FEW_ROWS or (not packed and chip not in NATIVE)
    outputs = max(128, min(most, ((1 << 22) if deep == 256 or several else (1 << 21)) // wide // 128 * 128))
    outputs = min(outputs, -(-O // 128) * 128)
    cores = CORES.get(chip or "", 1)
    outputs = next((n for n in range(outputs, outputs // 2, -OUTPUTS) if -(-O // n) % cores == 0), outputs)
    key = {"M": 1 << max(M - 1, 0).bit_length(), "I": I, "O": O, "format": weight.format}
    key |= {"size": size if grouped else 0, "rows": activation_format or x_dtype.name}
    found = best("quantized_matmul", chip, key) or {}
    rows, outputs = min(M, found.get("rows", rows)), found.get("outputs", outputs)
    return Plan(taken, weights, scaled_first, rows, tile, inputs, outputs, several)


def tuning_space(chip: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    """For `benchmarks.tune`: how many outputs a block may have; the closed form, which says none, comes first."""
    O = key["O"]
    even = [n for n in range(256, 4097, 128) if O % n == 0 and (O // n) % CORES.get(chip, 1) == 0]
    return [{}, *({"outputs": n} for n in even[:11])]


def makes_rows(cut: Plan, M: int, I: int, O: int, weight: QuantizedWeight, chip: str | None) -> bool:
    """Whether the kernel can make its rows ready itself: one tile of rows, whose inputs it has all at once."""
    blocks, G = -(-O // cut.outputs), cut.inputs // weight.block_sizes[1] if weight.scales.shape[0] > 1 else 1
    shifts = weight.zeros is not None or (weight.format == "int4" and cut.weights in NARROW)
    return (
        cut.rows >= M
        and cut.inputs >= I
        and blocks % CORES.get(chip or "", 1) == 0
        and cut.tile % (256 if cut.tile > 128 else 128) == 0
        # Only there do kernels make float8 numbers.
        and (cut.operand.dtype != FLOAT8 or chip in NATIVE or chip is None)
        and (not shifts or cut.scaled_first or G == 1 or G % 8 == 0)
    )


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
    chip = target_chip()
    cut = plan(M, x_MI.dtype, weight, activation_format, chip)
    size, G = weight.block_sizes[1], weight.scales.shape[0]
    grouped, packed, taken = G > 1, weight.format in PACKED, cut.operand
    inputs_first = packed or weight.inputs_first
    sums_apart = grouped and not cut.scaled_first
    by_block = sums_apart and activation_format is not None
    tiles, steps = -(-M // cut.rows), -(-I // cut.inputs)
    padded = steps * cut.inputs
    G_all = padded // size if grouped else 1
    fill = [(0, tiles * cut.rows - M), (0, 0)]
    whole = activation_format is None or (not grouped and scale is None)
    inside = whole and makes_rows(cut, M, I, O, weight, chip)
    # Codes taken as they are, 0 to 15, are 8 too large.
    coded = weight.format == "int4" and cut.weights in NARROW
    shift_given = weight.zeros is not None or (coded and not inside)

    if inside:
        groups = cut.tile // size if sums_apart and size < cut.tile else 1
        R = -(-taken.pieces * M // 8) * 8
        x_NRI, x_scales_MG, means_MI = jnp.zeros((1, groups * R, 0)), jnp.zeros(()), None
    elif activation_format is None:
        x_MI = _fill(x_MI, padded, cut.tile, packed)
        pieces, x_scales_MG = split(x_MI, taken)
        parts = [w * piece.astype(jnp.float32) for w, piece in zip(taken.weights, pieces, strict=True)]
        means_MI = sum(parts[1:], parts[0]) * x_scales_MG
    else:
        x_MGB, x_scales_MG = quantize_rows(x_MI, activation_format, size, scale)
        pieces = [_fill(x_MGB.reshape(M, -1)[:, :I], padded, cut.tile, packed)]
        steps_MGB = pieces[0].astype(jnp.float32)
        means_MI = steps_MGB * x_scales_MG if x_scales_MG.shape[1] == 1 else steps_MGB
    if not inside:
        # [tiles, R, padded]: of a tile's rows all first pieces, then all second ones.
        x_PMI = jnp.pad(jnp.stack(pieces), [(0, 0), *fill])
        x_NRI = x_PMI.reshape(taken.pieces, tiles, cut.rows, padded).swapaxes(0, 1).reshape(tiles, -1, padded)
        R = -(-x_NRI.shape[1] // 8) * 8
        x_NRI = jnp.pad(x_NRI, [(0, 0), (0, R - x_NRI.shape[1]), (0, 0)])
        x_NRI = jax.vmap(lambda x_RI: apart(x_RI, cut.tile, size if sums_apart else cut.tile, packed))(x_NRI)

    scales_GO = weight.scales if weight.scales.dtype == jnp.uint8 else weight.scales.astype(jnp.float32)

    def spread(blocks_GP: jax.Array) -> jax.Array:
        blocks_OG = expand(blocks_GP, (weight.block[0], 1), (O, G))
        return jnp.pad(jnp.broadcast_to(blocks_OG.T, (G, O)), [(0, G_all - G), (0, 0)])

    scales_GO = spread(scales_GO)
    # What the unit's weights have to be less, times the sums of the inputs: zero points, eight of float8 codes. A
    # kernel that has all of them takes zero points as they are.
    shift_GO, narrow_zeros = None, True
    if weight.zeros is not None:
        narrow_zeros = weight.zeros.dtype == jnp.int8 and steps == 1
        shift_GO = spread(weight.zeros if narrow_zeros else weight.zeros.astype(jnp.float32))
    if coded and shift_given and not inside:
        shift_GO = jnp.full((G_all, O), CODES_OFF) if shift_GO is None else shift_GO + CODES_OFF
    totals_MG = None
    if shift_GO is not None and not cut.scaled_first and not inside:
        shift_GO = shift_GO * scales_of(scales_GO, jnp.float32)
    if shift_GO is not None and not cut.scaled_first and not inside:
        # Even and odd inputs of packed weights' tiles stand apart.
        assert means_MI is not None
        means = means_MI.reshape(M, padded // cut.tile, 1 + packed, G_all * cut.tile // padded if grouped else 1, -1)
        totals_MG = jnp.sum(means, axis=(2, 4)).reshape(M, -1)
        totals_MG = totals_MG if grouped else jnp.sum(totals_MG, axis=1, keepdims=True)
        if by_block:
            totals_MG = totals_MG * jnp.pad(x_scales_MG, [(0, 0), (0, G_all - G)])
        totals_MG = jnp.pad(totals_MG, fill)

    layout = Layout(
        format=weight.format,
        operand=taken,
        weights=cut.weights,
        tile=cut.tile,
        size=size if grouped else None,
        inputs=cut.inputs,
        rows=cut.rows,
        end=I if weight.format == "fp8_e4m3" and I % cut.inputs else None,
        sums_apart=sums_apart,
        scaled_first=cut.scaled_first,
        by_block=by_block,
        shifted=shift_GO is not None or coded,
        bias=bias_O is not None,
        activation=activation,
        steps=steps,
        inputs_first=inputs_first,
        inside=I if inside else None,
        quantized=activation_format,
        narrow_scales=cut.scaled_first and narrow_zeros and chip in DEEP and size % 32 == 0,
        shift_given=shift_given,
        copies=cut.copies,
    )
    G_step = cut.inputs // size if grouped else 1
    J_R, BO = x_NRI.shape[1], cut.outputs
    blocks = -(-O // BO)
    # A core makes its rows ready at the first of its steps. Indices: of outputs, of a tile of rows, of inputs.
    cores = CORES.get(chip or "", 1) if inside else 1
    order = (lambda c, o, k: (c * (blocks // cores) + o, 0, k)) if inside else (lambda o, n, k: (o, n, k))

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(*order(*at)))

    if inside:
        arguments, specs = [x_MI], [spec((M, cut.inputs), lambda o, n, k: (0, 0))]
    else:
        arguments, specs = [x_NRI], [spec((None, J_R, cut.inputs), lambda o, n, k: (n, 0, k))]
    a_copy, of_weights = BO // cut.copies, cut.inputs // 2 if packed else cut.inputs
    for c in range(cut.copies):

        def index(o: jax.Array, n: jax.Array, k: jax.Array, c: int = c) -> tuple[jax.Array, jax.Array]:
            # There is nothing past the last outputs to copy.
            at = jnp.minimum(o * cut.copies + c, -(-O // a_copy) - 1)
            return (k, at) if inputs_first else (at, k)

        specs.append(spec((of_weights, a_copy) if inputs_first else (a_copy, of_weights), index))
    arguments += [*[weight.values] * cut.copies, scales_GO]
    specs.append(spec((G_step, BO), lambda o, n, k: (k, o)))
    if inside:
        pass
    elif by_block:
        # [tiles, R, G]: R is rows filled up to eights.
        x_scales = jnp.pad(x_scales_MG, [fill[0], (0, G_all - x_scales_MG.shape[1])]).reshape(tiles, cut.rows, G_all)
        arguments.append(jnp.pad(x_scales, [(0, 0), (0, R - cut.rows), (0, 0)]))
        specs.append(spec((None, R, G_all), lambda o, n, k: (n, 0, 0)))
    else:
        arguments.append(jnp.pad(x_scales_MG, fill))
        specs.append(spec((cut.rows, 1), lambda o, n, k: (n, 0)))
    if shift_GO is not None:
        arguments.append(shift_GO)
        specs.append(spec((shift_GO.shape[0] if not cut.scaled_first else G_step, BO),
                          (lambda o, n, k: (k, o)) if cut.scaled_first else (lambda o, n, k: (0, o))))  # fmt: skip
    if totals_MG is not None:
        arguments.append(totals_MG)
        specs.append(spec((cut.rows, G_all), lambda o, n, k: (n, 0)))
    if bias_O is not None:
        arguments.append(bias_O.astype(jnp.float32)[None])
        specs.append(spec((1, BO), lambda o, n, k: (0, o)))
    sums = jnp.dtype(jnp.float32) if sums_apart else taken.sums
    scratch = [pltpu.VMEM((R, BO), sums)] if steps > 1 else []
    scratch += [pltpu.VMEM((G_step, OUTPUTS), jnp.float32)] if sums_apart else []
    if inside:
        scratch.append(pltpu.VMEM((J_R, cut.inputs), taken.dtype))
        scratch += [pltpu.VMEM((M, 1), jnp.float32)] if layout.scaled_inside else []
        scratch += [pltpu.VMEM((M, len(PARTS) * G_all), jnp.bfloat16)] if layout.totals_inside else []
    y_MO = pl.pallas_call(
        lambda *refs: kernel(layout, *refs),
        grid=(cores, blocks // cores, 1) if inside else (blocks, tiles, steps),
        in_specs=specs,
        out_specs=spec((cut.rows, BO), lambda o, n, k: (n, o)),
        out_shape=jax.ShapeDtypeStruct((tiles * cut.rows, O), out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if inside else "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        name=f"quantized_matmul_{weight.format}",
    )(*arguments)
    return y_MO[:M]


def _fill(x_MI: jax.Array, size: int, tile: int, packed: bool) -> jax.Array:
    x_MI = jnp.pad(x_MI, [(0, 0), (0, size - x_MI.shape[1])])
    return evens_first(x_MI, tile) if packed else x_MI
