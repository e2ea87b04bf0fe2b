"""Paged attention in plain XLA: a softmax for each page, merged page by page, in loops as long as the real contexts.

PagedAttention is Kwon et al. 2023, arXiv:2309.06180; merging parts of a softmax Milakov and Gimelshein 2018,
arXiv:1805.02867. A page's part is computed by itself and merged into its request's result in the order of the pages,
from the request's own first: so nothing in a token's result depends on its neighbours.

Decoding takes the pages of all requests as one list, some a turn: what it reads is the real contexts and no more, and
a turn is long enough to hide what a turn costs. A prompt's chunk is taken by itself, a tile of queries and a page a
turn.

Nor may a result depend on the chunk of the prompt that the token came in with, so each step must round a row alike in a
tile of one token and in one of many. XLA:CPU's products do from some number of rows up, which depends on their columns
(`_rows_needed`); its sums do not, so the sum over keys is a tree of additions of our own.

Shapes: T token rows, R requests, S slots a page, K key/value heads, G query heads for each, D head size,
V size of a value; t: the query tokens of one tile, r: their rows, row = t * G + g; W: the pages of one turn, each with
its own queries.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..chips import known_platform
from .batch import SharedPrefixes, token_rows, write
from .pages import Pages

TILE = 64  # query tokens of a chunk that are taken together
TURN = 4  # pages that decoding takes together: a turn costs something, and so do the places in it that stay empty
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
        q_WKrD = self._pad(jnp.swapaxes(q_tKGD, 0, 1).reshape(1, K, t * G, D))
        extra = q_WKrD.shape[2] - t * G
        position_Wr = jnp.pad(jnp.repeat(position_t, G), (0, extra))[None]
        real_Wr = jnp.pad(jnp.repeat(real_t, G), (0, extra))[None]
        last = jnp.where(real_t, position_t, -1).max()

        def turn(j: Any, carry: Any) -> Any:
            part = self._page(q_WKrD, position_Wr, real_Wr, last[None], jnp.asarray(j)[None], table_M[j][None])
            return _merge(carry, jax.tree.map(lambda x: x[0], part))

        stop = last // self.pages.page_size + 1
        start = self._nothing(jnp.broadcast_to(jnp.arange(q_WKrD.shape[2]) % G, q_WKrD.shape[1:3]), q_tKGD)
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
        (R, _, G, _), S, W = q_RKGD.shape, self.pages.page_size, min(TURN, 2 * len(q_RKGD))
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
        count_R = jnp.where(real_R, position_R // S + 1 - low_R, 0)
        end_R = jnp.cumsum(count_R)
        total = end_R[-1]

        def turn(i: Any, carry: Any) -> Any:
            item_W = i * W + jnp.arange(W)
            r_W = jnp.minimum(_first_above(end_R, item_W), R - 1)
            # Past the end of the list: any page, without a query.
            real_W = item_W < total
            j_W = jnp.where(real_W, item_W - (end_R - count_R)[r_W] + low_R[r_W], 0)
            last_W = jnp.where(real_W, position_R[r_W], -1)
            rows_Wr = jnp.broadcast_to(last_W[:, None], (W, q_RKrD.shape[2]))
            part = self._page(q_RKrD[r_W], rows_Wr, rows_Wr >= 0, last_W, j_W, table_RM[r_W, j_W])

            def merge(w: Any, carry: Any) -> Any:
                mine, one = (jax.tree.map(lambda x, at=at: x[at], tree) for tree, at in ((carry, r_W[w]), (part, w)))
                return jax.tree.map(lambda x, new: x.at[r_W[w]].set(new), carry, _merge(mine, one))

            return jax.lax.fori_loop(0, jnp.minimum(W, total - i * W), merge, carry)

        out_RKrV = _result(jax.lax.fori_loop(0, -(-total // W), turn, start))
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
        q_1KzD = jnp.swapaxes(q_RKrD, 0, 1).reshape(1, K, R * r, D)
        position_1z = jnp.repeat(position_R, r)[None]
        leads_R = shares_R & (prefixes.leader_R == jnp.arange(R))
        end_R = jnp.cumsum(jnp.where(leads_R, prefixes.pages_R, 0))

        def turn(i: Any, carry: Any) -> Any:
            leader = _first_above(end_R, i)
            j = i - end_R[leader] + prefixes.pages_R[leader]
            has_R = shares_R & (prefixes.leader_R == leader) & (low_R <= j)
            real_1z = jnp.repeat(has_R, r)[None]
            part = self._page(
                q_1KzD, position_1z, real_1z, position_R[leader][None], j[None], table_RM[leader, j][None]
            )
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

    def _pad(self, q_WKrD: jax.Array) -> jax.Array:
        """More rows, where fewer would be rounded in another way."""
        needed = max(_rows_needed(self.pages.page_size), _rows_needed(q_WKrD.shape[3]))
        return jnp.pad(q_WKrD, ((0, 0), (0, 0), (0, max(0, needed - q_WKrD.shape[2])), (0, 0)))

    def _page(
        self,
        q_WKrD: jax.Array,
        position_Wr: jax.Array,
        real_Wr: jax.Array,
        last_W: jax.Array,
        j_W: jax.Array,
        page_W: jax.Array,
    ) -> Any:
        """The part of page j of a request, for W of them: values [W, K, r, V], maxima and sums [W, K, r, 1]."""
        S = self.pages.page_size
        kT_WKDS, v_WKSV = self.pages.take(self.layer, page_W)
        s_WS = j_W[:, None] * S + jnp.arange(S)
        # Slots beyond the request may hold what another one left, even nan, which a weight of 0 would not hide.
        v_WKSV = jnp.where((s_WS <= last_W[:, None])[:, None, :, None], v_WKSV, 0)
        distance_WrS = position_Wr[:, :, None] - s_WS[:, None]
        mask_WrS = (distance_WrS >= 0) & real_Wr[:, :, None]
        if self.window is not None:
            mask_WrS &= distance_WrS < self.window
        mask_WKrS = mask_WrS[:, None]
        scores_WKrS = _dot("wkrd,wkds->wkrs", q_WKrD, kT_WKDS.astype(q_WKrD.dtype)) * self.scale
        v_scale_WK1S = None
        if self.pages.quantised:
            k_scale_WK1S, v_scale_WK1S = (x[:, :, None] for x in self.pages.take_scales(self.layer, page_W))
            scores_WKrS = scores_WKrS * k_scale_WK1S
        if self.softcap is not None:
            scores_WKrS = self.softcap * jnp.tanh(scores_WKrS / self.softcap)
        scores_WKrS = jnp.where(mask_WKrS, scores_WKrS, MASKED)
        max_WKr1 = scores_WKrS.max(-1, keepdims=True)
        p_WKrS = jnp.where(mask_WKrS, jnp.exp(scores_WKrS - max_WKr1), 0)
        scaled_WKrS = p_WKrS if v_scale_WK1S is None else jnp.where(mask_WKrS, p_WKrS * v_scale_WK1S, 0)
        pv_WKrV = _dot("wkrs,wksv->wkrv", scaled_WKrS.astype(q_WKrD.dtype), v_WKSV.astype(q_WKrD.dtype))
        return pv_WKrV, max_WKr1, _sum(p_WKrS)


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
