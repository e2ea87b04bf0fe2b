"""What `paged_attention` means, in the plainest `jax.numpy`. Gathers every request's whole table for each token row:
for tests only.

Shapes: T token rows, R requests, M pages a request, S slots a page, C = M * S, H query heads, K key/value heads,
G = H // K, D head size, V size of a value.
"""

import jax
import jax.numpy as jnp

from .batch import SharedPrefixes, token_rows, write
from .pages import Pages


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
    del decode_rows, prefixes  # promises for speed, without meaning
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    dtype = jnp.promote_types(q_THD.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    rows = token_rows(T, lengths_R, query_start_R, query_length_R)
    pages = write(pages, layer, k_TKD, v_TKV, rows, page_table_RM)

    table_RM = jnp.clip(page_table_RM, 0, pages.num_pages - 1)
    k_RMKDS, v_RMKSV = (x.astype(dtype) for x in pages.take(layer, table_RM))
    if pages.quantised:
        k_scale_RMKS, v_scale_RMKS = pages.take_scales(layer, table_RM)
        k_RMKDS, v_RMKSV = k_RMKDS * k_scale_RMKS[..., None, :], v_RMKSV * v_scale_RMKS[..., None]
    k_TCKD, v_TCKV = (
        jnp.swapaxes(x, 2, 3).reshape(len(table_RM), -1, K, x.shape[-1])[rows.request_T]
        for x in (jnp.swapaxes(k_RMKDS, 3, 4), v_RMKSV)
    )
    distance_TC = rows.position_T[:, None] - jnp.arange(k_TCKD.shape[1])
    sees_TC = (distance_TC >= 0) & rows.owned_T[:, None]
    if window is not None:
        sees_TC &= distance_TC < window
    v_TCKV = jnp.where(sees_TC[:, :, None, None], v_TCKV, 0)  # what is not seen may hold anything, even nan

    q_TKGD = q_THD.reshape(T, K, H // K, D).astype(dtype)
    scores_TKGC = scale * jnp.einsum("tkgd,tckd->tkgc", q_TKGD, k_TCKD, precision=precision)
    if softcap is not None:
        scores_TKGC = softcap * jnp.tanh(scores_TKGC / softcap)
    scores_TKGC = jnp.where(sees_TC[:, None, None], scores_TKGC, -jnp.inf)
    if sinks_H is None:
        weights_TKGC = jax.nn.softmax(scores_TKGC, -1)
    else:  # a key that has no value
        sinks_TKG1 = jnp.broadcast_to(sinks_H.astype(dtype).reshape(K, H // K, 1), (*scores_TKGC.shape[:3], 1))
        weights_TKGC = jax.nn.softmax(jnp.concatenate([scores_TKGC, sinks_TKG1], -1), -1)[..., :-1]
    weights_TKGC = jnp.where(rows.owned_T[:, None, None, None], weights_TKGC, 0)
    out_TKGV = jnp.einsum("tkgc,tckv->tkgv", weights_TKGC, v_TCKV, precision=precision)
    return out_TKGV.reshape(T, H, pages.value_dim).astype(q_THD.dtype), pages
