"""The forward kernel of a ring on TPU (Liu et al. 2023, arXiv:2310.01889), all of it in one `pallas_call`.

A turn of the grid takes one key head of one row. Its keys and values go round both ways at once: in round r those of
the device r places behind arrive along the ring, and those of the device r places ahead against it, until all have met.
So links carry both ways and there are half as many rounds as devices. What the next round needs is copied from device
to device while this round is computed, from one of two buffers of each stream into the other.

- Entry: the barrier with both neighbours; nothing is sent to a device that is not in the kernel.
- Back-pressure: a message needs a permit, and each device gives its neighbours two for a stream, one for each buffer. A
  buffer is given back when it has been used here and sent on. So a fast neighbour cannot write what is still read,
  also over the grid's turns: messages of a stream are counted through, and number s goes to buffer s % 2.
- Exit: every device takes back its two permits, so it has left no signal on its way and its semaphores are at zero.

Meetings are as in `xla.py`: in zigzag order keys from an earlier device give their early chunk to all queries, keys
from a later one give both chunks to the late queries; each is half of the products, without a mask. Device d's own keys
come first, causally. Tiles are those of `flash_attention`.

With a window every pair of tiles is asked by its positions whether it is empty, full or an edge, and nothing travels
further than the window reaches: chunk c is needed by those up to `reach` chunks after it, which are at most as many
devices away, behind for an early chunk and ahead for a late one.

Shapes: N rows times key heads, G query heads of a key head, T tokens of a device (two chunks), D head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..flash_attention.block_plan import Plan
from ..flash_attention.tpu_forward import LANES, LOWEST, SUBLANES, Rows, Scores, scores_kept

COLLECTIVE_ID = 7


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static part of a call: n devices on `axis`, each with two chunks in tiles of `block`; G heads a key head.

    `tokens` of a chunk are no padding.
    """

    axis: str
    n: int
    G: int
    chunk: int
    block: int
    scores: Scores
    segments: bool
    tokens: int = 0
    window: int | None = None

    @property
    def T(self) -> int:
        return 2 * self.chunk

    @property
    def rounds(self) -> tuple[int, int]:
        """Messages that arrive along the ring, and against it."""
        along, against = self.n // 2, (self.n - 1) // 2
        if self.window is None:
            return along, against
        reach = (self.window + self.tokens - 2) // self.tokens
        return min(along, reach), min(against, reach)

    @property
    def streams(self) -> int:
        return 2 if self.rounds[1] else 1

    def plan(self, causal: bool) -> Plan:
        """Of one tile."""
        size = self.block
        return Plan(size, size, size, size, causal, None, 0, self.segments)

    @property
    def window_plan(self) -> Plan:
        """Of one tile at the edge of the window, which is told how far its queries are behind its keys."""
        size = self.block
        return Plan(size, size, size, size, True, self.window, None, self.segments)

    def distance(self, device: Any, i: Any, other: Any, j: Any) -> Any:
        """Between the first tokens of a device's tile i and of another's tile j, in the whole row."""

        def position(device: Any, i: Any) -> Any:
            per_chunk = self.chunk // self.block
            late = i >= per_chunk
            chunk = jnp.where(late, 2 * self.n - 1 - device, device)
            return chunk * self.tokens + jnp.where(late, i - per_chunk, i) * self.block

        return position(device, i) - position(other, j)

    def overlap(self, distance: Any) -> tuple[Any, Any]:
        """Whether tiles of queries and keys at this distance see anything of each other, and everything."""
        assert self.window is not None
        some = (distance > -self.block) & (distance < self.window + self.block - 1)
        return some, (distance >= self.block - 1) & (distance <= self.window - self.block)

    def vmem(self, D: int, itemsize: int) -> int:
        """Bytes of the kernel's buffers: what the grid loads and stores is there twice."""
        lanes = -(-D // LANES) * LANES
        rows = 2 * self.G * 2 * lanes * itemsize + self.G * 4 * (lanes + 2 * SUBLANES)
        keys = (2 + 4) * 2 * lanes * itemsize
        return self.T * (rows + keys) * 9 // 8 + (8 << 20)  # and what the compiler spills


class Streams:
    """Messages between devices, in order, through one or two buffers a stream.

    Stream 0 goes along the ring, stream 1 against it, `hops` devices far.

    Attributes:
        buffers: for each stream a ref [slots, ...]. sent, arrived: DMA semaphores [streams], [streams, slots].
        permits: regular semaphores [streams], of the messages that this device may send.
    """

    def __init__(self, o: Ring, buffers: Any, sent: Any, arrived: Any, permits: Any, hops: tuple[int, int] = (1, 1)):
        self.buffers, self.sent, self.arrived, self.permits, self.axis = buffers, sent, arrived, permits, o.axis
        me = lax.axis_index(o.axis)
        self.targets = (lax.rem(me + hops[0] + o.n, o.n), lax.rem(me - hops[1] + o.n, o.n))
        self.sources = (lax.rem(me - hops[0] + o.n, o.n), lax.rem(me + hops[1] + o.n, o.n))
        self.used = [stream for stream in (0, 1) if o.rounds[stream]]
        self.slots = buffers.shape[1]

    def enter(self) -> None:
        """After the barrier: the others may send."""
        for stream in self.used:
            self._signal(self.permits.at[stream], self.slots, self.sources[stream])

    def leave(self) -> None:
        for stream in self.used:
            pl.semaphore_wait(self.permits.at[stream], self.slots)

    def send(self, stream: int, number: Any, source: Any) -> Any:
        """Starts message `number` of a stream once there is a permit. The copy also stands for the one that arrives."""
        pl.semaphore_wait(self.permits.at[stream], 1)
        copy = self.copy(stream, number, source)
        copy.start()
        return copy

    def copy(self, stream: int, number: Any, source: Any) -> Any:
        slot = self.slot(number)
        return pltpu.make_async_remote_copy(
            src_ref=source,
            dst_ref=self.buffers.at[stream, slot],
            send_sem=self.sent.at[stream],
            recv_sem=self.arrived.at[stream, slot],
            device_id={self.axis: self.targets[stream]},
            device_id_type=pl.DeviceIdType.MESH,
        )

    def give_back(self, stream: int) -> None:
        """The oldest buffer may be written again."""
        self._signal(self.permits.at[stream], 1, self.sources[stream])

    def at(self, stream: int, number: Any) -> Any:
        """What message `number` brought."""
        return self.buffers.at[stream, self.slot(number)]

    def slot(self, number: Any) -> Any:
        return lax.rem(jnp.int32(number), jnp.int32(self.slots))

    def _signal(self, semaphore: Any, count: int, device: Any) -> None:
        pl.semaphore_signal(semaphore, count, device_id={self.axis: device}, device_id_type=pl.DeviceIdType.MESH)


def barrier(o: Ring, hops: tuple[int, ...]) -> None:
    """Waits until the devices so far away, on both sides, are in the kernel too."""
    semaphore, me = pltpu.get_barrier_semaphore(), lax.axis_index(o.axis)
    for far in hops:
        for other in (me + far, me - far + o.n):
            device: dict[Any, Any] = {o.axis: lax.rem(other, o.n)}
            pl.semaphore_signal(semaphore, 1, device_id=device, device_id_type=pl.DeviceIdType.MESH)
    pl.semaphore_wait(semaphore, 2 * len(hops))


def semaphores(streams: int, slots: int) -> list[Any]:
    """What `Streams` takes after its buffers."""
    dma = pltpu.SemaphoreType.DMA
    return [dma((streams,)), dma((streams, slots)), pltpu.SemaphoreType.REGULAR((streams,))]


def travel(
    o: Ring, streams: Streams, turn: Any, home: Any, own: Callable[[], None], meet: Callable[[int, Any, Any], None]
) -> None:
    """All rounds of one turn of the grid: `own()`, then `meet(stream, round, keys and values)` for each that comes."""
    first = [turn * rounds for rounds in o.rounds]  # number of the turn's first message in each stream

    def one(r: Any, here: list[int], onward: list[int], compute: Callable[[], None]) -> None:
        """Round r: what came by the streams `here` is used, and sent `onward`."""
        sources = [streams.at(stream, first[stream] + r - 1) if here else home for stream in onward]
        copies = [
            streams.send(stream, first[stream] + r, source) for stream, source in zip(onward, sources, strict=True)
        ]
        compute()
        for copy in copies:
            copy.wait_send()
        for stream in here:
            streams.give_back(stream)
        for copy in copies:
            copy.wait_recv()

    def both(r: Any, here: list[int]) -> Callable[[], None]:
        def compute() -> None:
            for stream in here:
                meet(stream, r, streams.at(stream, first[stream] + r - 1))

        return compute

    def streams_of(r: int) -> list[int]:
        return [stream for stream in (0, 1) if r <= o.rounds[stream]]

    one(0, [], streams_of(1), own)
    a, b = o.rounds
    if b > 1:
        loop(1, b, lambda r: one(r, [0, 1], [0, 1], both(r, [0, 1])))
    for r in range(max(b, 1), a + 1):
        here = streams_of(r)
        one(r, here, streams_of(r + 1), both(r, here))


def origin(o: Ring, stream: int, r: Any) -> Any:
    """The device whose keys a stream brings in round r."""
    me = lax.axis_index(o.axis)
    return lax.rem((me - r if stream == 0 else me + r) + o.n, o.n)


def forward(o: Ring, q_NGTD: jax.Array, kv_N2TD: jax.Array, q_ids: Any, kv_ids: Any) -> tuple[jax.Array, jax.Array]:
    """out [N, G, T, D] in q's dtype and lse [N, G, 1, T]; segment ids [B, 1, T] and [B, n, 1, T] of all devices."""
    N, G, T, D = q_NGTD.shape
    # Copies to other devices take no block with a dimension left out, so the keys keep theirs.
    inputs, specs = [q_NGTD, kv_N2TD], [_per_turn(G, T, D), pl.BlockSpec((1, 2, T, D), lambda turn: (turn, 0, 0, 0))]
    if o.segments:
        K = N // len(q_ids)
        inputs += [q_ids, kv_ids]
        specs += [
            pl.BlockSpec((None, 1, T), lambda turn: (lax.div(turn, jnp.int32(K)), 0, 0)),
            pl.BlockSpec((None, o.n, 1, T), lambda turn: (lax.div(turn, jnp.int32(K)), 0, 0, 0)),
        ]
    dtype = q_NGTD.dtype
    return pl.pallas_call(
        lambda *refs: _kernel(o, *refs),
        grid=(N,),
        in_specs=specs,
        out_specs=[_per_turn(G, T, D), _per_turn(G, 1, T)],
        out_shape=[jax.ShapeDtypeStruct((N, G, T, D), dtype), jax.ShapeDtypeStruct((N, G, 1, T), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((o.streams, 2, 2, T, D), dtype),
            pltpu.VMEM((G, 1, T), jnp.float32),
            pltpu.VMEM((G, SUBLANES, T), jnp.float32),
            pltpu.VMEM((G, D, T), jnp.float32),
            pltpu.VMEM(scores_kept(o.plan(False)), jnp.float32),
            *semaphores(o.streams, 2),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=o.vmem(D, dtype.itemsize),
            collective_id=COLLECTIVE_ID,
            has_side_effects=True,
        ),
        cost_estimate=cost(o, N * G, T, D, products=2, arrays=(q_NGTD, kv_N2TD, q_NGTD)),
        name="ring_attention_forward",
    )(*inputs)


def cost(o: Ring, heads: int, T: int, D: int, products: int, arrays: tuple[jax.Array, ...]) -> pl.CostEstimate:
    """Of one device: as all have equal shares of the pairs of the whole row."""
    row = o.n * T
    window = row if o.window is None else min(o.window, row)
    pairs = heads * (window * (2 * row - window + 1) // 2) // o.n
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * pairs * D, transcendentals=pairs, bytes_accessed=moved)


def _per_turn(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda turn: (turn, 0, 0, 0))


def _kernel(o: Ring, q_ref: Any, kv_ref: Any, *refs: Any) -> None:
    q_ids: Any
    kv_ids: Any
    q_ids, kv_ids = refs[:2] if o.segments else (None, None)
    out_ref, lse_ref, buffers, max_ref, sum_ref, acc_ref, scores_ref, sent, arrived, permits = refs[2 * o.segments :]
    turn, me, kv_ref = pl.program_id(0), lax.axis_index(o.axis), kv_ref.at[0]
    streams = Streams(o, buffers, sent, arrived, permits)

    @pl.when(turn == 0)
    def _() -> None:
        barrier(o, (1,))
        streams.enter()

    max_ref[...] = jnp.full(max_ref.shape, LOWEST, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    per_chunk = o.chunk // o.block

    def rows(g: Any, i: Any, j: Any, kv: Any, device: Any, plan: Plan, tables: dict[str, Any]) -> Rows:
        at, keys = tile(o, i), tile(o, j)
        x = {"q": q_ref.at[g, at], "k": kv.at[0, keys], "v": kv.at[1, keys]}
        if o.segments:
            x |= {"q_ids": q_ids.at[:, at], "kv_ids": kv_ids.at[device, :, keys]}
        outputs = out_ref.at[g, at], lse_ref.at[g, :, at]
        state = *(ref.at[g, :, at] for ref in (max_ref, sum_ref, acc_ref)), scores_ref
        return Rows(plan, o.scores, x, tables, (0, 0, 0, 0), (*outputs, *state))

    def attend(g: Any, i: Any, j: Any, kv: Any, device: Any, causal: bool = False) -> None:
        rows(g, i, j, kv, device, o.plan(causal), {}).run(first=False, last=False, edge=causal or o.segments)

    def attend_window(g: Any, i: Any, kv: Any, device: Any) -> None:
        def one(j: Any, plan: Plan, tables: dict[str, Any], edge: bool) -> None:
            rows(g, i, j, kv, device, plan, tables).run(first=False, last=False, edge=edge)

        in_window(o, me, i, device, one)

    def own() -> None:
        if o.window is not None:
            for_each(o.G, 2 * per_chunk, lambda g, i: attend_window(g, i, kv_ref, me))
        else:
            for_each(
                o.G, 2 * per_chunk, lambda g, i: own_keys(i, lambda j, causal: attend(g, i, j, kv_ref, me, causal))
            )

    def meet(stream: int, r: Any, kv: Any) -> None:
        device = origin(o, stream, r)
        if o.window is not None:
            for_each(o.G, 2 * per_chunk, lambda g, i: attend_window(g, i, kv, device))
            return
        low, high = seen(device < me, per_chunk)
        for_each(
            o.G,
            2 * per_chunk,
            lambda g, i: loop(0, high, lambda j: attend(g, i, j, kv, device)),
            low=low,
        )

    travel(o, streams, turn, kv_ref, own, meet)

    def finish(g: Any, i: Any) -> None:
        one = rows(g, i, 0, kv_ref, me, o.plan(False), {})
        for chunk in one.chunks():
            *_, max_i, sum_i, acc_i, _scores = one.refs
            one.finish(chunk, *(ref[:, chunk] for ref in (max_i, sum_i, acc_i)))

    for_each(o.G, 2 * per_chunk, finish)
    pl.when(turn == pl.num_programs(0) - 1)(streams.leave)


def seen(earlier: Any, per_chunk: int) -> tuple[Any, Any]:
    """The first row block that sees keys of another device, and the number of key blocks that it sees."""
    return jnp.where(earlier, 0, per_chunk), jnp.where(earlier, per_chunk, 2 * per_chunk)


def tile(o: Ring, i: Any) -> Any:
    return pl.ds(pl.multiple_of(i * o.block, o.block), o.block)


def loop(low: Any, high: Any, body: Callable[[Any], None]) -> None:
    def turn(i: Any, carry: Any) -> Any:
        body(i)
        return carry

    lax.fori_loop(low, high, turn, 0)


def for_each(heads: int, blocks: int, body: Callable[[Any, Any], None], low: Any = 0) -> None:
    loop(0, heads, lambda g: loop(low, blocks, lambda i: body(g, i)))


def own_keys(i: Any, attend: Callable[[Any, bool], None]) -> None:
    attend(i, True)
    loop(0, i, lambda j: attend(j, False))


def in_window(o: Ring, me: Any, i: Any, device: Any, attend: Callable[[Any, Plan, dict[str, Any], bool], None]) -> None:
    """`attend(j, plan, tables, edge)` for the tiles of `device` that this device's queries of tile i see any of."""

    def one(j: Any) -> None:
        distance = o.distance(me, i, device, j)
        some, full = o.overlap(distance)
        at_edge = some if o.segments else some & jnp.logical_not(full)
        pl.when(at_edge)(lambda: attend(j, o.window_plan, {"offset": [distance]}, True))
        if not o.segments and o.window is not None and o.window >= 2 * o.block - 1:
            pl.when(some & full)(lambda: attend(j, o.plan(False), {}, False))

    loop(0, 2 * o.chunk // o.block, one)
