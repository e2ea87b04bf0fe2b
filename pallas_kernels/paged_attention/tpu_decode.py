"""One new token of each of many requests on a TPU: writes it into its page and attends to the request's pages.

Requests are taken in turn, each block by block (of 8-bit pages two blocks at once, merged in order); while these are
computed the next ones' pages are copied, be they of this request or of the next. The new token is put into the last
block's buffer, and its tile of slots copied back while the next request is computed.

On a chip whose two cores are one device each core takes half of the key heads, which is an equal share whatever the
requests are; an odd number of them, such as a latent's one, stays on one core. (Equal shares of the pages, as in Lean
Attention, arXiv:2405.10480, would have to keep every block's part of a request that is cut to merge them in order, or
the result would depend on where the cut falls.)

Shapes: as in tpu_block; N request rows of a program, r rows of a key head: its query heads, padded to 8.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pages import LANES
from .tpu_block import LOG2_E, MASKED, Cache, Sizes, both, negated, one_in_all, result, softmax_step, when, wide

IN_FLIGHT = 8 * 2**20  # bytes of blocks that are on the chip or on the way to it
BUFFERS = (2, 6)


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
        begin_N: the block to begin with, where `state` holds maxima, sums and values of the ones before.
        block_rows: requests of one step of the grid; N is a multiple.
        static_length: all requests have this length, and pages in order of layer 0; scalar arguments are not read (for
            the static profiler, which cannot follow data).
    """
    N, rows, _ = q_NrC.shape
    steps, per_core = N // block_rows, rows // cores
    active_N = (lengths_N > 0).reshape(steps, block_rows)
    # Of each step's requests the active ones first.
    order = jnp.argsort(~active_N, 1, stable=True) + jnp.arange(steps)[:, None] * block_rows
    scalars = [
        jnp.asarray(layer, jnp.int32).reshape(1),
        order.reshape(N).astype(jnp.int32),
        active_N.sum(1).astype(jnp.int32),
        lengths_N.astype(jnp.int32),
        begin_N.astype(jnp.int32),
        table.reshape(-1).astype(jnp.int32),
    ]
    if static_length is not None:
        scalars = []

    def by_core(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """Of [N, rows, lanes]: the rows of each core, side by side, and a block of them."""
        x = x.reshape(N, cores, -1, x.shape[-1])
        spec = pl.BlockSpec((None, block_rows, *x.shape[2:]), lambda c, b, *_: (c, b, 0, 0))
        return jnp.swapaxes(x, 0, 1), spec

    K, E, V = sizes.K, sizes.N * LANES, sizes.V
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    given = [q_NrC, new_NKE] + ([] if new_scale_NKZ is None else [new_scale_NKZ])
    inputs: list[Any]
    specs: list[Any]
    inputs, specs = map(list, zip(*map(by_core, given), strict=True))
    if sinks_r is not None:
        inputs.append(jnp.broadcast_to(sinks_r[:, None].astype(jnp.float32), (rows, LANES)))
        specs.append(pl.BlockSpec((per_core, LANES), lambda c, b, *_: (c, 0)))
    if state is not None:
        for x in state:
            for those, new in zip((inputs, specs), by_core(x), strict=True):
                those.append(new)
    first_cache = len(scalars) + len(inputs)
    kv = kv_LPKNSX.reshape(*kv_LPKNSX.shape[:2], -1, LANES)
    caches = [kv] if scale_LPKZ is None else [kv, scale_LPKZ]
    has = dict(scales=scale_LPKZ is not None, sinks=sinks_r is not None, state=state is not None)
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
        pltpu.SemaphoreType.DMA(()),
        pltpu.VMEM((per_core, LANES), jnp.float32),
        pltpu.VMEM((per_core, LANES), jnp.float32),
        pltpu.VMEM((per_core, V), jnp.float32),
    ]
    out_spec = pl.BlockSpec((None, block_rows, per_core, V), lambda c, b, *_: (c, b, 0, 0))
    out, *caches = pl.pallas_call(
        functools.partial(_kernel, sizes, cores, block_rows, has, static_length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=[*specs, *[hbm] * len(caches)],
            out_specs=[out_spec, *[hbm] * len(caches)],
            scratch_shapes=[x for x in scratch if x is not None],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((cores, N, per_core, V), q_NrC.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches),
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
    out = jnp.swapaxes(out, 0, 1).reshape(N, rows, V)
    return out, caches[0].reshape(kv_LPKNSX.shape), caches[1] if len(caches) > 1 else None


def _kernel(
    sizes: Sizes, cores: int, block_rows: int, has: dict[str, bool], static_length: int | None, *refs: Any
) -> None:
    given: Iterator[Any] = iter(refs)

    def take(name: str) -> Any:
        return next(given) if has[name] else None

    known = static_length is not None
    scalars: list[Any] = [None if known else next(given) for _ in range(6)]
    layer_ref, order_ref, count_ref, length_ref, begin_ref, table_ref = scalars
    q_ref, new_ref, new_scale_ref, sinks_ref = next(given), next(given), take("scales"), take("sinks")
    top_in, sum_in, acc_in = take("state"), take("state"), take("state")
    next(given)  # the cache as an input, which its output is
    take("scales")
    out_ref, kv_hbm, scale_hbm = next(given), next(given), take("scales")
    kv_buf, scale_buf, sems = next(given), take("scales"), next(given)
    write_buf, scale_write_buf, write_sem = next(given), take("scales"), next(given)
    top_ref, sum_ref, acc_ref = given

    K, B, n = sizes.K, sizes.B, sizes.n
    per_head = q_ref.shape[1] // K
    b = pl.program_id(1)
    core = pl.program_id(0) if cores > 1 else None
    cache = Cache(sizes, 0 if known else layer_ref[0], core, table_ref, kv_hbm, scale_hbm, kv_buf, scale_buf, sems)
    count = count_ref[b] if static_length is None else block_rows

    def request(a: Any) -> Any:
        return b * block_rows + a if known else order_ref[b * block_rows + jnp.minimum(a, block_rows - 1)]

    def length_of(r: Any) -> Any:
        return static_length if known else length_ref[r]

    def low_of(r: Any) -> Any:
        """First page, and first block."""
        page = sizes.first_page(length_of(r) - 1)
        block = page // n
        return page, block if known and not has["state"] else jnp.maximum(block, begin_ref[r])

    def stop_of(r: Any) -> Any:
        return -(-length_of(r) // sizes.S) if known else (length_of(r) + sizes.S - 1) // sizes.S

    buffers = len(kv_buf)
    # Blocks that are attended to together. One waits for products and maxima longer than 8 bits take to be read; two
    # wait for both at once. A latent's are too wide for the registers.
    together = 2 if sizes.quantised and buffers >= 4 and sizes.V < 512 else 1

    def following(slot: Any) -> Any:
        if isinstance(slot, int):
            return (slot + 1) % buffers
        return jnp.where(slot + 1 == buffers, 0, slot + 1)

    def fetch(ahead: Any, wanted: Any = True) -> Any:
        """Begins to copy the next block that nothing copies yet, if there is one: (slot, nth request, block)."""
        if wanted is False:
            return ahead
        slot, a, j = ahead
        r = request(a)
        (page, _), stop = low_of(r), stop_of(r)

        if known:  # past the last one, the last once more: the profiler follows no conditions on every chip
            cache.start(jnp.minimum(r, count - 1), j, page, stop, slot)
        else:
            pl.when(both(wanted, a < count))(lambda: cache.start(r, j, page, stop, slot))

        ends = (j + 1) * n >= stop
        if isinstance(ends, bool):
            return following(slot), a + ends, 0 if ends else j + 1
        _, low = low_of(request(a + 1))
        after = following(slot), jnp.where(ends, a + 1, a), jnp.where(ends, low, j + 1)
        return after if wanted is True else tuple(jnp.where(wanted, *x) for x in zip(after, ahead, strict=True))

    def one(a: Any, carry: Any) -> Any:
        r = request(a)
        row, length, stop = r - b * block_rows, length_of(r), stop_of(r)
        low_page, low = low_of(r)
        last = (stop - 1) // n
        if has["state"]:
            top_ref[...], sum_ref[...], acc_ref[...] = top_in[row], sum_in[row], acc_in[row]
        else:
            top_ref[...] = jnp.full_like(top_ref, MASKED) if sinks_ref is None else sinks_ref[...] * LOG2_E
            sum_ref[...] = jnp.zeros_like(sum_ref) if sinks_ref is None else one_in_all(len(sum_ref))
            acc_ref[...] = jnp.zeros_like(acc_ref)

        rows = [pl.ds(h * per_head, per_head) for h in range(K)]
        in_pieces = [cache.query(q_ref[row, of_head]) for of_head in rows] if sizes.in_pieces else None

        def mask_of(j: Any) -> jax.Array:
            at = j * B + jax.lax.broadcasted_iota(jnp.int32, (per_head, B), 1)
            return at < length if sizes.window is None else (at < length) & (at >= length - sizes.window)

        def attend(*blocks: tuple[Any, Any, bool]) -> None:
            """To blocks one after the other: (its number, its slot, whether some of it is hidden)."""
            # Head by head as in a chunk, but each stage for all: they wait for nothing of one another.
            masks = [mask_of(j) if masked else None for j, _, masked in blocks]
            q = in_pieces or [q_ref[row, of_head] for of_head in rows]
            s = [[cache.scores(q[h], slot, h) for h in range(K)] for _, slot, _ in blocks]
            found: list[Any] = []
            for n, mask in enumerate(masks):
                states = ((top_ref[x], sum_ref[x]) if n == 0 else found[-1][h][1:3] for h, x in enumerate(rows))
                found.append([softmax_step(s[n][h], mask, *state) for h, state in enumerate(states)])
            for h, of_head in enumerate(rows):
                _, top_ref[of_head], sum_ref[of_head], _ = found[-1][h]
                acc = acc_ref[of_head]
                for n, (_, slot, _) in enumerate(blocks):
                    p, _, _, keep = found[n][h]
                    acc = acc * wide(keep, sizes.V) + cache.mix(p, masks[n], slot, h)
                acc_ref[of_head] = acc

        def arrive(j: Any, slot: Any) -> None:
            """Of a block before the last, whose pages are full."""
            cache.wait(j, low_page, stop, slot)
            if sizes.window is not None:
                pl.when(j == low)(lambda: cache.tidy(j, low_page, length, slot))

        masked = sizes.window is not None

        def some(j: Any, carry: Any) -> Any:
            """A block before the last, or `together` from the j-th on."""
            slot, ahead = carry
            slots = [slot]
            for _ in range(together - 1):
                slots.append(following(slots[-1]))
            first = low + together * j
            ahead = fetch(ahead)
            for n, at in enumerate(slots):
                arrive(first + n, at)
            attend(*((first + n, at, masked) for n, at in enumerate(slots)))
            for _ in slots[1:]:
                ahead = fetch(ahead)  # to where those were
            return following(slots[-1]), ahead

        before = last - low
        if known:
            # Written out, so that buffers are known too: the profiler does not follow others on every chip.
            for j in range(before // together):
                carry = some(j, carry)
            slot, ahead = carry
        else:
            slot, ahead = jax.lax.fori_loop(0, before // together, some, carry)
        # The last one, with the one before it if that is left.
        odd = False if together == 1 else before % 2 == 1
        end = (following(slot) if odd else slot) if known or together == 1 else jnp.where(odd, following(slot), slot)
        ahead = fetch(ahead)
        when(odd)(lambda: arrive(last - 1, slot))
        cache.wait(last, low_page, stop, end)
        new = (new_ref[row], None if new_scale_ref is None else new_scale_ref[row])
        when(known or a > 0)(written)  # what the request before began
        _insert(cache, length - 1, end, *new, write_buf, scale_write_buf)
        cache.tidy(last, low_page, length, end)
        when(odd)(lambda: attend((last - 1, slot, masked), (last, end, True)))
        when(negated(odd))(lambda: attend((last, end, True)))
        ahead = fetch(ahead, odd)
        out_ref[row] = result(acc_ref[...], sum_ref[...]).astype(out_ref.dtype)
        write(r)
        return following(end), ahead

    def write(r: Any) -> None:
        """Begins to copy the tile of slots that the new token is in."""
        rows, position = sizes.write_rows, length_of(r) - 1
        page = cache.page(r, position // sizes.S)
        first = position % sizes.S // rows * rows
        for h, i in ((h, i) for h in range(K) for i in range(sizes.N)):
            slots = cache.page_in_memory(page).at[cache.rows(h, i, first, rows)]
            pltpu.make_async_copy(write_buf.at[h * sizes.N + i], slots, write_sem).start()
        if scale_write_buf is not None:
            pltpu.make_async_copy(scale_write_buf, cache.scales_in_memory(page), write_sem).start()

    def written() -> None:
        """Waits until a request's new token is in the cache."""
        for buffer in (write_buf, scale_write_buf):
            if buffer is not None:
                pltpu.make_async_copy(buffer, buffer, write_sem).wait()

    out_ref[...] = jnp.zeros_like(out_ref)

    @when(count > 0)
    def _() -> None:
        _, low = low_of(request(0))
        ahead = (0, 0, low)
        for _ in range(buffers - 1):
            ahead = fetch(ahead)
        if known:
            _, before, j = ahead  # of the first request; the same for each
            write(0)  # for the first to wait for
            jax.lax.fori_loop(0, count, lambda a, _: one(a, (0, (buffers - 1, a + before, j))) and None, None)
            for slot in range(buffers - 1):
                cache.wait(slot, 0, stop_of(0), slot)
        else:
            jax.lax.fori_loop(0, count, one, (0, ahead))
        written()


def _insert(
    cache: Cache,
    position: Any,
    slot: Any,
    new_KE: jax.Array,
    new_scale_KZ: jax.Array | None,
    write_buf: Any,
    scale_write_buf: Any,
) -> None:
    """Puts the new token into the buffer of its request's last block, and its tile of slots into one of their own.

    (What lies behind the token in that tile is written back as it is, for others to tidy up.)
    """
    sizes, S, rows = cache.sizes, cache.sizes.S, cache.sizes.write_rows
    entry, at = position // S, position % S
    nth = entry % sizes.n
    first = at // rows * rows
    tiles = [(h, i) for h in range(sizes.K) for i in range(sizes.N)]
    # A tile in words of 32 bits, each of which holds a lane of as many neighbouring slots as fit.
    bits = 8 * jnp.dtype(sizes.kept).itemsize
    word, shift = at % rows * bits // 32, at * bits % 32
    is_mine = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0) == word
    others = ~(jnp.full((8, LANES), 2**bits - 1 if bits < 32 else -1, jnp.int32) << shift)
    for at_tile, (h, i) in enumerate(tiles):
        tile = cache.rows(h, i, first, rows)
        old = pltpu.bitcast(cache.kv_buf[slot, nth, tile], jnp.int32)
        mine = (old & others) | (new_KE[h : h + 1, i * LANES : (i + 1) * LANES] << shift)
        new = pltpu.bitcast(jnp.where(is_mine, mine, old), cache.kv_buf.dtype)
        cache.kv_buf[slot, nth, tile] = new
        write_buf[at_tile] = new
    if new_scale_KZ is not None:
        old = cache.scale_buf[slot, nth]
        lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
        new = jnp.where((lane == at) | (lane == S + at), new_scale_KZ, old)
        cache.scale_buf[slot, nth] = new
        scale_write_buf[...] = new
