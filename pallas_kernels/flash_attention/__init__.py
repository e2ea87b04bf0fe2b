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
BACKWARD = Operation(__name__, "flash_attention_backward")


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
    inputs = tuple(map(jnp.asarray, (q_BTHD, k_BSKD, v_BSKD)))
    options = _check_options(inputs, causal, window, q_segment_ids_BT, kv_segment_ids_BS, q_offset, scale, softcap)
    out_BTHD, lse_BTH = OPERATION(*inputs, **options, implementation=implementation)
    return (out_BTHD, lse_BTH) if return_lse else out_BTHD


def flash_attention_backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    d_out_BTHD: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients that these queries and keys pass each other, where they may be a part of a longer row.

    The whole row's softmax enters by two numbers a query. Over any division of the keys, dq adds up, and dk and dv are
    those of the whole; likewise with queries and keys exchanged. That is how attention over several devices goes back.

    Args:
      q_BTHD, k_BSKD, v_BSKD, and the options: as `flash_attention`.
      d_out_BTHD: gradient of the whole output, in q's dtype.
      lse_BTH: log-sum-exp of each query over **all** its keys, from `flash_attention`; -inf passes no gradient.
      delta_BTH: `sum_D out * d_out - d_lse` of the whole row's output, in lse's dtype.

    Returns:
      dq_BTHD, dk_BSKD and dv_BSKD in lse's dtype, unrounded, as they are terms of a sum.

    Raises:
      As `flash_attention`.
    """
    inputs = tuple(map(jnp.asarray, (q_BTHD, k_BSKD, v_BSKD)))
    options = _check_options(inputs, causal, window, q_segment_ids_BT, kv_segment_ids_BS, q_offset, scale, softcap)
    if d_out_BTHD.shape != inputs[0].shape or d_out_BTHD.dtype != inputs[0].dtype:
        raise ValueError(f"d_out is as q, {inputs[0].dtype}{inputs[0].shape}, got {d_out_BTHD.dtype}{d_out_BTHD.shape}")
    wide, rows = jnp.promote_types(inputs[0].dtype, jnp.float32), inputs[0].shape[:3]
    for what, x in (("lse", lse_BTH), ("delta", delta_BTH)):
        if x.shape != rows or x.dtype != wide:
            raise ValueError(f"{what} is one {wide} a query and head, {rows}, got {x.dtype}{x.shape}")
    return BACKWARD(*inputs, d_out_BTHD, lse_BTH, delta_BTH, **options, implementation=implementation)


def _check_options(
    inputs: tuple[jax.Array, ...],
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float | None,
    softcap: float | None,
) -> dict[str, Any]:
    """What a candidate takes as keywords; ValueError where the rules of `flash_attention` are broken."""
    B, T, D, S = _check_shapes(*inputs)
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
    return {
        "causal": causal,
        "window": window,
        "q_segment_ids_BT": q_segment_ids_BT,
        "kv_segment_ids_BS": kv_segment_ids_BS,
        "q_offset": q_offset,
        "scale": 1 / math.sqrt(D) if scale is None else scale,
        "softcap": softcap,
    }


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
