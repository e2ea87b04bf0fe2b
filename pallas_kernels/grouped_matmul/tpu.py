"""Grouped products on TPUs (Mosaic), with tiles of rows that groups may share.

Shapes: N rows, sorted by group, G groups, I inputs, O outputs. The product of rows sums over A and gives C, which are
I and O, or O and I; a, c, n: the parts of A, C and N in one block; s: the rows of a piece.

The grid goes over parts of C, then over visits (`visits.py`), then over parts of A. So a group's weights stay on the
chip while its rows pass, and are read once for each part of C when A is not cut. A tile that groups share is visited by
each: it computes its own rows in pieces of several sizes, and stores these rows only.

The gradient of the weights goes over parts of O and I, then over visits, and sums in float32 on the chip as long as the
group is the same. Rows of others are zeroed on both sides: they may hold anything.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..quantized_matmul import QuantizedWeight, dequantize
from .blocks import GradientBlocks, ProductBlocks, gradient_blocks, product_blocks, vmem_bytes
from .blocks import tuning_space as tuning_space
from .tpu_quantized import Arranged, arrange, fill
from .visits import FIRST, GROUP, HIGH, LOW, TILE, Known, quotient, visits

ALIGNMENT = 16  # rows at whose multiples a piece may begin: a register of bfloat16


def grouped_matmul(x_NI: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    return with_weights(x_NI, weight_GOI, sizes_G, contract=2)


def grouped_matmul_dx(dy_NO: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    return with_weights(dy_NO, weight_GOI, sizes_G, contract=1)


def grouped_matmul_dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return gradient(x_NI, dy_NO, sizes_G)


def with_weights(
    x_NA: jax.Array,
    weight_GOI: jax.Array | QuantizedWeight,
    sizes_G: jax.Array | tuple[int, ...],
    *,
    contract: int,
    blocks: ProductBlocks | None = None,
) -> jax.Array:
    """`product`, also with quantised weights: as they are kept, or where that cannot be made floats beforehand."""
    if not isinstance(weight_GOI, QuantizedWeight):
        return product(x_NA, weight_GOI, sizes_G, contract=contract, blocks=blocks)
    arranged = arrange(weight_GOI, x_NA.dtype)
    if arranged is not None and len(x_NA):
        G, O, I = weight_GOI.shape
        A, C = (I, O) if contract == 2 else (O, I)
        try:
            multiples = arranged.kept.multiples(contract, arranged.scales.dtype)
            blocks = blocks or product_blocks(len(x_NA), A, C, G, x_NA.dtype, contract, multiples)
        except NotImplementedError:
            arranged = None
        else:
            return product(x_NA, arranged.values, sizes_G, contract=contract, blocks=blocks, arranged=arranged)
    return product(x_NA, dequantize(weight_GOI, x_NA.dtype), sizes_G, contract=contract)


def _check(dtype: jnp.dtype) -> None:
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"this kernel takes bfloat16 and float32, not {dtype}")


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _is_own(low: Any, high: Any, first: Any, shape: tuple[int, ...]) -> jax.Array:
    """Which rows of a piece that starts at row `first` of its tile are its own."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first
    return (row >= low) & (row < high)


def _pieces(low: Any, high: Any, rows: int, sizes: tuple[int, ...], body: Callable[..., None]) -> None:
    """`body(first, low, high, size)` for pieces that together hold the rows [low, high) of a tile of `rows`.

    As many of the largest as there are, then at most one of each smaller size, each half of the one before. A piece
    reaches over `high`, or, at the end of the tile, back over rows that an earlier one has; [low, high) are its own.
    """
    largest, smallest = sizes[0], sizes[-1]
    align = math.gcd(ALIGNMENT, smallest)
    begin = quotient(low, align) * align
    units = quotient(high - begin + smallest - 1, smallest)
    turns = quotient(units, largest // smallest)

    def piece(first: Any, size: int) -> None:
        place = 0 if size == rows else pl.multiple_of(jnp.minimum(first, rows - size), align)
        body(place, jnp.maximum(first, low), high, size)

    def turn(index: Any, _: None) -> None:
        piece(begin + index * largest, largest)

    jax.lax.fori_loop(0, turns, turn, None)
    begin, units = begin + turns * largest, units - turns * (largest // smallest)
    for size in sizes[1:]:
        has = (units & (size // smallest)) > 0
        pl.when(has)(partial(piece, begin, size))
        begin = begin + jnp.where(has, size, 0)


def _parts(size: int, part: int, body: Callable[[Any], None]) -> None:
    """`body(first)` for parts of a whole; without a loop when there is only one."""
    if size == part:
        return body(0)

    def turn(index: Any, _: None) -> None:
        body(pl.multiple_of(index * part, part))

    jax.lax.fori_loop(0, size // part, turn, None)


def product(
    x_NA: jax.Array,
    weight_GOI: jax.Array,
    sizes_G: jax.Array | tuple[int, ...],
    *,
    contract: int,
    blocks: ProductBlocks | None = None,
    arranged: Arranged | None = None,
) -> jax.Array:
    """Rows times weights, summed over dimension `contract` of the weights, [N, C]; a tuple of sizes is static.

    Of `arranged` weights, `weight_GOI` are their values; they have to fit `blocks`.
    """
    _check(x_NA.dtype)
    kept = None if arranged is None else arranged.kept
    (N, A), G, C = x_NA.shape, len(weight_GOI), weight_GOI.shape[3 - contract]
    per_byte, terms_last = (1 if kept is None else kept.per_byte), contract == 2
    if kept is not None and kept.inputs_first:
        terms_last, C = not terms_last, weight_GOI.shape[contract] * (1 if contract == 2 else per_byte)
    # Scales that wait for the rows or the result.
    bare = kept is not None and kept.size is None
    if not N:
        return jnp.zeros((N, C), x_NA.dtype)
    b = blocks or product_blocks(N, A, C, G, x_NA.dtype, contract)
    parts_a = A // b.a

    def kernel(*refs: Any) -> None:
        table, (x_nA, weight_1, *others) = (refs[0], refs[2:]) if known is None else (known, refs)
        scales_1: Any = None if kept is None else others.pop(0)
        y_nc, *scratch = others
        visit, part = pl.program_id(1), pl.program_id(2)
        weight_2 = weight_1.at[0] if kept is None else scratch.pop()
        if kept is not None:
            # A group's weights stay for its visits, if its terms are not cut.
            is_new = (table[FIRST, visit] == 1) | (parts_a > 1)
            pl.when(is_new)(partial(fill, kept, weight_1, scales_1, weight_2))
        low, high, is_rest = table[LOW, visit], table[HIGH, visit], table[GROUP, visit] == G

        def some(first: Any, size: int, own: Any) -> jax.Array:
            x_sa = x_nA[pl.ds(first, size), :]
            if bare and contract == 1:
                x_sa = (x_sa.astype(jnp.float32) * scales_1[0, 0]).astype(x_sa.dtype)
            w = weight_2[own, :] if terms_last else weight_2[:, own]
            y_sc = _dot(x_sa, w, (1, 1 if terms_last else 0))
            return y_sc * scales_1[0, 0, :, own] if bare and contract == 2 else y_sc

        def columns(first: Any, low: Any, high: Any, size: int, *, body: Callable[..., None], chunk: int) -> None:
            def each(column: Any) -> None:
                own = pl.ds(column, chunk)
                is_own = _is_own(low, high, first, (size, chunk))
                body((pl.ds(first, size), own), is_own, lambda: some(first, size, own))

            _parts(b.c, chunk, each)

        def shared(place: Any, is_own: jax.Array, product: Callable[[], jax.Array]) -> None:
            y_nc[place] = jnp.where(is_own, product(), y_nc[place].astype(jnp.float32)).astype(y_nc.dtype)

        def add(place: Any, is_own: jax.Array, product: Callable[[], jax.Array]) -> None:
            old_sc = scratch[0][place]
            scratch[0][place] = jnp.where(is_own, jnp.where(part == 0, 0, old_sc) + product(), old_sc)

        def last(place: Any, is_own: jax.Array, product: Callable[[], jax.Array]) -> None:
            sum_sc = scratch[0][place] + product()
            y_nc[place] = jnp.where(is_own, sum_sc, y_nc[place].astype(jnp.float32)).astype(y_nc.dtype)

        def nothing(place: Any, is_own: jax.Array, product: Callable[[], jax.Array]) -> None:
            y_nc[place] = jnp.where(is_own, 0, y_nc[place].astype(jnp.float32)).astype(y_nc.dtype)

        # Of a tile that is its group's alone, all rows.
        def whole(place: Any, _: jax.Array, product: Callable[[], jax.Array]) -> None:
            y_nc[place] = product().astype(y_nc.dtype)

        def add_whole(place: Any, _: jax.Array, product: Callable[[], jax.Array]) -> None:
            scratch[0][place] = jnp.where(part == 0, 0, scratch[0][place]) + product()

        def last_whole(place: Any, _: jax.Array, product: Callable[[], jax.Array]) -> None:
            y_nc[place] = (scratch[0][place] + product()).astype(y_nc.dtype)

        is_whole = (low == 0) & (high == b.n) & ~is_rest

        def run(condition: Any, rows: Callable[..., None], all_rows: Callable[..., None]) -> None:
            run_whole = partial(columns, body=all_rows, chunk=b.wide)
            pl.when(condition & is_whole)(lambda: _parts(b.n, b.s[0], lambda f: run_whole(f, 0, b.n, b.s[0])))
            run_some = partial(columns, body=rows, chunk=b.chunk)
            pl.when(condition & ~is_whole & ~is_rest)(lambda: _pieces(low, high, b.n, b.s, run_some))

        if parts_a == 1:
            run(True, shared, whole)
        else:
            run(part < parts_a - 1, add, add_whole)
            run(part == parts_a - 1, last, last_whole)
        clear = partial(columns, body=nothing, chunk=b.chunk)
        pl.when((part == parts_a - 1) & is_rest)(lambda: _pieces(low, high, b.n, b.s, clear))

    known = None
    if isinstance(sizes_G, tuple):
        known = Known(sizes_G, N, b.n, rest=True)
        count, scalars, last = known.count, (), max(g for g in range(G) if sizes_G[g])
    else:
        found = visits(sizes_G, N, b.n, rest=True)
        # The rows of no group read no weights: those that are there stay.
        last = jnp.max(jnp.where(sizes_G > 0, jnp.arange(G, dtype=jnp.int32), 0))
        count, scalars = found.count, (found.table_5V, last[None])

    def at(visit: Any, refs: tuple[Any, ...]) -> tuple[Any, Any]:
        table, final = refs if known is None else (known, (last,))
        return table[TILE, visit], jnp.minimum(table[GROUP, visit], final[0])

    def part_of_a(visit: Any, part: Any, refs: tuple[Any, ...]) -> Any:
        if parts_a == 1:
            return 0
        is_rest = (refs[0] if known is None else known)[GROUP, visit] == G
        return jnp.where(is_rest, parts_a - 1, part)

    def weight_index(column: Any, visit: Any, part: Any, *refs: Any) -> tuple[Any, ...]:
        group, part = at(visit, refs)[1], part_of_a(visit, part, refs)
        return (group, column, part) if terms_last else (group, part, column)

    def scales_index(column: Any, visit: Any, part: Any, *refs: Any) -> tuple[Any, ...]:
        group, part = at(visit, refs)[1], part_of_a(visit, part, refs)
        # Outputs are columns of the forward product and terms of the other, and inputs are what these are not.
        inputs, outputs = (part, column) if contract == 2 else (column, part)
        return group, 0, 0 if bare else inputs, outputs

    terms, columns_c = b.a // (per_byte if contract == 2 else 1), b.c // (per_byte if contract == 1 else 1)
    arguments, specs, scratch = [x_NA, weight_GOI], [], []
    if arranged is not None:
        inputs, outputs = (b.a, b.c) if contract == 2 else (b.c, b.a)
        blocks_of_inputs = 1 if bare else -(-inputs // (arranged.kept.size or 1))
        shape = (1, arranged.scales.shape[1], blocks_of_inputs, outputs)
        arguments, specs = [*arguments, arranged.scales], [pl.BlockSpec(shape, scales_index)]
        scratch = [pltpu.VMEM((b.c, b.a) if terms_last else (b.a, b.c), x_NA.dtype)]

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(C, b.c), count, parts_a),
            in_specs=[
                pl.BlockSpec((b.n, b.a), lambda c, v, a, *refs: (at(v, refs)[0], part_of_a(v, a, refs))),
                pl.BlockSpec((1, columns_c, terms) if terms_last else (1, terms, columns_c), weight_index),
                *specs,
            ],
            out_specs=pl.BlockSpec((b.n, b.c), lambda c, v, a, *refs: (at(v, refs)[0], c)),
            scratch_shapes=([pltpu.VMEM((b.n, b.c), jnp.float32)] if parts_a > 1 else []) + scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((N, C), x_NA.dtype),
        compiler_params=_parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(N, A, C, x_NA, weight_GOI),
        name="grouped_matmul" if contract == 2 else "grouped_matmul_dx",
    )
    return call(*scalars, *arguments)


def gradient(
    x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array | tuple[int, ...], *, blocks: GradientBlocks | None = None
) -> jax.Array:
    """`dy.T @ x` of each group's rows, [G, O, I]; a tuple of sizes is static."""
    _check(x_NI.dtype)
    (N, I), O, G = x_NI.shape, dy_NO.shape[1], len(sizes_G)
    if not N:
        return jnp.zeros((G, O, I), x_NI.dtype)
    b = blocks or gradient_blocks(N, I, O, G, x_NI.dtype)
    known = None
    if isinstance(sizes_G, tuple):
        known = Known(sizes_G, N, b.n, rest=False)
        count, scalars = known.count, ()
    else:
        found = visits(sizes_G, N, b.n, rest=False)
        count, scalars = found.count, (found.table_5V,)

    def kernel(*refs: Any) -> None:
        table, (x_ni, dy_no, dweight_1oi, sum_oi) = (refs[0], refs[1:]) if known is None else (known, refs)
        visit = pl.program_id(2)
        low, high = table[LOW, visit], table[HIGH, visit]

        is_first, is_whole = table[FIRST, visit] == 1, (low == 0) & (high == b.n)

        def add(is_first: Any, dy: jax.Array, x: jax.Array) -> None:
            # Neither zeroed before nor copied after: those would be passes over the sums that no product hides.
            sum_oi[...] = total = jnp.where(is_first, 0, sum_oi[...]) + _dot(dy, x, (0, 0))
            dweight_1oi[0] = total.astype(dweight_1oi.dtype)

        def add_own(first: Any, begin: Any, high: Any, size: int) -> None:
            place = pl.ds(first, size)
            dy_so, x_si = (
                jnp.where(_is_own(begin, high, first, z.shape), z.astype(jnp.float32), 0).astype(z.dtype)
                for z in (dy_no[place, :], x_ni[place, :])
            )
            add(is_first & (begin == low), dy_so, x_si)

        pl.when(is_whole)(lambda: add(is_first, dy_no[...], x_ni[...]))
        pl.when(~is_whole & (low < high))(lambda: _pieces(low, high, b.n, b.s, add_own))

        @pl.when(low == high)
        def _() -> None:
            dweight_1oi[...] = jnp.zeros_like(dweight_1oi)

    def read(row: int, visit: Any, refs: tuple[Any, ...]) -> Any:
        return (refs[0] if known is None else known)[row, visit]

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(O, b.o), pl.cdiv(I, b.i), count),
            in_specs=[
                pl.BlockSpec((b.n, b.i), lambda o, i, v, *refs: (read(TILE, v, refs), i)),
                pl.BlockSpec((b.n, b.o), lambda o, i, v, *refs: (read(TILE, v, refs), o)),
            ],
            out_specs=pl.BlockSpec((1, b.o, b.i), lambda o, i, v, *refs: (read(GROUP, v, refs), o, i)),
            scratch_shapes=[pltpu.VMEM((b.o, b.i), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((G, O, I), x_NI.dtype),
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(N, I, O, x_NI, dy_NO),
        name="grouped_matmul_dweight",
    )
    return call(*scalars, x_NI, dy_NO)


def _parameters(*semantics: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes())


def _cost(N: int, A: int, C: int, *arrays: jax.Array) -> pl.CostEstimate:
    moved = sum(a.size * a.dtype.itemsize for a in arrays) + N * C * arrays[0].dtype.itemsize
    return pl.CostEstimate(flops=2 * N * A * C, bytes_accessed=moved, transcendentals=0)
