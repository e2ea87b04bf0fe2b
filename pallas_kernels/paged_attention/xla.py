"""Paged attention in plain XLA: a softmax for each page, merged page by page, in loops as long as the real contexts.

PagedAttention is Kwon et al. 2023, arXiv:2309.06180; merging parts of a softmax Milakov and Gimelshein 2018,
arXiv:1805.02867. A page's part is computed by itself and merged into its request's result in the order of the pages,
from the request's own first: so nothing in a token's result depends on its neighbours.

Decoding takes one request after the other, and of its pages one a turn: what is read is the real contexts and no more.
A prompt's chunk is taken by itself, a tile of queries and a page a turn.

Nor may a result depend on the chunk of the prompt that the token came in with, so each step must round a row alike in a
tile of one token and in one of many. XLA:CPU's products do from some number of rows up, which depends on their columns
(`_rows_needed`); its sums do not, so the sum over keys is a tree of additions of our own.

Shapes: T token rows, R requests, S slots a page, K key/value heads, G query heads for each, D head size,
V size of a value; t: the query tokens of one tile, r: their rows, row = t * G + g.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..chips import known_platform
from .batch import SharedPrefixes, token_rows, write
from .pages import Pages

TILE = 64  # query tokens of a chunk that are taken together
SHARED_BY = 2  # a prefix is read once where at least one row in so many has it
MASKED = -1e30  # stands for -inf where a difference of two of them must not be nan


def paged_attention(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKV: jax.Array | None,
    pages: Pages,
    *,
    layer: int | jax.Array,
    page_table_RM: jax.Array,
    lengths_R: jax.Array,
    query_start_R: jax.Array,
    query_length_R: jax.Array,
    decode_rows: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: jax.Array | None,
    prefixes: SharedPrefixes | None,
) -> tuple[jax.Array, Pages]:
    dtype = q_THD.dtype
    if known_platform() == "cpu":
        # Its products of bfloat16 are slow where one row is multiplied.
        q_THD = q_THD.astype(jnp.promote_types(dtype, jnp.float32))
    T, H, D = q_THD.shape
    R, K = len(page_table_RM), k_TKD.shape[1]
    rows = token_rows(T, lengths_R, query_start_R, query_length_R)
    pages = write(pages, layer, k_TKD, v_TKV, rows, page_table_RM)
    table_RM = jnp.clip(page_table_RM, 0, pages.num_pages - 1)
    first_R = lengths_R - query_length_R  # position of the first new token

    is_decode_R = (query_length_R == 1) & (query_start_R == jnp.arange(R))
    sinks_KG = None if sinks_H is None else sinks_H.reshape(K, H // K)
    attend = _Attend(pages, layer, window, scale, softcap, sinks_KG)

    def tile(r: Any, nth: Any, out_TKGV: jax.Array) -> jax.Array:
        """New tokens nth .. nth + TILE of request r, as far as they are its own."""
        at, nth_t = query_start_R[r] + nth, nth + jnp.arange(TILE)
        q_tKGD, old_tKGV = (jax.lax.dynamic_slice_in_dim(x, at, TILE) for x in (q_TKGD, out_TKGV))
        real_t = nth_t < query_length_R[r]
        new_tKGV = attend.tile(q_tKGD, first_R[r] + nth_t, real_t, table_RM[r])
        out_tKGV = jnp.where(real_t[:, None, None, None], new_tKGV, old_tKGV)
        return jax.lax.dynamic_update_slice_in_dim(out_TKGV, out_tKGV, at, 0)

    def chunk(r: Any, out_TKGV: jax.Array) -> jax.Array:
        tiles = jnp.where(query_start_R[r] >= decode_rows, -(-query_length_R[r] // TILE), 0)
        return jax.lax.fori_loop(0, tiles, lambda i, out: tile(r, i * TILE, out), out_TKGV)

    # A tile may reach past the last token row, where a slice would be moved back to fit.
    extra = TILE if decode_rows < T else 0
    q_TKGD = jnp.pad(q_THD.reshape(T, K, H // K, D), ((0, extra), (0, 0), (0, 0), (0, 0)))
    out_TKGV = jnp.zeros((*q_TKGD.shape[:3], pages.value_dim), q_TKGD.dtype)
    if decode_rows:
        N = min(decode_rows, R)
        sharing = None if prefixes is None else jax.tree.map(lambda x_R: x_R[:N], prefixes)
        new_NKGV = attend.rows(q_TKGD[:N], first_R[:N], is_decode_R[:N], table_RM[:N], sharing)
        out_TKGV = out_TKGV.at[:N].set(new_NKGV)
    if decode_rows < T:
        out_TKGV = jax.lax.fori_loop(0, R, chunk, out_TKGV)
    return out_TKGV[:T].reshape(T, H, pages.value_dim).astype(dtype), pages


@dataclass(frozen=True)
class _Attend:
    """Attention of queries over the pages of one layer."""

    pages: Pages
    layer: int | jax.Array
    window: int | None
    scale: float
    softcap: float | None
    sinks_KG: jax.Array | None

    def tile(self, q_tKGD: jax.Array, position_t: jax.Array, real_t: jax.Array, table_M: jax.Array) -> jax.Array:
        """Consecutive tokens of one request; anything for those that are not real."""
        t, K, G, D = q_tKGD.shape
        q_KrD = self._pad(jnp.swapaxes(q_tKGD, 0, 1).reshape(K, t * G, D))
        extra = q_KrD.shape[1] - t * G
        position_r = jnp.pad(jnp.repeat(position_t, G), (0, extra))
        real_r = jnp.pad(jnp.repeat(real_t, G), (0, extra))
        last = jnp.where(real_t, position_t, -1).max()

        def turn(j: Any, carry: Any) -> Any:
            return _merge(carry, self._page(q_KrD, position_r, real_r, last, j, table_M[j]))

        stop = last // self.pages.page_size + 1
        start = self._nothing(jnp.broadcast_to(jnp.arange(q_KrD.shape[1]) % G, q_KrD.shape[:2]), q_tKGD)
        out_KrV = _result(jax.lax.fori_loop(self._low(position_t[0]), stop, turn, start))
        return jnp.swapaxes(out_KrV[:, : t * G].reshape(K, t, G, -1), 0, 1).astype(q_tKGD.dtype)

    def rows(
        self,
        q_RKGD: jax.Array,
        position_R: jax.Array,
        real_R: jax.Array,
        table_RM: jax.Array,
        prefixes: SharedPrefixes | None,
    ) -> jax.Array:
        """The one token of each request; 0 for those that are not real."""
        (R, _, G, _), S = q_RKGD.shape, self.pages.page_size
        q_RKrD = self._pad(q_RKGD)
        low_R = self._low(position_R)
        start = self._nothing(jnp.broadcast_to(jnp.arange(q_RKrD.shape[2]) % G, q_RKrD.shape[:3]), q_RKGD)
        if prefixes is not None:
            shares_R = real_R & (prefixes.pages_R > low_R)
            shares_R &= shares_R[prefixes.leader_R]
            # All rows are multiplied with each shared page, so few that share it gain nothing.
            members_R = jnp.zeros(R, jnp.int32).at[prefixes.leader_R].add(shares_R)
            shares_R &= (SHARED_BY * members_R >= R)[prefixes.leader_R]
            start = self._shared(q_RKrD, position_R, shares_R, low_R, table_RM, prefixes, start)
            low_R = jnp.where(shares_R, prefixes.pages_R, low_R)
        stop_R = jnp.where(real_R, position_R // S + 1, low_R)

        def row(r: Any, out_RKrV: jax.Array) -> jax.Array:
            # All that is not masked lies in the request, up to this position.
            q_KrD, position, table_M = q_RKrD[r], position_R[r], table_RM[r]
            position_r = jnp.broadcast_to(position, q_KrD.shape[1:2])

            def turn(j: Any, carry: Any) -> Any:
                return _merge(carry, self._page(q_KrD, position_r, position_r >= 0, position, j, table_M[j]))

            first = jax.tree.map(lambda x_R: x_R[r], start)
            return out_RKrV.at[r].set(_result(jax.lax.fori_loop(low_R[r], stop_R[r], turn, first)))

        out_RKrV = jax.lax.fori_loop(0, R, row, jnp.zeros_like(start[0]))
        return out_RKrV[:, :, :G].astype(q_RKGD.dtype)

    def _shared(
        self,
        q_RKrD: jax.Array,
        position_R: jax.Array,
        shares_R: jax.Array,
        low_R: jax.Array,
        table_RM: jax.Array,
        prefixes: SharedPrefixes,
        start: Any,
    ) -> Any:
        """`start` and the pages of shared prefixes, each of them read and multiplied once for all rows that have it."""
        R, K, r, D = q_RKrD.shape
        q_KzD = jnp.swapaxes(q_RKrD, 0, 1).reshape(K, R * r, D)
        position_z = jnp.repeat(position_R, r)
        leads_R = shares_R & (prefixes.leader_R == jnp.arange(R))
        end_R = jnp.cumsum(jnp.where(leads_R, prefixes.pages_R, 0))

        def turn(i: Any, carry: Any) -> Any:
            leader = _first_above(end_R, i)
            j = i - end_R[leader] + prefixes.pages_R[leader]
            has_R = shares_R & (prefixes.leader_R == leader) & (low_R <= j)
            part = self._page(q_KzD, position_z, jnp.repeat(has_R, r), position_R[leader], j, table_RM[leader, j])
            rows = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(K, R, r, -1), 0, 1), part)
            merged = _merge(carry, rows)
            return jax.tree.map(lambda old, new: jnp.where(has_R[:, None, None, None], new, old), carry, merged)

        return jax.lax.fori_loop(0, end_R[-1], turn, start)

    def _nothing(self, group_Kr: jax.Array, like: jax.Array) -> Any:
        """The state of a softmax over no keys yet, but for the sinks: values, maxima and sums.

        `group_Kr` [..., K, r] tells which of its key head's query heads a row is.
        """
        dtype = jnp.promote_types(like.dtype, jnp.float32)
        values = jnp.zeros((*group_Kr.shape, self.pages.value_dim), dtype)
        if self.sinks_KG is None:
            zeros = jnp.zeros((*group_Kr.shape, 1), dtype)
            return values, jnp.full_like(zeros, MASKED), zeros
        head_K1 = jnp.arange(len(self.sinks_KG))[:, None]
        top = self.sinks_KG.astype(dtype)[head_K1, group_Kr][..., None]
        return values, top, jnp.ones_like(top)

    def _low(self, position: jax.Array) -> Any:
        """The first page that a query sees, given its position."""
        zero = jnp.zeros_like(position)
        return zero if self.window is None else jnp.maximum(position - self.window + 1, 0) // self.pages.page_size

    def _pad(self, q_KrD: jax.Array) -> jax.Array:
        """More rows, where fewer would be rounded in another way. [..., K, r, D]."""
        needed = max(_rows_needed(self.pages.page_size), _rows_needed(q_KrD.shape[-1]))
        widths = [(0, 0)] * (q_KrD.ndim - 2) + [(0, max(0, needed - q_KrD.shape[-2])), (0, 0)]
        return jnp.pad(q_KrD, widths)

    def _page(
        self, q_KrD: jax.Array, position_r: jax.Array, real_r: jax.Array, last: jax.Array, j: jax.Array, page: jax.Array
    ) -> Any:
        """The part of page j of a request: values [K, r, V], maxima and sums [K, r, 1]."""
        S = self.pages.page_size
        kT_KDS, v_KSV = self.pages.take_one(self.layer, page)
        s_S = j * S + jnp.arange(S)
        # Slots beyond the request may hold what another one left, even nan, which a weight of 0 would not hide.
        v_KSV = jnp.where((s_S <= last)[:, None], v_KSV, 0)
        distance_rS = position_r[:, None] - s_S
        mask_rS = (distance_rS >= 0) & real_r[:, None]
        if self.window is not None:
            mask_rS &= distance_rS < self.window
        scores_KrS = _dot("krd,kds->krs", q_KrD, kT_KDS.astype(q_KrD.dtype)) * self.scale
        v_scale_K1S = None
        if self.pages.quantised:
            k_scale_K1S, v_scale_K1S = (x[:, None] for x in self.pages.take_scales(self.layer, page))
            scores_KrS = scores_KrS * k_scale_K1S
        if self.softcap is not None:
            scores_KrS = self.softcap * jnp.tanh(scores_KrS / self.softcap)
        scores_KrS = jnp.where(mask_rS, scores_KrS, MASKED)
        max_Kr1 = scores_KrS.max(-1, keepdims=True)
        # The mask goes in before: chosen after the exponential, a page takes XLA:CPU a tenth longer.
        p_KrS = jnp.exp(jnp.where(mask_rS, scores_KrS - max_Kr1, -jnp.inf))
        scaled_KrS = p_KrS if v_scale_K1S is None else jnp.where(mask_rS, p_KrS * v_scale_K1S, 0)
        pv_KrV = _dot("krs,ksv->krv", scaled_KrS.astype(q_KrD.dtype), v_KSV.astype(q_KrD.dtype))
        return pv_KrV, max_Kr1, _sum(p_KrS)


def _first_above(end_R: jax.Array, item: jax.Array) -> jax.Array:
    """The first place whose end lies above the item. All are compared: a search is a loop of many small kernels."""
    return jnp.searchsorted(end_R, item, side="right", method="compare_all")


def _merge(one: Any, other: Any) -> Any:
    """Two parts of a softmax as one. The part with the lower maximum is scaled down to the other's: one product and one
    sum, which can be fused into one rounding in one way only, whatever loop this is compiled into."""
    (acc, top, total), (new_acc, new_top, new_total) = one, other
    scale = jnp.exp(-jnp.abs(top - new_top))
    is_new = new_top > top

    def joined(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(is_new, old, new) * scale + jnp.where(is_new, new, old)

    return joined(acc, new_acc), jnp.maximum(top, new_top), joined(total, new_total)


def _result(state: Any) -> jax.Array:
    acc, _, total = state
    return acc / jnp.where(total > 0, total, 1)


def _rows_needed(columns: int) -> int:
    """Rows from which up a product of so many columns rounds each row alike (measured up to 256 rows, on AVX-512)."""
    if columns % 64 == 0:
        return 1
    return 2 if columns <= 16 else 64


def _sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, kept as one, in an order that does not depend on the shape of the rest."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if rest.shape[-1]:
            x = jnp.concatenate([x, rest], -1)
    return x


def _dot(subscripts: str, x: Any, y: Any) -> jax.Array:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before (TPUs would)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT
    out_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=out_dtype)
