"""`tpu_decode` over 8-bit pages on chips whose matrix unit they keep busy: in pairs of blocks, one ahead of the other.

While the values of a pair are summed, the keys of the next one are multiplied, be it of this request or of the next,
and its weights found: neither waits for the other, so that the matrix unit does not stand still. Of an odd number of
blocks the first is alone. Blocks are merged in their order as in `tpu_decode`, so that a token's bits are the same.

What a step needs of scalars is found in the one before, where scalar slots are free, and kept in scalar memory. Copies
begin after all that is read in a step: a compiler takes what they write for the same, and has one wait for the other.

Shapes: as in tpu_decode.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pages import LANES
from .tpu_block import LOG2_E, Cache, Sizes, nothing, one_in_all, result, softmax_step, wide

BUFFERS = 8  # a power of 2: of two pairs that are read, and of what is on the way


class Step(NamedTuple):
    """A pair whose keys are multiplied, and the one before, whose values are summed; truths are 0 or 1."""

    nth: Any  # request of this program, which is row `r`
    r: Any
    first: Any  # block
    blocks: Any  # 1 or 2
    left: Any  # blocks behind them
    slot: Any  # of the first one
    begins: Any  # the request
    there: Any  # else all requests are done
    two: Any  # it is there, and has two blocks
    inserts: Any  # the new token, as it is there and the request's last
    value_r: Any
    value_first: Any
    value_blocks: Any
    value_slot: Any
    value_begins: Any
    copied: Any  # a result that was put where this step's will be
    freed: Any  # buffers, by the step before
    ahead: Any  # the request of which blocks are fetched
    ahead_block: Any


def scratch(sizes: Sizes, rows: int) -> list[Any]:
    K, S, pieces = sizes.K, sizes.S, sizes.in_pieces
    wanted = [
        pltpu.VMEM((BUFFERS, sizes.n, K * sizes.N * S, LANES), sizes.kept),
        pltpu.VMEM((BUFFERS, sizes.n, K, 2 * S), jnp.float32),
        pltpu.SemaphoreType.DMA((BUFFERS,)),
        pltpu.VMEM((K * sizes.N, sizes.write_rows, LANES), sizes.kept),
        pltpu.VMEM((K, 2 * S), jnp.float32),
        pltpu.SemaphoreType.DMA(()),
        pltpu.VMEM((3, rows, sizes.V), sizes.dtype),  # results: of the last two requests, and what is none
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((2, rows, LANES), jnp.float32),  # maxima and sums of two requests
        pltpu.VMEM((2, rows, LANES), jnp.float32),
        pltpu.VMEM((rows, sizes.V), jnp.float32),
        pltpu.VMEM((2, rows, sizes.B), jnp.float32),  # weights of a pair, with the values' scales
        pltpu.VMEM((2, rows, LANES), jnp.float32),  # what is kept of the values before
        pltpu.SMEM((len(Step._fields),), jnp.int32),
        pltpu.VMEM((2 * rows, sizes.C), sizes.kept) if pieces else None,
        pltpu.VMEM((rows, LANES), jnp.float32) if pieces else None,
    ]
    return [x for x in wanted if x is not None]


def kernel(
    sizes: Sizes, cores: int, shares: int, block_rows: int, has: dict[str, bool], static_length: int | None, *refs: Any
) -> None:
    given: Iterator[Any] = iter(refs)
    known = static_length is not None
    scalars: list[Any] = [None if known else next(given) for _ in range(8)]
    _, layer_ref, order_ref, count_ref, stop_ref, length_ref, begin_ref, table_ref = scalars
    q_ref, new_ref, new_scale_ref = (next(given) for _ in range(3))
    sinks_ref = next(given) if has["sinks"] else None
    states_in = [next(given) for _ in range(3)] if has["state"] else None
    _, _, out_hbm, kv_hbm, scale_hbm = (next(given) for _ in range(5))  # inputs that outputs are, and these
    kv_buf, scale_buf, sems, write_buf, scale_write_buf, write_sem = (next(given) for _ in range(6))
    out_buf, out_sems, top_ref, sum_ref, acc_ref, weight_ref, keep_ref, step_ref = (next(given) for _ in range(8))
    pieces_ref: Any = next(given, None)  # for float8
    back_ref: Any = next(given, None)

    K, B, n, V = sizes.K, sizes.B, sizes.n, sizes.V
    per_head = q_ref.shape[1] // K
    rows = [pl.ds(h * per_head, per_head) for h in range(K)]
    of_pieces = [pl.ds(2 * h * per_head, 2 * per_head) for h in range(K)]
    b, c = pl.program_id(1), pl.program_id(0)
    share = c if shares > 1 else None
    layer = 0 if known else layer_ref[0]
    within = sizes.M % n == 0  # or the last block's last pages are not
    cache = Cache(sizes, layer, share, table_ref, kv_hbm, scale_hbm, kv_buf, scale_buf, sems, within)
    program = c * pl.num_programs(1) + b
    count = jnp.int32(block_rows * shares // cores if known else count_ref[program])

    def request(a: Any) -> Any:
        """The row of the a-th of this program; past the last one, the last one's."""
        a = jnp.minimum(a, count - 1)
        if known:
            return b * block_rows + (c * count if shares < cores else 0) + a
        return order_ref[program * block_rows + a]

    def length_of(r: Any) -> Any:
        return jnp.int32(static_length) if known else length_ref[r]

    def stop_of(r: Any) -> Any:
        return (length_of(r) + sizes.S - 1) // sizes.S

    def low_of(r: Any) -> Any:
        """First page that the request sees, and the first block that is taken here."""
        page = jnp.int32(sizes.first_page(length_of(r) - 1))
        return page, page // n if known else jnp.maximum(page // n, begin_ref[r])

    def later(slot: Any, blocks: Any) -> Any:
        return (slot + blocks) & (BUFFERS - 1)

    def begin(a: Any) -> tuple[Any, ...]:
        """The first step of the a-th: its row, first block, blocks, and blocks left."""
        r = request(a)
        low = low_of(r)[1]
        every = (stop_of(r) - 1) // n + 1 - low
        blocks = 2 - every % 2
        return r, low, blocks, every - blocks

    def put(step: Step) -> None:
        for at, x in enumerate(step):
            step_ref[at] = jnp.int32(x)

    def next_of(step: Step, freed: Any, ahead: Any) -> Step:
        ends = step.left == 0
        nth = jnp.where(ends, step.nth + 1, step.nth)
        same = step.r, step.first + step.blocks, 2, step.left - 2
        r, first, blocks, left = (jnp.where(ends, *x) for x in zip(begin(nth), same, strict=True))
        there = nth < count
        return Step(
            nth=nth, r=r, first=first, blocks=blocks, left=left, slot=later(step.slot, step.blocks), begins=ends,
            there=there, two=there & (blocks == 2), inserts=there & (left == 0),
            value_r=step.r, value_first=step.first, value_blocks=step.blocks, value_slot=step.slot,
            value_begins=step.begins, copied=(step.begins == 1) & (step.nth > 2), freed=freed,
            ahead=ahead[0], ahead_block=ahead[1],
        )  # fmt: skip

    def fetch(ahead: Any, slot: Any, wanted: Any) -> tuple[Any, list[Callable[[], None]]]:
        """What begins to copy the next block that nothing copies yet, if there is one, and what is behind it."""
        a, j = ahead
        r = request(a)
        stop = stop_of(r)
        starts = cache.starts(r, j, low_of(r)[0], jnp.where(wanted & (a < count), stop, 0), slot)
        ends = (j + 1) * n >= stop
        after = jnp.where(ends, a + 1, a), jnp.where(ends, low_of(request(a + 1))[1], j + 1)
        return tuple(jnp.where(wanted, x, y) for x, y in zip(after, ahead, strict=True)), starts

    def ready(step: Step) -> None:
        """Waits for the blocks, and puts the new token into the last one."""
        r, end = step.r, later(step.slot, step.blocks - 1)
        last = step.first + step.blocks - 1

        def arrive(j: Any, slot: Any) -> None:
            low_page, low = low_of(r)
            cache.wait(j, low_page, stop_of(r), slot, full=sizes.window is None)
            if sizes.window is not None:
                pl.when(j == low)(lambda: cache.tidy(j, low_page, length_of(r), slot))

        pl.when(step.two == 1)(lambda: arrive(step.first, step.slot))
        pl.when((step.there == 1) & (step.inserts == 0))(lambda: arrive(last, end))

        @pl.when(step.inserts == 1)
        def _() -> None:
            low_page, length, row = low_of(r)[0], length_of(r), r - b * block_rows
            cache.wait(last, low_page, stop_of(r), end)
            pl.when(step.nth > 0)(token_written)
            cache.insert(length - 1, end, new_ref[row], new_scale_ref[row], write_buf, scale_write_buf)
            cache.tidy(last, low_page, length, end)

        if sizes.in_pieces:

            @pl.when((step.begins == 1) & (step.there == 1))
            def _() -> None:
                for x, of_head in zip(rows, of_pieces, strict=True):
                    pieces_ref[of_head], back = cache.query(q_ref[r - b * block_rows, x])
                    back_ref[x] = jnp.broadcast_to(back, (per_head, LANES))

    def mask_of(r: Any, j: Any) -> jax.Array:
        at, length = j * B + jax.lax.broadcasted_iota(jnp.int32, (per_head, B), 1), length_of(r)
        return at < length if sizes.window is None else (at < length) & (at >= length - sizes.window)

    def before(r: Any, x: Any) -> tuple[jax.Array, ...]:
        """The state of a head's rows before the first block."""
        if states_in is not None:
            return tuple(ref[r - b * block_rows, x] for ref in states_in)
        top, total, acc = nothing(per_head, V)
        return (top, total, acc) if sinks_ref is None else (sinks_ref[x] * LOG2_E, one_in_all(per_head), acc)

    def attend(values: int, keys: int) -> None:
        """To the values of so many blocks, and to the keys of so many."""
        step = Step(*(step_ref[at] for at in range(len(Step._fields))))
        begins, row = step.begins == 1, step.r - b * block_rows
        value_begins, value_nth = step.value_begins == 1, step.nth - step.begins
        slots = [step.slot, later(step.slot, 1)][:keys]
        value_slots = [step.value_slot, later(step.value_slot, 1)][:values]

        out_at = jnp.where(value_begins, value_nth & 1, 2)
        out_buf[out_at] = result(acc_ref[...], sum_ref[value_nth + 1 & 1]).astype(out_buf.dtype)
        accs = [jnp.where(value_begins, before(step.value_r, x)[2], acc_ref[x]) for x in rows]
        scores: list[list[jax.Array]] = []

        def sum_values(nth: int) -> None:
            scales = cache.scales_of_all(value_slots[nth], 1)
            mask = mask_of(step.value_r, step.value_first + nth) if sizes.in_pieces else None
            for h, x in enumerate(rows):
                mixed = cache.mix_scaled(weight_ref[nth, x], mask, scales[h : h + 1], value_slots[nth], h)
                accs[h] = accs[h] * wide(keep_ref[nth, x], V) + mixed

        def multiply_keys(nth: int) -> None:
            scales = cache.scales_of_all(slots[nth], 0)
            scores.append([])
            for h, x in enumerate(rows):
                q = (pieces_ref[of_pieces[h]], wide(back_ref[x], B)) if sizes.in_pieces else q_ref[row, x]
                scores[nth].append(cache.scores(q, slots[nth], h, scales[h : h + 1]))

        # The order that the matrix unit keeps to. int8 keys are turned over first, while it has values.
        work = [functools.partial(multiply_keys, nth) for nth in range(keys)]
        of_values = [functools.partial(sum_values, nth) for nth in range(values)]
        for one in work + of_values if sizes.in_pieces else of_values[:1] + work + of_values[1:]:
            one()

        parity = step.nth & 1
        tops = [jnp.where(begins, before(step.r, x)[0], top_ref[parity, x]) for x in rows]
        sums = [jnp.where(begins, before(step.r, x)[1], sum_ref[parity, x]) for x in rows]
        for nth, slot in enumerate(slots):
            mask, scales = mask_of(step.r, step.first + nth), cache.scales_of_all(slot, 1)
            for h, x in enumerate(rows):
                p, tops[h], sums[h], keep_ref[nth, x] = softmax_step(scores[nth][h], mask, tops[h], sums[h])
                weight_ref[nth, x] = p * scales[h : h + 1]
        for h, x in enumerate(rows):
            top_ref[parity, x], sum_ref[parity, x], acc_ref[x] = tops[h], sums[h], accs[h]

        free = later(step.value_slot, -step.freed)
        ahead, starts = fetch((step.ahead, step.ahead_block), free, True)
        ahead, more = fetch(ahead, later(free, 1), step.freed == 2)
        for start in starts + more:
            start()
        for start in cache.write(step.r, length_of(step.r) - 1, write_buf, scale_write_buf, write_sem):
            pl.when(step.inserts == 1)(start)
        pl.when(value_begins & (value_nth > 0))(lambda: out_copy(value_nth - 1).start())
        put(next_of(step, values, ahead))

    def iterate(_: Any) -> Any:
        step = Step(*(step_ref[at] for at in range(len(Step._fields))))
        pl.when(step.copied == 1)(lambda: out_written(step.nth - step.begins - 1))
        ready(step)
        jax.lax.cond(
            (step.value_blocks == 2) & (step.two == 1),
            lambda: attend(2, 2),
            lambda: jax.lax.cond(
                step.value_blocks == 2,
                lambda: attend(2, 1),
                lambda: jax.lax.cond(step.two == 1, lambda: attend(1, 2), lambda: attend(1, 1)),
            ),
        )
        return step.there

    def out_copy(a: Any) -> Any:
        """Of the a-th's result."""
        at, share_at = (a + 1) & 1, 0 if share is None else share
        return pltpu.make_async_copy(out_buf.at[at], out_hbm.at[request(a), share_at], out_sems.at[at])

    def out_written(a: Any) -> None:
        at = (a + 1) & 1
        pltpu.make_async_copy(out_buf.at[at], out_buf.at[at], out_sems.at[at]).wait()

    def token_written() -> None:
        for buffer in (write_buf, scale_write_buf):
            pltpu.make_async_copy(buffer, buffer, write_sem).wait()

    @pl.when(count > 0)
    def _() -> None:
        # Before the first step one whose values nobody asks for: a block of the last buffer, which is free.
        ahead: Any = jnp.int32(0), low_of(request(0))[1]
        for slot in range(BUFFERS - 3):
            ahead, starts = fetch(ahead, slot, True)
            for start in starts:
                start()
        r, first, blocks, left = begin(0)
        put(
            Step(
                0, r, first, blocks, left, 0, begins=1, there=1, two=blocks == 2, inserts=left == 0,
                value_r=r, value_first=first, value_blocks=1, value_slot=BUFFERS - 1, value_begins=1, copied=0, freed=2,
                ahead=ahead[0], ahead_block=ahead[1],
            )
        )  # fmt: skip
        jax.lax.while_loop(lambda there: there == 1, iterate, jnp.int32(1))
        token_written()
        pl.when(count > 2)(lambda: out_written(count - 3))
        pl.when(count > 1)(lambda: out_written(count - 2))
        out_buf[count & 1] = result(acc_ref[...], sum_ref[count + 1 & 1]).astype(out_buf.dtype)
        out_copy(count - 1).start()
        out_written(count - 1)

    if not known:  # rows that are no decodes
        out_buf[...] = jnp.zeros_like(out_buf)

        def empty(a: Any) -> Any:
            place = out_hbm.at[order_ref[program * block_rows + a], 0 if share is None else share]
            return pltpu.make_async_copy(out_buf.at[2], place, write_sem)

        jax.lax.fori_loop(count, stop_ref[program], lambda a, _: empty(a).start(), None)
        jax.lax.fori_loop(count, stop_ref[program], lambda a, _: empty(a).wait(), None)
