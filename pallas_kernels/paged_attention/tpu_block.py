"""What the TPU kernels of paged attention share: copies of pages to and from the chip, and a step of the softmax.

A block is `n` pages of one request, counted from its own first token: always as many tokens, whatever else is in the
batch. One block's copies are under way while another is computed. Every kernel takes a block in the same way and merges
blocks in their order, so that a token's bits do not depend on the kernel, on the split or on company.

Shapes: K key/value heads (of one core), n pages a block, S slots a page, B = n * S, E lanes of a token in the cache,
in tiles of X = 128, Z = 2 S scales of a page, C lanes of a key that are multiplied, V lanes of a value, N rows.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import float8
from ..chips import target_chip
from ..float8 import FLOAT8, NATIVE, to_bfloat16
from .pages import LANES

MASKED = -1e30  # stands for -inf where a difference of two of them must not be nan
LOG2_E = math.log2(math.e)
BUSY = ("7x",)  # chips whose memory is so fast that the matrix unit must not wait, nor do what others can
PAIRS_BYTES = 3 * 2**20  # of a block at most, of which `tpu_pairs` has 8 on the chip
State = tuple[jax.Array, jax.Array, jax.Array]  # of a softmax: maxima and sums of each lane [N, 128], values [N, V]


@dataclass(frozen=True)
class Sizes:
    """What is known while tracing."""

    K: int
    S: int
    n: int
    M: int  # pages a request
    N: int  # tiles of lanes of a token
    C: int
    v_lane: int
    V: int
    scale: float
    softcap: float | None
    window: int | None
    quantised: bool
    dtype: Any  # of the products' inputs
    kept: Any  # of the cache
    part: int | None = None  # blocks of a part, at whose borders a request may be cut; None: it never is

    @property
    def B(self) -> int:
        return self.n * self.S

    @property
    def part_pages(self) -> int:
        return self.M if self.part is None else self.part * self.n

    @property
    def write_rows(self) -> int:
        """Slots of a tile: what a copy to the cache must be whole multiples of."""
        return 32 // jnp.dtype(self.kept).itemsize

    @property
    def in_pieces(self) -> bool:
        """Whether pages are multiplied as they are kept: float8, by bfloat16 in pieces."""
        return self.kept == FLOAT8 and self.dtype == jnp.bfloat16 and target_chip() in NATIVE

    @property
    def in_pairs(self) -> bool:
        """Whether decodes go by `tpu_pairs`."""
        by_8_bits = self.quantised and self.dtype == jnp.bfloat16 and self.part is None
        # A latent's values are too wide for the registers.
        return by_8_bits and self.B * self.K * self.N * LANES <= PAIRS_BYTES and self.V < 512 and target_chip() in BUSY

    @property
    def turns_keys(self) -> bool:
        """Whether int8 keys are turned over as such, a quarter of the work that bfloat16 is to the matrix unit."""
        return self.kept == jnp.int8 and self.dtype == jnp.bfloat16 and target_chip() in BUSY

    def first_page(self, position: Any) -> Any:
        """The first page that a query at `position` sees."""
        return 0 if self.window is None else jnp.maximum(position - self.window + 1, 0) // self.S


def when(condition: Any):
    """`pl.when`, but what is known while tracing leaves no branch."""
    if isinstance(condition, bool):
        return (lambda body: body()) if condition else (lambda body: None)
    return pl.when(condition)


def both(a: Any, b: Any) -> Any:
    """a and b, of which either may be known while tracing."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def negated(a: Any) -> Any:
    return not a if isinstance(a, bool) else jnp.logical_not(a)


@dataclass(frozen=True)
class Cache:
    """The pages in the large memory, and the buffers on the chip that blocks of them come to."""

    sizes: Sizes
    layer: Any
    core: Any  # which of the shares of the heads; None: there is one
    table_ref: Any  # None: request r has the pages from r * M on
    kv_hbm: Any
    scale_hbm: Any
    kv_buf: Any  # [buffers, n, K * tiles * S, X]
    scale_buf: Any  # [buffers, n, K, Z]
    sems: Any  # [buffers]
    within: bool = False  # every page that is asked for is in the table, and none before it

    def mine(self, of_head: int) -> Any:
        """This core's part of a page's axis that has `of_head` numbers a head."""
        if self.core is None:
            return slice(None)
        size = self.sizes.K * of_head
        return pl.ds(pl.multiple_of(self.core * size, size), size)

    def page_in_memory(self, page: Any) -> Any:
        """[K * tiles * S, X]: two axes and a tile of lanes, for the plainest of copies."""
        return self.kv_hbm.at[self.layer, page, self.mine(self.sizes.N * self.sizes.S)]

    def scales_in_memory(self, page: Any) -> Any:
        """[K, Z]"""
        return self.scale_hbm.at[self.layer, page, self.mine(1)]

    def rows(self, head: Any, tile: int, first: Any = 0, count: int | None = None) -> Any:
        """Of the rows of a page in a buffer: those of a head's tile, or `count` slots of it."""
        at = (head * self.sizes.N + tile) * self.sizes.S + first
        count = self.sizes.S if count is None else count
        return pl.ds(at if isinstance(at, int) else pl.multiple_of(at, self.sizes.write_rows), count)

    def page(self, r: Any, entry: Any) -> Any:
        """Of what the table does not have, any."""
        at = r * self.sizes.M + entry
        if self.table_ref is None:
            return at
        return self.table_ref[at if self.within else jnp.minimum(at, len(self.table_ref) - 1)]

    def _copies(self, slot: Any, nth: Any, page: Any) -> list[Any]:
        sem = self.sems.at[slot]
        copies = [pltpu.make_async_copy(self.page_in_memory(page), self.kv_buf.at[slot, nth], sem)]
        if self.sizes.quantised:
            copies.append(pltpu.make_async_copy(self.scales_in_memory(page), self.scale_buf.at[slot, nth], sem))
        return copies

    def start(self, r: Any, j: Any, low: Any, stop: Any, slot: Any) -> None:
        """Begins to copy block j of request r: of its pages those in [low, stop)."""
        for page in self.starts(r, j, low, stop, slot):
            page()

    def starts(self, r: Any, j: Any, low: Any, stop: Any, slot: Any) -> list[Callable[[], None]]:
        """`start`, page by page, for other work to come between."""
        n = self.sizes.n
        return [functools.partial(self._start, r, j * n + nth, nth, low, stop, slot) for nth in range(n)]

    def _start(self, r: Any, at: Any, nth: int, low: Any, stop: Any, slot: Any) -> None:
        # Read in any case: so little is left under the condition that there is no branch.
        copies = self._copies(slot, nth, self.page(r, at))

        @when(at < stop if self.within and self.sizes.window is None else both(at >= low, at < stop))
        def _() -> None:
            for copy in copies:
                copy.start()

    def wait(self, j: Any, low: Any, stop: Any, slot: Any, full: bool = False) -> None:
        """Until block j is there: a whole one at once, as a semaphore counts bytes, another page by page.

        `full`: it has all pages.
        """
        n = self.sizes.n
        whole = full or both(j * n >= low, (j + 1) * n <= stop)

        @when(whole)
        def _() -> None:
            for buffer, sem in self._block(slot):
                pltpu.make_async_copy(buffer, buffer, sem).wait()

        @when(negated(whole))
        def _() -> None:
            def page(nth: Any, _: Any = None) -> None:
                for copy in self._copies(slot, nth, 0):
                    copy.wait()

            # A loop: what is written out runs too, each under a condition, where a block is whole.
            jax.lax.fori_loop(jnp.maximum(low - j * n, 0), jnp.minimum(stop - j * n, n), page, None)

    def _block(self, slot: Any) -> list[tuple[Any, Any]]:
        """A block's buffers and what tells that they are full."""
        buffers = [self.kv_buf] + ([self.scale_buf] if self.sizes.quantised else [])
        return [(buffer.at[slot], self.sems.at[slot]) for buffer in buffers]

    def tidy(self, j: Any, low: Any, length: Any, slot: Any) -> None:
        """Zeros for what block j does not have: pages that were not copied, and slots from position `length` on.

        They may hold anything, even nan, which a weight of 0 would not hide.
        """
        S, n = self.sizes.S, self.sizes.n

        def page(nth: Any, _: Any = None) -> None:
            at = j * n + nth
            there = both(at >= low, at * S < length)
            whole = both(at >= low, (at + 1) * S <= length)

            @when(negated(there))
            def _() -> None:
                self.kv_buf[slot, nth] = jnp.zeros(self.kv_buf.shape[2:], self.kv_buf.dtype)
                if self.sizes.quantised:
                    self.scale_buf[slot, nth] = jnp.zeros(self.scale_buf.shape[2:], jnp.float32)

            @when(both(there, negated(whole)))
            def _() -> None:
                page = self.kv_buf[slot, nth]
                # 32 bits: masks of packed numbers are not for every chip.
                row = jax.lax.broadcasted_iota(jnp.int32, page.shape, 0)
                keep = jax.lax.rem(row, S) < length - at * S
                wide = page.astype(jnp.float32)
                self.kv_buf[slot, nth] = jnp.where(keep, wide, 0).astype(page.dtype)
                if self.sizes.quantised:
                    scales = self.scale_buf[slot, nth]
                    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
                    keep = jnp.where(lane >= S, lane - S, lane) < length - at * S
                    self.scale_buf[slot, nth] = jnp.where(keep, scales, 0)

        if isinstance(j, int) and isinstance(length, int):  # for the profiler
            for nth in range(n):
                page(nth)
        else:
            # Without a window all is there up to the end.
            begin = jnp.clip(length // S - j * n, 0, n) if self.sizes.window is None else 0
            jax.lax.fori_loop(begin, n, page, None)

    def insert(
        self,
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
        sizes, S, rows = self.sizes, self.sizes.S, self.sizes.write_rows
        entry, at = position // S, position % S
        nth = entry % sizes.n
        first = at // rows * rows
        tiles = [(h, i) for h in range(sizes.K) for i in range(sizes.N)]
        # A tile in words of 32 bits, each of which holds a lane of as many neighbouring slots as fit.
        bits = 8 * jnp.dtype(sizes.kept).itemsize
        word, shift = at % rows * bits // 32, at * bits % 32
        is_mine = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0) == word
        others = ~(jnp.full((8, LANES), 2**bits - 1 if bits < 32 else -1, jnp.int32) << shift)
        places = [self.rows(h, i, first, rows) for h, i in tiles]
        # All are read before any is written: a compiler takes them for the same.
        every = [pltpu.bitcast(self.kv_buf[slot, nth, place], jnp.int32) for place in places]
        for at_tile, ((h, i), place, old) in enumerate(zip(tiles, places, every, strict=True)):
            mine = (old & others) | (new_KE[h : h + 1, i * LANES : (i + 1) * LANES] << shift)
            new = pltpu.bitcast(jnp.where(is_mine, mine, old), self.kv_buf.dtype)
            self.kv_buf[slot, nth, place] = new
            write_buf[at_tile] = new
        if new_scale_KZ is not None:
            old = self.scale_buf[slot, nth]
            lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
            new = jnp.where((lane == at) | (lane == S + at), new_scale_KZ, old)
            self.scale_buf[slot, nth] = new
            scale_write_buf[...] = new

    def write(self, r: Any, position: Any, write_buf: Any, scale_write_buf: Any, sem: Any) -> list[Callable[[], None]]:
        """What begin to copy the tile of slots that `insert` changed to where it belongs."""
        sizes, rows = self.sizes, self.sizes.write_rows
        page = self.page(r, position // sizes.S)
        first = position % sizes.S // rows * rows
        places = [self.rows(h, i, first, rows) for h in range(sizes.K) for i in range(sizes.N)]
        pairs = [(write_buf.at[nth], self.page_in_memory(page).at[place]) for nth, place in enumerate(places)]
        if scale_write_buf is not None:
            pairs.append((scale_write_buf, self.scales_in_memory(page)))
        return [pltpu.make_async_copy(*pair, sem).start for pair in pairs]

    def key(self, slot: Any, head: Any) -> jax.Array:
        """[B, C]"""
        return self._tiles(slot, head, 0, self.sizes.C)

    def value(self, slot: Any, head: Any) -> jax.Array:
        """[B, V]"""
        return self._tiles(slot, head, self.sizes.v_lane // LANES, self.sizes.V)

    def _tiles(self, slot: Any, head: Any, first: int, lanes: int) -> jax.Array:
        tiles = [self.kv_buf[slot, :, self.rows(head, first + i)] for i in range(lanes // LANES)]
        tiles = [x.reshape(self.sizes.B, LANES) for x in tiles]
        if not self.sizes.in_pieces:
            tiles = [_cast(x, self.sizes.dtype) for x in tiles]
        return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, 1)

    def scales(self, slot: Any, head: Any, which: int) -> jax.Array:
        """[1, B]: of the keys (0) or the values (1)."""
        S = self.sizes.S
        pages = [self.scale_buf[slot, nth, pl.ds(head, 1)] for nth in range(self.sizes.n)]
        return jnp.concatenate([x[:, which * S : (which + 1) * S] for x in pages], 1)

    def scales_of_all(self, slot: Any, which: int) -> jax.Array:
        """[K, B]"""
        S = self.sizes.S
        return jnp.concatenate([self.scale_buf[slot, nth, :, pl.ds(which * S, S)] for nth in range(self.sizes.n)], 1)

    def query(self, q_NC: jax.Array) -> Any:
        """Queries as `scores` takes them."""
        if not self.sizes.in_pieces:
            return q_NC
        x_2NC, back_N1 = float8.pieces(q_NC)
        return x_2NC, back_N1 * (self.sizes.scale * LOG2_E if self.sizes.softcap is None else 1.0)

    def scores(self, q: Any, slot: Any, head: Any, scales: jax.Array | None = None) -> jax.Array:
        """[N, B], in powers of 2."""
        sizes = self.sizes
        if sizes.in_pieces:
            s_NB = float8.product(q, self.key(slot, head), (1, 1))
        elif sizes.turns_keys:
            tiles = [self.kv_buf[slot, :, self.rows(head, i)] for i in range(sizes.C // LANES)]
            tiles = [_cast(x.reshape(sizes.B, LANES).T, sizes.dtype) for x in tiles]
            s_NB = product(q, tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, 0), (1, 0))
        else:
            s_NB = product(q, self.key(slot, head), (1, 1))
        if sizes.quantised:
            s_NB = s_NB * (self.scales(slot, head, 0) if scales is None else scales)
        if sizes.softcap is None:
            return s_NB if sizes.in_pieces else s_NB * (sizes.scale * LOG2_E)
        return jnp.tanh(s_NB * (sizes.scale / sizes.softcap)) * (sizes.softcap * LOG2_E)

    def mix(self, p_NB: jax.Array, mask_NB: jax.Array | None, slot: Any, head: Any) -> jax.Array:
        """[N, V]: the values by their weights, which are 1 at most, and 0 where the mask is."""
        if not self.sizes.quantised:
            return product(p_NB.astype(self.sizes.dtype), self.value(slot, head), (1, 0))
        scales = self.scales(slot, head, 1)
        return self.mix_scaled(p_NB * scales, mask_NB, scales, slot, head)

    def mix_scaled(
        self, p_NB: jax.Array, mask_NB: jax.Array | None, scales: jax.Array, slot: Any, head: Any
    ) -> jax.Array:
        """`mix` by weights that the values' scales are in already."""
        sizes, value = self.sizes, self.value(slot, head)
        if not sizes.in_pieces:
            return product(p_NB.astype(sizes.dtype), value, (1, 0))
        # Of the tokens that a row sees, as a row's bits must not hang on others; known before the weights are.
        seen = scales if mask_NB is None else jnp.where(mask_NB, scales, 0)
        return float8.product(float8.pieces(p_NB, jnp.max(seen, axis=1, keepdims=True)), value, (1, 0))


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    if x.dtype == dtype:
        return x
    if x.dtype == FLOAT8 and jnp.dtype(dtype) == jnp.bfloat16:
        return to_bfloat16(x, normal=True)
    if x.dtype.itemsize == 1 and jnp.dtype(dtype) == jnp.bfloat16:
        return x.astype(jnp.float32).astype(dtype)
    return x.astype(dtype)


def product(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Accumulates in float32, and of float32 inputs rounds nothing before."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def wide(x_N128: jax.Array, lanes: int) -> jax.Array:
    """[N, lanes] of an array whose lanes are all alike."""
    return jnp.concatenate([x_N128] * -(-lanes // x_N128.shape[1]), 1)[:, :lanes]


def one_in_all(N: int) -> jax.Array:
    """[N, 128] whose sum over the lanes is 1."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (N, LANES), 1) == 0, 1.0, 0.0)


def over_lanes(x_N128: jax.Array) -> jax.Array:
    """The sum over the lanes, in each of them: once for a token, by an instruction that takes every row alike."""
    return jnp.broadcast_to(jnp.sum(x_N128, 1, keepdims=True), x_N128.shape)


def result(acc_NV: jax.Array, sum_N128: jax.Array) -> jax.Array:
    """[N, V], 0 in rows that saw nothing."""
    total_N128 = over_lanes(sum_N128)
    return acc_NV / wide(jnp.where(total_N128 > 0, total_N128, 1), acc_NV.shape[1])


def nothing(N: int, V: int) -> State:
    """The state of a softmax that saw nothing yet."""
    zeros = jnp.zeros((N, LANES), jnp.float32)
    return jnp.full_like(zeros, MASKED), zeros, jnp.zeros((N, V), jnp.float32)


def merged(one: State, other: State) -> State:
    """Two parts of a softmax as one; one that saw nothing leaves the other's bits as they are.

    What has the lower maximum is scaled down to the other: one product and one sum, for all kernels to round alike.
    """
    scale_N128 = jnp.exp2(-jnp.abs(one[0] - other[0]))

    def joined(x: jax.Array, y: jax.Array) -> jax.Array:
        top_x, top_y, scale = (wide(z, x.shape[1]) for z in (one[0], other[0], scale_N128))
        return jnp.where(top_x < top_y, x, y) * scale + jnp.where(top_x < top_y, y, x)

    return jnp.maximum(one[0], other[0]), joined(one[1], other[1]), joined(one[2], other[2])


def _by_lane(p_NB: jax.Array) -> jax.Array:
    """[N, 128]: the sum of what is in each lane of B / 128 tiles."""
    N, B = p_NB.shape
    tiles = [p_NB[:, at : at + LANES] for at in range(0, B, LANES)]
    if B % LANES:
        tiles[-1] = jnp.concatenate([tiles[-1], jnp.zeros((N, LANES - B % LANES), p_NB.dtype)], 1)
    return functools.reduce(jnp.add, tiles)


def softmax_step(
    s_NB: jax.Array, mask_NB: jax.Array | None, top_N128: jax.Array, sum_N128: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights [N, B], the new maxima, sums of each lane, and the factor for what was summed before.

    With a mask or without, the same numbers are subtracted and exponentiated: where a compiler joins the product
    before and this difference into one instruction that rounds once, it does so in both.
    """
    seen_NB = s_NB if mask_NB is None else jnp.where(mask_NB, s_NB, MASKED)
    new_top_N128 = jnp.maximum(top_N128, jnp.max(seen_NB, 1, keepdims=True))
    p_NB = jnp.exp2(s_NB - wide(new_top_N128, s_NB.shape[1]))
    if mask_NB is not None:
        p_NB = jnp.where(mask_NB, p_NB, 0)
    keep_N128 = jnp.exp2(top_N128 - new_top_N128)
    return p_NB, new_top_N128, sum_N128 * keep_N128 + _by_lane(p_NB), keep_N128
