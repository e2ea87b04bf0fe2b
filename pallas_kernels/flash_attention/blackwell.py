"""Forward attention for Blackwell: Mosaic GPU with tcgen05, accumulators in tensor memory, and one warp each for loads
and for products.

A block of the grid holds two tiles of 128 queries, each with a warpgroup that does its exponentials, one query a
thread; the tensor cores work for one tile while the other's warpgroup computes. An output is scaled down only when a
row's maximum has grown by a factor of 256: until then the old one serves (FlashAttention-4, arXiv:2603.05451). Head
sizes over 128 leave room for the output of one tile, which takes turns with itself: the scores of the next block are
computed while this one's exponentials are.

    warp 0 of the last warpgroup  loads q, and blocks of k and v as far ahead as there is room
    warp 1 of it                  scores = q k^T, and once probabilities lie where they were, out += p v
    the other warpgroups          scores -> probabilities, the sum and the maximum of each row; the end

Products of one thread happen in the order in which it issues them: that scores are complete says that the product
before them is, and they may overwrite the probabilities that it read.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values,
q rows of a tile, s keys of a block, c columns of a part of it.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .blackwell_warp import any_of_warp, in_fours, wait_load_of_warp
from .gpu_blocks import (
    LOG2E,
    NEVER,
    UNSEEN,
    Arrays,
    Options,
    block_at,
    blocks_met,
    edges,
    i32,
    keys_of,
    pad_rows,
    round_up,
)
from .hopper import mask, read, swizzled, tanh, tile_of_bias

ROWS = 128  # queries of a tile: the lanes of tensor memory, and the threads of a warpgroup
SHARED_MEMORY = 227 * 1024 - 512  # bytes a block may have, less barriers
TENSOR_MEMORY = 512  # columns of 32 bits
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a row a thread
OF_ROW, OF_COLUMN = NATIVE.reduce(1), NATIVE.reduce(0)
SPREAD = plgpu.Layout.TCGEN05  # a row over four threads, which write to shared memory without conflicts
PART = 32  # scores that a thread takes from tensor memory at a time
# Of a maximum, the powers of two that are left in the probabilities. Those of float8, up to 448, begin as large as they
# may, so that small ones keep more of their bits.
GROWTH, GROWTH8, RANGE8 = 8.0, 3.0, 5.0


@dataclass(frozen=True)
class Plan:
    """tiles: of queries in a block of the grid. block: keys. k, v: blocks of each in flight. width: columns of the
    parts that q is cut into in shared memory, so that the output fits in the first; `own_out` where it does not."""

    tiles: int
    block: int
    k: int
    v: int
    width: int
    own_out: bool

    @property
    def rows(self) -> int:
        return self.tiles * ROWS


def plan(D: int, E: int, itemsize: int = 2) -> Plan:
    tiles, block = (2, 128) if 2 * (128 + E) <= TENSOR_MEMORY and D <= 192 else (1, 64 if itemsize > 1 else 128)
    of_q, of_out = (plgpu.find_swizzle(x * itemsize * 8) // itemsize for x in (D, E))
    shares = itemsize > 1 and (D == E or (E < D and of_q == of_out))  # the output of float8 is wider
    width = D if D == E or not shares else of_q
    room = SHARED_MEMORY - tiles * ROWS * (D * itemsize + 8 + (0 if shares else 2 * E))
    k, v = block * D * itemsize, block * E * itemsize
    stages = min(4, room // (k + v))
    return Plan(tiles, block, min(4, stages + (room - stages * (k + v) >= k)), stages, width, not shares)


def check(q: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for dtypes and head sizes that this kernel has no place for."""
    D, E = q.shape[3], v.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"the Blackwell kernel takes bfloat16, float16 and float8, got {q.dtype}")
    if D % 16 or E % 16 or not (16 <= D <= 256 and 16 <= E <= 256):
        raise NotImplementedError(f"the Blackwell kernel takes head sizes of 16, 32, ... 256, got {D} and {E}")
    if plan(D, E, q.dtype.itemsize).v < 1:
        raise NotImplementedError(f"blocks of head sizes {D} and {E} do not fit the shared memory")


def forward(
    o: Options, arrays: Arrays, q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHE, lse_BTH)."""
    check(q_BTHD, v_BSKE)
    true_E = v_BSKE.shape[3]
    if o.scaled:
        q_BTHD, k_BSKD, v_BSKE = (pad_rows(x, round_up(x.shape[3], 32), 3) for x in (q_BTHD, k_BSKD, v_BSKE))
    (B, T, H, D), E, dtype = q_BTHD.shape, v_BSKE.shape[3], q_BTHD.dtype
    out_dtype = jnp.dtype(jnp.bfloat16) if o.scaled else dtype
    p = plan(D, E, dtype.itemsize)
    T_pad, S_pad = round_up(T, p.rows), round_up(o.S, p.block)
    inputs = {"q": pad_rows(q_BTHD, T_pad), "k": pad_rows(k_BSKD, S_pad), "v": pad_rows(v_BSKE, S_pad)}
    inputs |= arrays.padded(T_pad, S_pad)
    if o.segments:
        inputs["met"] = blocks_met(o, inputs, p.rows, p.block)
    names = tuple(inputs)
    slots = 2  # of scores: one of each tile, or two of the only one

    def body(*refs: Any) -> None:
        ordered = {"orders_tensor_core": True}
        scratch = {
            "q": plgpu.SMEM((p.tiles, D // p.width, ROWS, p.width), dtype, transforms=swizzled(p.width, dtype)),
            "k": plgpu.SMEM((p.k, p.block, D), dtype, transforms=swizzled(D, dtype)),
            "v": plgpu.SMEM((p.v, p.block, E), dtype, transforms=swizzled(E, dtype)),
            "lse": plgpu.SMEM((p.tiles, ROWS), jnp.float32),
            "norm": plgpu.SMEM((p.tiles, ROWS), jnp.float32),
            # Probabilities lie in the first half of the columns of the scores that they come from, or, float8, in a
            # quarter. The sums are in the same piece, as the addresses of two took one register too many.
            "tensor_memory": plgpu.RefUnion(
                (plgpu.TMEM((ROWS, slots * p.block), jnp.float32), plgpu.TMEM((ROWS, p.tiles * E), jnp.float32)),
                plgpu.TMEM((ROWS, 4 // dtype.itemsize * slots * p.block), dtype, packed=True),
            ),
            "q_ready": plgpu.Barrier(num_barriers=p.tiles, num_arrivals=D // p.width),
            "k_ready": plgpu.Barrier(num_barriers=p.k),
            "v_ready": plgpu.Barrier(num_barriers=p.v),
            "k_free": plgpu.Barrier(num_barriers=p.k, **ordered),
            "v_free": plgpu.Barrier(num_barriers=p.v, **ordered),
            "scores": plgpu.Barrier(num_barriers=slots, **ordered),
            "weights": plgpu.Barrier(num_barriers=slots, **ordered),
            "added": plgpu.Barrier(num_barriers=p.tiles, **ordered),
        }
        if p.own_out:
            scratch["out"] = plgpu.SMEM((p.tiles, ROWS, E), out_dtype, transforms=swizzled(E, out_dtype))
        given = dict(zip((*names, "out", "lse"), refs, strict=True))

        def scope(*allocated: Any) -> None:
            parts = dict(zip(scratch, allocated, strict=True))
            (parts["scores_of"], parts["acc"]), parts["weights_of"] = parts.pop("tensor_memory")
            _kernel(o, p, given, parts)

        pl.run_scoped(scope, *scratch.values(), collective_axes="warpgroup")

    body.__name__ = "flash_attention"  # what profilers show
    out_BTHE, lse_BHT = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, T_pad, H, E), out_dtype),
            jax.ShapeDtypeStruct((B, H, T_pad), jnp.float32),
        ),
        grid=(B, H, T_pad // p.rows),
        grid_names=("batch", "head", "tile"),
        num_threads=p.tiles + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*inputs.values())
    return out_BTHE[:, :T, :, :true_E], jnp.swapaxes(lse_BHT[:, :, :T], 1, 2)


def _kernel(o: Options, p: Plan, given: dict[str, Any], scratch: dict[str, Any]) -> None:
    group, n = lax.axis_index("warpgroup"), given["k"].shape[1] // p.block

    # Found out by each role for itself: what is known before they part is kept where registers are few.
    def place() -> tuple[Any, Any, Any, Any]:
        batch, tiles = lax.axis_index("batch"), given["q"].shape[1] // p.rows
        # The last queries see the most keys under a causal mask: they start first.
        pair = i32(tiles - 1) - lax.axis_index("tile")
        return batch, lax.axis_index("head"), pair, i32(o.offset) if o.offset is not None else given["offset"][batch]

    def range_of(t: Any, batch: Any, head: Any, pair: Any, offset: Any) -> tuple[Any, Any, Any, Any]:
        if o.segments:  # places in the list of both tiles
            return i32(0), i32(0), i32(0), given["met"][batch, pair, 0]
        return keys_of(o, (pair * i32(p.tiles) + t) * i32(ROWS) + offset, ROWS, p.block, n)

    @pl.when(group < p.tiles)
    def _compute() -> None:
        here = place()
        _compute_tile(o, p, given, scratch, (*here, lax.axis_index("warpgroup")), range_of(group, *here))

    @pl.when(group == p.tiles)
    def _drive() -> None:
        here = place()
        ranges = [range_of(i32(t), *here) for t in range(p.tiles)]
        spans = [(x[0], x[3]) for x in ranges]
        low, high = reduce(jnp.minimum, [x[0] for x in spans]), reduce(jnp.maximum, [x[1] for x in spans])

        @plgpu.warp_map
        def _(warp: Any) -> None:
            @pl.when(warp == 0)
            def _() -> None:
                _load(o, p, given, scratch, here[:3], (low, high))

            @pl.when(warp == 1)
            def _() -> None:
                _multiply(p, scratch, spans, (low, high))


def _load(o: Options, p: Plan, given: Any, scratch: Any, place: tuple[Any, ...], span: tuple[Any, Any]) -> None:
    batch, head, pair = place
    low, high = span
    for t in range(p.tiles):
        rows = pl.ds(pair * i32(p.rows) + i32(t * ROWS), ROWS)
        for part in range(scratch["q"].shape[1]):
            source = given["q"].at[batch, rows, head, pl.ds(part * p.width, p.width)]
            plgpu.copy_gmem_to_smem(source, scratch["q"].at[t, part], scratch["q_ready"].at[t])

    @pl.loop(low, high)
    def _(j: Any) -> None:
        keys = (batch, pl.ds(block_at(o, given, batch, pair, j) * i32(p.block), p.block), lax.div(head, i32(o.G)))
        for name, stages in (("k", p.k), ("v", p.v)):
            slot = lax.rem(j - low, i32(stages))

            @pl.when(j - low >= stages)
            def _(name: str = name, slot: Any = slot) -> None:
                plgpu.barrier_wait(scratch[name + "_free"].at[slot])

            plgpu.copy_gmem_to_smem(given[name].at[*keys], scratch[name].at[slot], scratch[name + "_ready"].at[slot])


def _multiply(p: Plan, scratch: Any, spans: list[tuple[Any, Any]], span: tuple[Any, Any]) -> None:
    low, high = span
    E = scratch["v"].shape[2]

    def slot_of(t: int, j: Any) -> Any:
        return i32(t) if p.tiles > 1 else lax.rem(j - low, i32(2))

    def in_tile(t: int, j: Any) -> Any:
        return (j >= spans[t][0]) & (j < spans[t][1])

    def scores(t: int, j: Any) -> None:
        slot, stage = slot_of(t, j), lax.rem(j - low, i32(p.k))
        if t == 0:
            plgpu.barrier_wait(scratch["k_ready"].at[stage])

        @pl.when(in_tile(t, j))
        def _() -> None:
            scores_qs = scratch["scores_of"].at[:, pl.ds(slot * i32(p.block), p.block)]
            for part in range(scratch["q"].shape[1]):
                columns = scratch["k"].at[stage, :, pl.ds(part * p.width, p.width)]
                turned = plgpu.transpose_ref(columns, (1, 0))
                # A place that seems to depend on the step: its descriptors are computed in each, and not kept.
                own = scratch["q"].at[i32(t) + lax.div(j, i32(NEVER)), part]
                plgpu.tcgen05_mma(scores_qs, own, turned, accumulate=part > 0)
            plgpu.tcgen05_commit_arrive(scratch["scores"].at[slot])

        if t == p.tiles - 1:
            plgpu.tcgen05_commit_arrive(scratch["k_free"].at[stage])

    def values(t: int, j: Any) -> None:
        slot, stage = slot_of(t, j), lax.rem(j - low, i32(p.v))
        if t == 0:
            plgpu.barrier_wait(scratch["v_ready"].at[stage])

        @pl.when(in_tile(t, j))
        def _() -> None:
            plgpu.barrier_wait(scratch["weights"].at[slot])
            acc_qE = scratch["acc"].at[:, pl.ds(t * E, E)]
            first = slot * i32(4 // scratch["v"].dtype.itemsize * p.block)
            weights_qs = scratch["weights_of"].at[:, pl.ds(first, p.block)]
            plgpu.tcgen05_mma(acc_qE, weights_qs, scratch["v"].at[stage], accumulate=j > spans[t][0])
            plgpu.tcgen05_commit_arrive(scratch["added"].at[t])

        if t == p.tiles - 1:
            plgpu.tcgen05_commit_arrive(scratch["v_free"].at[stage])

    for t in range(p.tiles):
        plgpu.barrier_wait(scratch["q_ready"].at[t])

    # Two tiles: the probabilities of the last block, then the scores of this one in their place. One: two places.
    order = (values, scores) if p.tiles > 1 else (scores, values)

    @pl.loop(low, high + 1)
    def _(j: Any) -> None:
        for t in range(p.tiles):
            for product in order:
                if product is scores:
                    pl.when(j < high)(lambda t=t: scores(t, j))
                else:
                    pl.when(j > low)(lambda t=t: values(t, j - 1))


def _compute_tile(
    o: Options, p: Plan, given: Any, scratch: Any, place: tuple[Any, ...], spans: tuple[Any, ...]
) -> None:
    batch, head, pair, offset, group = place
    low, full_low, full_high, high = spans
    E, dtype = given["v"].shape[3], given["v"].dtype
    tile = pair * i32(p.tiles) + group
    first = tile * i32(ROWS)
    rows, added = pl.ds(first, ROWS), scratch["added"].at[group]
    crowded = o.bend is not None or o.window is not None or o.segments or o.bias or o.scaled
    crowded |= o.offset is None or o.S % p.block != 0
    growth, below = (GROWTH8, RANGE8) if o.scaled else (GROWTH, 0.0)
    part = PART // 4 if o.bias else PART // 2 if crowded else PART
    parts = range(0, p.block, part)
    # The widest part of an output that is a power of two of its columns.
    wide = next(x for x in (64, 32, 16) if E % x == 0)
    q_ids_q = read(given["q_ids"].at[batch, rows], OF_ROW) if o.segments else None

    def of_rows(x_q: Any, width: int) -> Any:
        return lax.broadcast_in_dim(x_q, (ROWS, width), [0])

    def out_part(start: int) -> Any:
        return scratch["acc"].at[:, pl.ds(group * i32(E) + i32(start), wide)]

    def scale_output(decay_q: Any) -> None:
        for start in range(0, E, wide):
            acc_qc = plgpu.async_load_tmem(out_part(start), layout=NATIVE)
            wait_load_of_warp()
            plgpu.async_store_tmem(out_part(start), acc_qc * of_rows(decay_q, wide))

    def step(j: Any, carry: Any, masked: bool) -> Any:
        max_q, sum_q = carry
        slot = group if p.tiles > 1 else lax.rem(j - low, i32(2))
        # 128 scores at a time would want more registers than 168: they are loaded twice, and what was masked or bent is
        # put back in between.
        back = masked or o.bend is not None or o.bias or o.scaled

        def scores_part(start: int) -> Any:
            return scratch["scores_of"].at[:, pl.ds(slot * i32(p.block) + i32(start), part)]

        def load(start: int) -> Any:
            return plgpu.async_load_tmem(scores_part(start), layout=NATIVE)

        first_key = block_at(o, given, batch, pair, j) * i32(p.block)
        plgpu.barrier_wait(scratch["scores"].at[slot])
        highest_q = max_q
        for start in parts:
            x_qc = load(start)
            key = first_key + i32(start)
            if o.scaled:
                x_qc = x_qc * given["qk_scale"][head]
            if o.bend is not None:
                x_qc = tanh(x_qc * o.bend)
            if o.bias:
                x_qc = o.biased(x_qc, tile_of_bias(given["bias"], batch, head, rows, pl.ds(key, part), NATIVE))
            if masked:
                ids = None
                if o.segments:
                    ids = q_ids_q, read(given["kv_ids"].at[batch, pl.ds(key, part)], OF_COLUMN)
                left = i32(o.S) - key if o.S % p.block else None
                sees = mask(o, first + offset - key, left, x_qc.shape, ids, None, layout=NATIVE)
                x_qc = jnp.where(sees, x_qc, UNSEEN)
            top_q = x_qc.max(axis=1) * o.base2
            highest_q = jnp.maximum(highest_q, top_q - below if below else top_q)
            if back:
                wait_load_of_warp()
                plgpu.async_store_tmem(scores_part(start), x_qc)
        if back:
            plgpu.commit_tmem()
        grew_q = highest_q - max_q > growth
        new_max_q = jnp.where(grew_q, highest_q, max_q)
        decay_q = jnp.exp2(max_q - new_max_q)
        sum_q = sum_q * decay_q
        x_qc = load(0)
        for start in parts:
            # Probabilities go where scores were that have been loaded by now; the next are on their way.
            wait_load_of_warp()
            next_qc = load(start + part) if start + part < p.block else x_qc
            p_qc = jnp.exp2(x_qc * o.base2 - of_rows(new_max_q, part))
            sum_q = sum_q + p_qc.sum(axis=1)
            first_s = slot * i32(4 // dtype.itemsize * p.block) + i32(start)
            weights_qc = scratch["weights_of"].at[:, pl.ds(first_s, part)]
            plgpu.async_store_tmem(weights_qc, in_fours(p_qc) if o.scaled else p_qc.astype(dtype))
            x_qc = next_qc

        @pl.when(j > low)
        def _() -> None:
            plgpu.barrier_wait(added)
            pl.when(any_of_warp(new_max_q > max_q))(lambda: scale_output(decay_q))

        plgpu.commit_tmem()
        plgpu.barrier_arrive(scratch["weights"].at[slot])
        return new_max_q, sum_q

    carry = (
        plgpu.layout_cast(jnp.full((ROWS,), UNSEEN * o.base2, jnp.float32), OF_ROW),
        plgpu.layout_cast(jnp.full((ROWS,), 0.0, jnp.float32), OF_ROW),
    )
    if o.window is not None and not o.segments:
        carry = lax.fori_loop(low, full_low, lambda j, c: step(j, c, True), carry)
    if not o.segments:
        carry = lax.fori_loop(full_low, full_high, lambda j, c: step(j, c, False), carry)
    if edges(o, p.block):
        carry = lax.fori_loop(full_high, high, lambda j, c: step(j, c, True), carry)
    max_q, sum_q = carry
    decay_q = None
    if o.sinks:
        sink = jnp.maximum(given["sinks"][head] * jnp.float32(LOG2E), jnp.float32(UNSEEN * o.base2))
        sink_q = plgpu.layout_cast(lax.broadcast_in_dim(sink, (ROWS,), ()), OF_ROW)
        new_max_q = jnp.maximum(max_q, sink_q)
        decay_q = jnp.exp2(max_q - new_max_q)
        sum_q, max_q = sum_q * decay_q + jnp.exp2(sink_q - new_max_q), new_max_q
    # A row that saw nothing has counted masked scores as exp(0): its maximum tells.
    seen_q = max_q > UNSEEN * o.base2 * 0.5
    norm_q = jnp.where(seen_q, 1.0 / jnp.where(seen_q, sum_q, 1.0), 0.0)
    if decay_q is not None:
        norm_q = norm_q * decay_q
    if o.scaled:
        norm_q = norm_q * given["v_scale"][head]
    lse_q = max_q * (1 / LOG2E) + jnp.log(jnp.where(seen_q, sum_q, 1.0))
    scratch["lse"].at[group][...] = jnp.where(seen_q, lse_q, -jnp.inf)
    scratch["norm"].at[group][...] = norm_q
    plgpu.commit_smem()
    norm_q = read(scratch["norm"].at[group], SPREAD.reduce(1))
    # Where q is there is room for the output once it has come, and the products, if there are any, have read it.
    plgpu.barrier_wait(scratch["q_ready"].at[group])
    pl.when(high > low)(lambda: plgpu.barrier_wait(added))
    whole = scratch["out"].at[group] if p.own_out else None
    for start in range(0, E, wide):
        acc_qc, norm_qc = plgpu.async_load_tmem(out_part(start), layout=SPREAD), of_rows(norm_q, wide)
        # A tile without keys has no product: nobody has written there.
        acc_qc = jnp.where(norm_qc != 0, acc_qc * norm_qc, 0.0)
        target = scratch["q"].at[group, start // p.width] if whole is None else whole
        column = start % p.width if whole is None else start
        target.at[:, pl.ds(column, wide)][...] = acc_qc.astype(given["out"].dtype)
    plgpu.commit_smem()
    out = given["out"].at[batch, rows, head]
    if whole is not None:
        plgpu.copy_smem_to_gmem(whole, out)
    else:
        width = min(p.width, E)
        for start in range(0, E, width):
            plgpu.copy_smem_to_gmem(scratch["q"].at[group, start // width], out.at[:, pl.ds(start, width)])
    plgpu.copy_smem_to_gmem(scratch["lse"].at[group], given["lse"].at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
