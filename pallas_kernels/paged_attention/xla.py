"""Paged attention in plain XLA: online softmax over pages, in loops as long as the real contexts.

PagedAttention is Kwon et al. 2023, arXiv:2309.06180; the online softmax Milakov and Gimelshein 2018, arXiv:1805.02867.
Decodes go through the pages together, one page of every request a turn; each prompt's chunk goes alone, a tile of
queries at a time. Turns always start at multiples of the page size, and a turn that a row does not need leaves its
accumulators as they are, bit for bit: a row's result does not depend on how long its neighbours are.

Shapes: T token rows, R requests, M pages a request, S slots a page, K key/value heads, G query heads for each,
D head size, X = T + TILE.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .batch import token_rows, write
from .pages import Pages

TILE = 64  # queries of a chunk that are taken together
MASKED = -1e30  # stands for -inf where a difference of two of them must not be nan


def paged_attention(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKD: jax.Array,
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
) -> tuple[jax.Array, Pages]:
    T, H, D = q_THD.shape
    R, K = len(page_table_RM), k_TKD.shape[1]
    rows = token_rows(T, lengths_R, query_start_R, query_length_R)
    pages = write(pages, layer, k_TKD, v_TKD, rows, page_table_RM)
    table_RM = jnp.clip(page_table_RM, 0, pages.num_pages - 1)
    q_TKGD = q_THD.reshape(T, K, H // K, D)

    def attend(q_NKGtD: Any, position_Nt: Any, seen_Nt: Any, table_NM: Any) -> Any:
        """Tiles of t queries at some positions of N requests; those not seen give 0."""
        S = pages.page_size

        def turn(j: Any, carry: Any) -> Any:
            acc, max_, sum_ = carry
            page_N = jax.lax.dynamic_index_in_dim(table_NM, j, 1, keepdims=False)
            distance_NtS = position_Nt[:, :, None] - (j * S + jnp.arange(S))
            mask_NtS = (distance_NtS >= 0) & seen_Nt[:, :, None]
            if window is not None:
                mask_NtS &= distance_NtS < window
            k_NKSD = pages.k_LPKSD[layer, page_N].astype(q_NKGtD.dtype)
            # Slots beyond the context may hold what another request left, even nan.
            v_NKSD = jnp.where(mask_NtS.any(1)[:, None, :, None], pages.v_LPKSD[layer, page_N], 0).astype(q_NKGtD.dtype)
            scores = _dot("nkgtd,nksd->nkgts", q_NKGtD, k_NKSD) * scale
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            mask = mask_NtS[:, None, None]
            scores = jnp.where(mask, scores, MASKED)
            new_max = jnp.maximum(max_, scores.max(-1))
            p = jnp.where(mask, jnp.exp(scores - new_max[..., None]), 0)
            decay = jnp.exp(max_ - new_max)
            acc = acc * decay[..., None] + _dot("nkgts,nksd->nkgtd", p.astype(q_NKGtD.dtype), v_NKSD)
            return acc, new_max, sum_ * decay + p.sum(-1)

        acc_dtype = jnp.promote_types(q_NKGtD.dtype, jnp.float32)
        shape = q_NKGtD.shape[:4]
        start = (
            jnp.zeros(q_NKGtD.shape, acc_dtype),
            jnp.full(shape, MASKED, acc_dtype),
            jnp.zeros(shape, acc_dtype),
        )
        high = jnp.where(seen_Nt, position_Nt // S + 1, 0).max()
        low = 0
        if window is not None:
            low = jnp.where(seen_Nt, jnp.maximum(position_Nt - window + 1, 0) // S, table_NM.shape[1]).min()
        acc, _, sum_ = jax.lax.fori_loop(low, high, turn, start)
        return (acc / jnp.where(sum_ > 0, sum_, 1)[..., None]).astype(q_NKGtD.dtype)

    out_TKGD = jnp.zeros_like(q_TKGD)
    N = min(decode_rows, R)
    if N:
        decodes_N = (query_length_R[:N] == 1) & (query_start_R[:N] == jnp.arange(N))
        out_NKGtD = attend(
            q_TKGD[:N, :, :, None], (lengths_R[:N] - 1)[:, None], decodes_N[:, None], table_RM[:N]
        )
        out_TKGD = out_TKGD.at[:N].set(out_NKGtD[:, :, :, 0])
    if decode_rows < T:
        tile = min(TILE, T - decode_rows)
        q_XKGD, out_XKGD = (jnp.pad(x, ((0, tile), (0, 0), (0, 0), (0, 0))) for x in (q_TKGD, out_TKGD))

        def request(r: Any, out_XKGD: Any) -> Any:
            start, length = query_start_R[r], query_length_R[r]

            def tile_of(i: Any, out_XKGD: Any) -> Any:
                nth_t = i * tile + jnp.arange(tile)
                at = start + i * tile
                q_KGtD = jnp.transpose(jax.lax.dynamic_slice_in_dim(q_XKGD, at, tile), (1, 2, 0, 3))
                position_t, seen_t = lengths_R[r] - length + nth_t, nth_t < length
                out_KGtD = attend(q_KGtD[None], position_t[None], seen_t[None], table_RM[r][None])[0]
                out_tKGD = jnp.transpose(out_KGtD, (2, 0, 1, 3))
                old = jax.lax.dynamic_slice_in_dim(out_XKGD, at, tile)
                new = jnp.where(seen_t[:, None, None, None], out_tKGD, old)
                return jax.lax.dynamic_update_slice_in_dim(out_XKGD, new, at, 0)

            tiles = jnp.where(start >= decode_rows, -(-length // tile), 0)
            return jax.lax.fori_loop(0, tiles, tile_of, out_XKGD)

        out_TKGD = jax.lax.fori_loop(0, R, request, out_XKGD)[:T]
    return out_TKGD.reshape(T, H, D), pages


def _dot(subscripts: str, x: Any, y: Any) -> Any:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before (TPUs would)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        subscripts, x, y, precision=precision, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )
