"""The ragged batch seen from its token rows, and the write into the pages, shared by the candidates.

Shapes: T token rows, R requests, M pages a request, K key/value heads, D head size, V size of a value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .pages import Pages, quantise, to_bits


class TokenRows(NamedTuple):
    """Of each token row: does a request own it, which, and at what position of that request."""

    owned_T: jax.Array
    request_T: jax.Array
    position_T: jax.Array


class SharedPrefixes(NamedTuple):
    """Requests whose tables begin alike, so that decoding may read those pages once for all (arXiv:2402.05099).

    A promise for speed: it changes no result. The first `pages_R[r]` pages of request r are those of request
    `leader_R[r]`, which leads itself and promises as many; all of them are full before this step. 0 pages: r shares
    nothing.
    """

    leader_R: jax.Array
    pages_R: jax.Array


class NewTokens(NamedTuple):
    """The new tokens as the pages keep them, with scales where these are quantised."""

    k_TKD: jax.Array
    v_TKV: jax.Array
    k_scale_TK: jax.Array | None
    v_scale_TK: jax.Array | None

    @property
    def scales_TK2(self) -> jax.Array | None:
        """Of the key and of the value."""
        if self.k_scale_TK is None or self.v_scale_TK is None:
            return None
        return jnp.stack([self.k_scale_TK, self.v_scale_TK], -1)


def token_rows(T: int, lengths_R: jax.Array, query_start_R: jax.Array, query_length_R: jax.Array) -> TokenRows:
    nth_TR = jnp.arange(T)[:, None] - query_start_R
    owns_TR = (nth_TR >= 0) & (nth_TR < query_length_R)
    request_T = owns_TR.argmax(1)
    positions_TR = lengths_R - query_length_R + nth_TR
    position_T = jnp.take_along_axis(positions_TR, request_T[:, None], 1)[:, 0]
    return TokenRows(owns_TR.any(1), request_T, position_T)


def as_kept(pages: Pages, k_TKD: jax.Array, v_TKV: jax.Array | None) -> NewTokens:
    """In the pages' dtype; the values of a latent are taken from its keys."""
    if not pages.quantised:
        k_TKD = k_TKD.astype(pages.dtype)
        v_TKV = k_TKD[..., : pages.value_dim] if v_TKV is None else v_TKV.astype(pages.dtype)
        return NewTokens(k_TKD, v_TKV, None, None)
    k_TKD, k_scale_TK = quantise(k_TKD, pages.dtype)
    if v_TKV is None:
        return NewTokens(k_TKD, k_TKD[..., : pages.value_dim], k_scale_TK, k_scale_TK)
    v_TKV, v_scale_TK = quantise(v_TKV, pages.dtype)
    return NewTokens(k_TKD, v_TKV, k_scale_TK, v_scale_TK)


def write(
    pages: Pages,
    layer: int | jax.Array,
    k_TKD: jax.Array,
    v_TKV: jax.Array | None,
    rows: TokenRows,
    page_table_RM: jax.Array,
) -> Pages:
    """The new tokens in their slots; rows that nobody owns, or whose page does not exist, are dropped."""
    entry_T = rows.position_T // pages.page_size
    M = page_table_RM.shape[1]
    page_T = page_table_RM[rows.request_T, jnp.clip(entry_T, 0, M - 1)]
    good_T = rows.owned_T & (entry_T >= 0) & (entry_T < M) & (page_T >= 0)
    page_T = jnp.where(good_T, page_T, pages.num_pages)  # past the end: the scatter drops it
    slot_T = rows.position_T % pages.page_size
    new = as_kept(pages, k_TKD, v_TKV)
    k, v, kv, scale = pages.k_LPKDS, pages.v_LPKSD, pages.kv_LPKNSX, pages.scale_LPKZ
    if k is not None and v is not None:
        k_TKD, v_TKV = (to_bits(x) if pages.layout == "bits" else x for x in (new.k_TKD, new.v_TKV))
        k = k.at[layer, page_T, :, :, slot_T].set(k_TKD, mode="drop")
        v = v.at[layer, page_T, :, slot_T].set(v_TKV, mode="drop")
    if kv is not None:
        tiles_TKNX = pages.join(new.k_TKD, new.v_TKV).reshape(len(page_T), *kv.shape[2:4], -1)
        kv = kv.at[layer, page_T, :, :, slot_T].set(tiles_TKNX, mode="drop")
    if scale is not None:
        scale = scale.at[layer, page_T, :, slot_T].set(new.k_scale_TK, mode="drop")
        scale = scale.at[layer, page_T, :, pages.page_size + slot_T].set(new.v_scale_TK, mode="drop")
    return Pages(k, v, kv, scale, pages.head_dim, pages.value_dim, pages.latent)
