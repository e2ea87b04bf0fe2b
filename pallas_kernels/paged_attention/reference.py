"""What `paged_attention` means, in the plainest `jax.numpy`. Gathers every request's whole table for each token row:
for tests only.

Shapes: T token rows, R requests, M pages a request, S slots a page, C = M * S, H query heads, K key/value heads,
G = H // K, D head size.
"""

import jax
import jax.numpy as jnp

from .batch import token_rows, write
from .pages import Pages


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
    del decode_rows  # a promise for speed, without meaning
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    dtype = jnp.promote_types(q_THD.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    rows = token_rows(T, lengths_R, query_start_R, query_length_R)
    pages = write(pages, layer, k_TKD, v_TKD, rows, page_table_RM)

    table_RM = jnp.clip(page_table_RM, 0, pages.num_pages - 1)
    k_TCKD, v_TCKD = (
        jnp.swapaxes(x, 2, 3).reshape(len(table_RM), -1, K, D)[rows.request_T].astype(dtype)
        for x in (jnp.swapaxes(pages.k_LPKDS[layer, table_RM], 3, 4), pages.v_LPKSD[layer, table_RM])
    )
    distance_TC = rows.position_T[:, None] - jnp.arange(k_TCKD.shape[1])
    sees_TC = (distance_TC >= 0) & rows.owned_T[:, None]
    if window is not None:
        sees_TC &= distance_TC < window
    v_TCKD = jnp.where(sees_TC[:, :, None, None], v_TCKD, 0)  # what is not seen may hold anything, even nan

    q_TKGD = q_THD.reshape(T, K, H // K, D).astype(dtype)
    scores_TKGC = scale * jnp.einsum("tkgd,tckd->tkgc", q_TKGD, k_TCKD, precision=precision)
    if softcap is not None:
        scores_TKGC = softcap * jnp.tanh(scores_TKGC / softcap)
    scores_TKGC = jnp.where(sees_TC[:, None, None], scores_TKGC, -jnp.inf)
    weights_TKGC = jnp.where(rows.owned_T[:, None, None, None], jax.nn.softmax(scores_TKGC, -1), 0)
    out_TKGD = jnp.einsum("tkgc,tckd->tkgd", weights_TKGC, v_TCKD, precision=precision)
    return out_TKGD.reshape(T, H, D).astype(q_THD.dtype), pages
