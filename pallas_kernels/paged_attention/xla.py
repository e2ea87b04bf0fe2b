"""Paged attention in plain XLA: online softmax over a request's pages, in loops as long as the real contexts.

PagedAttention is Kwon et al. 2023, arXiv:2309.06180; the online softmax Milakov and Gimelshein 2018, arXiv:1805.02867.
Requests are taken one after another and pages one a turn, always from the request's own first: so nothing in a token's
result depends on its neighbours. Taking the requests together would read, on a CPU whose memory is the limit, as many
pages for each as for the longest.

Nor may it depend on the chunk of the prompt that the token came in with, so each step must round a row alike in a tile
of one token and in one of many. XLA:CPU's products do from some number of rows up, which depends on their columns
(`_rows_needed`); its sums do not, so the sum over keys is a tree of additions of our own.

Shapes: T token rows, R requests, S slots a page, K key/value heads, G query heads for each, D head size;
t: the query tokens of one tile, r: their rows, row = t * G + g.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .batch import token_rows, write
from .pages import Pages

TILE = 64  # query tokens of a chunk that are taken together
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
    first_R = lengths_R - query_length_R  # position of the first new token

    is_decode_R = (query_length_R == 1) & (query_start_R == jnp.arange(R))

    def tile(size: int, r: Any, nth: Any, stop: Any, out_TKGD: jax.Array) -> jax.Array:
        """New tokens nth .. nth + size of request r, of which those from `stop` on are not its own."""
        at, nth_t = query_start_R[r] + nth, nth + jnp.arange(size)
        q_tKGD, old_tKGD = (jax.lax.dynamic_slice_in_dim(x, at, size) for x in (q_TKGD, out_TKGD))
        position_t, real_t = first_R[r] + nth_t, nth_t < stop
        new_tKGD = _attend(q_tKGD, position_t, real_t, pages, layer, table_RM[r], window, scale, softcap)
        out_tKGD = jnp.where(real_t[:, None, None, None], new_tKGD, old_tKGD)
        return jax.lax.dynamic_update_slice_in_dim(out_TKGD, out_tKGD, at, 0)

    def decode(r: Any, out_TKGD: jax.Array) -> jax.Array:
        return tile(1, r, 0, is_decode_R[r].astype(int), out_TKGD)

    def chunk(r: Any, out_TKGD: jax.Array) -> jax.Array:
        tiles = jnp.where(query_start_R[r] >= decode_rows, -(-query_length_R[r] // TILE), 0)
        return jax.lax.fori_loop(0, tiles, lambda i, out: tile(TILE, r, i * TILE, query_length_R[r], out), out_TKGD)

    # A tile may reach past the last token row, where a slice would be moved back to fit.
    extra = TILE if decode_rows < T else 0
    q_TKGD = jnp.pad(q_THD.reshape(T, K, H // K, D), ((0, extra), (0, 0), (0, 0), (0, 0)))
    out_TKGD = jnp.zeros_like(q_TKGD)
    if decode_rows:
        out_TKGD = jax.lax.fori_loop(0, min(decode_rows, R), decode, out_TKGD)
    if decode_rows < T:
        out_TKGD = jax.lax.fori_loop(0, R, chunk, out_TKGD)
    return out_TKGD[:T].reshape(T, H, D), pages


def _attend(
    q_tKGD: jax.Array,
    position_t: jax.Array,
    real_t: jax.Array,
    pages: Pages,
    layer: int | jax.Array,
    table_M: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attention of consecutive tokens of one request; anything for those that are not real."""
    t, K, G, D = q_tKGD.shape
    S = pages.page_size
    acc_dtype = jnp.promote_types(q_tKGD.dtype, jnp.float32)
    q_KrD = jnp.swapaxes(q_tKGD, 0, 1).reshape(K, t * G, D)
    position_r, real_r = jnp.repeat(position_t, G), jnp.repeat(real_t, G)
    extra = max(0, _rows_needed(S) - t * G, _rows_needed(D) - t * G)
    q_KrD = jnp.pad(q_KrD, ((0, 0), (0, extra), (0, 0)))
    position_r, real_r = (jnp.pad(x, (0, extra)) for x in (position_r, real_r))
    last = jnp.where(real_t, position_t, -1).max()

    def turn(j: Any, carry: Any) -> Any:
        acc_KrD, max_Kr1, sum_Kr1 = carry
        corner = [jnp.asarray(i, jnp.int32) for i in (layer, table_M[j], 0, 0, 0)]
        kT_KDS, v_KSD = (
            jax.lax.dynamic_slice(x, corner, (1, 1, *x.shape[2:]))[0, 0] for x in (pages.k_LPKDS, pages.v_LPKSD)
        )
        s = j * S + jnp.arange(S)
        # Slots beyond the request may hold what another one left, even nan, which a weight of 0 would not hide.
        v_KSD = jnp.where((s <= last)[:, None], v_KSD, 0)
        distance_rS = position_r[:, None] - s
        mask_rS = (distance_rS >= 0) & real_r[:, None]
        if window is not None:
            mask_rS &= distance_rS < window
        scores_KrS = _dot("krd,kds->krs", q_KrD, kT_KDS.astype(q_KrD.dtype)) * scale
        if softcap is not None:
            scores_KrS = softcap * jnp.tanh(scores_KrS / softcap)
        scores_KrS = jnp.where(mask_rS, scores_KrS, MASKED)
        new_max = jnp.maximum(max_Kr1, scores_KrS.max(-1, keepdims=True))
        p_KrS = jnp.where(mask_rS, jnp.exp(scores_KrS - new_max), 0)
        decay = jnp.exp(max_Kr1 - new_max)
        pv_KrD = _dot("krs,ksd->krd", p_KrS.astype(q_KrD.dtype), v_KSD.astype(q_KrD.dtype))
        return acc_KrD * decay + pv_KrD, new_max, sum_Kr1 * decay + _sum(p_KrS)

    zeros_Kr1 = jnp.zeros((*q_KrD.shape[:2], 1), acc_dtype)
    start = (jnp.zeros(q_KrD.shape, acc_dtype), jnp.full_like(zeros_Kr1, MASKED), zeros_Kr1)
    low = 0 if window is None else jnp.maximum(position_t[0] - window + 1, 0) // S
    acc_KrD, _, sum_Kr1 = jax.lax.fori_loop(low, last // S + 1, turn, start)
    out_KrD = (acc_KrD / jnp.where(sum_Kr1 > 0, sum_Kr1, 1)).astype(q_tKGD.dtype)
    return jnp.swapaxes(out_KrD[:, : t * G].reshape(K, t, G, D), 0, 1)


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
