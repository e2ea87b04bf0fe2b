"""What `flash_attention` means, in the plainest `jax.numpy`. Holds T x S scores: for tests only.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size,
E head size of values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .gradient import without_padding


def flash_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    *,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None,
    sinks_H: jax.Array | None,
    qk_scale_H: jax.Array | None,
    v_scale_H: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    out_dtype = q_BTHD.dtype
    q_BTHD = without_padding(q_BTHD, q_segment_ids_BT)
    k_BSKD, v_BSKE = (without_padding(x, kv_segment_ids_BS) for x in (k_BSKD, v_BSKE))
    if qk_scale_H is not None and v_scale_H is not None:
        q_BTHD, out_dtype = q_BTHD.astype(jnp.float32) * qk_scale_H[:, None], jnp.bfloat16
    scores, sees = _scores(
        q_BTHD, k_BSKD, causal, window, q_segment_ids_BT, kv_segment_ids_BS, q_offset, scale, softcap, bias_BHTS
    )
    B, K, G, T, _ = scores.shape
    if sinks_H is not None:  # one more key, whose value is 0
        sinks_1 = jnp.broadcast_to(sinks_H.astype(scores.dtype).reshape(K, G, 1, 1), (B, K, G, T, 1))
        scores = jnp.concatenate([scores, sinks_1], -1)
        sees = jnp.concatenate([jnp.broadcast_to(sees, (*scores.shape[:-1], sees.shape[-1])), sinks_1 > -jnp.inf], -1)
        v_BSKE = jnp.pad(v_BSKE, [(0, 0), (0, 1), (0, 0), (0, 0)])
    # A row that sees nothing must give 0 and no gradient: `where` on both sides of every operation that could make nan.
    any_1 = sees.any(-1, keepdims=True)
    max_1 = jax.lax.stop_gradient(jnp.where(sees, scores, -jnp.inf).max(-1, keepdims=True))
    exp_BKGTS = jnp.where(sees, jnp.exp(jnp.where(sees, scores - jnp.where(any_1, max_1, 0), 0)), 0)
    sum_1 = exp_BKGTS.sum(-1, keepdims=True)
    out_BTHE = _weighted(exp_BKGTS / jnp.where(any_1, sum_1, 1), v_BSKE)
    lse_BKGT1 = jnp.where(any_1, jnp.log(jnp.where(any_1, sum_1, 1)) + jnp.where(any_1, max_1, 0), -jnp.inf)
    if v_scale_H is not None:
        out_BTHE = out_BTHE * v_scale_H[:, None]
    return out_BTHE.astype(out_dtype), _rows(lse_BKGT1[..., 0])


def flash_attention_backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
    bias_BHTS: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """These keys' terms of the output, `sum_s p v` and `sum_s p`, with the softmax's denominator held fixed.

    The denominator's own share of the gradient is what `delta` takes off.
    """
    B, T, H, _ = q_BTHD.shape
    K, wide = k_BSKD.shape[2], lse_BTH.dtype
    lse_BKGT1 = jnp.transpose(lse_BTH.reshape(B, T, K, H // K), (0, 2, 3, 1))[..., None]
    seen = lse_BKGT1 > -jnp.inf

    def terms(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        scores, sees = _scores(q, k, **options, bias_BHTS=bias)
        sees = sees & seen
        p_BKGTS = jnp.where(sees, jnp.exp(jnp.where(sees, scores - jnp.where(seen, lse_BKGT1, 0), 0)), 0)
        return _weighted(p_BKGTS, v), _rows(p_BKGTS.sum(-1))

    inputs = jax.tree.map(lambda x: x.astype(wide), (q_BTHD, k_BSKD, v_BSKE, bias_BHTS))
    *grads, d_bias_BHTS = jax.vjp(terms, *inputs)[1]((d_out_BTHE.astype(wide), -delta_BTH))
    return (*grads,) if d_bias_BHTS is None else (*grads, d_bias_BHTS)


def _scores(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Every score, [B, K, G, T, S], and which of them count, [B, K or 1, G or 1, T, S]."""
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
    if bias_BHTS is not None:
        heads = (K, H // K) if bias_BHTS.shape[1] == H else (1, 1)
        bias_BKGTS = bias_BHTS.astype(dtype).reshape(bias_BHTS.shape[0], *heads, T, S)
        sees = sees & (bias_BKGTS > -jnp.inf)
        scores_BKGTS = scores_BKGTS + jnp.where(bias_BKGTS > -jnp.inf, bias_BKGTS, 0)
    return scores_BKGTS, sees


def _weighted(weights_BKGTS: jax.Array, v_BSKE: jax.Array) -> jax.Array:
    """The sum over the keys of weight times value, [B, T, H, D]."""
    B, K, G, T, _ = weights_BKGTS.shape
    values = v_BSKE.astype(weights_BKGTS.dtype)
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bkgts,bskd->btkgd", weights_BKGTS, values, precision=precision).reshape(B, T, K * G, -1)


def _rows(x_BKGT: jax.Array) -> jax.Array:
    """[B, T, H]."""
    B, K, G, T = x_BKGT.shape
    return jnp.transpose(x_BKGT, (0, 3, 1, 2)).reshape(B, T, K * G)
