"""Backward attention for Blackwell: one Mosaic GPU kernel for dk and dv, one for dq.

Each recomputes the probabilities of its tile from the log-sum-exp, as `hopper_backward.py` does, and adds nothing up in
memory. The sums stay in tensor memory, and so do probabilities and the gradients of scores, which are the left sides of
the products that add to them.

- dk, dv: a block of the grid holds 128 keys, and goes through blocks of 64 queries that see them, of all the heads
  that share the keys. Two warpgroups take blocks in turns, a key a thread: the tensor cores work on one's block while
  the other computes. Head sizes that add up to more than 256 leave room for one block at a time, over 384 for none.
- dq: two tiles of 128 queries in turns, each with a warpgroup, as in the forward pass, and blocks of 64 keys; with
  head sizes over 128 one tile.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values,
q queries and s keys of a tile or block, c columns of a part of it.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .blackwell import NATIVE, OF_COLUMN, OF_ROW, PART, ROWS, SHARED_MEMORY, SPREAD, TENSOR_MEMORY
from .gpu_blocks import (
    Arrays,
    Options,
    block_at,
    blocks_met,
    edges,
    i32,
    keys_of,
    of_rows,
    pad_rows,
    queries_of,
    round_up,
)
from .hopper import mask, read, swizzled, tanh, tile_of_bias

BLOCK = 64  # what streams by: queries for dk and dv, keys for dq
WIDE = 2 * ROWS  # what lengths are padded to
ORDERED = {"orders_tensor_core": True}


def key_plan(D: int, E: int) -> tuple[int, int]:
    """(blocks of queries in tensor memory, in shared memory) of the kernel for dk and dv."""
    slots = min(2, (TENSOR_MEMORY - D - E) // (2 * BLOCK))
    stage = 2 * BLOCK * (D + E) + 12 * BLOCK
    stages = min(4, (SHARED_MEMORY - 2 * ROWS * (D + E)) // stage)
    # A warpgroup waits for each phase of the blocks that it takes: with two, every second one.
    return slots, stages // slots * slots if slots > 0 else 0


def query_plan(D: int, E: int) -> tuple[int, int]:
    """(tiles of queries, blocks of keys in shared memory) of the kernel for dq."""
    tiles = 2 if 2 * (2 * BLOCK + D) <= TENSOR_MEMORY and D + E <= 256 else 1
    return tiles, min(4, (SHARED_MEMORY - 2 * tiles * ROWS * (D + E)) // (2 * BLOCK * (D + E)))


def check(q: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for dtypes and head sizes that these kernels have no place for."""
    D, E = q.shape[3], v.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Blackwell kernels take bfloat16 and float16, got {q.dtype}")
    if D % 16 or E % 16 or min(D, E) < 16:
        raise NotImplementedError(f"the Blackwell kernels take head sizes of 16, 32, ..., got {D} and {E}")
    if min(key_plan(D, E)) < 1 or min(query_plan(D, E)) < 1:
        raise NotImplementedError(f"gradients of head sizes {D} and {E} do not fit the tensor memory")


def backward(
    o: Options,
    arrays: Arrays,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTHD, dk_BSKD, dv_BSKE) in float32."""
    check(q_BTHD, v_BSKE)
    T_pad, S_pad = round_up(q_BTHD.shape[1], WIDE), round_up(o.S, ROWS)
    given = {
        "q": pad_rows(q_BTHD, T_pad),
        "k": pad_rows(k_BSKD, S_pad),
        "v": pad_rows(v_BSKE, S_pad),
        "d_out": pad_rows(d_out_BTHE, T_pad),
        **of_rows(lse_BTH, delta_BTH, T_pad),
        **arrays.padded(T_pad, S_pad),
    }
    of_keys = {**given, "bias": jnp.swapaxes(given["bias"], 2, 3)} if o.bias else dict(given)
    dk_BSKD, dv_BSKE = _keys_gradient(o, of_keys)
    return _queries_gradient(o, given)[:, : o.T], dk_BSKD[:, : o.S], dv_BSKE[:, : o.S]


def _launch(
    name: str, body: Any, given: dict[str, jax.Array], outs: dict[str, Any], scratch: dict[str, Any], grid: Any, n: int
) -> Any:
    """Runs body(given, scratch), both by name, on n warpgroups that compute and one that loads and multiplies."""
    names = (*given, *outs)

    def entry(*refs: Any) -> None:
        of_call = dict(zip(names, refs, strict=True))

        def scope(*allocated: Any) -> None:
            parts = dict(zip(scratch, allocated, strict=True))
            (scores, slopes, *sums), (parts["scores_16"], parts["slopes_16"]) = parts.pop("tensor_memory")
            parts |= {"scores_of": scores, "slopes_of": slopes, **dict(zip(outs, sums, strict=True))}
            body(of_call, parts)

        pl.run_scoped(scope, *scratch.values(), collective_axes="warpgroup")

    entry.__name__ = name  # what profilers show
    return plgpu.kernel(
        entry,
        out_type=tuple(outs.values()),
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=n + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*given.values())


def _tensor_memory(slots: int, dtype: Any, *sums: int) -> Any:
    """Places for `slots` blocks of scores and of their gradients, half of each of which is then written with 16 bits,
    and for sums of so many columns. They are in one piece: addresses of several took one register too many."""
    shape = ROWS, slots * BLOCK
    widths = (shape[1], shape[1], *sums)
    wide = tuple(plgpu.TMEM((ROWS, columns), jnp.float32) for columns in widths)
    packed = plgpu.TMEM((ROWS, 2 * shape[1]), dtype, packed=True)
    return plgpu.RefUnion(wide, (packed, packed))


def _wide(slot: Any, start: int = 0, width: int = BLOCK) -> Any:
    return slice(None), pl.ds(slot * i32(BLOCK) + i32(start), width)


def _packed(slot: Any, start: int = 0, width: int = BLOCK) -> Any:
    return slice(None), pl.ds(slot * i32(2 * BLOCK) + i32(start), width)


def _drive(load: Any, multiply: Any) -> None:
    """One warp each for loads and for products."""

    @plgpu.warp_map
    def _(warp: Any) -> None:
        pl.when(warp == 0)(load)
        pl.when(warp == 1)(multiply)


def _weights(o: Options, x: Any, lse: Any, axis: int, sees: Any, on_edge: Any, bias: Any) -> tuple[Any, Any]:
    """(p, what d score is multiplied by), from the products x, one log-sum-exp a query, and a bias or None."""
    slope = None
    if o.bend is not None:
        x = tanh(x * o.bend)
        slope = 1.0 - x * x
    exponent = x * o.to_base2 if bias is None else o.biased(x, bias)
    p = jnp.exp2(exponent - lax.broadcast_in_dim(lse, x.shape, [axis]))
    if on_edge is True:
        p = jnp.where(sees(), p, 0.0)
    elif on_edge is not None:
        p = lax.cond(on_edge, lambda p: jnp.where(sees(), p, 0.0), lambda p: p, p)
    return p, p if slope is None else p * slope


def _gradient_of(p: Any, dp: Any, delta: Any, axis: int) -> Any:
    return p * (dp - lax.broadcast_in_dim(delta, dp.shape, [axis]))


def _write(acc: Any, out: Any, columns: int, scale: float, written: Any) -> None:
    """The sum in tensor memory into the global one; zeros where no product was."""
    width = next(x for x in (64, 32, 16) if columns % x == 0)
    for start in range(0, columns, width):
        part = slice(None), pl.ds(start, width)
        sum_rc = plgpu.async_load_tmem(acc.at[part], layout=SPREAD)
        out.at[part][...] = jnp.where(written, sum_rc * scale, 0.0)


def _keys_gradient(o: Options, given: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (B, S, K, D), E, dtype = given["k"].shape, given["v"].shape[3], given["k"].dtype
    T, (slots, stages) = given["q"].shape[1], key_plan(D, E)
    if o.segments:
        given["met"] = blocks_met(o, given, BLOCK, ROWS, of_keys=True)
    scratch = {
        "k": plgpu.SMEM((ROWS, D), dtype, transforms=swizzled(D, dtype)),
        "v": plgpu.SMEM((ROWS, E), dtype, transforms=swizzled(E, dtype)),
        "q": plgpu.SMEM((stages, BLOCK, D), dtype, transforms=swizzled(D, dtype)),
        "d_out": plgpu.SMEM((stages, BLOCK, E), dtype, transforms=swizzled(E, dtype)),
        "lse": plgpu.SMEM((stages, BLOCK), jnp.float32),
        "delta": plgpu.SMEM((stages, BLOCK), jnp.float32),
        "tensor_memory": _tensor_memory(slots, dtype, D, E),
        "kv_ready": plgpu.Barrier(num_arrivals=2),
        "ready": plgpu.Barrier(num_arrivals=5 if o.segments else 4, num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages, **ORDERED),
        "multiplied": plgpu.Barrier(num_barriers=slots, **ORDERED),
        "weighted": plgpu.Barrier(num_barriers=slots, **ORDERED),
        "done": plgpu.Barrier(**ORDERED),
    }
    if o.segments:
        scratch["q_ids"] = plgpu.SMEM((stages, BLOCK), jnp.int32)

    def body(given: dict[str, Any], scratch: dict[str, Any]) -> None:
        batch, kv_head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        key = tile * i32(ROWS)  # under a causal mask the first keys are seen by the most queries
        offset = i32(o.offset) if o.offset is not None else given["offset"][batch]

        def span() -> tuple[Any, Any, Any, Any]:
            """(low, full_low, full_high, n), n blocks of any head: each role computes them, as few registers are left
            where all begin. All heads of a group take a block of queries before the next block comes."""
            low, full_low, full_high, high = queries_of(o, key - offset, ROWS, BLOCK, T // BLOCK)
            if o.segments:  # places in the tile's list
                low, high = i32(0), given["met"][batch, tile, 0]
            return low, full_low, full_high, (high - low) * i32(o.G)

        def load() -> None:
            low, _, _, n = span()
            for name in "kv":
                source = given[name].at[batch, pl.ds(key, ROWS), kv_head]
                plgpu.copy_gmem_to_smem(source, scratch[name], scratch["kv_ready"])

            @pl.loop(0, n)
            def _(count: Any) -> None:
                head = kv_head * i32(o.G) + lax.rem(count, i32(o.G))
                i = block_at(o, given, batch, tile, low + lax.div(count, i32(o.G)))
                slot, rows = lax.rem(count, i32(stages)), pl.ds(i * i32(BLOCK), BLOCK)
                ready = scratch["ready"].at[slot]
                pl.when(count >= stages)(lambda: plgpu.barrier_wait(scratch["free"].at[slot]))
                for name in ("q", "d_out"):
                    plgpu.copy_gmem_to_smem(given[name].at[batch, rows, head], scratch[name].at[slot], ready)
                for name in ("lse", "delta"):
                    plgpu.copy_gmem_to_smem(given[name].at[batch, head, rows], scratch[name].at[slot], ready)
                if o.segments:
                    plgpu.copy_gmem_to_smem(given["q_ids"].at[batch, rows], scratch["q_ids"].at[slot], ready)

        def multiply() -> None:
            n = span()[3]

            def start(count: Any) -> None:
                slot, stage = lax.rem(count, i32(slots)), lax.rem(count, i32(stages))
                plgpu.barrier_wait(scratch["ready"].at[stage])
                for left, right, place in (("k", "q", "scores_of"), ("v", "d_out", "slopes_of")):
                    turned = plgpu.transpose_ref(scratch[right].at[stage], (1, 0))
                    plgpu.tcgen05_mma(scratch[place].at[_wide(slot)], scratch[left], turned, accumulate=False)
                plgpu.tcgen05_commit_arrive(scratch["multiplied"].at[slot])

            def add(count: Any) -> None:
                slot, stage = lax.rem(count, i32(slots)), lax.rem(count, i32(stages))
                plgpu.barrier_wait(scratch["weighted"].at[slot])
                for acc, place, right in (("dv", "scores_16", "d_out"), ("dk", "slopes_16", "q")):
                    left = scratch[place].at[_packed(slot)]
                    plgpu.tcgen05_mma(scratch[acc], left, scratch[right].at[stage], accumulate=count > 0)
                plgpu.tcgen05_commit_arrive(scratch["free"].at[stage])

            plgpu.barrier_wait(scratch["kv_ready"])

            @pl.loop(0, n + i32(slots))
            def _(count: Any) -> None:
                pl.when(count >= slots)(lambda: add(count - i32(slots)))
                pl.when(count < n)(lambda: start(count))

            plgpu.tcgen05_commit_arrive(scratch["done"])

        @pl.when(group < slots)
        def _() -> None:
            low, full_low, full_high, n = span()
            place = batch, kv_head, tile, low, full_low, full_high, offset, n
            _compute_keys(o, given, scratch, place, slots, stages)
            plgpu.barrier_wait(scratch["done"])
            for index, (name, scale) in enumerate((("dk", o.scale), ("dv", 1.0))):

                @pl.when(group == index % slots)
                def _(name: str = name, scale: float = scale) -> None:
                    out = given[name].at[batch, pl.ds(key, ROWS), kv_head]
                    _write(scratch[name], out, scratch[name].shape[1], scale, n > 0)

        pl.when(group == slots)(lambda: _drive(load, multiply))

    outs = {name: jax.ShapeDtypeStruct((B, S, K, width), jnp.float32) for name, width in (("dk", D), ("dv", E))}
    return _launch("flash_attention_dkv", body, given, outs, scratch, (B, K, S // ROWS), slots)


def _compute_keys(o: Options, given: Any, scratch: Any, place: tuple[Any, ...], slots: int, stages: int) -> None:
    batch, kv_head, tile, low, full_low, full_high, offset, n = place
    key = tile * i32(ROWS)
    dtype, group = given["k"].dtype, lax.axis_index("warpgroup")
    kv_ids_s = read(given["kv_ids"].at[batch, pl.ds(key, ROWS)], OF_ROW) if o.segments else None

    @pl.loop(0, lax.div(n - group + i32(slots - 1), i32(slots)))
    def _(turn: Any) -> None:
        count = group + turn * i32(slots)
        i = block_at(o, given, batch, tile, low + lax.div(count, i32(o.G)))
        stage = lax.rem(count, i32(stages))
        # Queries and keys beyond T and S need no mask: the ones pass nothing, and of the others nothing is kept.
        on_edge = None
        if o.segments:
            on_edge = True
        elif o.window is not None:
            on_edge = (i < full_low) | (i >= full_high)
        elif o.causal:
            on_edge = i < full_low
        plgpu.barrier_wait(scratch["ready"].at[stage])
        plgpu.barrier_wait(scratch["multiplied"].at[group])
        for start in range(0, BLOCK, PART):

            def of_queries(name: str, start: int = start) -> Any:
                return read(scratch[name].at[stage, pl.ds(start, PART)], OF_COLUMN)

            def sees(start: int = start, of_queries: Any = of_queries) -> Any:
                ids = (kv_ids_s, of_queries("q_ids")) if o.segments else None
                lead = i * i32(BLOCK) + i32(start) + offset - key
                return mask(o, lead, None, (ROWS, PART), ids, None, keys_first=True, layout=NATIVE)

            x_sc = plgpu.async_load_tmem(scratch["scores_of"].at[_wide(group, start, PART)], layout=NATIVE)
            dp_sc = plgpu.async_load_tmem(scratch["slopes_of"].at[_wide(group, start, PART)], layout=NATIVE)
            bias_sc = None
            if o.bias:
                head = kv_head * i32(o.G) + lax.rem(count, i32(o.G))
                columns = pl.ds(i * i32(BLOCK) + i32(start), PART)
                bias_sc = tile_of_bias(given["bias"], batch, head, pl.ds(key, ROWS), columns, NATIVE)
            p_sc, w_sc = _weights(o, x_sc, of_queries("lse"), 1, sees, on_edge, bias_sc)
            ds_sc = _gradient_of(w_sc, dp_sc, of_queries("delta"), 1)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(scratch["scores_16"].at[_packed(group, start, PART)], p_sc.astype(dtype))
            plgpu.async_store_tmem(scratch["slopes_16"].at[_packed(group, start, PART)], ds_sc.astype(dtype))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(scratch["weighted"].at[group])


def _queries_gradient(o: Options, given: dict[str, jax.Array]) -> jax.Array:
    (B, T, H, D), E, dtype = given["q"].shape, given["v"].shape[3], given["q"].dtype
    tiles, stages = query_plan(D, E)
    if o.segments:
        given["met"] = blocks_met(o, given, tiles * ROWS, BLOCK)
    scratch = {
        "q": plgpu.SMEM((tiles, ROWS, D), dtype, transforms=swizzled(D, dtype)),
        "d_out": plgpu.SMEM((tiles, ROWS, E), dtype, transforms=swizzled(E, dtype)),
        "k": plgpu.SMEM((stages, BLOCK, D), dtype, transforms=swizzled(D, dtype)),
        "v": plgpu.SMEM((stages, BLOCK, E), dtype, transforms=swizzled(E, dtype)),
        "tensor_memory": _tensor_memory(tiles, dtype, tiles * D),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages, **ORDERED),
        "multiplied": plgpu.Barrier(num_barriers=tiles, **ORDERED),
        "weighted": plgpu.Barrier(num_barriers=tiles, **ORDERED),
        "done": plgpu.Barrier(**ORDERED),
    }

    def body(given: dict[str, Any], scratch: dict[str, Any]) -> None:
        batch, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        # The last queries see the most keys under a causal mask: they start first.
        several = i32(T // (tiles * ROWS) - 1) - lax.axis_index("tile")
        first = several * i32(tiles)
        offset = i32(o.offset) if o.offset is not None else given["offset"][batch]
        n = given["k"].shape[1] // BLOCK

        def range_of(t: Any) -> tuple[Any, Any, Any, Any]:
            if o.segments:  # places in the list of all tiles
                return i32(0), i32(0), i32(0), given["met"][batch, several, 0]
            return keys_of(o, (first + t) * i32(ROWS) + offset, ROWS, BLOCK, n)

        spans = [(x[0], x[3]) for x in (range_of(i32(t)) for t in range(tiles))]
        low, high = reduce(jnp.minimum, [x[0] for x in spans]), reduce(jnp.maximum, [x[1] for x in spans])

        def load() -> None:
            for t in range(tiles):
                rows = pl.ds((first + i32(t)) * i32(ROWS), ROWS)
                for name in ("q", "d_out"):
                    source = given[name].at[batch, rows, head]
                    plgpu.copy_gmem_to_smem(source, scratch[name].at[t], scratch["q_ready"].at[t])

            @pl.loop(low, high)
            def _(j: Any) -> None:
                stage, block = lax.rem(j - low, i32(stages)), block_at(o, given, batch, several, j)
                keys = pl.ds(block * i32(BLOCK), BLOCK)
                pl.when(j - low >= stages)(lambda: plgpu.barrier_wait(scratch["free"].at[stage]))
                for name in "kv":
                    source = given[name].at[batch, keys, lax.div(head, i32(o.G))]
                    plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], scratch["ready"].at[stage])

        def multiply() -> None:
            def in_tile(t: int, j: Any) -> Any:
                return (j >= spans[t][0]) & (j < spans[t][1])

            def start(t: int, j: Any) -> None:
                stage = lax.rem(j - low, i32(stages))
                if t == 0:
                    plgpu.barrier_wait(scratch["ready"].at[stage])

                @pl.when(in_tile(t, j))
                def _() -> None:
                    for left, right, place in (("q", "k", "scores_of"), ("d_out", "v", "slopes_of")):
                        turned = plgpu.transpose_ref(scratch[right].at[stage], (1, 0))
                        acc = scratch[place].at[_wide(i32(t))]
                        plgpu.tcgen05_mma(acc, scratch[left].at[t], turned, accumulate=False)
                    plgpu.tcgen05_commit_arrive(scratch["multiplied"].at[t])

            def add(t: int, j: Any) -> None:
                stage = lax.rem(j - low, i32(stages))

                @pl.when(in_tile(t, j))
                def _() -> None:
                    plgpu.barrier_wait(scratch["weighted"].at[t])
                    acc, left = scratch["dq"].at[:, pl.ds(t * D, D)], scratch["slopes_16"].at[_packed(i32(t))]
                    plgpu.tcgen05_mma(acc, left, scratch["k"].at[stage], accumulate=j > spans[t][0])

                if t == tiles - 1:
                    plgpu.tcgen05_commit_arrive(scratch["free"].at[stage])

            for t in range(tiles):
                plgpu.barrier_wait(scratch["q_ready"].at[t])

            @pl.loop(low, high + 1)
            def _(j: Any) -> None:
                for t in range(tiles):
                    pl.when(j > low)(lambda t=t: add(t, j - 1))
                    pl.when(j < high)(lambda t=t: start(t, j))

            plgpu.tcgen05_commit_arrive(scratch["done"])

        @pl.when(group < tiles)
        def _() -> None:
            row = (first + group) * i32(ROWS)
            span = range_of(group)
            _compute_queries(o, given, scratch, (batch, head, several, row, offset), span)
            plgpu.barrier_wait(scratch["done"])
            sums = scratch["dq"].at[:, pl.ds(group * i32(D), D)]
            _write(sums, given["dq"].at[batch, pl.ds(row, ROWS), head], D, o.scale, span[3] > span[0])

        pl.when(group == tiles)(lambda: _drive(load, multiply))

    outs = {"dq": jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)}
    return _launch("flash_attention_dq", body, given, outs, scratch, (B, H, T // (tiles * ROWS)), tiles)[0]


def _compute_queries(o: Options, given: Any, scratch: Any, place: tuple[Any, ...], span: tuple[Any, ...]) -> None:
    batch, head, several, row, offset = place
    low, full_low, full_high, high = span
    dtype, group, rows = given["k"].dtype, lax.axis_index("warpgroup"), pl.ds(row, ROWS)
    lse_q = read(given["lse"].at[batch, head, rows], OF_ROW)
    delta_q = read(given["delta"].at[batch, head, rows], OF_ROW)
    q_ids_q = read(given["q_ids"].at[batch, rows], OF_ROW) if o.segments else None

    @pl.loop(low, high)
    def _(j: Any) -> None:
        on_edge = None
        if o.segments:
            on_edge = True
        elif edges(o, BLOCK):
            on_edge = (j < full_low) | (j >= full_high) if o.window is not None else j >= full_high
        first_key = block_at(o, given, batch, several, j) * i32(BLOCK)
        plgpu.barrier_wait(scratch["multiplied"].at[group])
        for start in range(0, BLOCK, PART):
            key = first_key + i32(start)

            def sees(key: Any = key) -> Any:
                ids = None
                if o.segments:
                    ids = q_ids_q, read(given["kv_ids"].at[batch, pl.ds(key, PART)], OF_COLUMN)
                left = i32(o.S) - key if o.S % BLOCK else None
                return mask(o, row + offset - key, left, (ROWS, PART), ids, None, layout=NATIVE)

            x_qc = plgpu.async_load_tmem(scratch["scores_of"].at[_wide(group, start, PART)], layout=NATIVE)
            dp_qc = plgpu.async_load_tmem(scratch["slopes_of"].at[_wide(group, start, PART)], layout=NATIVE)
            bias_qc = None
            if o.bias:
                bias_qc = tile_of_bias(given["bias"], batch, head, rows, pl.ds(key, PART), NATIVE)
            _, w_qc = _weights(o, x_qc, lse_q, 0, sees, on_edge, bias_qc)
            ds_qc = _gradient_of(w_qc, dp_qc, delta_q, 0)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(scratch["slopes_16"].at[_packed(group, start, PART)], ds_qc.astype(dtype))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(scratch["weighted"].at[group])
