"""Chunks of prompts on a TPU: writes their tokens into the pages and attends to each request's pages, tile by tile.

A tile is a number of consecutive token rows, whoever owns them: the requests that have some of them are taken in turn,
and each sees the rows that are not its own as masked. So rows need no alignment, and a step of the grid reads and
writes whole tiles.

The same kernel reads prefixes that requests share (Juravsky et al. 2024, arXiv:2402.05099): its rows are then the one
query of each request, in the order of their groups, a group's pages are read once for all of its rows in a tile, and
the softmax's state goes on to `decode`.

Shapes: as in tpu_block; T token rows, t of a tile, H query heads (of one core).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from .pages import LANES
from .tpu_block import LOG2_E, Cache, Sizes, State, merged, nothing, one_in_all, result, softmax_step, when, wide

BUFFERS = 2
ROWS = 512  # of a product at most
ALIGN = 8  # rows of 32-bit numbers that a copy begins at multiples of


class Rows(NamedTuple):
    """Who owns which token rows. Of R requests: first row, rows, and tokens in the cache with the new ones."""

    start_R: jax.Array
    count_R: jax.Array
    length_R: jax.Array
    owner_T: jax.Array  # -1: nobody
    position_T: jax.Array


def chunk(
    sizes: Sizes,
    q_THC: jax.Array,
    new: tuple[jax.Array, jax.Array | None] | None,
    sinks_H: jax.Array | None,
    kv_LPKNSX: jax.Array,
    scale_LPKZ: jax.Array | None,
    rows: Rows,
    *,
    layer: Any,
    table: jax.Array,
    tile: int,
    cores: int,
    vmem_bytes: int,
    static: bool = False,
) -> tuple[Any, jax.Array, jax.Array | None]:
    """[T, H, V] and the updated cache; without `new` the state [T, H, 128 | 128 | V] and the cache as it is.

    Where requests may be cut, that is two states: of the parts before the last one, and of the last one.

    Args:
        new: the tokens as the cache keeps them [T, K, E], and the scales of their keys and values [T, K, 2].
        tile: token rows of a tile; T is a multiple.
        static: one request owns all rows, from its first token on, in pages in order of layer 0; scalar arguments are
            not read (for the static profiler, which cannot follow data).
    """
    T, H, C = q_THC.shape
    K, S, E, V = sizes.K, sizes.S, sizes.N * LANES, sizes.V
    tiles, per_core = T // tile, H // cores
    start_R = jnp.where(rows.count_R > 0, rows.start_R, T)
    order_R = jnp.argsort(start_R, stable=True)
    starts, ends = start_R[order_R], (start_R + rows.count_R)[order_R]
    edges = jnp.arange(tiles) * tile
    first = jnp.searchsorted(ends, edges, side="right")
    stop = jnp.searchsorted(starts, jnp.minimum(edges + tile, T), side="left")
    scalars = [
        jnp.asarray(x, jnp.int32).reshape(-1)
        for x in (layer, order_R, first, stop, start_R, rows.count_R, rows.length_R, table)
    ]
    if static:
        scalars = []
    across = lambda lanes: pl.BlockSpec((per_core, tile, lanes), lambda c, i, *_: (c, i, 0))  # noqa: E731
    info = pl.BlockSpec((tile, LANES), lambda c, i, *_: (i, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    inputs: list[Any] = [_in_hbm(jnp.swapaxes(q_THC, 0, 1))]
    inputs += [jnp.broadcast_to(x.astype(jnp.int32)[:, None], (T, LANES)) for x in (rows.owner_T, rows.position_T)]
    specs = [across(C), info, info]
    if sinks_H is not None:
        sinks = jnp.broadcast_to(sinks_H[:, None].astype(jnp.float32), (H, LANES))
        # An axis for the cores: a block may be a whole axis of few heads, not half of one.
        inputs.append(sinks.reshape(cores, per_core, LANES))
        specs.append(pl.BlockSpec((None, per_core, LANES), lambda c, i, *_: (c, 0, 0)))
    window = -(-(S + ALIGN) // ALIGN) * ALIGN
    most = (tile + S - 2) // S + 1  # pages that the rows of a tile may lie in
    across_window = -(-max(S + LANES - 1, 2 * S) // LANES) * LANES  # of scales, which lie across the lanes
    writes = new is not None
    if new is not None:
        # A page's rows begin anywhere: before the first row, and as far as a window after the last.
        padded = jnp.pad(new[0].astype(jnp.float32), ((S, window), (0, 0), (0, 0)))
        inputs.append(_in_hbm(jnp.swapaxes(padded, 0, 1)))
        specs.append(hbm)
        if new[1] is not None:
            padded = jnp.pad(new[1], ((S, across_window + -(S + T) % LANES), (0, 0), (0, 0)))
            inputs.append(_in_hbm(jnp.moveaxis(padded, 0, 2).reshape(cores, K, 2, -1).swapaxes(1, 2)))
            specs.append(hbm)
    kv = kv_LPKNSX.reshape(*kv_LPKNSX.shape[:2], -1, LANES)
    inputs.append(kv)
    specs.append(hbm)
    cache_at = len(scalars) + len(inputs) - 1
    if scale_LPKZ is not None:
        inputs.append(scale_LPKZ)
        specs.append(hbm)
    if writes:
        out_shape = [
            jax.ShapeDtypeStruct((H, T, V), q_THC.dtype),
            jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        ]
        out_specs = [across(V), hbm]
        if scale_LPKZ is not None:
            out_shape.append(jax.ShapeDtypeStruct(scale_LPKZ.shape, scale_LPKZ.dtype))
            out_specs.append(hbm)
    else:
        states = (LANES, LANES, V) * (1 if sizes.part is None else 2)
        out_shape = [jax.ShapeDtypeStruct((H, T, lanes), jnp.float32) for lanes in states]
        out_specs = [across(lanes) for lanes in states]
    scratch = [pltpu.VMEM((BUFFERS, sizes.n, K * sizes.N * S, LANES), kv.dtype)]
    if sizes.quantised:
        scratch.append(pltpu.VMEM((BUFFERS, sizes.n, K, 2 * S), jnp.float32))
    scratch.append(pltpu.SemaphoreType.DMA((BUFFERS,)))
    for _ in range(1 if sizes.part is None else 2):
        scratch += [pltpu.VMEM((per_core, tile, lanes), jnp.float32) for lanes in (LANES, LANES, V)]
    if writes:
        scratch += [
            pltpu.VMEM((most, K * sizes.N * S, LANES), kv.dtype),
            pltpu.VMEM((most, K, window, E), jnp.float32),
            pltpu.SemaphoreType.DMA((most,)),
        ]
    if writes and sizes.quantised:
        scratch += [pltpu.VMEM((most, K, 2 * S), jnp.float32), pltpu.VMEM((most, 2, K, across_window), jnp.float32)]
    out = pl.pallas_call(
        functools.partial(_kernel, sizes, cores, sinks_H is not None, writes, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, tiles),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases={cache_at + n: 1 + n for n in range(1 + sizes.quantised)} if writes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores > 1 else "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,
        ),
        name="paged_chunk" if writes else "paged_prefix",
    )(*scalars, *inputs)
    if writes:
        return jnp.swapaxes(out[0], 0, 1), out[1].reshape(kv_LPKNSX.shape), out[2] if sizes.quantised else None
    return tuple(jnp.swapaxes(x, 0, 1) for x in out), kv_LPKNSX, scale_LPKZ


def _in_hbm(x: jax.Array) -> jax.Array:
    """Or XLA brings what it made itself into the kernel's memory first, and finds that both do not fit."""
    # Known to what is compiled for a chip only, not to interpreters.
    return x if target_chip() is None else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _heads_of_product(G: int, tile: int) -> int:
    """Of the G query heads of a key head, those whose rows are multiplied by keys that the matrix unit loads once."""
    return next(g for g in range(G, 0, -1) if G % g == 0 and (g == 1 or g * tile <= ROWS))


def _kernel(sizes: Sizes, cores: int, has_sinks: bool, writes: bool, static: bool, *refs: Any) -> None:
    given: Iterator[Any] = iter(refs)
    scalars: list[Any] = [None if static else next(given) for _ in range(8)]
    layer_ref, order_ref, first_ref, stop_ref, start_ref, count_ref, length_ref, table_ref = scalars
    q_HtC, owner_ref, position_ref = next(given), next(given), next(given)
    sinks_ref = next(given) if has_sinks else None
    new_hbm = next(given) if writes else None
    new_scale_hbm = next(given) if writes and sizes.quantised else None
    kv_hbm = next(given)
    scale_hbm = next(given) if sizes.quantised else None
    states = 1 if sizes.part is None else 2
    out_refs = [next(given) for _ in range(1 if writes else 3 * states)]
    if writes:
        kv_hbm = next(given)
        scale_hbm = next(given) if sizes.quantised else None
    kv_buf = next(given)
    scale_buf = next(given) if sizes.quantised else None
    sems, top_Ht, sum_Ht, acc_HtV = (next(given) for _ in range(4))
    part_refs = top_Ht, sum_Ht, acc_HtV
    # Of the parts before the one that is being summed.
    whole_refs = part_refs if sizes.part is None else tuple(next(given) for _ in range(3))
    of_writes = tuple(given)

    K, B, n, S, V = sizes.K, sizes.B, sizes.n, sizes.S, sizes.V
    H, t, _ = q_HtC.shape
    g = _heads_of_product(H // K, t)
    at_once = 2 if H // g % 2 == 0 else 1  # the products of one while the other's weights are made
    i = pl.program_id(1)
    core = pl.program_id(0) if cores > 1 else None
    cache = Cache(sizes, 0 if static else layer_ref[0], core, table_ref, kv_hbm, scale_hbm, kv_buf, scale_buf, sems)

    def begin_head(h: Any, _: Any) -> None:
        top, total, acc = nothing(t, V)
        if sizes.part is not None:
            top_Ht[h], sum_Ht[h], acc_HtV[h] = top, total, acc
        if sinks_ref is not None:
            top, total = jnp.broadcast_to(sinks_ref[pl.ds(h, 1)] * LOG2_E, top.shape), one_in_all(t)
        for ref, x in zip(whole_refs, (top, total, acc), strict=True):
            ref[h] = x

    jax.lax.fori_loop(0, H, begin_head, None)

    def attend(r: Any, j: Any, slot: Any, masked: bool) -> None:
        def group(a: Any) -> tuple[Any, State]:
            some, k = pl.ds(a * g, g), a * g * K // H
            rows = lambda ref: ref[some].reshape(g * t, ref.shape[2])  # noqa: E731
            s = cache.scores(cache.query(rows(q_HtC)), slot, k)
            mask = None
            if masked:
                of_each = lambda x: wide(jnp.concatenate([x] * g), B)  # noqa: E731
                position = position_ref[...]
                at = j * B + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
                mask = at <= of_each(jnp.where(owner_ref[...] == r, position, -1))
                if sizes.window is not None:
                    mask &= at > of_each(position) - sizes.window
            p, top, total, keep = softmax_step(s, mask, rows(top_Ht), rows(sum_Ht))
            acc = rows(acc_HtV) * wide(keep, V) + cache.mix(p, mask, slot, k)
            return some, (top, total, acc)

        def groups(a: Any, _: Any) -> None:
            # All are read before any is written: a compiler takes them for the same.
            for some, state in [group(a * at_once + nth) for nth in range(at_once)]:
                for ref, x in zip(part_refs, state, strict=True):
                    ref[some] = x.reshape(g, t, -1)

        jax.lax.fori_loop(0, H // g // at_once, groups, None)

    def end_part(r: Any) -> None:
        """The next block is another part's: merges what the rows of request r have of the one before."""

        def head(h: Any, _: Any) -> None:
            whole, part = (tuple(ref[h] for ref in refs) for refs in (whole_refs, part_refs))
            # Rows of other requests may be in the midst of a part.
            is_mine = jnp.where(owner_ref[...] == r, 1, 0)
            for n, (new, empty) in enumerate(zip(merged(whole, part), nothing(t, V), strict=True)):
                mine = wide(is_mine, new.shape[1]) == 1
                whole_refs[n][h] = jnp.where(mine, new, whole[n])
                part_refs[n][h] = jnp.where(mine, empty, part[n])

        jax.lax.fori_loop(0, H, head, None)

    def one(a: Any, _: Any) -> None:
        """The rows of this tile that a request owns: positions from `begin` up to `end`."""
        if static:
            r, row, stop_row = 0, i * t, i * t + t
            begin, end = row, stop_row
        else:
            r = order_ref[a]
            row, stop_row = jnp.maximum(start_ref[r], i * t), jnp.minimum(start_ref[r] + count_ref[r], i * t + t)
            begin = end = length_ref[r]
            if writes:
                begin = end - count_ref[r] + row - start_ref[r]
                end = begin + stop_row - row
        if writes:
            _write(cache, r, row, begin, end, new_hbm, new_scale_hbm, *of_writes)
        # Rows of a prefix have positions of their own, so with a window all of its pages are read.
        low_page = sizes.first_page(begin) if writes else 0
        stop_page = (end + S - 1) // S
        low, stop = low_page // n, (stop_page + n - 1) // n
        alone = (stop_row - row) == t

        def block(j: Any, slot: Any) -> Any:
            @when(j + 1 < stop)
            def _() -> None:
                cache.start(r, j + 1, low_page, stop_page, 1 - slot)

            cache.wait(j, low_page, stop_page, slot)
            untidy = (j + 1) * B > end
            if sizes.window is not None:
                untidy |= j == low
            when(untidy)(lambda: cache.tidy(j, low_page, end, slot))
            plain = alone & ((j + 1) * B <= begin + 1)
            if sizes.part is not None:
                pl.when((j > low) & (jax.lax.rem(j, sizes.part) == 0))(lambda: end_part(r))
            if sizes.window is not None:
                plain = False if not writes else plain & (j * B > end - 1 - sizes.window)
            when(plain)(lambda: attend(r, j, slot, False))
            when(not plain if isinstance(plain, bool) else jnp.logical_not(plain))(lambda: attend(r, j, slot, True))
            return 1 - slot

        @when(low < stop)
        def _() -> None:
            cache.start(r, low, low_page, stop_page, 0)
            jax.lax.fori_loop(low, stop, block, 0)

    if static:
        one(0, None)
    else:
        jax.lax.fori_loop(first_ref[i], stop_ref[i], one, None)

    def end_head(h: Any, _: Any) -> None:
        if writes and sizes.part is not None:
            _, total, acc = merged(*(tuple(ref[h] for ref in refs) for refs in (whole_refs, part_refs)))
            out_refs[0][h] = result(acc, total).astype(out_refs[0].dtype)
        elif writes:
            out_refs[0][h] = result(acc_HtV[h], sum_Ht[h]).astype(out_refs[0].dtype)
        else:
            found = [ref[h] for ref in (whole_refs if sizes.part is None else whole_refs + part_refs)]
            for out, x in zip(out_refs, found, strict=True):
                out[h] = x

    jax.lax.fori_loop(0, H, end_head, None)


def _write(
    cache: Cache,
    r: Any,
    row: Any,
    begin: Any,
    end: Any,
    new_hbm: Any,
    new_scale_hbm: Any,
    page_buf: Any,
    new_buf: Any,
    sems: Any,
    scale_buf: Any = None,
    new_scale_buf: Any = None,
) -> None:
    """The tokens at token rows from `row` on, into the slots of positions from `begin` up to `end` of request r.

    A page is read, changed and written whole: its tiles hold several tokens. So are its scales.
    """
    S = cache.sizes.S
    most, K, window, E = new_buf.shape

    def page_at(nth: int) -> tuple[Any, Any, Any]:
        """The page, and the row of the window that its first slot is in; whether there is such a page."""
        entry = begin // S + nth
        there = entry * S < end
        # (A row of `new` is S more than a token row.)
        row_of_page = row + entry * S - begin + S
        return entry, row_of_page, there

    def old_page(nth: int, entry: Any) -> list[tuple[Any, Any]]:
        page = cache.page(r, entry)
        found = [(cache.page_in_memory(page), page_buf.at[nth])]
        return found if scale_buf is None else [*found, (cache.scales_in_memory(page), scale_buf.at[nth])]

    def read(nth: int, entry: Any, row_of_page: Any) -> list[Any]:
        def window_of(align: int, size: int) -> Any:
            return pl.ds(pl.multiple_of(row_of_page // align * align, align), size)

        pairs = [*old_page(nth, entry), (new_hbm.at[cache.mine(1), window_of(ALIGN, window)], new_buf.at[nth])]
        if scale_buf is not None:
            core = 0 if cache.core is None else cache.core
            new_scales = new_scale_hbm.at[core, :, :, window_of(LANES, new_scale_buf.shape[3])]
            pairs.append((new_scales, new_scale_buf.at[nth]))
        return [pltpu.make_async_copy(source, buffer, sems.at[nth]) for source, buffer in pairs]

    def back(nth: int, entry: Any) -> list[Any]:
        return [pltpu.make_async_copy(buffer, page, sems.at[nth]) for page, buffer in old_page(nth, entry)]

    def change_scales(nth: int, entry: Any, row_of_page: Any) -> None:
        size, (K, Z) = new_scale_buf.shape[3], scale_buf.shape[1:]
        # To the lanes of the page: keys' from the first on, values' after them.
        to_first = size - jax.lax.rem(row_of_page, LANES)
        keys, values = (
            pltpu.roll(new_scale_buf[nth, which], jax.lax.rem(to_first + which * S, size), 1)[:, :Z]
            for which in range(2)
        )
        lane = jax.lax.broadcasted_iota(jnp.int32, (K, Z), 1)
        of_keys = lane < S
        position = entry * S + jnp.where(of_keys, lane, lane - S)
        is_new = (position >= begin) & (position < end)
        scale_buf[nth] = jnp.where(is_new, jnp.where(of_keys, keys, values), scale_buf[nth])

    for nth in range(most):
        entry, row_of_page, there = page_at(nth)

        @when(there)
        def _(nth: int = nth, entry: Any = entry, row_of_page: Any = row_of_page) -> None:
            for copy in read(nth, entry, row_of_page):
                copy.start()

    for nth in range(most):
        entry, row_of_page, there = page_at(nth)

        @when(there)
        def _(nth: int = nth, entry: Any = entry, row_of_page: Any = row_of_page) -> None:
            for copy in read(nth, entry, row_of_page):
                copy.wait()
            shift = jax.lax.rem(window - jax.lax.rem(row_of_page, ALIGN), window)
            position = entry * S + jax.lax.broadcasted_iota(jnp.int32, (S, LANES), 0)
            is_new = (position >= begin) & (position < end)

            def head(k: Any, _: Any) -> None:
                moved = pltpu.roll(new_buf[nth, k], shift, 0)[:S]
                for i in range(cache.sizes.N):
                    kept = page_buf[nth, cache.rows(k, i)].astype(jnp.float32)
                    new = jnp.where(is_new, moved[:, i * LANES : (i + 1) * LANES], kept)
                    page_buf[nth, cache.rows(k, i)] = new.astype(page_buf.dtype)

            jax.lax.fori_loop(0, K, head, None)
            if scale_buf is not None:
                change_scales(nth, entry, row_of_page)
            for copy in back(nth, entry):
                copy.start()

    for nth in range(most):
        entry, _, there = page_at(nth)

        @when(there)
        def _(nth: int = nth, entry: Any = entry) -> None:
            for copy in back(nth, entry):
                copy.wait()
