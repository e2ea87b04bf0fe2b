"""Forward attention for Hopper: Mosaic GPU with wgmma, TMA and a warpgroup that only loads.

Two warpgroups each hold 64 queries of one head and take turns, so that one's products run while the other does its
exponentials (FlashAttention-3, arXiv:2407.08608); a third keeps blocks of keys and values coming. Which blocks a tile
sees follows from its place, so none that the mask empties is loaded, and only those on its edge are masked.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values,
q rows of a tile, s keys of a block.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from .gpu_blocks import (
    FEW_LOADS,
    LOG2E,
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
    unknown_zero,
)

ROWS = 64  # queries of a warpgroup: what one wgmma takes
GROUPS = 2  # warpgroups that compute
TILE = ROWS * GROUPS
WGMMA = plgpu.Layout.WGMMA
OF_ROW, OF_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
SHARED_MEMORY = 227 * 1024 - 2048  # bytes a block may have, less barriers
FLOAT8_RANGE = 8.0  # probabilities up to 2**8, of float8's 448, so that small ones keep more of their bits
FLOAT8_KEYS = 16  # of which `float8_left` changes the order


def blocks(D: int, E: int, itemsize: int = 2, bias: bool = False) -> tuple[int, int]:
    """(keys of a block, blocks in flight) for head sizes D and E: the most keys whose scores, and bias, fit the
    registers beside the accumulator, then as many blocks as fit the shared memory."""
    keys = 128 if E <= 128 and D <= 128 and not bias else 64
    fixed = TILE * D * itemsize + (TILE * E * 2 if D != E or itemsize == 1 else 0)
    stage = keys * (D + E) * itemsize + keys * 4
    return keys, min(4, (SHARED_MEMORY - fixed - TILE * 4) // stage)


def swizzled(width: int, dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory that wgmma reads, for rows of `width`."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def check(q: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for dtypes and head sizes that wgmma does not take here."""
    D, E = q.shape[3], v.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"the Hopper kernel takes bfloat16, float16 and float8, got {q.dtype}")
    if D % 16 or E % 16 or not (16 <= D <= 256 and 16 <= E <= 256):
        raise NotImplementedError(f"the Hopper kernel takes head sizes of 16, 32, ... 256, got {D} and {E}")


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
    block, stages = blocks(D, E, dtype.itemsize, o.bias)
    T_pad, S_pad = round_up(T, TILE), round_up(o.S, block)
    inputs = {"q": pad_rows(q_BTHD, T_pad), "k": pad_rows(k_BSKD, S_pad), "v": pad_rows(v_BSKE, S_pad)}
    if o.scaled:
        inputs["v"] = turned(inputs["v"])
    inputs |= arrays.padded(T_pad, S_pad)
    if o.segments:
        inputs["met"] = blocks_met(o, inputs, TILE, block)
    names = tuple(inputs)

    def body(*refs: Any) -> None:
        scratch = {
            "q": plgpu.SMEM((GROUPS, ROWS, D), dtype, transforms=swizzled(D, dtype)),
            "k": plgpu.SMEM((stages, block, D), dtype, transforms=swizzled(D, dtype)),
            "v": plgpu.SMEM(
                (stages, E, block) if o.scaled else (stages, block, E),
                dtype,
                transforms=swizzled(block if o.scaled else E, dtype),
            ),
            "lse": plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(num_barriers=GROUPS),
            "k_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2 if o.segments else 1),
            "v_ready": plgpu.Barrier(num_barriers=stages),
            "k_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            "v_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=GROUPS),
        }
        if D != E or o.scaled:
            scratch["out"] = plgpu.SMEM((GROUPS, ROWS, E), out_dtype, transforms=swizzled(E, out_dtype))
        if o.segments and (o.window is not None or o.bend is not None or o.bias or E > 128):
            scratch["columns"] = plgpu.SMEM((GROUPS, block), jnp.int32)  # see `mask`: registers are short
        if o.segments:
            scratch["kv_ids"] = plgpu.SMEM((stages, block), jnp.int32)
        given = dict(zip((*names, "out", "lse"), refs, strict=True))
        pl.run_scoped(
            lambda *x: _kernel(o, block, stages, given, dict(zip(scratch, x, strict=True))),
            *scratch.values(),
            collective_axes="warpgroup",
        )

    body.__name__ = "flash_attention"  # what profilers show
    tiles = T_pad // TILE
    out_BTHE, lse_BHT = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, T_pad, H, E), out_dtype),
            jax.ShapeDtypeStruct((B, H, T_pad), jnp.float32),
        ),
        grid=(B, H, tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    return out_BTHE[:, :T, :, :true_E], jnp.swapaxes(lse_BHT[:, :, :T], 1, 2)


def _kernel(o: Options, block: int, stages: int, given: dict[str, Any], scratch: dict[str, Any]) -> None:
    batch, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    # The last queries see the most keys under a causal mask: they start first.
    tile = i32(given["q"].shape[1] // TILE - 1) - lax.axis_index("tile")
    offset = i32(o.offset) if o.offset is not None else given["offset"][batch]
    n = given["k"].shape[1] // block

    def range_of(group: Any) -> tuple[Any, Any, Any, Any]:
        if o.segments:  # places in the tile's list
            return i32(0), i32(0), i32(0), given["met"][batch, tile, 0]
        return keys_of(o, tile * i32(TILE) + group * i32(ROWS) + offset, ROWS, block, n)

    # Both warpgroups go through all the blocks that either sees, as they free them and take turns together.
    first, last = range_of(i32(0)), range_of(i32(GROUPS - 1))
    low, high = jnp.minimum(first[0], last[0]), jnp.maximum(first[3], last[3])

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(FEW_LOADS[0], action="increase")
        place = (batch, head, tile, group, offset)
        _compute_group(o, block, stages, given, scratch, place, (low, *range_of(group), high))

    @pl.when(group == GROUPS)
    def _load() -> None:
        plgpu.set_max_registers(FEW_LOADS[1], action="decrease")
        _load_blocks(o, block, stages, given, scratch, (batch, lax.div(head, i32(o.G)), tile), (low, high))


def _load_blocks(
    o: Options, block: int, stages: int, given: Any, scratch: Any, of: tuple[Any, Any, Any], span: tuple[Any, Any]
) -> None:
    batch, kv_head, tile = of
    low, high = span

    @pl.loop(low, high)
    def _(j: Any) -> None:
        slot = lax.rem(j - low, i32(stages))
        keys = (batch, pl.ds(block_at(o, given, batch, tile, j) * i32(block), block))

        @pl.when(j - low >= stages)
        def _() -> None:
            plgpu.barrier_wait(scratch["k_free"].at[slot])

        plgpu.copy_gmem_to_smem(given["k"].at[*keys, kv_head], scratch["k"].at[slot], scratch["k_ready"].at[slot])
        if o.segments:
            plgpu.copy_gmem_to_smem(given["kv_ids"].at[keys], scratch["kv_ids"].at[slot], scratch["k_ready"].at[slot])

        @pl.when(j - low >= stages)
        def _() -> None:
            plgpu.barrier_wait(scratch["v_free"].at[slot])

        values = given["v"].at[batch, kv_head, :, keys[1]] if o.scaled else given["v"].at[*keys, kv_head]
        plgpu.copy_gmem_to_smem(values, scratch["v"].at[slot], scratch["v_ready"].at[slot])


def _compute_group(
    o: Options, block: int, stages: int, given: Any, scratch: Any, place: tuple[Any, ...], spans: tuple[Any, ...]
) -> None:
    batch, head, tile, group, offset = place
    low, own_low, full_low, full_high, own_high, high = spans
    q_smem = scratch["q"].at[group]
    rows = pl.ds(tile * i32(TILE) + group * i32(ROWS), ROWS)
    E, dtype = given["out"].shape[3], given["v"].dtype
    turn = scratch["turn"]

    def take_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    plgpu.copy_gmem_to_smem(given["q"].at[batch, rows, head], q_smem, scratch["q_ready"].at[group])
    first_position = tile * i32(TILE) + group * i32(ROWS) + offset
    q_ids_q = None
    if o.segments:
        q_ids_q = read(given["q_ids"].at[batch, rows], OF_ROW)
    crowded = "columns" in scratch
    if crowded:
        scratch["columns"].at[group][...] = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=OF_COLUMN)
    plgpu.barrier_wait(scratch["q_ready"].at[group])

    def skip(j: Any, _: Any) -> None:
        slot = lax.rem(j - low, i32(stages))
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        take_turn()
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        take_turn()

    def step(j: Any, carry: Any, masked: bool) -> Any:
        acc_qE, max_q, sum_q = carry
        slot = lax.rem(j - low, i32(stages))
        bias_qs = None
        if o.bias:
            keys = pl.ds(block_at(o, given, batch, tile, j) * i32(block), block)
            bias_qs = tile_of_bias(given["bias"], batch, head, rows, keys)
        plgpu.barrier_wait(scratch["k_ready"].at[slot])

        def scores(acc_ref: Any) -> Any:
            own = scratch["q"].at[group + unknown_zero()] if crowded else q_smem
            plgpu.wgmma(acc_ref, own, plgpu.transpose_ref(scratch["k"].at[slot], (1, 0)))
            take_turn()
            return acc_ref[...]

        x_qs = pl.run_scoped(scores, ACC((ROWS, block), jnp.float32))
        kv_ids_s = None
        if o.segments:
            kv_ids_s = read(scratch["kv_ids"].at[slot], OF_COLUMN)
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        if o.scaled:
            x_qs = x_qs * given["qk_scale"][head]
        if o.bend is not None:
            x_qs = tanh(x_qs * o.bend)
        if bias_qs is not None:
            x_qs = o.biased(x_qs, bias_qs)
        if masked:
            columns_s = None
            if crowded:
                columns_s = read(scratch["columns"].at[group], OF_COLUMN)
            # Read where it is needed, from a place that seems to depend on the step: registers are short.
            first_key = block_at(o, given, batch, tile, j + unknown_zero() if crowded else j) * i32(block)
            lead = first_position - first_key
            left = i32(o.S) - first_key if o.S % block else None
            x_qs = jnp.where(mask(o, lead, left, x_qs.shape, (q_ids_q, kv_ids_s), columns_s), x_qs, UNSEEN)
        # The maximum is kept in units of log2, so that the exponent is one multiplication-and-addition.
        highest_q = x_qs.max(axis=1) * o.base2
        new_max_q = jnp.maximum(max_q, highest_q - FLOAT8_RANGE if o.scaled else highest_q)
        decay_q = jnp.exp2(max_q - new_max_q)
        p_qs = jnp.exp2(x_qs * o.base2 - lax.broadcast_in_dim(new_max_q, x_qs.shape, [0]))
        acc_qE = acc_qE * lax.broadcast_in_dim(decay_q, acc_qE.shape, [0])
        sum_q = sum_q * decay_q + p_qs.sum(axis=1)
        p_qs = float8_left(p_qs) if o.scaled else p_qs.astype(dtype)
        acc_qE, sum_q, new_max_q, p_qs = lax.optimization_barrier((acc_qE, sum_q, new_max_q, p_qs))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        plgpu.barrier_wait(turn)

        def add_values(acc_ref: Any) -> None:
            v_smem = scratch["v"].at[slot]
            plgpu.wgmma(acc_ref, p_qs, plgpu.transpose_ref(v_smem, (1, 0)) if o.scaled else v_smem)

        acc_qE = pl.run_state(add_values)(ACC.init(acc_qE))
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        return acc_qE, new_max_q, sum_q

    carry = (
        plgpu.layout_cast(jnp.full((ROWS, E), 0.0, jnp.float32), WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), UNSEEN * o.base2, jnp.float32), OF_ROW),
        plgpu.layout_cast(jnp.full((ROWS,), 0.0, jnp.float32), OF_ROW),
    )
    # One group is half a step behind the other: that is what keeps one's products beside the other's exponentials.
    pl.when(group == 1)(take_turn)
    if o.window is not None and not o.segments:
        lax.fori_loop(low, own_low, skip, None)
        carry = lax.fori_loop(own_low, full_low, lambda j, c: step(j, c, True), carry)
    if not o.segments:
        carry = lax.fori_loop(full_low, full_high, lambda j, c: step(j, c, False), carry)
    if edges(o, block):
        carry = lax.fori_loop(full_high, own_high, lambda j, c: step(j, c, True), carry)
    if not o.segments:
        lax.fori_loop(own_high, high, skip, None)
    pl.when(group == 0)(take_turn)

    acc_qE, max_q, sum_q = carry
    if o.sinks:
        sink = jnp.maximum(given["sinks"][head] * jnp.float32(LOG2E), jnp.float32(UNSEEN * o.base2))
        sink_q = lax.broadcast_in_dim(sink, (ROWS,), ())
        new_max_q = jnp.maximum(max_q, sink_q)
        decay_q = jnp.exp2(max_q - new_max_q)
        sum_q = sum_q * decay_q + jnp.exp2(sink_q - new_max_q)
        acc_qE, max_q = acc_qE * lax.broadcast_in_dim(decay_q, acc_qE.shape, [0]), new_max_q
    # A row that saw nothing has counted masked scores as exp(0): its maximum tells.
    seen_q = max_q > UNSEEN * o.base2 * 0.5
    norm_q = jnp.where(seen_q, 1.0 / jnp.where(seen_q, sum_q, 1.0), 0.0)
    if o.scaled:
        norm_q = norm_q * given["v_scale"][head]
    out_smem = scratch["out"].at[group] if "out" in scratch else q_smem
    out_smem[...] = (acc_qE * lax.broadcast_in_dim(norm_q, acc_qE.shape, [0])).astype(given["out"].dtype)
    lse_q = max_q * (1 / LOG2E) + jnp.log(jnp.where(seen_q, sum_q, 1.0))
    scratch["lse"].at[group][...] = jnp.where(seen_q, lse_q, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, given["out"].at[batch, rows, head])
    plgpu.copy_smem_to_gmem(scratch["lse"].at[group], given["lse"].at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)


def read(ref: Any, layout: Any) -> jax.Array:
    """What a reference holds, as a vector that is laid out as the rows or columns of a product."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # JAX 0.10 wants one
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def tile_of_bias(bias: Any, batch: Any, head: Any, rows: Any, columns: Any, layout: Any = WGMMA) -> jax.Array:
    """From global memory into registers, as it is kept; the bias may be all batch rows' or all heads'."""
    batch, head = (i32(0) if n == 1 else at for n, at in zip(bias.shape[:2], (batch, head), strict=True))
    return read(bias.at[batch, head, rows, columns], layout)


def turned(v_BSKE: jax.Array) -> jax.Array:
    """[B, K, E, S]: values with the keys last, as wgmma wants those of 8 bits, and these in the order of
    `float8_left`."""
    (B, S, K, E), n = v_BSKE.shape, FLOAT8_KEYS
    of_keys = v_BSKE.reshape(B, S // n, 2, 4, 2, K, E)
    return of_keys.transpose(0, 5, 6, 1, 3, 2, 4).reshape(B, K, E, S)


def float8_left(p_qs: jax.Array) -> jax.Array:
    """A product's result in float8 as the left side of the next, with the keys in another order: a thread holds numbers
    2c, 2c + 1, 2c + 8, 2c + 9 of 16 columns and is to hold 4c ... 4c + 3, so that is what they are called, and nothing
    moves (as in FlashAttention-3)."""
    from jax.experimental.mosaic import gpu as mgpu  # jaxlib may have been built without
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    of_kernel: Any = plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(p_qs.shape, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT),
    )

    @of_kernel
    def float8_left(_: Any, x: Any) -> Any:
        x = x.astype(ir.Float8E4M3FNType.get())
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        pairs = x.registers.reshape(-1, 2, 2)  # groups of 16 columns, their halves, the rows r and r + 8
        fours = np.empty((len(pairs), 2), dtype=object)
        for at in np.ndindex(*fours.shape):
            fours[at] = utils.vector_concat([pairs[at[0], 0, at[1]], pairs[at[0], 1, at[1]]])
        return mgpu.FragmentedArray(
            _registers=fours.reshape(layout.registers_shape(x.shape)), _layout=layout, _is_signed=None
        )

    return float8_left(p_qs)


def tanh(x: jax.Array) -> jax.Array:
    """By the exponential: the instruction for tanh errs by 2**-11, which a softcap of 50 turns into 2% of a weight."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2E)))


def mask(
    o: Options,
    lead: Any,
    left: Any,
    shape: tuple[int, ...],
    ids: Any,
    columns: Any,
    keys_first: bool = False,
    layout: Any = WGMMA,
) -> Any:
    """What the rows of a tile see of its keys; with `keys_first` the tile is [keys, queries].

    Args:
      lead: the first query's position less the first key's. left: how many keys there are from the first one on;
        None where there are enough.
      ids: (of rows, of columns), segment ids. columns: 0, 1, ... as OF_COLUMN, or None to compute them: then they and
        what follows from them are kept in registers, one for each of a thread's columns.
    """
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    if columns is None:
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    else:
        column = lax.broadcast_in_dim(columns, shape, [1])
    # key - query, but for `lead`, is column - row, or with the keys first row - column.
    sees = []
    if o.causal:
        sees.append(row <= column + lead if keys_first else column <= row + lead)
    if o.window is not None:
        near = lead - i32(o.window)
        sees.append(row > column + near if keys_first else column > row + near)
        if not o.causal:
            far = lead + i32(o.window)
            sees.append(row < column + far if keys_first else column < row + far)
    if left is not None:
        sees.append(column < left)
    if o.segments:
        of_row, of_column = (lax.broadcast_in_dim(x, shape, [axis]) for axis, x in enumerate(ids))
        sees.append(of_row == of_column)
    result = sees[0]
    for more in sees[1:]:
        result = result & more
    return result
