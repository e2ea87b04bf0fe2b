"""Rows made ready for the matrix unit within the kernel, at its first step: pieces, their order, their sums.

Outside, some ten small operations of XLA do the same, each of which takes up to a microsecond where few rows are
multiplied in ten. What the parts mean is in `tpu_rows.py`.

Shapes: M rows   R rows of the unit (pieces of M)   I inputs   T inputs of a tile   C inputs at a time
  J blocks of inputs in a tile   G blocks of inputs
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .formats import FLOAT8, LARGEST
from .quantize_rows import FORMATS
from .tpu_rows import Operand

# Three bfloat16 hold a float32; of the products of two such sums, those that count, as (left part, right part).
PARTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))
# Added to a float32 below 2 ** 22, it leaves a whole number in the low bits.
WHOLE = 1.5 * 2.0**23
# About how many rows one product puts in order.
TURNED = 256
# Rows at a time, where each is one of the unit's: what is found of so many stays in registers.
ROWS = 32


def prepare(
    x_ref: Any, rows_ref: Any, scales_ref: Any, totals_ref: Any, *, taken: Operand, end: int, tile: int, size: int,
    packed: bool, quantized: str | None,
) -> None:  # fmt: skip
    """Fills `rows_ref` [J * R, I] as `split`, `evens_first` and `apart` would, and the pieces' scales [M, 1].

    `quantized`: the format that whole rows are first rounded to, as `quantize_rows` would.
    `totals_ref`, if not None: the sums of each block of `size` inputs, in bfloat16 parts [M, 6 * G] for `outer`.
    `end`: inputs from there on are none.
    """
    M, refs = x_ref.shape[0], (x_ref, rows_ref, scales_ref, totals_ref)
    cut = {"taken": taken, "end": end, "tile": tile, "size": size, "packed": packed, "quantized": quantized}
    if M <= ROWS or M % ROWS or rows_ref.shape[0] > M or packed:
        return _prepare(*refs, **cut)

    @pl.loop(0, M // ROWS)
    def _(n: jax.Array) -> None:
        _prepare(*(None if ref is None else ref.at[pl.ds(n * ROWS, ROWS)] for ref in refs), **cut)


def _prepare(
    x_ref: Any, rows_ref: Any, scales_ref: Any, totals_ref: Any, *, taken: Operand, end: int, tile: int, size: int,
    packed: bool, quantized: str | None,
) -> None:  # fmt: skip
    I, C = rows_ref.shape[1], chunk(tile)
    up_M1: Any = None
    if quantized is not None or taken.dtype != jnp.bfloat16:
        reach_M1, flaw_M1 = _reach(x_ref, I, end)
        if quantized is None:
            up_M1, down_M1 = reach_scales(reach_M1)
            # Rows that are not finite are zeros, and their scale is not a number.
            scales_ref[...] = jnp.where(flaw_M1 == 0, down_M1, jnp.nan)
            up_M1 = jnp.where(flaw_M1 == 0, up_M1, 0)
        else:
            unit_M1 = jnp.maximum(reach_M1 * (1 / LARGEST[FORMATS[quantized][0]]), jnp.finfo(jnp.float32).tiny)
            # A row that is not finite: whatever it becomes, times what is not a number.
            scales_ref[...] = up_M1 = jnp.where(flaw_M1 == 0, unit_M1, jnp.nan)
    totals_MG = None
    put_apart = partial(_apart, rows=rows_ref.shape[0], tile=tile, size=size, packed=packed, dtype=taken.dtype)
    wide: list[tuple[int, jax.Array]] = []
    for first in range(0, I, C):
        x_MC = _inputs(x_ref, first, C, end)
        pieces = _pieces(x_MC, up_M1, taken) if quantized is None else [_rounded(x_MC / up_M1, taken)]
        if totals_ref is not None:
            means_MC = x_MC if quantized is None else pieces[0] * up_M1
            totals_MG = _add_totals(totals_MG, means_MC, first, size, I // size)
        x_RC = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
        if not packed:
            rows_ref[:, first : first + C] = put_apart(x_RC, first % tile)
            continue
        wide.append((first, x_RC))
        if len(wide) * len(x_RC) < TURNED and first + C < I:
            continue
        # Several at a time, as the unit's weights take longer to load than few rows to multiply.
        x_XC = jnp.concatenate([x_RC for _, x_RC in wide], axis=0).astype(jnp.bfloat16)
        x_XC = jnp.dot(x_XC, _evens_first(C), preferred_element_type=jnp.float32)
        for k, (first, x_RC) in enumerate(wide):
            R = len(x_RC)
            n, at = divmod(first, tile)
            for half in range(2):
                to, start = n * tile + at // 2 + half * (tile // 2), half * (C // 2)
                x_RW = x_XC[k * R : (k + 1) * R, start : start + C // 2]
                rows_ref[:, to : to + C // 2] = put_apart(x_RW, to % tile)
        wide = []
    if totals_ref is not None:
        assert totals_MG is not None
        parts = three_parts(totals_MG)
        totals_ref[...] = jnp.concatenate([parts[left] for left, _ in PARTS], axis=1).astype(jnp.bfloat16)


def outer(totals_MP: jax.Array, shift_GO: jax.Array) -> jax.Array:
    """Totals times what codes are off by, summed over G, to float32's precision in one product of bfloat16."""
    if len(shift_GO) == 1:
        # The unit would take a tile for it.
        firsts = [[left for left, _ in PARTS].index(part) for part in range(3)]
        total_M1, *rest = (totals_MP[:, p : p + 1].astype(jnp.float32) for p in firsts)
        return sum(rest, total_M1) * shift_GO
    parts = three_parts(shift_GO)
    shift_PO = jnp.concatenate([parts[right] for _, right in PARTS], axis=0).astype(jnp.bfloat16)
    return jnp.dot(totals_MP, shift_PO, preferred_element_type=jnp.float32)


def three_parts(x: jax.Array) -> list[jax.Array]:
    """Float32 as three of bfloat16's values, still float32."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return parts


def chunk(tile: int) -> int:
    """Inputs at a time: as many of each kind of a packed tile fill whole lanes."""
    return 256 if tile % 256 == 0 else 128


def reach_scales(reach_M1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For rows of these largest numbers: the power of two that they are multiplied by, and its reciprocal."""
    # The power of two above it, from the bits, where its reciprocal is a normal number.
    above_M1 = (lax.bitcast_convert_type(reach_M1, jnp.int32) >> 23) - 126
    up_M1 = 22 - jnp.clip(above_M1, -100, 128)
    up, down = (lax.bitcast_convert_type((power + 127) << 23, jnp.float32) for power in (up_M1, -up_M1))
    return up, down


def _reach(x_ref: Any, I: int, end: int) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude of each row [M, 1], and 0 if all of it is finite."""
    reach_MC = flaw_MC = jnp.zeros((x_ref.shape[0], 128), jnp.float32)
    for first in range(0, I, 128):
        x_MC = _inputs(x_ref, first, 128, end)
        reach_MC, flaw_MC = jnp.maximum(reach_MC, jnp.abs(x_MC)), flaw_MC + x_MC * 0
    return jnp.max(reach_MC, axis=1, keepdims=True), jnp.sum(flaw_MC, axis=1, keepdims=True)


def _inputs(x_ref: Any, first: int, C: int, end: int) -> jax.Array:
    x_MC = x_ref[:, first : first + C].astype(jnp.float32)
    if first + C > end:
        x_MC = jnp.where(lax.broadcasted_iota(jnp.int32, x_MC.shape, 1) + first < end, x_MC, 0)
    return x_MC


def _pieces(x_MC: jax.Array, up_M1: Any, taken: Operand) -> list[jax.Array]:
    """As `split`'s, float32 with the values of the pieces' dtype."""
    if taken.dtype == jnp.bfloat16:
        pieces = []
        for _ in taken.weights:
            pieces.append(x_MC.astype(jnp.bfloat16).astype(jnp.float32))
            x_MC = jnp.where(jnp.abs(x_MC) < jnp.inf, x_MC - pieces[-1], 0)
        return pieces
    x_MC = jnp.where(up_M1 > 0, x_MC, 0) * up_M1
    pieces = []
    rest = lax.bitcast_convert_type(x_MC + WHOLE, jnp.int32) - 0x4B400000
    for _ in range(2):
        digit = ((rest + 128) & 255) - 128
        pieces.insert(0, digit.astype(jnp.float32))
        rest = (rest - digit) >> 8
    return [rest.astype(jnp.float32), *pieces]


def _rounded(values_MC: jax.Array, taken: Operand) -> jax.Array:
    """float32 with values of `taken`, within whose reach they are."""
    return jnp.round(values_MC) if taken.dtype == jnp.int8 else values_MC.astype(FLOAT8).astype(jnp.float32)


def _evens_first(C: int) -> jax.Array:
    """The permutation [C, C] by which a product puts even inputs first."""
    old, new = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in range(2))
    wanted = jnp.where(new < C // 2, 2 * new, 2 * new - C + 1)
    return (old == wanted).astype(jnp.float32).astype(jnp.bfloat16)


def _apart(x_RW: jax.Array, at: int, rows: int, tile: int, size: int, packed: bool, dtype: jnp.dtype) -> jax.Array:
    """[J * R, W] in the unit's dtype from [R, W], the part of a tile from `at` on: row group j keeps block j only."""
    groups = max(1, tile // size)
    R, missing = rows // groups, rows // groups - x_RW.shape[0]
    if missing:
        x_RW = jnp.concatenate([x_RW, jnp.zeros((missing, x_RW.shape[1]), x_RW.dtype)], axis=0)
    if groups > 1:
        column = lax.broadcasted_iota(jnp.int32, x_RW.shape, 1) + at
        # Of packed tiles: which input it is, in order.
        column = jnp.where(column < tile // 2, 2 * column, 2 * column - tile) if packed else column
        member = lax.shift_right_logical(column, jnp.int32(size.bit_length() - 1))
        x_RW = jnp.concatenate([jnp.where(member == j, x_RW, 0) for j in range(groups)], axis=0)
    assert x_RW.shape[0] == groups * R
    return x_RW.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else x_RW.astype(dtype)


def _add_totals(totals_MG: Any, x_MC: jax.Array, first: int, size: int, G: int) -> jax.Array:
    """The sums of each block so far, and of these inputs."""
    (M, C), step = x_MC.shape, min(size, x_MC.shape[1])
    if totals_MG is None:
        totals_MG = jnp.zeros((M, G), jnp.float32)
    block = lax.broadcasted_iota(jnp.int32, (M, G), 1)
    column = lax.broadcasted_iota(jnp.int32, (M, C), 1)
    for start in range(0, C, step):
        own = x_MC if step == C else jnp.where((column >= start) & (column < start + step), x_MC, 0)
        sum_M1 = jnp.sum(own, axis=1, keepdims=True)
        totals_MG = jnp.where(block == (first + start) // size, totals_MG + sum_M1, totals_MG)
    return totals_MG
