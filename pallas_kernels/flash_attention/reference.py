"""What `flash_attention` means, in the plainest `jax.numpy`. Holds T x S scores: for tests only.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size.
"""

import jax
import jax.numpy as jnp


def flash_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D).astype(dtype)
    precision = jax.lax.Precision.HIGHEST
    scores_BKGTS = scale * jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD.astype(dtype), precision=precision)
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)

    p_BT1 = (jnp.arange(T) + jnp.reshape(q_offset, (-1, 1)))[:, :, None]
    distance_BTS = p_BT1 - jnp.arange(S)
    sees_BTS = jnp.ones((B, T, S), bool)
    if causal:
        sees_BTS &= distance_BTS >= 0
    if window is not None:
        sees_BTS &= jnp.abs(distance_BTS) < window
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        sees_BTS &= q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
        sees_BTS &= q_segment_ids_BT[:, :, None] != 0
    sees = sees_BTS[:, None, None]

    # A row that sees nothing must give 0 and no gradient: `where` on both sides of every operation that could make nan.
    any_1 = sees.any(-1, keepdims=True)
    max_1 = jax.lax.stop_gradient(jnp.where(sees, scores_BKGTS, -jnp.inf).max(-1, keepdims=True))
    exp_BKGTS = jnp.where(sees, jnp.exp(jnp.where(sees, scores_BKGTS - jnp.where(any_1, max_1, 0), 0)), 0)
    sum_1 = exp_BKGTS.sum(-1, keepdims=True)
    weights_BKGTS = exp_BKGTS / jnp.where(any_1, sum_1, 1)
    out_BTKGD = jnp.einsum("bkgts,bskd->btkgd", weights_BKGTS, v_BSKD.astype(dtype), precision=precision)
    lse_BKGT1 = jnp.where(any_1, jnp.log(jnp.where(any_1, sum_1, 1)) + jnp.where(any_1, max_1, 0), -jnp.inf)
    lse_BTH = jnp.transpose(lse_BKGT1[..., 0], (0, 3, 1, 2)).reshape(B, T, H)
    return out_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype), lse_BTH
