"""Attention over a paged cache, for a flat batch in which prompts' chunks and decodes mix.

What it means is in `reference.py`. Shapes, here and in every candidate:
  T token rows   R request rows   M pages a request at most   L layers   P pages in the pool   S slots a page
  H query heads   K key/value heads (K divides H)   D head size   V size of a value: D, or the latent's
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..candidates import Operation
from .batch import SharedPrefixes
from .pages import Pages, init_pages

__all__ = ["OPERATION", "Pages", "SharedPrefixes", "init_pages", "paged_attention"]

OPERATION = Operation(__name__, "paged_attention")


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
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    prefixes: SharedPrefixes | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pages]:
    """Writes the new tokens' keys and values into their pages, then lets each new token attend to its request so far.

    - Request r owns the token rows `query_start[r] .. query_start[r] + query_length[r]`; length 0 is an idle request.
      `lengths[r]` counts the tokens in the cache after this step, the new ones included: new token j has position
      `lengths - query_length + j`, and sees the positions up to its own (with `window` w: the last w of them).
    - Position p of request r lives in page `page_table[r, p // S]`, slot `p % S`. Entries of the table past the last
      token's page are never used, whatever they hold. No page is in the table of two requests that write to it.
    - Token rows that nobody owns: output 0, nothing written.
    - Promise by the caller, which shapes the program: requests with one new token and row r < `decode_rows` have it at
      token row r; all others' token rows lie in `[decode_rows, T)`.
    - A token's result depends, bit for bit, on its own request only: not on the other requests, the request's row, the
      token rows' place, nor on how the prompt was cut into chunks, nor on `prefixes`. (Work is cut into blocks of a
      fixed number of tokens, counted from the request's own first, and merged in their order.)

    Jit with `pages` donated (or carry them through a scan): the update is then in place.

    Args:
      q_THD, k_TKD, v_TKV: new tokens, one floating dtype. v is None where pages keep a latent, whose first numbers it
        is; queries are then already in the latent's space (absorbed), and so are results: out [T, H, V].
      pages: from `init_pages`; where these are quantised, so are the new tokens, as they are written and read.
      layer: which layer of `pages`, a Python int or a traced one. The arrays of the ragged batch are integers.
      sinks_H: a score for each head of a key without a value, which takes part in the softmax (arXiv:2309.17453).
      prefixes: requests that begin with the same pages, whose decodes may read these once for all of them.
      implementation: a candidate's name, or None for the best one of the platform.

    Returns:
      `out_THV` in q's dtype, and the pages with the new tokens.

    Raises:
      ValueError: shapes, dtypes or options that break the rules above. NotImplementedError: no candidate takes them.
    """
    q_THD, k_TKD, page_table_RM, lengths_R, query_start_R, query_length_R = map(
        jnp.asarray, (q_THD, k_TKD, page_table_RM, lengths_R, query_start_R, query_length_R)
    )
    v_TKV = None if v_TKV is None else jnp.asarray(v_TKV)
    T, D = _check_shapes(q_THD, k_TKD, v_TKV, pages)
    R = page_table_RM.shape[0]
    if page_table_RM.ndim != 2:
        raise ValueError(f"page_table must be [R, M], got shape {page_table_RM.shape}")
    checked = [("lengths", lengths_R), ("query_start", query_start_R), ("query_length", query_length_R)]
    if prefixes is not None:
        prefixes = SharedPrefixes(*map(jnp.asarray, prefixes))
        checked += [("prefixes.leader", prefixes.leader_R), ("prefixes.pages", prefixes.pages_R)]
    for what, x in checked:
        if x.shape != (R,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{what} must be integers of shape ({R},), one a row of page_table, got {x.dtype}{x.shape}"
            )
    if not 0 <= decode_rows <= T:
        raise ValueError(f"decode_rows must lie in [0, {T}] (the number of token rows), got {decode_rows}")
    if isinstance(layer, int | np.integer) and not 0 <= layer < pages.num_layers:
        raise ValueError(f"layer must lie in [0, {pages.num_layers}), got {layer}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no cap")
    if sinks_H is not None:
        sinks_H = jnp.asarray(sinks_H)
        if sinks_H.shape != (q_THD.shape[1],) or not jnp.issubdtype(sinks_H.dtype, jnp.floating):
            raise ValueError(f"sinks are one floating number a query head, got {sinks_H.dtype}{sinks_H.shape}")
    return OPERATION(
        q_THD,
        k_TKD,
        v_TKV,
        pages,
        layer=layer,
        page_table_RM=page_table_RM,
        lengths_R=lengths_R,
        query_start_R=query_start_R,
        query_length_R=query_length_R,
        decode_rows=decode_rows,
        window=window,
        scale=1 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        sinks_H=sinks_H,
        prefixes=prefixes,
        implementation=implementation,
    )


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array | None, pages: Pages) -> tuple[int, int]:
    if (v is None) != pages.latent:
        raise ValueError("v is None if and only if the pages were made with init_pages(latent=...)")
    v = k if v is None else v
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(
            "paged_attention takes q [T, H, D] and k, v [T, K, D] with the same T and D, "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key/value heads, got {q.shape[1]} and {k.shape[1]}"
        )
    if k.shape[1:] != (pages.num_kv_heads, pages.head_dim):
        raise ValueError(
            f"the pages hold {pages.num_kv_heads} heads of size {pages.head_dim}, got keys of {k.shape[1:]}: "
            "make the pages with init_pages for this model"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return q.shape[0], q.shape[2]
