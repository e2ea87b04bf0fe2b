"""Backward attention for Hopper: one Mosaic GPU kernel for dk and dv, one for dq.

Each recomputes the probabilities of its tile from the log-sum-exp. Two kernels do seven products where one would do
five, but nothing is added up in memory, so that gradients are the same bits every time, and a group's queries add to
their key in the registers.

- dk, dv: a block of the grid holds 128 keys (64 a warpgroup) and goes through the queries that see them, of all the
  heads that share the key. With head sizes over 128 both warpgroups hold the same 64 keys and half of each gradient.
- dq: 128 queries, 64 a warpgroup, and the blocks of keys that they see.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values,
q rows of a block of queries, s of keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from .gpu_blocks import (
    FEW_LOADS,
    MANY_LOADS,
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
    unknown_zero,
)
from .hopper import GROUPS, OF_COLUMN, OF_ROW, ROWS, TILE, WGMMA, check, mask, read, swizzled, tanh, tile_of_bias

STAGES = 2  # blocks in flight
SHARED_MEMORY = 226 * 1024  # bytes that a block's arrays may take


def key_block(o: Options, D: int, E: int) -> int:
    """Keys of a block of the dq kernel: the most whose tiles (one more, where scores are bent) fit the registers."""
    return 128 if max(D, E) <= 64 and o.bend is None else 64


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
    if o.bias and o.segments and max(q_BTHD.shape[3], v_BSKE.shape[3]) > 192:
        raise NotImplementedError("a bias, segments and heads over 192 together need more registers than there are")
    T_pad, S_pad = round_up(q_BTHD.shape[1], TILE), round_up(o.S, TILE)
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
    name: str, body: Any, given: dict[str, jax.Array], outs: dict[str, Any], scratch: dict[str, Any], grid: Any
) -> Any:
    """Runs body(given, scratch), both by name, on two warpgroups that compute and one that loads."""
    names = (*given, *outs)

    def entry(*refs: Any) -> None:
        of_call = dict(zip(names, refs, strict=True))
        pl.run_scoped(
            lambda *x: body(of_call, dict(zip(scratch, x, strict=True))),
            *scratch.values(),
            collective_axes="warpgroup",
        )

    entry.__name__ = name  # what profilers show
    return plgpu.kernel(
        entry,
        out_type=tuple(outs.values()),
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*given.values())


def _probabilities(o: Options, x: Any, lse: Any, axis: int, bias: Any) -> tuple[Any, Any]:
    """(p, what d score is multiplied by beside p, or None), from the products x, one log-sum-exp a query, and what
    reads a bias, or None."""
    slope = None
    if o.bend is not None:
        x = tanh(x * o.bend)
        slope = 1.0 - x * x
    exponent = x * o.to_base2 if bias is None else o.biased(x, bias())
    return jnp.exp2(exponent - lax.broadcast_in_dim(lse, x.shape, [axis])), slope


def _accumulate(*products: tuple[Any, Any, Any]) -> list[Any]:
    """acc + a @ b for each (acc, a, b), in flight together."""

    def scope(*acc_refs: Any) -> list[Any]:
        for acc_ref, (acc, a, b_ref) in zip(acc_refs, products, strict=True):
            acc_ref[...] = acc
            plgpu.wgmma(acc_ref, a, b_ref)
        return [acc_ref[...] for acc_ref in acc_refs]

    return pl.run_scoped(scope, *(ACC(acc.shape, jnp.float32) for acc, _, _ in products))


def _pair(weights: Any, start_dp: Any, shape: tuple[int, int], together: bool) -> Any:
    """(*weights(x_ref), dp): the products of both in flight together, or one after the other, in fewer registers."""
    tile_ref = ACC(shape, jnp.float32)
    if together:
        return pl.run_scoped(weights, tile_ref, tile_ref)

    def of_values(dp_ref: Any) -> Any:
        start_dp(dp_ref)
        return dp_ref[...]

    return *pl.run_scoped(weights, tile_ref), pl.run_scoped(of_values, tile_ref)


def _queries_gradient(o: Options, given: dict[str, jax.Array]) -> jax.Array:
    (B, T, H, D), E, dtype = given["q"].shape, given["v"].shape[3], given["q"].dtype
    block = key_block(o, D, E)
    if o.segments:
        given["met"] = blocks_met(o, given, TILE, block)
    # With head size 256 there is room for two blocks of keys, and one of values.
    fixed, room = 2 * TILE * (D + E), SHARED_MEMORY
    stages = {"k": STAGES, "v": STAGES if fixed + 2 * STAGES * block * (D + E) <= room else 1}
    scratch = {
        "q": plgpu.SMEM((GROUPS, ROWS, D), dtype, transforms=swizzled(D, dtype)),
        "d_out": plgpu.SMEM((GROUPS, ROWS, E), dtype, transforms=swizzled(E, dtype)),
        "k": plgpu.SMEM((stages["k"], block, D), dtype, transforms=swizzled(D, dtype)),
        "v": plgpu.SMEM((stages["v"], block, E), dtype, transforms=swizzled(E, dtype)),
        "columns": plgpu.SMEM((GROUPS, block), jnp.int32),
        "q_ready": plgpu.Barrier(num_barriers=GROUPS, num_arrivals=2),
        "k_ready": plgpu.Barrier(num_barriers=stages["k"], num_arrivals=2 if o.segments else 1),
        "v_ready": plgpu.Barrier(num_barriers=stages["v"]),
        "k_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages["k"]),
        "v_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages["v"]),
    }
    if o.segments:
        scratch["kv_ids"] = plgpu.SMEM((stages["k"], block), jnp.int32)

    def body(given: dict[str, Any], scratch: dict[str, Any]) -> None:
        batch, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = i32(T // TILE - 1) - lax.axis_index("tile")  # the last queries see the most keys: they start first
        offset = i32(o.offset) if o.offset is not None else given["offset"][batch]
        n = given["k"].shape[1] // block

        def range_of(group: Any) -> tuple[Any, Any, Any, Any]:
            return keys_of(o, tile * i32(TILE) + group * i32(ROWS) + offset, ROWS, block, n)

        first, last = range_of(i32(0)), range_of(i32(GROUPS - 1))
        low, high = jnp.minimum(first[0], last[0]), jnp.maximum(first[3], last[3])
        if o.segments:  # places in the tile's list
            low, high = i32(0), given["met"][batch, tile, 0]

        @pl.when(group < GROUPS)
        def _() -> None:
            plgpu.set_max_registers((MANY_LOADS if o.segments and D <= 192 else FEW_LOADS)[0], action="increase")
            _, full_low, full_high, _ = range_of(group)
            place = (batch, head, tile, offset, group)
            _compute_queries(o, block, stages, given, scratch, place, (low, full_low, full_high, high))

        @pl.when(group == GROUPS)
        def _() -> None:
            plgpu.set_max_registers((MANY_LOADS if o.segments and D <= 192 else FEW_LOADS)[1], action="decrease")
            kv_head = lax.div(head, i32(o.G))

            @pl.loop(low, high)
            def _(j: Any) -> None:
                keys = (batch, pl.ds(block_at(o, given, batch, tile, j) * i32(block), block))
                for name in "kv":
                    slot = lax.rem(j - low, i32(stages[name]))
                    ready = scratch[name + "_ready"].at[slot]

                    @pl.when(j - low >= stages[name])
                    def _(name: str = name, slot: Any = slot) -> None:
                        plgpu.barrier_wait(scratch[name + "_free"].at[slot])

                    plgpu.copy_gmem_to_smem(given[name].at[*keys, kv_head], scratch[name].at[slot], ready)
                    if o.segments and name == "k":
                        plgpu.copy_gmem_to_smem(given["kv_ids"].at[keys], scratch["kv_ids"].at[slot], ready)

    outs = {"dq": jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)}
    return _launch("flash_attention_dq", body, given, outs, scratch, (B, H, T // TILE))[0]


def _compute_queries(
    o: Options, block: int, stages: Any, given: Any, scratch: Any, place: tuple[Any, ...], spans: tuple[Any, ...]
) -> None:
    batch, head, tile, offset, group = place
    low, full_low, full_high, high = spans
    row = tile * i32(TILE) + group * i32(ROWS)
    rows, D, dtype = pl.ds(row, ROWS), given["k"].shape[3], given["k"].dtype
    q_smem, d_out_smem, ready = scratch["q"].at[group], scratch["d_out"].at[group], scratch["q_ready"].at[group]
    plgpu.copy_gmem_to_smem(given["q"].at[batch, rows, head], q_smem, ready)
    plgpu.copy_gmem_to_smem(given["d_out"].at[batch, rows, head], d_out_smem, ready)
    lse_q = read(given["lse"].at[batch, head, rows], OF_ROW)
    delta_q = read(given["delta"].at[batch, head, rows], OF_ROW)
    q_ids_q = None
    if o.segments:
        q_ids_q = read(given["q_ids"].at[batch, rows], OF_ROW)
    scratch["columns"].at[group][...] = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=OF_COLUMN)
    crowded = D > 128 or o.segments or o.window is not None or o.bend is not None or o.bias
    plgpu.barrier_wait(ready)

    def masked(p_qs: Any, j: Any, slot: Any) -> Any:
        kv_ids_s = None
        if o.segments:
            kv_ids_s = read(scratch["kv_ids"].at[slot], OF_COLUMN)
        columns_s = read(scratch["columns"].at[group], OF_COLUMN)
        first_key = block_at(o, given, batch, tile, j) * i32(block)
        lead = row + offset - first_key
        left = i32(o.S) - first_key if o.S % block else None
        return jnp.where(mask(o, lead, left, p_qs.shape, (q_ids_q, kv_ids_s), columns_s), p_qs, 0.0)

    def bias_of(j: Any) -> Any:
        keys = pl.ds(block_at(o, given, batch, tile, j) * i32(block), block)
        return lambda: tile_of_bias(given["bias"], batch, head, rows, keys)

    def step(j: Any, dq_qD: Any) -> Any:
        slot, v_slot = (lax.rem(j - low, i32(stages[name])) for name in "kv")
        k_smem, v_smem = scratch["k"].at[slot], scratch["v"].at[v_slot]
        own = group + unknown_zero() if crowded else group
        q_smem, d_out_smem = scratch["q"].at[own], scratch["d_out"].at[own]

        def start_dp(dp_ref: Any) -> None:
            plgpu.barrier_wait(scratch["v_ready"].at[v_slot])
            plgpu.wgmma(dp_ref, d_out_smem, plgpu.transpose_ref(v_smem, (1, 0)))

        def weights(x_ref: Any, *dp_refs: Any) -> Any:
            plgpu.barrier_wait(scratch["k_ready"].at[slot])
            plgpu.wgmma(x_ref, q_smem, plgpu.transpose_ref(k_smem, (1, 0)))
            for dp_ref in dp_refs:
                start_dp(dp_ref)
            x_qs = plgpu.wgmma_accumulator_load(x_ref, wait_n=len(dp_refs))
            p_qs, slope_qs = _probabilities(o, x_qs, lse_q, 0, bias_of(j) if o.bias else None)
            if o.segments:
                p_qs = masked(p_qs, j, slot)
            elif edges(o, block):
                on_edge = (j < full_low) | (j >= full_high) if o.window is not None else j >= full_high
                p_qs = lax.cond(on_edge, lambda p: masked(p, j, slot), lambda p: p, p_qs)
            return p_qs if slope_qs is None else p_qs * slope_qs, *(dp_ref[...] for dp_ref in dp_refs)

        w_qs, dp_qs = _pair(weights, start_dp, (ROWS, block), together=D <= 192)
        plgpu.barrier_arrive(scratch["v_free"].at[v_slot])
        ds_qs = w_qs * (dp_qs - lax.broadcast_in_dim(delta_q, dp_qs.shape, [0]))
        (dq_qD,) = _accumulate((dq_qD, ds_qs.astype(dtype), k_smem))
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        return dq_qD

    dq_qD = plgpu.layout_cast(jnp.full((ROWS, D), 0.0, jnp.float32), WGMMA)
    dq_qD = lax.fori_loop(low, high, step, dq_qD)
    given["dq"].at[batch, rows, head][...] = dq_qD * o.scale


def _keys_gradient(o: Options, given: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (B, S, K, D), E, dtype = given["k"].shape, given["v"].shape[3], given["k"].dtype
    T, stages = given["q"].shape[1], STAGES
    shared = max(D, E) > 128  # both warpgroups hold the same keys, each half of the gradients' columns
    tile_keys = ROWS if shared else TILE
    if o.segments:
        given["met"] = blocks_met(o, given, ROWS, tile_keys, of_keys=True)
    rows_of_ids = 1 if o.segments else 0
    # What is cut in two in shared memory has its halves in whole tiles.
    of_k, of_v = (swizzled(width // 2 if shared else width, dtype) for width in (D, E))
    scratch = {
        "k": plgpu.SMEM((tile_keys, D), dtype, transforms=of_k),
        "v": plgpu.SMEM((tile_keys, E), dtype, transforms=of_v),
        "q": plgpu.SMEM((stages, ROWS, D), dtype, transforms=of_k),
        "d_out": plgpu.SMEM((stages, ROWS, E), dtype, transforms=of_v),
        "lse": plgpu.SMEM((stages, ROWS), jnp.float32),
        "delta": plgpu.SMEM((stages, ROWS), jnp.float32),
        "columns": plgpu.SMEM((GROUPS, ROWS), jnp.int32),
        "kv_ready": plgpu.Barrier(num_arrivals=2),
        "q_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2 + rows_of_ids),
        "d_out_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "q_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        "d_out_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    }
    if o.segments:
        scratch["q_ids"] = plgpu.SMEM((stages, ROWS), jnp.int32)

    def body(given: dict[str, Any], scratch: dict[str, Any]) -> None:
        batch, kv_head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")  # under a causal mask the first keys are seen by the most queries
        offset = i32(o.offset) if o.offset is not None else given["offset"][batch]

        def range_of(group: Any) -> tuple[Any, Any, Any, Any]:
            first = tile * i32(tile_keys) + (i32(0) if shared else group * i32(ROWS))
            return queries_of(o, first - offset, ROWS, ROWS, T // ROWS)

        first, last = range_of(i32(0)), range_of(i32(GROUPS - 1))
        low, high = jnp.minimum(first[0], last[0]), jnp.maximum(first[3], last[3])
        if o.segments:  # places in the tile's list
            low, high = i32(0), given["met"][batch, tile, 0]

        @pl.when(group < GROUPS)
        def _() -> None:
            plgpu.set_max_registers((MANY_LOADS if o.segments else FEW_LOADS)[0], action="increase")
            _, full_low, full_high, _ = range_of(group)
            place = (batch, kv_head, tile, offset, group)
            _compute_keys(o, shared, given, scratch, place, (low, full_low, full_high, high))

        @pl.when(group == GROUPS)
        def _() -> None:
            plgpu.set_max_registers((MANY_LOADS if o.segments else FEW_LOADS)[1], action="decrease")
            keys = (batch, pl.ds(tile * i32(tile_keys), tile_keys), kv_head)
            for name in "kv":
                plgpu.copy_gmem_to_smem(given[name].at[keys], scratch[name], scratch["kv_ready"])

            @pl.loop(0, (high - low) * i32(o.G))
            def _(count: Any) -> None:
                head = kv_head * i32(o.G) + lax.rem(count, i32(o.G))
                i = block_at(o, given, batch, tile, low + lax.div(count, i32(o.G)))
                slot, rows = lax.rem(count, i32(stages)), pl.ds(i * i32(ROWS), ROWS)
                for name, of_row in (("q", "lse"), ("d_out", "delta")):
                    ready = scratch[name + "_ready"].at[slot]

                    @pl.when(count >= stages)
                    def _(name: str = name) -> None:
                        plgpu.barrier_wait(scratch[name + "_free"].at[slot])

                    plgpu.copy_gmem_to_smem(given[name].at[batch, rows, head], scratch[name].at[slot], ready)
                    plgpu.copy_gmem_to_smem(given[of_row].at[batch, head, rows], scratch[of_row].at[slot], ready)
                    if o.segments and name == "q":
                        plgpu.copy_gmem_to_smem(given["q_ids"].at[batch, rows], scratch["q_ids"].at[slot], ready)

    outs = {name: jax.ShapeDtypeStruct((B, S, K, width), jnp.float32) for name, width in (("dk", D), ("dv", E))}
    return _launch("flash_attention_dkv", body, given, outs, scratch, (B, K, S // tile_keys))


def _compute_keys(
    o: Options, shared: bool, given: Any, scratch: Any, place: tuple[Any, ...], spans: tuple[Any, ...]
) -> None:
    batch, kv_head, tile, offset, group = place
    low, full_low, full_high, high = spans
    D, E, dtype = given["k"].shape[3], given["v"].shape[3], given["k"].dtype
    key = tile * i32(ROWS) if shared else tile * i32(TILE) + group * i32(ROWS)
    first_own = i32(0) if shared else group * i32(ROWS)
    width_k, width_v = (D // 2, E // 2) if shared else (D, E)
    columns_k, columns_v = (pl.ds(group * i32(w) if shared else 0, w) for w in (width_k, width_v))
    keys, shape = pl.ds(key, ROWS), (ROWS, ROWS)
    # Masks and bends need registers, of which two accumulators of 64 x 128 leave enough for one more tile in flight.
    many = o.bias or (o.segments and o.window is not None and o.bend is not None)
    wide = width_k + width_v > (128 if many else 192)
    crowded = wide and (shared or o.segments or o.window is not None or o.bend is not None or o.bias)
    kv_ids_s = None
    if o.segments:
        kv_ids_s = read(given["kv_ids"].at[batch, keys], OF_ROW)
    # Read back where a tile is masked: computed there, they would take registers everywhere.
    scratch["columns"].at[group][...] = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_COLUMN)
    plgpu.barrier_wait(scratch["kv_ready"])

    def masked(p_sq: Any, count: Any, slot: Any) -> Any:
        q_ids_q = None
        if o.segments:
            q_ids_q = read(scratch["q_ids"].at[slot], OF_COLUMN)
        columns_q = read(scratch["columns"].at[group], OF_COLUMN)
        i = block_at(o, given, batch, tile, low + lax.div(count, i32(o.G)))
        lead = i * i32(ROWS) + offset - key
        sees = mask(o, lead, None, shape, (kv_ids_s, q_ids_q), columns_q, keys_first=True)
        return jnp.where(sees, p_sq, 0.0)

    # All heads of a group take a block of queries before the next block comes. Queries and keys beyond T and S need
    # no mask: the ones pass nothing, and of the others nothing is kept.
    first_full, first_edge, end = ((edge - low) * i32(o.G) for edge in (full_low, full_high, high))

    def bias_of(count: Any) -> Any:
        head = kv_head * i32(o.G) + lax.rem(count, i32(o.G))
        i = block_at(o, given, batch, tile, low + lax.div(count, i32(o.G)))
        return lambda: tile_of_bias(given["bias"], batch, head, keys, pl.ds(i * i32(ROWS), ROWS))

    def step(count: Any, carry: Any) -> Any:
        dk_sD, dv_sE = carry
        if o.window is not None:
            on_edge = (count < first_full) | (count >= first_edge)
        else:
            on_edge = count < first_full if o.causal else None
        slot = lax.rem(count, i32(STAGES))
        q_smem, d_out_smem = scratch["q"].at[slot], scratch["d_out"].at[slot]
        own = pl.ds(first_own + (unknown_zero() * i32(ROWS) if wide else i32(0)), ROWS)
        k_smem, v_smem = scratch["k"].at[own], scratch["v"].at[own]

        def start_dp(dp_ref: Any) -> None:
            plgpu.barrier_wait(scratch["d_out_ready"].at[slot])
            plgpu.wgmma(dp_ref, v_smem, plgpu.transpose_ref(d_out_smem, (1, 0)))

        def weights(x_ref: Any, *dp_refs: Any) -> Any:
            plgpu.barrier_wait(scratch["q_ready"].at[slot])
            plgpu.wgmma(x_ref, k_smem, plgpu.transpose_ref(q_smem, (1, 0)))
            for dp_ref in dp_refs:
                start_dp(dp_ref)
            x_sq = plgpu.wgmma_accumulator_load(x_ref, wait_n=len(dp_refs))
            lse_q = read(scratch["lse"].at[slot], OF_COLUMN)
            p_sq, slope_sq = _probabilities(o, x_sq, lse_q, 1, bias_of(count) if o.bias else None)
            if o.segments:
                p_sq = masked(p_sq, count, slot)
            elif on_edge is not None:
                p_sq = lax.cond(on_edge, lambda p: masked(p, count, slot), lambda p: p, p_sq)
            w_sq = p_sq if slope_sq is None else p_sq * slope_sq
            return p_sq.astype(dtype), w_sq, *(dp_ref[...] for dp_ref in dp_refs)

        p_sq, w_sq, dp_sq = _pair(weights, start_dp, shape, together=not crowded)
        delta_q = read(scratch["delta"].at[slot], OF_COLUMN)
        ds_sq = w_sq * (dp_sq - lax.broadcast_in_dim(delta_q, shape, [1]))
        dv_sE, dk_sD = _accumulate(
            (dv_sE, p_sq, d_out_smem.at[:, columns_v]),
            (dk_sD, ds_sq.astype(dtype), q_smem.at[:, columns_k]),
        )
        plgpu.barrier_arrive(scratch["d_out_free"].at[slot])
        plgpu.barrier_arrive(scratch["q_free"].at[slot])
        return dk_sD, dv_sE

    carry = tuple(plgpu.layout_cast(jnp.full((ROWS, w), 0.0, jnp.float32), WGMMA) for w in (width_k, width_v))
    dk_sD, dv_sE = lax.fori_loop(0, end, step, carry)
    given["dk"].at[batch, keys, kv_head, columns_k][...] = dk_sD * o.scale
    given["dv"].at[batch, keys, kv_head, columns_v][...] = dv_sE
