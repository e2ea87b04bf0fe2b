"""Attention of packed rows: softmax(q k^T) v without a matrix of scores.

What it means is in `reference.py`. Shapes, here and in every candidate:
  B batch rows   T query positions   S key positions   H query heads   K key/value heads (K divides H)   D head size
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..candidates import Operation

OPERATION = Operation(__name__, "flash_attention")


def flash_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of each query row over the keys that it may see, differentiable in q, k and v (reverse mode).

    - Query row t has position `t + q_offset` among the keys; `q_offset` is an int, or one int per batch row `[B]`.
    - `causal`: position p sees keys at positions <= p. `window` w: only those in (p - w, p] (causal) or at a distance
      below w on both sides (not causal).
    - Segments: a query sees only keys of its own segment; segment 0 is padding, which sees nothing and is not seen.
      With one of the two arrays only, the other is the same (T must equal S).
    - A row that sees no key gives output 0, log-sum-exp -inf, and passes no gradient.
    - Head h of the H query heads reads key/value head `h // (H // K)`.
    - `scale` multiplies the scores (default `1 / sqrt(D)`), then `softcap` c bends them: `c * tanh(score / c)`.

    Products take the inputs' dtype and accumulate in float32 (float64 for float64 inputs), as does the softmax.

    Args:
      q_BTHD: queries. k_BSKD, v_BSKD: keys and values of the same dtype.
      implementation: a candidate's name, or None for the best one of the platform.

    Returns:
      `out_BTHD` in q's dtype, and with `return_lse` also `lse_BTH`, the natural logarithm of each row's softmax
      denominator in float32 (float64 for float64 inputs); both are differentiable.

    Raises:
      ValueError: shapes, dtypes or options that break the rules above. NotImplementedError: no candidate takes them.
    """
    q_BTHD, k_BSKD, v_BSKD = map(jnp.asarray, (q_BTHD, k_BSKD, v_BSKD))
    B, T, D, S = _check_shapes(q_BTHD, k_BSKD, v_BSKD)
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):
        if T != S:
            raise ValueError(f"one array of segment ids serves queries and keys only if T == S, got T={T}, S={S}")
        q_segment_ids_BT = kv_segment_ids_BS = kv_segment_ids_BS if q_segment_ids_BT is None else q_segment_ids_BT
    for what, ids, shape in (("q", q_segment_ids_BT, (B, T)), ("kv", kv_segment_ids_BS, (B, S))):
        if ids is not None and (ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ValueError(f"{what} segment ids must be integers of shape {shape}, got {ids.dtype}{ids.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no cap")
    if isinstance(q_offset, int | np.integer):
        q_offset = int(q_offset)
    else:
        q_offset = jnp.asarray(q_offset)
        if q_offset.shape not in ((), (B,)) or not jnp.issubdtype(q_offset.dtype, jnp.integer):
            raise ValueError(
                f"q_offset must be an int or integers of shape ({B},), got {q_offset.dtype}{q_offset.shape}"
            )
        q_offset = jnp.broadcast_to(q_offset, (B,))
    out_BTHD, lse_BTH = OPERATION(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        causal=causal,
        window=window,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
        q_offset=q_offset,
        scale=1 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        implementation=implementation,
    )
    return (out_BTHD, lse_BTH) if return_lse else out_BTHD


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[int, ...]:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "flash_attention takes q [B, T, H, D] and k, v [B, S, K, D] with the same B and D, "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if min(q.shape) < 1 or min(k.shape) < 1:
        raise ValueError(f"no axis may be empty, got q {q.shape}, k {k.shape}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {H} and {K}")
    return B, T, D, S
