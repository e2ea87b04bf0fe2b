"""One new token of each of many requests on a TPU: writes it into its page and attends to the request's pages.

Requests are taken in turn, each block by block (of 8-bit pages two blocks at once, merged in order); while these are
computed the next ones' pages are copied, be they of this request or of the next. The new token is put into the last
block's buffer, and its tile of slots copied back while the next request is computed, as is the result.

On a chip whose two cores are one device each core takes half of the key heads, which is an equal share whatever the
requests are. Where these cannot be halved, as a latent's one, each takes half of the pages, as in Lean Attention
(arXiv:2405.10480): a range of the requests, of which the last of the first core and the first of the second may be one
that is cut. Nothing that a core copies or writes is of another's.

Where the cut falls depends on the other requests; what is summed must not. So there a request is made of parts, of as
many blocks each whatever its length, and cut only between two of them. A part is summed by itself, and the parts are
merged in their order, the first one first: at once where one core has them all, else the second core keeps each of its
parts, and `merge` does it when both are done. Chunks of prompts are summed in the same parts, so that a token has the
same bits in either kernel. With parts of 2,048 tokens the cores' shares differ by 2,048 at most.

Where the matrix unit has less time than that, `tpu_pairs` takes 8-bit pages.

Shapes: as in tpu_block; N request rows of a program, r rows of a key head: its query heads, padded to 8.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tpu_pairs
from .pages import LANES
from .tpu_block import (
    LOG2_E,
    MASKED,
    Cache,
    Sizes,
    State,
    both,
    merged,
    negated,
    nothing,
    one_in_all,
    result,
    softmax_step,
    when,
    wide,
)

IN_FLIGHT = 8 * 2**20  # bytes of blocks that are on the chip or on the way to it
BUFFERS = (2, 6)
MERGE_BUFFERS = 8  # a state is small, and takes long to come


def decode(
    sizes: Sizes,
    q_NrC: jax.Array,
    new_NKE: jax.Array,
    new_scale_NKZ: jax.Array | None,
    sinks_r: jax.Array | None,
    state: tuple[jax.Array, jax.Array, jax.Array] | None,
    kv_LPKNSX: jax.Array,
    scale_LPKZ: jax.Array | None,
    *,
    layer: Any,
    table: jax.Array,
    lengths_N: jax.Array,
    begin_N: jax.Array,
    block_rows: int,
    cores: int,
    vmem_bytes: int,
    static_length: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """[N, K * r, V] and the updated cache.

    Args:
        new_NKE: the bits of the new tokens as the cache keeps them, each number's in an int32.
        lengths_N: tokens of each request with the new one; 0: not a decode, result 0.
        cores: that share the work, by key heads if `sizes.K` is a part of them, by requests if it is all.
        begin_N: the block to begin with, where `state` holds maxima, sums and values of the ones before.
        block_rows: requests of one step of the grid; N is a multiple.
        static_length: all requests have this length, and pages in order of layer 0; scalar arguments are not read (for
            the static profiler, which cannot follow data).
    """
    N, rows, _ = q_NrC.shape
    shares = new_NKE.shape[1] // sizes.K  # of the heads
    steps, per_core = N // block_rows, rows // shares
    cut = sizes.part is not None and static_length is None
    active_N = lengths_N > 0
    mine_cN = jnp.ones((cores, N), bool)
    first_N = stop_N = cuts = lengths_N
    if shares < cores:
        first_N = jnp.maximum(sizes.first_page(lengths_N - 1), begin_N * sizes.n)
        stop_N = -(-lengths_N // sizes.S)
        cuts = divided(first_N, stop_N, sizes.part_pages, cores)
        core_N = jnp.arange(N) * cores // N  # of the rows that are no decodes
        mine_cN = jnp.where(active_N, cuts[:-1] < cuts[1:], core_N == jnp.arange(cores)[:, None])
    # Of each step's rows the core's own decodes first, then those of its own that are none, then the other core's.
    place_csn = jnp.where(mine_cN, jnp.where(active_N, 0, 1), 2).reshape(cores, steps, block_rows)
    order_csn = jnp.argsort(place_csn, 2, stable=True) + jnp.arange(steps)[:, None] * block_rows
    count_cs, stop_cs = (place_csn < 1).sum(2), (place_csn < 2).sum(2)
    # A step that has none takes the rows of the next that has some, which are then there already.
    block_cs = jax.lax.cummin(jnp.where(count_cs > 0, jnp.arange(steps), steps - 1), axis=1, reverse=True)
    scalars = [
        jnp.asarray(x, jnp.int32).reshape(-1)
        for x in (block_cs, layer, order_csn, count_cs, stop_cs, lengths_N, begin_N, table)
    ]
    if cut:
        assert cores == 2
        scalars += [x.astype(jnp.int32).reshape(-1) for x in (cuts[:-1], cuts[1:])]
    if static_length is not None:
        scalars = []

    def by_core(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """Of [N, rows, lanes]: the rows of each share of the heads, side by side, and a block of them."""
        x = x.reshape(N, shares, -1, x.shape[-1])

        def at(c: Any, b: Any, *scalars: Any) -> tuple[Any, ...]:
            return c if shares > 1 else 0, scalars[0][c * steps + b] if scalars else b, 0, 0

        return jnp.swapaxes(x, 0, 1), pl.BlockSpec((None, block_rows, *x.shape[2:]), at)

    K, E, V = sizes.K, sizes.N * LANES, sizes.V
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    given = [q_NrC, new_NKE] + ([] if new_scale_NKZ is None else [new_scale_NKZ])
    inputs: list[Any]
    specs: list[Any]
    inputs, specs = map(list, zip(*map(by_core, given), strict=True))
    if sinks_r is not None:
        inputs.append(jnp.broadcast_to(sinks_r[:, None].astype(jnp.float32), (rows, LANES)))
        specs.append(pl.BlockSpec((per_core, LANES), lambda c, b, *_: (c if shares > 1 else 0, 0)))
    if state is not None:
        for x in state:
            for those, new in zip((inputs, specs), by_core(x), strict=True):
                those.append(new)
    first_cache = len(scalars) + len(inputs)
    kv = kv_LPKNSX.reshape(*kv_LPKNSX.shape[:2], -1, LANES)
    caches = [kv] if scale_LPKZ is None else [kv, scale_LPKZ]
    has = dict(scales=scale_LPKZ is not None, sinks=sinks_r is not None, state=state is not None)
    has |= dict(parts=sizes.part is not None, cut=cut)
    blocks = 0 if static_length is None else -(-static_length // sizes.B)
    buffers = min(max(IN_FLIGHT // (sizes.B * K * E * kv_LPKNSX.dtype.itemsize), BUFFERS[0]), BUFFERS[1])
    if blocks:
        buffers = math.gcd(blocks, buffers if blocks % buffers == 0 else 2 ** (buffers.bit_length() - 1))
    scratch = [
        pltpu.VMEM((buffers, sizes.n, K * sizes.N * sizes.S, LANES), kv_LPKNSX.dtype),
        pltpu.VMEM((buffers, sizes.n, K, 2 * sizes.S), jnp.float32) if sizes.quantised else None,
        pltpu.SemaphoreType.DMA((buffers,)),
        pltpu.VMEM((K * sizes.N, sizes.write_rows, LANES), kv_LPKNSX.dtype),
        pltpu.VMEM((K, 2 * sizes.S), jnp.float32) if sizes.quantised else None,
        pltpu.VMEM((per_core, V), q_NrC.dtype),
        pltpu.SemaphoreType.DMA(()),
        pltpu.VMEM((per_core, LANES), jnp.float32),
        pltpu.VMEM((per_core, LANES), jnp.float32),
        pltpu.VMEM((per_core, V), jnp.float32),
    ]
    of_state = [(per_core, LANES), (per_core, LANES), (per_core, V)]
    states: list[Any] = []
    if has["parts"]:
        scratch += [pltpu.VMEM(shape, jnp.float32) for shape in of_state]
    if cut:
        scratch.append(pltpu.SemaphoreType.DMA(()))
        parts = -(-sizes.M // sizes.part_pages)
        states = [jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in of_state]
    kernel, scratch = (tpu_pairs.kernel, tpu_pairs.scratch(sizes, per_core)) if sizes.in_pairs else (_kernel, scratch)
    out, *found = pl.pallas_call(
        functools.partial(kernel, sizes, cores, shares, block_rows, has, static_length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[*specs, *[hbm] * len(caches)],
            out_specs=[hbm] * (1 + len(caches) + len(states)),
            scratch_shapes=[x for x in scratch if x is not None],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((N, shares, per_core, V), q_NrC.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches),
            *states,
        ],
        input_output_aliases={first_cache + i: 1 + i for i in range(len(caches))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores > 1 else "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,
            disable_semaphore_checks=static_length is not None,
        ),
        name="paged_decode",
    )(*scalars, *inputs, *caches)
    caches, states = found[: len(caches)], found[len(caches) :]
    if cut:
        is_cut_N = (first_N < cuts[1]) & (cuts[1] < stop_N)
        row = jnp.argmax(is_cut_N)
        later = -(-stop_N[row] // sizes.part_pages) - cuts[1, row] // sizes.part_pages
        out = merge(out, states, row, jnp.where(is_cut_N[row], 1 + later, 0), vmem_bytes)
    return out.reshape(N, rows, V), caches[0].reshape(kv_LPKNSX.shape), caches[1] if len(caches) > 1 else None


def divided(first_N: jax.Array, stop_N: jax.Array, part: int, cores: int) -> jax.Array:
    """[cores + 1, N]: core c takes the pages from `[c]` up to `[c + 1]` of the requests' `first_N` up to `stop_N`.

    Of the list of all pages each core has a range, as long as the others' but that it begins and ends between parts:
    at the multiples of `part`, or where a request does. The borders are the nearest ones to those of equal ranges, so
    half of a part is the most that lies between.
    """
    pages_N = stop_N - first_N
    ends_N = jnp.cumsum(pages_N)
    # Pages of the request before the border of equal ranges, times `cores`.
    before_cN = ends_N[-1] * jnp.arange(cores + 1)[:, None] - (ends_N - pages_N) * cores
    at_cN = first_N + jnp.clip(before_cN // cores, 0, pages_N)
    low_cN = jnp.maximum(at_cN // part * part, first_N)
    high_cN = jnp.minimum(at_cN // part * part + part, stop_N)
    return jnp.where((low_cN + high_cN - 2 * first_N) * cores < 2 * before_cN, high_cN, low_cN)


def _kernel(
    sizes: Sizes, cores: int, shares: int, block_rows: int, has: dict[str, bool], static_length: int | None, *refs: Any
) -> None:
    given: Iterator[Any] = iter(refs)

    def take(name: str) -> Any:
        return next(given) if has[name] else None

    known = static_length is not None
    scalars: list[Any] = [None if known else next(given) for _ in range(8)]
    from_ref, to_ref = take("cut"), take("cut")
    _, layer_ref, order_ref, count_ref, stop_ref, length_ref, begin_ref, table_ref = scalars
    q_ref, new_ref, new_scale_ref, sinks_ref = next(given), next(given), take("scales"), take("sinks")
    states_in = [[take("state") for _ in range(3)] for _ in range(2 if has["parts"] else 1)]
    next(given)  # the cache as an input, which its output is
    take("scales")
    out_hbm, kv_hbm, scale_hbm = next(given), next(given), take("scales")
    states_hbm = [take("cut") for _ in range(3)]
    kv_buf, scale_buf, sems = next(given), take("scales"), next(given)
    write_buf, scale_write_buf, out_buf, write_sem = next(given), take("scales"), next(given), next(given)
    top_ref, sum_ref, acc_ref = part_refs = [next(given) for _ in range(3)]
    whole_refs = [take("parts") for _ in range(3)]  # of the parts before the one that is being summed
    state_sem = take("cut")

    K, B, n, Q = sizes.K, sizes.B, sizes.n, sizes.part or sizes.M
    per_head = q_ref.shape[1] // K
    b = pl.program_id(1)
    c = pl.program_id(0)
    share = c if shares > 1 else None
    cache = Cache(sizes, 0 if known else layer_ref[0], share, table_ref, kv_hbm, scale_hbm, kv_buf, scale_buf, sems)
    N = pl.num_programs(1) * block_rows
    step = c * pl.num_programs(1) + b
    count = count_ref[step] if static_length is None else block_rows * shares // cores

    def request(a: Any) -> Any:
        """The a-th that this core takes in this step; past the last one, any."""
        if not known:
            return order_ref[step * block_rows + jnp.minimum(a, block_rows - 1)]
        return b * block_rows + (c * count if shares < cores else 0) + jnp.minimum(a, count - 1)

    def length_of(r: Any) -> Any:
        return static_length if known else length_ref[r]

    def low_of(r: Any) -> Any:
        """First page that the request sees, and the first block that is taken here."""
        page = sizes.first_page(length_of(r) - 1)
        if has["cut"]:
            return page, from_ref[c * N + r] // n
        block = page // n
        return page, block if known and not has["state"] else jnp.maximum(block, begin_ref[r])

    def stop_of(r: Any) -> Any:
        return to_ref[c * N + r] if has["cut"] else end_of(r)

    def end_of(r: Any) -> Any:
        return -(-length_of(r) // sizes.S) if known else (length_of(r) + sizes.S - 1) // sizes.S

    buffers = len(kv_buf)
    # Blocks that are attended to together. One waits for products and maxima longer than 8 bits take to be read; two
    # wait for both at once. A latent's are too wide for the registers.
    together = 2 if sizes.quantised and buffers >= 4 and sizes.V < 512 else 1

    def following(slot: Any) -> Any:
        if isinstance(slot, int):
            return (slot + 1) % buffers
        return jnp.where(slot + 1 == buffers, 0, slot + 1)

    def fetch(ahead: Any, wanted: Any = True) -> tuple[Any, list[Any]]:
        """The next block that nothing copies yet, if there is one: what is behind it, and what begin to copy it.

        `ahead`: (slot, nth request, block).
        """
        if wanted is False:
            return ahead, []
        slot, a, j = ahead
        r = request(a)
        (page, _), stop = low_of(r), stop_of(r)
        # Known, past the last one the last once more: the profiler follows no conditions on every chip.
        there = stop if known else jnp.where(both(wanted, a < count), stop, 0)
        starts = cache.starts(r, j, page, there, slot)
        ends = (j + 1) * n >= stop
        if isinstance(ends, bool):
            return (following(slot), a + ends, 0 if ends else j + 1), starts
        _, low = low_of(request(a + 1))
        after = following(slot), jnp.where(ends, a + 1, a), jnp.where(ends, low, j + 1)
        if wanted is not True:
            after = tuple(jnp.where(wanted, *x) for x in zip(after, ahead, strict=True))
        return after, starts

    def begin_part() -> None:
        put(part_refs, nothing(*acc_ref.shape))

    def one(a: Any, carry: Any) -> Any:
        r = request(a)
        row, length, stop = r - b * block_rows, length_of(r), stop_of(r)
        low_page, low = low_of(r)
        last = (stop - 1) // n
        # Of a request that is cut: whether what comes before is the other core's, and whether this is its end.
        later = from_ref[c * N + r] > jnp.maximum(low_page, begin_ref[r] * n) if has["cut"] else False
        ends = stop == end_of(r) if has["cut"] else True
        if has["state"]:
            for refs, given in zip((whole_refs, part_refs) if has["parts"] else (part_refs,), states_in, strict=True):
                put(refs, tuple(x[row] for x in given))
        else:
            top, total, acc = whole_refs if has["parts"] else part_refs
            top[...] = jnp.full_like(top, MASKED) if sinks_ref is None else sinks_ref[...] * LOG2_E
            total[...] = jnp.zeros_like(total) if sinks_ref is None else one_in_all(len(total))
            acc[...] = jnp.zeros_like(acc)
        if has["parts"]:
            if has["state"]:
                # Where the next block begins a part, a prefix has the whole of the one before.
                begins = jax.lax.rem(low, Q) == 0
                pl.when(begins)(lambda: put(whole_refs, merged(of(whole_refs), of(part_refs))))
                pl.when(begins | later)(begin_part)
            else:
                begin_part()

        rows = [pl.ds(h * per_head, per_head) for h in range(K)]
        in_pieces = [cache.query(q_ref[row, of_head]) for of_head in rows] if sizes.in_pieces else None

        def mask_of(j: Any) -> jax.Array:
            at = j * B + jax.lax.broadcasted_iota(jnp.int32, (per_head, B), 1)
            return at < length if sizes.window is None else (at < length) & (at >= length - sizes.window)

        def attend(*blocks: tuple[Any, Any, bool], starts: Sequence[Any], ends: bool = False) -> None:
            """To blocks one after the other: (its number, its slot, whether some of it is hidden).

            `starts` begin other copies: beside the products, where they take no time. `ends`: these are the last, and
            where there are no parts `out_buf` gets the result, as sums over lanes are waited for as long.
            """
            # Head by head as in a chunk, but each stage for all: they wait for nothing of one another.
            masks = [mask_of(j) if masked else None for j, _, masked in blocks]
            q = in_pieces or [q_ref[row, of_head] for of_head in rows]
            s: list[list[jax.Array]] = []
            places = [(slot, h) for _, slot, _ in blocks for h in range(K)]
            for nth, (slot, h) in enumerate(places):
                s += [[]] if h == 0 else []
                s[-1].append(cache.scores(q[h], slot, h))
                if nth == len(places) // 4:  # earlier, products wait for them; later, so do registers
                    for start in starts:
                        start()
            found: list[Any] = []
            for n, mask in enumerate(masks):
                states = ((top_ref[x], sum_ref[x]) if n == 0 else found[-1][h][1:3] for h, x in enumerate(rows))
                found.append([softmax_step(s[n][h], mask, *state) for h, state in enumerate(states)])
            for h, of_head in enumerate(rows):
                _, top, total, _ = found[-1][h]
                acc = acc_ref[of_head]
                for n, (_, slot, _) in enumerate(blocks):
                    p, _, _, keep = found[n][h]
                    acc = acc * wide(keep, sizes.V) + cache.mix(p, masks[n], slot, h)
                if ends and not has["parts"]:
                    out_buf[of_head] = result(acc, total).astype(out_buf.dtype)
                else:
                    top_ref[of_head], sum_ref[of_head], acc_ref[of_head] = top, total, acc

        def arrive(j: Any, slot: Any) -> None:
            """Of a block before the last, whose pages are full."""
            cache.wait(j, low_page, stop, slot, full=sizes.window is None)
            if sizes.window is not None:
                pl.when(j == low)(lambda: cache.tidy(j, low_page, length, slot))

        masked = sizes.window is not None

        def some(begin: Any, together: int, j: Any, carry: Any) -> Any:
            """A block before the last, or `together`: the j-th such from `begin` on."""
            slot, ahead = carry
            slots = [slot]
            for _ in range(together - 1):
                slots.append(following(slots[-1]))
            first = begin + together * j
            starts: list[Any] = []
            for n, at in enumerate(slots):
                ahead, more = fetch(ahead)
                starts += more
                arrive(first + n, at)
            attend(*((first + n, at, masked) for n, at in enumerate(slots)), starts=starts)
            return following(slots[-1]), ahead

        def loop(low: Any, stop: Any, body: Any, carry: Any) -> Any:
            if not known:
                return jax.lax.fori_loop(low, stop, body, carry)
            # Written out, so that buffers are known too: the profiler does not follow others on every chip.
            for j in range(low, stop):
                carry = body(j, carry)
            return carry

        def end_part(p: Any) -> None:
            """Merges it with those before, or keeps it until they are there."""
            when(negated(later))(lambda: put(whole_refs, merged(of(whole_refs), of(part_refs))))

            @when(later)
            def _() -> None:
                nth = p - low // Q
                pl.when(nth > 0)(state_kept)
                put(whole_refs, of(part_refs))
                keep_state(nth + 1)

        def part(p: Any, carry: Any) -> Any:
            """One before the last."""
            begin, end = jnp.maximum(low, p * Q), (p + 1) * Q
            if known:
                begin = max(low, p * Q)
            carry = loop(0, (end - begin) // together, functools.partial(some, begin, together), carry)
            if together > 1:
                odd = (end - begin) % together == 1
                alone = functools.partial(some, end - 1, 1, 0)
                if known:
                    carry = alone(carry) if odd else carry
                else:
                    carry = jax.lax.cond(odd, alone, lambda carry: carry, carry)
            end_part(p)
            begin_part()
            return carry

        begin, parts = low, 0
        if has["parts"]:
            parts = last // Q
            begin = max(low, parts * Q) if known else jnp.maximum(low, parts * Q)
            stop_part = jnp.where(ends, parts, parts + 1) if has["cut"] else parts
            carry = loop(low // Q, stop_part, part, carry)

        def finish(carry: Any) -> Any:
            """What is left of the request, up to the new token."""
            before = last - begin
            slot, ahead = loop(0, before // together, functools.partial(some, begin, together), carry)
            # The last one, with the one before it if that is left.
            odd = False if together == 1 else before % 2 == 1
            if known or together == 1:
                end = following(slot) if odd else slot
            else:
                end = jnp.where(odd, following(slot), slot)
            ahead, starts = fetch(ahead)
            ahead, more = fetch(ahead, odd)
            when(odd)(lambda: arrive(last - 1, slot))
            cache.wait(last, low_page, stop, end)
            new = (new_ref[row], None if new_scale_ref is None else new_scale_ref[row])
            when(known or a > 0)(written)  # what the request before began
            cache.insert(length - 1, end, *new, write_buf, scale_write_buf)
            cache.tidy(last, low_page, length, end)
            starts += cache.write(r, length - 1, write_buf, scale_write_buf, write_sem)
            when(odd)(lambda: attend((last - 1, slot, masked), (last, end, True), starts=starts + more, ends=True))
            when(negated(odd))(lambda: attend((last, end, True), starts=starts, ends=True))
            if has["parts"]:
                end_part(parts)
                _, total, acc = whole_refs
                out_buf[...] = result(acc[...], total[...]).astype(out_buf.dtype)
            result_of(r).start()
            return following(end), ahead

        if not has["cut"]:
            return finish(carry)
        carry = jax.lax.cond(ends, finish, lambda carry: carry, carry)
        pl.when(negated(ends))(lambda: keep_state(0))
        pl.when(later | negated(ends))(state_kept)
        return carry

    def keep_state(nth: Any) -> None:
        """Begins to copy what is summed of a request that both cores have, for `merge`."""
        for ref, hbm in zip(whole_refs, states_hbm, strict=True):
            pltpu.make_async_copy(ref, hbm.at[nth], state_sem).start()

    def state_kept() -> None:
        for ref in whole_refs:
            pltpu.make_async_copy(ref, ref, state_sem).wait()

    def result_of(r: Any) -> Any:
        return pltpu.make_async_copy(out_buf, out_hbm.at[r, 0 if share is None else share], write_sem)

    def written() -> None:
        """Waits until a request's new token is in the cache, and its result where it belongs."""
        for buffer in (write_buf, scale_write_buf, out_buf):
            if buffer is not None:
                pltpu.make_async_copy(buffer, buffer, write_sem).wait()

    @when(count > 0)
    def _() -> None:
        _, low = low_of(request(0))
        ahead = (0, 0, low)
        for _ in range(buffers - together):
            ahead, starts = fetch(ahead)
            for start in starts:
                start()
        if known:
            _, before, j = ahead  # of the first request; the same for each
            tile = request(0), length_of(request(0)) - 1, write_buf, scale_write_buf, write_sem
            for start in cache.write(*tile):  # for the first to wait for
                start()
            result_of(request(0)).start()
            jax.lax.fori_loop(0, count, lambda a, _: one(a, (0, (buffers - together, a + before, j))) and None, None)
            for slot in range(buffers - together):
                cache.wait(slot, 0, stop_of(0), slot)
        else:
            jax.lax.fori_loop(0, count, one, (0, ahead))
        if has["cut"]:
            pl.when((count > 1) | (stop_of(request(0)) == end_of(request(0))))(written)
        else:
            written()

    if not known:  # rows that are no decodes
        out_buf[...] = jnp.zeros_like(out_buf)
        jax.lax.fori_loop(count, stop_ref[step], lambda a, _: result_of(request(a)).start(), None)
        jax.lax.fori_loop(count, stop_ref[step], lambda a, _: result_of(request(a)).wait(), None)


def of(refs: Sequence[Any]) -> State:
    top_ref, sum_ref, acc_ref = refs
    return top_ref[...], sum_ref[...], acc_ref[...]


def put(refs: Sequence[Any], state: Sequence[jax.Array]) -> None:
    for ref, x in zip(refs, state, strict=True):
        ref[...] = x


def merge(out_N1rV: jax.Array, states: Sequence[jax.Array], row: Any, count: Any, vmem_bytes: int) -> jax.Array:
    """The results, with that of the request that both cores have: of the first `count` states, merged in order.

    Each core takes half of the rows. Without such a request `count` is 0. An int, it is known (for the profiler).
    """
    rows, V = states[2].shape[1:]
    cores = 2 if rows % 16 == 0 else 1
    half = rows // cores
    known = isinstance(count, int)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    given = [] if known else [jnp.stack([row, count]).astype(jnp.int32)]
    return pl.pallas_call(
        functools.partial(_merge_kernel, (row, count) if known else None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(given),
            grid=(cores,),
            in_specs=[hbm] * 4,
            out_specs=hbm,
            scratch_shapes=[
                *(pltpu.VMEM((MERGE_BUFFERS, half, lanes), jnp.float32) for lanes in (LANES, LANES, V)),
                *(pltpu.VMEM((half, lanes), jnp.float32) for lanes in (LANES, LANES, V)),
                pltpu.VMEM((half, V), out_N1rV.dtype),
                pltpu.SemaphoreType.DMA((MERGE_BUFFERS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(out_N1rV.shape, out_N1rV.dtype),
        input_output_aliases={len(given) + 3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores > 1 else "arbitrary",),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,
        ),
        name="paged_merge",
    )(*given, *states, out_N1rV)


def _merge_kernel(known: tuple[int, int] | None, *refs: Any) -> None:
    (row, count), refs = (known, refs) if known else ((refs[0][0], refs[0][1]), refs[1:])
    states_hbm, out_hbm, bufs, whole_refs, (out_buf, sems) = refs[:3], refs[4], refs[5:8], refs[8:11], refs[11:]
    half, V = out_buf.shape
    mine = pl.ds(pl.multiple_of(pl.program_id(0) * half, half), half)

    def copies(nth: Any) -> list[Any]:
        slot = jax.lax.rem(nth, MERGE_BUFFERS)
        pairs = zip(states_hbm, bufs, strict=True)
        return [pltpu.make_async_copy(hbm.at[nth, mine], buf.at[slot], sems.at[slot]) for hbm, buf in pairs]

    def start(nth: Any, _: Any = None) -> None:
        for copy in copies(nth):
            copy.start()

    def one(nth: Any, _: Any) -> None:
        following = nth + MERGE_BUFFERS - 1
        pl.when(following < count)(lambda: start(following))
        for copy in copies(nth):
            copy.wait()
        put(whole_refs, merged(of(whole_refs), of([buf.at[jax.lax.rem(nth, MERGE_BUFFERS)] for buf in bufs])))

    @when(count > 0)
    def _() -> None:
        put(whole_refs, nothing(half, V))
        jax.lax.fori_loop(0, jnp.minimum(MERGE_BUFFERS - 1, count), start, None)
        jax.lax.fori_loop(0, count, one, None)
        _, total, acc = of(whole_refs)
        out_buf[...] = result(acc, total).astype(out_buf.dtype)
        copy = pltpu.make_async_copy(out_buf, out_hbm.at[row, 0, mine], sems.at[0])
        copy.start()
        copy.wait()
