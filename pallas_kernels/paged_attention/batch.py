"""The ragged batch seen from its token rows, and the write into the pages, shared by the candidates.

Shapes: T token rows, R requests, M pages a request, K key/value heads, D head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .pages import Pages


class TokenRows(NamedTuple):
    """Of each token row: does a request own it, which, and at what position of that request."""

    owned_T: jax.Array
    request_T: jax.Array
    position_T: jax.Array


def token_rows(T: int, lengths_R: jax.Array, query_start_R: jax.Array, query_length_R: jax.Array) -> TokenRows:
    nth_TR = jnp.arange(T)[:, None] - query_start_R
    owns_TR = (nth_TR >= 0) & (nth_TR < query_length_R)
    request_T = owns_TR.argmax(1)
    positions_TR = lengths_R - query_length_R + nth_TR
    position_T = jnp.take_along_axis(positions_TR, request_T[:, None], 1)[:, 0]
    return TokenRows(owns_TR.any(1), request_T, position_T)


def write(
    pages: Pages, layer: int | jax.Array, k_TKD: jax.Array, v_TKD: jax.Array, rows: TokenRows, page_table_RM: jax.Array
) -> Pages:
    """The new tokens in their slots; rows that nobody owns, or whose page does not exist, are dropped."""
    entry_T = rows.position_T // pages.page_size
    M = page_table_RM.shape[1]
    page_T = page_table_RM[rows.request_T, jnp.clip(entry_T, 0, M - 1)]
    good_T = rows.owned_T & (entry_T >= 0) & (entry_T < M) & (page_T >= 0)
    page_T = jnp.where(good_T, page_T, pages.num_pages)  # past the end: the scatter drops it
    slot_T = rows.position_T % pages.page_size
    return Pages(
        pages.k_LPKDS.at[layer, page_T, :, :, slot_T].set(k_TKD.astype(pages.k_LPKDS.dtype), mode="drop"),
        pages.v_LPKSD.at[layer, page_T, :, slot_T].set(v_TKD.astype(pages.v_LPKSD.dtype), mode="drop"),
    )
