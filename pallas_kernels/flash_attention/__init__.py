"""Attention of packed rows: softmax(q k^T) v without a matrix of scores.

What it means is in `reference.py`. Shapes, here and in every candidate:
  B batch rows   T query positions   S key positions   H query heads   K key/value heads (K divides H)
  D head size of queries and keys   E head size of values
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..candidates import Operation

OPERATION = Operation(__name__, "flash_attention")
BACKWARD = Operation(__name__, "flash_attention_backward")
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


def flash_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    scale: float | None = None,
    softcap: float | None = None,
    bias_BHTS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    q_scale: float | jax.Array | None = None,
    k_scale: float | jax.Array | None = None,
    v_scale: float | jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of each query row over the keys that it may see, differentiable (reverse mode) in its float arrays.

    - Query row t has position `t + q_offset` among the keys; `q_offset` is an int, or one int per batch row `[B]`.
    - `causal`: position p sees keys at positions <= p. `window` w: only those in (p - w, p] (causal) or at a distance
      below w on both sides (not causal).
    - Segments: a query sees only keys of its own segment; segment 0 is padding, which sees nothing and is not seen,
      whatever it holds. With one of the two arrays only, the other is the same (T must equal S).
    - A row that sees no key gives output 0, log-sum-exp -inf, and passes no gradient.
    - Head h of the H query heads reads key/value head `h // (H // K)`.
    - `scale` multiplies the scores (default `1 / sqrt(D)`), then `softcap` c bends them: `c * tanh(score / c)`.
    - `bias_BHTS`, [B or 1, H or 1, T, S], is added after that, as transformers adds its masks; -inf hides a key.
    - `sinks_H`: one more logit a head, without a value: softmax's denominator, and so the log-sum-exp, has its
      exponential too. A row that sees no key then has the sink as its log-sum-exp. (gpt-oss, arXiv:2508.10925.)

    Products take the inputs' dtype and accumulate in float32 (float64 for float64 inputs), as does the softmax.

    float8_e4m3fn inputs stand for themselves times `q_scale`, `k_scale` and `v_scale`: float32, one number, or one a
    head ([H], [K], [K]); 1 when not given. Probabilities are then rounded to bfloat16 or, where a chip has no faster
    product, to float8_e4m3fn. The output is bfloat16, and there is no gradient.

    Args:
      q_BTHD: queries. k_BSKD, v_BSKE: keys and values of the same dtype.
      implementation: a candidate's name, or None for the best one of the platform.

    Returns:
      `out_BTHE` in q's dtype, and with `return_lse` also `lse_BTH`, the natural logarithm of each row's softmax
      denominator in float32 (float64 for float64 inputs); both are differentiable.

    Raises:
      ValueError: shapes, dtypes or options that break the rules above. NotImplementedError: no candidate takes them, or
        float8 inputs are differentiated.
    """
    inputs = tuple(map(jnp.asarray, (q_BTHD, k_BSKD, v_BSKE)))
    options = _check_options(
        inputs, causal, window, q_segment_ids_BT, kv_segment_ids_BS, q_offset, scale, softcap, bias_BHTS
    )
    options |= _check_float8(inputs, q_scale, k_scale, v_scale)
    if inputs[0].dtype == FLOAT8:
        inputs = _forward_only(*inputs)
    H, sinks_H = inputs[0].shape[2], _array(sinks_H)
    if sinks_H is not None and (sinks_H.shape != (H,) or not jnp.issubdtype(sinks_H.dtype, jnp.floating)):
        raise ValueError(f"sinks are one float a query head, ({H},), got {sinks_H.dtype}{sinks_H.shape}")
    options["sinks_H"] = sinks_H
    out_BTHE, lse_BTH = OPERATION(*inputs, **options, implementation=implementation)
    return (out_BTHE, lse_BTH) if return_lse else out_BTHE


def flash_attention_backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
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
    bias_BHTS: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """The gradients that these queries and keys pass each other, where they may be a part of a longer row.

    The whole row's softmax enters by two numbers a query. Over any division of the keys, dq adds up, and dk and dv are
    those of the whole; likewise with queries and keys exchanged. That is how attention over several devices goes back.

    What padding holds is finite here: who cuts a row has seen to it once, for all parts.

    Sinks enter by the log-sum-exp alone, and their gradient is a sum over rows: `-exp(sink - lse) * delta`.

    Args:
      q_BTHD, k_BSKD, v_BSKE, and the options: as `flash_attention`, without float8.
      d_out_BTHE: gradient of the whole output, in q's dtype.
      lse_BTH: log-sum-exp of each query over **all** its keys, from `flash_attention`; -inf passes no gradient.
      delta_BTH: `sum_D out * d_out - d_lse` of the whole row's output, in lse's dtype.

    Returns:
      dq_BTHD, dk_BSKD and dv_BSKE, and with a bias its gradient in its own shape: in lse's dtype, unrounded, as they
      are terms of a sum.

    Raises:
      As `flash_attention`.
    """
    inputs = tuple(map(jnp.asarray, (q_BTHD, k_BSKD, v_BSKE)))
    options = _check_options(
        inputs, causal, window, q_segment_ids_BT, kv_segment_ids_BS, q_offset, scale, softcap, bias_BHTS
    )
    if inputs[0].dtype.itemsize < 2:
        raise NotImplementedError(f"{inputs[0].dtype} attention has no gradient: differentiate it in bfloat16")
    of_out, dtype = (*inputs[0].shape[:3], inputs[2].shape[3]), inputs[0].dtype
    if d_out_BTHE.shape != of_out or d_out_BTHE.dtype != dtype:
        raise ValueError(f"d_out is as the output, {dtype}{of_out}, got {d_out_BTHE.dtype}{d_out_BTHE.shape}")
    wide, rows = jnp.promote_types(inputs[0].dtype, jnp.float32), inputs[0].shape[:3]
    for what, x in (("lse", lse_BTH), ("delta", delta_BTH)):
        if x.shape != rows or x.dtype != wide:
            raise ValueError(f"{what} is one {wide} a query and head, {rows}, got {x.dtype}{x.shape}")
    return BACKWARD(*inputs, d_out_BTHE, lse_BTH, delta_BTH, **options, implementation=implementation)


def _check_options(
    inputs: tuple[jax.Array, ...],
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float | None,
    softcap: float | None,
    bias_BHTS: jax.Array | None,
) -> dict[str, Any]:
    """What a candidate takes as keywords; ValueError where the rules of `flash_attention` are broken."""
    B, T, D, S = _check_shapes(*inputs)
    q_segment_ids_BT, kv_segment_ids_BS, bias_BHTS = map(_array, (q_segment_ids_BT, kv_segment_ids_BS, bias_BHTS))
    if bias_BHTS is not None:
        wanted = (B, inputs[0].shape[2], T, S)
        fits = bias_BHTS.ndim == 4 and bias_BHTS.shape[0] in (1, B) and bias_BHTS.shape[1] in (1, wanted[1])
        if not fits or bias_BHTS.shape[2:] != (T, S) or not jnp.issubdtype(bias_BHTS.dtype, jnp.floating):
            raise ValueError(
                f"bias is one float a score, {wanted} with 1 for B or H where they share it, "
                f"got {bias_BHTS.dtype}{bias_BHTS.shape}"
            )
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
        "bias_BHTS": bias_BHTS,
    }


def _check_float8(inputs: tuple[jax.Array, ...], *scales: Any) -> dict[str, Any]:
    """What multiplies each head's scores and its output, [H]; None for other dtypes."""
    if inputs[0].dtype.itemsize < 2 and inputs[0].dtype != FLOAT8:
        raise ValueError(f"of 8-bit floats, attention takes {FLOAT8}, got {inputs[0].dtype}")
    if inputs[0].dtype != FLOAT8:
        if any(scale is not None for scale in scales):
            raise ValueError(f"q_scale, k_scale and v_scale are for {FLOAT8} inputs, got {inputs[0].dtype}")
        return {"qk_scale_H": None, "v_scale_H": None}
    H, heads = inputs[0].shape[2], []
    for what, scale, x in zip("qkv", scales, inputs, strict=True):
        scale, own = jnp.asarray(1.0 if scale is None else scale, jnp.float32), x.shape[2]
        if scale.shape not in ((), (own,)):
            raise ValueError(f"{what}_scale is one number or one a head, ({own},), got {scale.shape}")
        heads.append(jnp.repeat(jnp.broadcast_to(scale, own), H // own))
    q_scale_H, k_scale_H, v_scale_H = heads
    return {"qk_scale_H": q_scale_H * k_scale_H, "v_scale_H": v_scale_H}


@jax.custom_vjp
def _forward_only(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    return inputs


def _no_gradient(*inputs: jax.Array) -> Any:
    raise NotImplementedError(f"{inputs[0].dtype} attention has no gradient: differentiate it in bfloat16")


_forward_only.defvjp(_no_gradient, _no_gradient)


def _array(x: Any) -> jax.Array | None:
    return None if x is None else jnp.asarray(x)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[int, ...]:
    fit = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not fit or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "flash_attention takes q [B, T, H, D], k [B, S, K, D] and v [B, S, K, E] with the same B and D, "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if min(q.shape) < 1 or min(v.shape) < 1:
        raise ValueError(f"no axis may be empty, got q {q.shape}, v {v.shape}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {H} and {K}")
    return B, T, D, S
