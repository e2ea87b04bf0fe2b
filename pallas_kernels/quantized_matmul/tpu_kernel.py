"""The kernel of one tile of rows, one block of outputs and one block of inputs. See `tpu.py` for the idea.

Shapes: M rows of the tile   R rows of the unit   I inputs of the block   O outputs of the block   G blocks of inputs
  T inputs of a tile   J blocks of inputs in a tile
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from ..float8 import to_bfloat16
from .activations import finish
from .formats import FLOAT8, PACKED
from .tpu_codes import NARROW, SIXTEEN, TURNING, UNITS, eleven, on_the_way, spread
from .tpu_inside import outer, prepare
from .tpu_rows import Operand

OUTPUTS = 256
CODES_OFF = 8.0


@dataclass(frozen=True)
class Layout:
    """What a kernel is made for; see `tpu.quantized_matmul`, which fills it."""

    format: str
    operand: Operand
    # What the unit's weights are.
    weights: jnp.dtype
    tile: int
    size: int | None
    inputs: int
    rows: int
    end: int | None
    sums_apart: bool
    scaled_first: bool
    by_block: bool
    shifted: bool
    bias: bool
    activation: str | None
    steps: int
    inputs_first: bool
    # None, or how many inputs there are: the kernel makes its rows ready itself (`tpu_inside.py`).
    inside: int | None
    # The format that it rounds them to, then.
    quantized: str | None
    # Weights are scaled in bfloat16.
    narrow_scales: bool
    # Whether zero points, or without `inside` all that codes are off by, times their scales, come from outside.
    shift_given: bool
    # Weights come in so many refs, each some of the block's outputs.
    copies: int

    @property
    def contract(self) -> int:
        """The dimension of the weights' values that is inputs."""
        return 0 if self.format in PACKED or self.inputs_first else 1

    @property
    def scaled_inside(self) -> bool:
        """Whether rows that the kernel makes ready have scales."""
        return self.inside is not None and (self.quantized is not None or self.operand.dtype != jnp.bfloat16)

    @property
    def totals_inside(self) -> bool:
        return self.shifted and not self.scaled_first and self.inside is not None

    @property
    def unit(self) -> float:
        """What the unit's weights count for."""
        if self.format in PACKED:
            return UNITS[self.format, self.codes]
        return SIXTEEN if self.turns else 1.0

    @property
    def codes(self) -> jnp.dtype:
        """What four bits become first."""
        return self.weights if self.weights in NARROW else on_the_way(self.format)

    @property
    def turns(self) -> bool:
        """Whether float8 becomes `eleven`, or that on its way to bfloat16."""
        return self.format == "fp8_e4m3" and self.operand.dtype == jnp.bfloat16 and target_chip() in TURNING


def kernel(layout: Layout, *refs: Any) -> None:
    given: Iterator[Any] = iter(refs)
    x_ref = next(given)
    w_refs = [next(given) for _ in range(layout.copies)]
    scales_ref = next(given)
    outside = layout.inside is None
    x_scales_ref = next(given) if outside else None
    shift_ref = next(given) if layout.shift_given else None
    totals_ref = next(given) if layout.shifted and not layout.scaled_first and outside else None
    bias_ref = next(given) if layout.bias else None
    y_ref = next(given)
    sums_ref = next(given) if layout.steps > 1 else None
    ready_ref = next(given) if layout.sums_apart else None
    if layout.inside is not None:
        rows_ref = next(given)
        x_scales_ref = next(given) if layout.scaled_inside else None
        totals_ref = next(given) if layout.totals_inside else None

        raw_ref, end = x_ref, layout.inside

        @pl.when(pl.program_id(1) == 0)
        def _():
            size = layout.size if layout.sums_apart and layout.size else layout.tile
            packed, given = layout.format in PACKED, (raw_ref, rows_ref, x_scales_ref, totals_ref)
            cut = {"end": end, "tile": layout.tile, "size": size, "packed": packed}
            prepare(*given, taken=layout.operand, quantized=layout.quantized, **cut)

        x_ref = rows_ref
    # Some outputs at a time, so that their sums stay in registers.
    a_copy = y_ref.shape[1] // layout.copies
    for first in (f for start in range(0, y_ref.shape[1], a_copy) for f in range(start, start + a_copy, OUTPUTS)):
        w_ref, start = w_refs[first // a_copy], first % a_copy
        width = min(OUTPUTS, a_copy - start)
        w_part = w_ref.at[:, pl.ds(start, width)] if layout.contract == 0 else w_ref.at[pl.ds(start, width), :]
        whole = (scales_ref, shift_ref, bias_ref, y_ref, sums_ref)
        refs_part = [None if ref is None else ref.at[:, pl.ds(first, width)] for ref in whole]
        if ready_ref is not None:
            ready_ref[:, :width] = _scales(scales_ref[:, first : first + width]) * layout.unit
        _outputs(layout, x_ref, w_part, x_scales_ref, totals_ref, ready_ref, *refs_part)


def _outputs(
    layout: Layout,
    x_ref: Any,
    w_ref: Any,
    x_scales_ref: Any,
    totals_ref: Any,
    ready_ref: Any,
    scales_ref: Any,
    shift_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    sums_ref: Any,
) -> None:
    sums_RO = _sums(layout, x_ref, w_ref, ready_ref, scales_ref, x_scales_ref, shift_ref)

    def write(sums_RO: jax.Array) -> None:
        M, sums_RO = layout.rows, sums_RO.astype(jnp.float32)
        parts = [weight * sums_RO[p * M : (p + 1) * M] for p, weight in enumerate(layout.operand.weights)]
        y_MO = sum(parts[1:], parts[0])
        if not layout.sums_apart and not layout.scaled_first:
            y_MO = y_MO * (_scales(scales_ref[...]) * layout.unit)
        if not layout.by_block and x_scales_ref is not None:
            y_MO = y_MO * x_scales_ref[...]
        if totals_ref is not None:
            if layout.inside is None:
                y_MO = y_MO - _outer(totals_ref[...], shift_ref[...])
            else:
                off = CODES_OFF if layout.format == "int4" and layout.weights in NARROW else 0.0
                off = off if shift_ref is None else shift_ref[...].astype(jnp.float32) + off
                y_MO = y_MO - outer(totals_ref[...], off * _scales(scales_ref[...]))
        bias_O = bias_ref[...] if layout.bias else None
        y_ref[...] = finish(y_MO, bias_O, layout.activation, y_ref.dtype)

    if layout.steps == 1:
        return write(sums_RO)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums_ref[...] = sums_RO

    @pl.when(step > 0)
    def _():
        sums_ref[...] += sums_RO

    @pl.when(step == layout.steps - 1)
    def _():
        write(sums_ref[...])


def _sums(
    layout: Layout, x_ref: Any, w_ref: Any, ready_ref: Any, scales_ref: Any, x_scales_ref: Any, shift_ref: Any
) -> jax.Array:
    """Sums over the block's inputs [R, O]; already scaled by block of inputs if those are summed apart."""
    taken, T = layout.operand, layout.tile
    total_RO: Any = None
    for n in range(layout.inputs // T):
        w_T = _weights(layout, w_ref, n, scales_ref, shift_ref)
        contract = (((1,), (layout.contract,)), ((), ()))
        sums_JRO = lax.dot_general(x_ref[:, n * T : (n + 1) * T], w_T, contract, preferred_element_type=taken.sums)
        if not layout.sums_apart:
            total_RO = sums_JRO if total_RO is None else total_RO + sums_JRO
            continue
        for first, sums_RO in _groups(layout, n, sums_JRO):
            sums_RO = sums_RO.astype(jnp.float32) * ready_ref[first : first + 1, : sums_RO.shape[1]]
            if layout.by_block:
                in_step = layout.inputs // (layout.size or layout.inputs)
                g = first if layout.steps == 1 else first + pl.program_id(2) * in_step
                sums_RO = sums_RO * _column(x_scales_ref, g, layout.steps)
            total_RO = sums_RO if total_RO is None else total_RO + sums_RO
    return total_RO


def _groups(layout: Layout, tile: int, sums_JRO: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Each block of inputs of a tile: its number in the block, and its sums."""
    groups = max(1, layout.tile // (layout.size or layout.tile))
    R = sums_JRO.shape[0] // groups
    for j in range(groups):
        yield tile * groups + j, sums_JRO[j * R : (j + 1) * R]


def _weights(layout: Layout, w_ref: Any, n: int, scales_ref: Any, shift_ref: Any) -> jax.Array:
    """A tile of weights as the unit takes them: [T, O] where inputs come first, else [O, T]."""
    T, dtype = layout.tile, layout.weights
    if layout.format not in PACKED:
        values = w_ref[n * T : (n + 1) * T, :] if layout.inputs_first else w_ref[:, n * T : (n + 1) * T]
        if layout.end is not None:
            # Past the weight's end there may be anything, and nan times zero is nan.
            first = pl.program_id(2) * layout.inputs + n * T if layout.steps > 1 else n * T
            inside = first + lax.broadcasted_iota(jnp.int32, values.shape, layout.contract) < layout.end
            values = jnp.where(inside, values.astype(jnp.float32), 0).astype(values.dtype)
        values = eleven(values) if layout.turns else values
        values = to_bfloat16(values) if values.dtype == FLOAT8 and dtype == jnp.bfloat16 else values.astype(dtype)
        if not layout.scaled_first:
            return values
        scales_GO = _scales(scales_ref[...]) * layout.unit
        return _scaled(layout, values, scales_GO, layout.size or layout.inputs, shift_ref).astype(dtype)
    words = pltpu.bitcast(w_ref[n * T // 2 : (n + 1) * T // 2], jnp.int32)
    low, high = spread(layout.format, words, layout.codes)
    # Put together before they are bfloat16, whose halves the compiler would take apart again.
    if not layout.scaled_first:
        return jnp.concatenate([low, high], axis=0).astype(dtype)
    # [T / 2, O] each, of which size / 2 rows share a scale.
    scales_GO = _scales(scales_ref[...]) * layout.unit
    half = (layout.size or layout.inputs) // 2
    parts = [_scaled(layout, codes, scales_GO, half, shift_ref) for codes in (low, high)]
    return jnp.concatenate(parts, axis=0).astype(dtype)


def _scaled(layout: Layout, values_TO: jax.Array, scales_GO: jax.Array, size: int, shift_ref: Any) -> jax.Array:
    """Values of which `size` rows share a scale, less what they are shifted by, times it."""
    if layout.narrow_scales:
        values_GBO = values_TO.astype(jnp.bfloat16).reshape(-1, size, values_TO.shape[1])
        if shift_ref is not None:
            # Exact: whole numbers up to 256, times a power of two.
            zeros_GO = (shift_ref[...].astype(jnp.float32) / layout.unit).astype(jnp.bfloat16)
            values_GBO = values_GBO - jnp.broadcast_to(zeros_GO[:, None], (len(zeros_GO), 1, values_TO.shape[1]))
        scales_G1O = jnp.broadcast_to(scales_GO.astype(jnp.bfloat16)[:, None], (len(scales_GO), 1, values_TO.shape[1]))
        return (values_GBO * scales_G1O).reshape(values_TO.shape)
    values_GBO = values_TO.astype(jnp.float32).reshape(-1, size, values_TO.shape[1])
    if shift_ref is not None:
        values_GBO = values_GBO - shift_ref[...].astype(jnp.float32)[:, None] / layout.unit
    return (values_GBO * scales_GO[:, None]).reshape(values_TO.shape)


def _scales(scales: jax.Array) -> jax.Array:
    if scales.dtype != jnp.uint8:
        return scales
    # 2 ** -127 is below float32's normal numbers, which a TPU takes for zero.
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def _column(x_ref: Any, g: Any, steps: int) -> jax.Array:
    if steps == 1:
        return x_ref[:, g : g + 1]
    columns = lax.broadcasted_iota(jnp.int32, x_ref.shape, 1)
    return jnp.sum(jnp.where(columns == g, x_ref[...], 0), axis=1, keepdims=True)


def _outer(totals_MG: jax.Array, shift_GO: jax.Array) -> jax.Array:
    """Sums of inputs times what codes are off by."""
    if totals_MG.shape[1] == 1:
        return totals_MG * shift_GO
    return jnp.dot(totals_MG, shift_GO, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
