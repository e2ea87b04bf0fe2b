"""The backward kernel of a ring on TPU: keys travel as in `tpu_forward.py`, the sums of their gradients behind them.

Queries, their output's gradient and dq stay. In its round r a device adds what its queries pass to keys that are r
devices from home, to the sums that the device before it sent after its round r - 1, and sends them on while it computes
round r + 1; after the last round they go home. So no product waits for sums, and every message but the last of each
stream goes to a neighbour. At home both streams' sums are added to what the device's own queries pass. Sums are kept
transposed, as `flash_attention/tpu_backward.py` makes them.

Back-pressure is that of `Streams`, with one buffer for arriving sums and one for those that come home.

Shapes: N rows times key heads, G query heads of a key head, T tokens of a device (two chunks), D head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..flash_attention.block_plan import Plan
from ..flash_attention.tpu_backward import Pair
from ..flash_attention.tpu_forward import LANES
from .tpu_forward import (
    COLLECTIVE_ID,
    Ring,
    Streams,
    barrier,
    cost,
    for_each,
    in_window,
    loop,
    origin,
    own_keys,
    seen,
    semaphores,
    tile,
    travel,
)


def vmem(o: Ring, D: int, itemsize: int) -> int:
    """Bytes of the kernel's buffers: what the grid loads and stores is there twice."""
    lanes = -(-D // LANES) * LANES
    rows = 2 * o.G * (2 * lanes * itemsize + lanes * 4 + 2 * 4 * 8)
    keys = (2 + 2 * o.streams) * 2 * lanes * itemsize
    sums = (2 + 2 * o.streams + 2 * o.streams) * 2 * lanes * 4
    return o.T * (rows + keys + sums) * 9 // 8 + (8 << 20)


def backward(
    o: Ring, rows: dict[str, jax.Array], kv_N2TD: jax.Array, q_ids: Any, kv_ids: Any
) -> tuple[jax.Array, jax.Array]:
    """dq [N, G, D, T] and (dk, dv) [N, 2, D, T] in float32; dq and dk without the scale.

    `rows`, in this order: q and d_out [N, G, T, D], lse2 (base 2, large where nothing is seen) and delta [N, G, 1, T].
    """
    N, G, T, D = rows["q"].shape
    dtype, float32, streams = kv_N2TD.dtype, jnp.float32, o.streams

    def per_turn(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda turn: (turn, 0, 0, 0))

    inputs = [*rows.values(), kv_N2TD]
    specs = [per_turn(*x.shape[1:]) for x in rows.values()]
    specs.append(pl.BlockSpec((1, 2, T, D), lambda turn: (turn, 0, 0, 0)))
    if o.segments:
        K = N // len(q_ids)
        inputs += [q_ids, kv_ids]
        specs += [
            pl.BlockSpec((None, 1, T), lambda turn: (lax.div(turn, jnp.int32(K)), 0, 0)),
            pl.BlockSpec((None, o.n, 1, T), lambda turn: (lax.div(turn, jnp.int32(K)), 0, 0, 0)),
        ]
    return pl.pallas_call(
        lambda *refs: _kernel(o, *refs),
        grid=(N,),
        in_specs=specs,
        out_specs=[per_turn(G, D, T), per_turn(2, D, T)],
        out_shape=[jax.ShapeDtypeStruct((N, G, D, T), float32), jax.ShapeDtypeStruct((N, 2, D, T), float32)],
        scratch_shapes=[
            pltpu.VMEM((streams, 2, 2, D, T), float32),  # sums that leave
            pltpu.VMEM((streams, 2, 2, T, D), dtype),
            *semaphores(streams, 2),
            pltpu.VMEM((streams, 1, 2, D, T), float32),
            *semaphores(streams, 1),
            pltpu.VMEM((streams, 1, 2, D, T), float32),
            *semaphores(streams, 1),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem(o, D, dtype.itemsize),
            collective_id=COLLECTIVE_ID + 1,
            has_side_effects=True,
        ),
        cost_estimate=cost(o, N * G, T, D, products=5, arrays=tuple(inputs)),
        name="ring_attention_backward",
    )(*inputs)


def _kernel(o: Ring, q_ref: Any, d_out_ref: Any, lse2_ref: Any, delta_ref: Any, kv_ref: Any, *refs: Any) -> None:
    q_ids: Any
    kv_ids: Any
    q_ids, kv_ids = refs[:2] if o.segments else (None, None)
    dq_ref, dkv_ref, leaving, *rest = refs[2 * o.segments :]
    turn, me, kv_ref = pl.program_id(0), lax.axis_index(o.axis), kv_ref.at[0]
    keys, sums = Streams(o, *rest[:4]), Streams(o, *rest[4:8])
    back = Streams(o, *rest[8:], hops=(-o.rounds[0], -o.rounds[1]))
    tiles, per_chunk = o.T // o.block, o.chunk // o.block

    @pl.when(turn == 0)
    def _() -> None:
        barrier(o, tuple(sorted({1, *(rounds for rounds in o.rounds if rounds)})))
        for streams in (keys, sums, back):
            streams.enter()

    dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)

    def pair(
        g: Any, i: Any, j: Any, kv: Any, into: Any, device: Any, plan: Plan, tables: dict[str, Any], edge: bool
    ) -> None:
        at, part = tile(o, i), tile(o, j)
        x = {"q": q_ref.at[g, at], "k": kv.at[0, part], "v": kv.at[1, part]}
        x |= {"d_out": d_out_ref.at[g, at], "lse2": lse2_ref.at[g, :, at], "delta": delta_ref.at[g, :, at]}
        if o.segments:
            x |= {"q_ids": q_ids.at[:, at], "kv_ids": kv_ids.at[device, :, part]}
        dq_at, dk_at, dv_at = dq_ref.at[g, :, at], into.at[0, :, part], into.at[1, :, part]

        def to_queries(rows: slice, dq: jax.Array) -> None:
            dq_at[:, rows] += dq

        def to_keys(keys: slice, dk: jax.Array, dv: jax.Array) -> None:
            dk_at[:, keys] += dk
            dv_at[:, keys] += dv

        Pair(plan, o.scores, x, tables, (0, 0, 0), to_queries, to_keys).run(edge=edge)

    def attend(g: Any, i: Any, j: Any, kv: Any, into: Any, device: Any, causal: bool = False) -> None:
        pair(g, i, j, kv, into, device, o.plan(causal), {}, causal or o.segments)

    def attend_window(g: Any, i: Any, kv: Any, into: Any, device: Any) -> None:
        in_window(o, me, i, device, lambda j, *how: pair(g, i, j, kv, into, device, *how))

    def begin(into: Any) -> None:
        def each(j: Any) -> None:
            into[:, :, tile(o, j)] = jnp.zeros((*into.shape[:2], o.block), jnp.float32)

        loop(0, tiles, each)

    def own() -> None:
        begin(dkv_ref)

        def row(g: Any, i: Any) -> None:
            if o.window is not None:
                attend_window(g, i, kv_ref, dkv_ref, me)
                return
            own_keys(i, lambda j, causal: attend(g, i, j, kv_ref, dkv_ref, me, causal))

        for_each(o.G, tiles, row)

    def add(into: Any, more: Any) -> None:
        def each(j: Any) -> None:
            into[:, :, tile(o, j)] += more[:, :, tile(o, j)]

        loop(0, tiles, each)

    def meet(stream: int, r: Any, kv: Any) -> None:
        into, device, rounds = leaving.at[stream, lax.rem(jnp.int32(r), 2)], origin(o, stream, r), o.rounds[stream]
        begin(into)
        if o.window is not None:
            for_each(o.G, tiles, lambda g, i: attend_window(g, i, kv, into, device))
        else:
            low, high = seen(device < me, per_chunk)
            for_each(o.G, tiles, lambda g, i: loop(0, high, lambda j: attend(g, i, j, kv, into, device)), low=low)
        number = turn * (rounds - 1) + r - 1  # of the sums that leave after this round

        @pl.when(r > 1)
        def _() -> None:
            arrived = sums.copy(stream, number - 1, into)
            arrived.wait_send()  # of the round before
            arrived.wait_recv()
            add(into, sums.at(stream, number - 1))
            sums.give_back(stream)

        @pl.when(r < rounds)
        def _() -> None:
            sums.send(stream, number, into)

        @pl.when(r == rounds)
        def _() -> None:
            back.send(stream, turn, into)

    travel(o, keys, turn, kv_ref, own, meet)
    for stream in back.used:
        copy = back.copy(stream, turn, leaving.at[stream, 0])
        copy.wait_send()
        copy.wait_recv()
        add(dkv_ref, back.at(stream, turn))
        back.give_back(stream)

    @pl.when(turn == pl.num_programs(0) - 1)
    def _() -> None:
        for streams in (keys, sums, back):
            streams.leave()
