"""Products of rows with weights of any kind on NVIDIA GPUs, by Pallas's Triton backend: one kernel for all.

Weights are read once, as they are kept, and become what is multiplied in registers. Quantised ones with one block of
inputs are multiplied bare (their values are exact in 16 bits) and scaled at the end; with several, they are scaled
first and rounded to the rows' dtype. Quantised rows meet quantised weights exactly: integers as integers, float8 as
bfloat16 (the unit's own sums of float8 keep 14 bits), each block scaled in float32.

The inputs of a byte that packs two are even and odd ones: rows come in these halves, so nothing is put side by side.
Few rows leave most of a GPU idle, so their sums are split over several programs, and XLA adds the parts.

With groups (`grouped_matmul`), tiles of rows begin where groups do; a program finds its own from the groups' sizes.

Shapes: M rows, A terms of a sum, H = A / 2, C columns of the result, E groups (experts), G blocks of inputs, S splits;
m, c, k, h: what a tile has of M, C, A and H.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..chips import target_chip
from .activations import ACTIVATIONS, finish
from .formats import FLOAT8, PACKED, QuantizedWeight, from_e2m1, scales_of

BAND = 8  # tiles of rows whose programs run side by side, so that they share weights in the cache
PROGRAMS = 264  # two for each of an H200's processors: what a product of few rows is split into
LEAST_STEPS = 4  # of a split: fewer would not keep loads in flight
BY_XLA = ("gelu",)  # activations for which this backend has no instruction


@dataclass(frozen=True)
class Tile:
    """Rows, columns and terms of a step, splits of the terms, and how Triton runs it."""

    m: int
    c: int
    k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Kind:
    """What is static of a product.

    `format` is None for float weights; `contract` is the dimension of unpacked ones that is summed.
    """

    format: str | None
    contract: int
    block: tuple[int, int]  # outputs and inputs of a scale
    groups: int  # G
    M: int
    A: int
    C: int
    E: int | None  # None: no groups
    zeros: bool
    quantized_rows: bool
    dtype: jnp.dtype  # of the rows
    activation: str | None

    @property
    def packed(self) -> bool:
        return self.format in PACKED

    @property
    def exact(self) -> Any:
        """The dtype of sums."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def scaled_first(self) -> bool:
        return self.format is not None and self.groups > 1


def tile_of(kind: Kind) -> Tile:
    """In closed form; raises NotImplementedError for blocks of inputs that no step divides."""
    rows = max(1, kind.M) if kind.E is None else -(-kind.M // kind.E)
    m = min(128, max(16, pl.next_power_of_2(rows)))
    wide = kind.dtype.itemsize == 4
    few = m <= 32
    k = 32 if wide else 128 if few and kind.format is not None else 64
    if kind.groups > 1:
        size = kind.block[1]
        k = min(k, size & -size)
        if k < (32 if kind.packed else 16):
            raise NotImplementedError(f"the Triton kernel wants blocks of 32, 64, ... inputs, got {size}")
    c = 32 if wide else 64 if m <= 64 else 128
    m = min(m, 32) if wide else m
    splits = 1
    if kind.E is None:
        programs = pl.cdiv(kind.M, m) * pl.cdiv(kind.C, c)
        # Writing and reading parts in float32 is to cost half of what the weights do.
        cheap = (kind.A // 2 if kind.packed else kind.A) // (8 * max(1, kind.M))
        splits = max(1, min(PROGRAMS // programs, cheap, pl.cdiv(kind.A, k) // LEAST_STEPS))
        splits = 1 << (splits.bit_length() - 1)
    large = m * c >= 128 * 128
    if large and kind.scaled_first and target_chip() == "a100":
        k = min(k, 32)  # of 64, registers do not hold what becomes of the weights
    return Tile(m, c, k, splits, 8 if large else 4, 3 if large or wide else 4)


def product(
    x_MA: jax.Array,
    weight: Any,
    *,
    sizes_E: jax.Array | None = None,
    contract: int = 1,
    x_scales_MG: jax.Array | None = None,
    bias_C: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tile: Tile | None = None,
) -> jax.Array:
    """`activation(x @ weight.T + bias)`, [M, C]; with groups, each row with its group's, zeros for rows of none.

    Args:
      x_MA: rows; quantised ones (int8, float8) with x_scales_MG, whole blocks.
      weight: a QuantizedWeight, or floats; stacked where there are groups. contract: which of a float weight's two
        dimensions is summed.
    """
    out_dtype = jnp.dtype(out_dtype or x_MA.dtype)
    kind, values = _kind(x_MA, weight, sizes_E, contract, x_scales_MG is not None, activation)
    t = tile or tile_of(kind)
    M, C = kind.M, kind.C
    given = {"x": x_MA, "w": values}
    if kind.packed:
        given["x"] = jnp.moveaxis(jnp.reshape(_even(x_MA), (M, -1, 2)), 2, 0)
    if kind.format is not None:
        given["scales"] = weight.scales
        if kind.zeros:
            given["zeros"] = weight.zeros.astype(jnp.float32)
    if x_scales_MG is not None:
        given["x_scales"] = x_scales_MG
    in_kernel = t.splits == 1 and activation not in BY_XLA
    if bias_C is not None and in_kernel:
        given["bias"] = bias_C
    if sizes_E is not None:
        given["sizes"] = sizes_E
    for name, array in given.items():
        if array.dtype.itemsize == 1 and 2**31 <= array.size < 2**32:
            raise NotImplementedError(f"Pallas addresses {name} of 2 to 4 GiB by 32 bits with a sign")
    if not M:
        return jnp.zeros((M, C), out_dtype)
    tiles, columns = pl.cdiv(M, t.m) + (0 if kind.E is None else kind.E), pl.cdiv(C, t.c)
    bands = pl.cdiv(tiles, BAND) * BAND if tiles > BAND else tiles
    out = jax.ShapeDtypeStruct((t.splits, M, C), out_dtype if in_kernel else jnp.float32)

    def kernel(*refs: Any) -> None:
        of_name = dict(zip((*given, "y"), refs, strict=True))
        width = min(bands, BAND)
        band, rest = _divided(pl.program_id(0), width * columns)
        column, nth = _divided(rest, width)
        _tile(kind, t, of_name, band * width + nth, column, in_kernel)

    (parts_SMC,) = pl.pallas_call(
        kernel,
        grid=(bands * columns, t.splits),
        out_shape=[out],
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        name="quantized_matmul" if kind.E is None else "grouped_matmul",
    )(*given.values())
    if in_kernel:
        return parts_SMC[0]
    return finish(parts_SMC.sum(0), bias_C, activation, out_dtype)


def _even(x_MA: jax.Array) -> jax.Array:
    return jnp.pad(x_MA, ((0, 0), (0, x_MA.shape[1] % 2)))


def _kind(
    x_MA: jax.Array, weight: Any, sizes_E: Any, contract: int, quantized_rows: bool, activation: str | None
) -> tuple[Kind, jax.Array]:
    E = None if sizes_E is None else len(sizes_E)
    common: dict[str, Any] = {"M": len(x_MA), "E": E, "dtype": x_MA.dtype, "activation": activation}
    if not isinstance(weight, QuantizedWeight):
        A, C = weight.shape[-2:] if contract == 0 else weight.shape[-2:][::-1]
        return Kind(None, contract, (1, A), 1, A=A, C=C, zeros=False, quantized_rows=False, **common), weight
    O, I = weight.shape[-2:]
    groups = weight.scales.shape[-2]
    A = x_MA.shape[1] if quantized_rows else I
    zeros = weight.zeros is not None
    shape = {"groups": groups, "A": A, "C": O, "zeros": zeros, "quantized_rows": quantized_rows}
    return Kind(weight.format, 0 if weight.inputs_first else 1, weight.block_sizes, **shape, **common), weight.values


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    by = jnp.int32(by)
    return lax.div(x, by), lax.rem(x, by)


def find_group(sizes_ref: Any, E: int, M: int, m: int, nth: Any) -> tuple[Any, Any, Any, Any]:
    """(group, first row, rows left of the group from there, whether there is such a tile) of the nth tile of m rows;
    group E has the rows of none."""
    i = jnp.arange(pl.next_power_of_2(E + 1), dtype=jnp.int32)
    size = plgpu.load(sizes_ref.at[jnp.minimum(i, E - 1)])
    size = jnp.where(i < E, size, 0)
    size = jnp.where(i == E, M - jnp.sum(size), size)
    tiles = lax.div(size + (m - 1), jnp.int32(m))
    stop = jnp.cumsum(tiles)
    before = stop <= nth
    group = jnp.sum(before.astype(jnp.int32))
    done = (nth - jnp.sum(jnp.where(before, tiles, 0))) * m
    first = jnp.sum(jnp.where(before, size, 0)) + done
    left = jnp.sum(jnp.where(i == group, size, 0)) - done
    return group, first, left, nth < jnp.sum(tiles)


def _tile(kind: Kind, t: Tile, refs: dict[str, Any], nth: Any, column: Any, in_kernel: bool) -> None:
    M, C, E = kind.M, kind.C, kind.E
    if E is None:
        first, left, there, at, is_rest = nth * t.m, M - nth * t.m, nth * t.m < M, (), False
    else:
        group, first, left, there = find_group(refs["sizes"], E, M, t.m, nth)
        at, is_rest = (jnp.minimum(group, E - 1),), group == E

    split = pl.program_id(1)

    @pl.when(there)
    def _() -> None:
        row_m = first + jnp.arange(t.m, dtype=jnp.int32)
        own_c = column * t.c + jnp.arange(t.c, dtype=jnp.int32)
        # What reaches beyond the arrays reads their last row or column, and is not stored.
        rows, columns = jnp.minimum(row_m, M - 1), own_c if C % t.c == 0 else jnp.minimum(own_c, C - 1)
        steps = pl.cdiv(kind.A, t.k)
        each = pl.cdiv(steps, t.splits)
        low = split * each
        high = jnp.minimum(low + each, steps)
        if E is not None:
            high = jnp.where(is_rest, low, high)
        start = jnp.zeros((t.m, t.c), jnp.float32 if kind.scaled_first else kind.exact)
        totals = kind.zeros and kind.groups == 1
        carry = (start, jnp.zeros((t.m,), jnp.float32)) if totals else (start,)

        def step(s: Any, carry: Any) -> Any:
            return _step(kind, t, refs, at, rows, columns, s, carry)

        sums_mc, *total_m = lax.fori_loop(low, high, step, carry)
        y_mc = sums_mc.astype(jnp.float32)
        if kind.format is not None and kind.groups == 1:
            if totals:
                y_mc -= total_m[0][:, None] * _by_column(kind, refs["zeros"], at, 0, columns)[None]
            y_mc *= _by_column(kind, refs["scales"], at, 0, columns)[None]
            if kind.quantized_rows:
                y_mc *= plgpu.load(refs["x_scales"].at[rows, 0])[:, None]
        if in_kernel:
            if "bias" in refs:
                y_mc += plgpu.load(refs["bias"].at[columns]).astype(jnp.float32)[None]
            if kind.activation is not None:
                y_mc = ACTIVATIONS[kind.activation](y_mc)
        if E is not None:
            y_mc = jnp.where(is_rest, 0.0, y_mc)
        kept = (jnp.arange(t.m, dtype=jnp.int32) < left)[:, None] & (own_c < C)[None]
        place = refs["y"].at[split, row_m[:, None], own_c[None]]
        plgpu.store(place, y_mc.astype(refs["y"].dtype), mask=kept)


def _step(kind: Kind, t: Tile, refs: Any, at: Any, rows: Any, columns: Any, s: Any, carry: Any) -> Any:
    """The sums, and the sums of rows for zero points, after the terms of step s."""
    sums_mc, *total_m = carry
    halves = 2 if kind.packed else 1
    n = t.k // halves
    own_k = s * n + jnp.arange(n, dtype=jnp.int32)
    edge = pl.cdiv(kind.A, halves)
    is_term = None if edge % n == 0 else own_k < edge

    def load(ref: Any, index: Any, axis: int) -> jax.Array:
        """With zeros for terms that there are not: 0 times what lies beyond might be nan."""
        if is_term is None:
            return plgpu.load(ref.at[index])
        mask = is_term[:, None] if axis == 0 else is_term[None]
        mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(*(jnp.shape(i) for i in index)))
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    if kind.packed:
        bytes_hc = load(refs["w"], (*at, own_k[:, None], columns[None]), 0)
        weights = [(bytes_hc & 15), (bytes_hc >> 4)]
        contract = 0
    elif kind.contract == 0:
        weights, contract = [load(refs["w"], (*at, own_k[:, None], columns[None]), 0)], 0
    else:
        weights, contract = [load(refs["w"], (*at, columns[:, None], own_k[None]), 1)], 1
    x_place = (rows[:, None], own_k[None])
    xs = [load(refs["x"], ((half,) if kind.packed else ()) + x_place, 1) for half in range(halves)]
    group = None
    if kind.groups > 1:
        group = lax.div(s * t.k, jnp.int32(kind.block[1]))
    found_mc: Any = 0
    for x_mk, codes in zip(xs, weights, strict=True):
        w = _multiplied(kind, refs, at, group, columns, codes, contract)
        if x_mk.dtype == FLOAT8:
            x_mk = x_mk.astype(jnp.bfloat16)
        if x_mk.dtype != w.dtype:
            raise NotImplementedError(f"rows of {x_mk.dtype} meet no weights of {w.dtype}")
        if not kind.scaled_first or kind.quantized_rows:
            found_mc += _dot(x_mk, w, contract, kind.exact)
        else:
            sums_mc += _dot(x_mk, w, contract, kind.exact)
        if total_m:
            total_m = [total_m[0] + jnp.sum(x_mk.astype(jnp.float32), axis=1)]
    if not kind.scaled_first:
        sums_mc += found_mc
    elif kind.quantized_rows:
        found_mc = jnp.asarray(found_mc, jnp.float32)
        if kind.zeros:
            x_m: Any = sum(jnp.sum(x.astype(jnp.float32), axis=1) for x in xs)
            found_mc -= x_m[:, None] * _by_column(kind, refs["zeros"], at, group, columns)[None]
        x_scale_m = plgpu.load(refs["x_scales"].at[rows, group])
        sums_mc += found_mc * x_scale_m[:, None] * _by_column(kind, refs["scales"], at, group, columns)[None]
    return (sums_mc, *total_m)


def _by_column(kind: Kind, ref: Any, at: Any, group: Any, columns: Any) -> jax.Array:
    """Scales or zero points of a block of inputs, one a column, in float32."""
    size = kind.block[0]
    if size >= kind.C:
        columns = jnp.zeros_like(columns)
    elif size > 1:
        columns = lax.div(columns, jnp.full_like(columns, size))
    return scales_of(plgpu.load(ref.at[(*at, group, columns)]), jnp.float32)


def _multiplied(kind: Kind, refs: Any, at: Any, group: Any, columns: Any, codes: Any, contract: int) -> jax.Array:
    """A tile of weights as the unit takes it."""
    match kind.format:
        case None:
            return codes
        case "mxfp4":
            values = from_e2m1(codes)
        case "int4":
            values = codes.astype(jnp.int8) - jnp.int8(8)
        case _:
            values = codes
    if kind.quantized_rows:
        return values.astype(jnp.bfloat16) if values.dtype == FLOAT8 else values
    if not kind.scaled_first:
        return values.astype(kind.dtype)
    wide = values.astype(jnp.float32)

    def spread(of_c: jax.Array) -> jax.Array:
        return of_c[None] if contract == 0 else of_c[:, None]

    if kind.zeros:
        wide -= spread(_by_column(kind, refs["zeros"], at, group, columns))
    return (wide * spread(_by_column(kind, refs["scales"], at, group, columns))).astype(kind.dtype)


def _dot(x: jax.Array, w: jax.Array, contract: int, sums: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=sums)
