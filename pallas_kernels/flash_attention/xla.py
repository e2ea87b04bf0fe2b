"""Blockwise attention in plain XLA: the forward and the backward pass never hold more than one block of scores.

The softmax is taken online over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867); the backward pass
recomputes each block's probabilities from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135; Dao 2023,
arXiv:2307.08691). Blocks that the causal mask or the window empties are never computed.

Shapes: B batch rows, K key/value heads, G query heads for each, D head size, T queries, S keys;
t, s: the positions within one block of queries (`block_q`) or keys (`block_k`); N blocks of queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_Q = 128
BLOCK_K = 128
UNROLL = 16  # pairs of blocks up to which loops are unrolled, which lets XLA overlap them; compile time grows with it
MASKED = -1e30  # stands for -inf where a difference of two of them must not be nan


@dataclass(frozen=True)
class _Options:
    """The static part of a call."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    offset: int | None  # None: one a batch row, traced
    T: int
    S: int
    block_q: int
    block_k: int

    @property
    def dot_dtype(self) -> Any:
        return None


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
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> tuple[jax.Array, jax.Array]:
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    static = isinstance(q_offset, int)
    block_q, block_k = min(block_q, _round_up(T, 8)), min(block_k, _round_up(S, 8))
    o = _Options(causal, window, scale, softcap, q_offset if static else None, T, S, block_q, block_k)
    q_BKGTD = jnp.transpose(_pad(q_BTHD, block_q).reshape(B, -1, K, H // K, D), (0, 2, 3, 1, 4))
    k_BKSD, v_BKSD = (jnp.transpose(_pad(x, block_k), (0, 2, 1, 3)) for x in (k_BSKD, v_BSKD))
    segments = None
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        segments = (_pad(q_segment_ids_BT, block_q), _pad(kv_segment_ids_BS, block_k))
    out_BKGTD, lse_BKGT = _attention(o, q_BKGTD, k_BKSD, v_BKSD, segments, None if static else q_offset)
    out_BTHD = jnp.transpose(out_BKGTD[:, :, :, :T], (0, 3, 1, 2, 4)).reshape(B, T, H, D)
    lse_BTH = jnp.transpose(lse_BKGT[..., :T], (0, 3, 1, 2)).reshape(B, T, H)
    return out_BTHD, lse_BTH


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(o: _Options, q: Any, k: Any, v: Any, segments: Any, offset_B: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(o, q, k, v, segments, offset_B)[0]


def _forward(o: _Options, q: Any, k: Any, v: Any, segments: Any, offset_B: Any) -> Any:
    B, K, G, T, D = q.shape
    acc_dtype = jnp.promote_types(q.dtype, jnp.float32)
    blocks = T // o.block_q

    def query_block(i: Any, carry: Any) -> Any:
        out, lse = carry
        q_BKGtD = _slice(q, i, o.block_q, 3)

        def key_block(j: Any, carry: Any) -> Any:
            acc_BKGtD, max_BKGt, sum_BKGt = carry
            scores, mask = _scores(o, q_BKGtD, _slice(k, j, o.block_k, 2), i, j, segments, offset_B)
            new_max_BKGt = jnp.maximum(max_BKGt, scores.max(-1))
            p_BKGts = jnp.exp(scores - new_max_BKGt[..., None])
            if mask is not None:
                p_BKGts = jnp.where(mask, p_BKGts, 0)
            decay_BKGt = jnp.exp(max_BKGt - new_max_BKGt)
            pv = _dot("bkgts,bksd->bkgtd", p_BKGts.astype(v.dtype), _slice(v, j, o.block_k, 2))
            return acc_BKGtD * decay_BKGt[..., None] + pv, new_max_BKGt, sum_BKGt * decay_BKGt + p_BKGts.sum(-1)

        rows = (B, K, G, o.block_q)
        start = (jnp.zeros((*rows, D), acc_dtype), jnp.full(rows, MASKED, acc_dtype), jnp.zeros(rows, acc_dtype))
        acc, max_, sum_ = _loop(*_key_range(o, i, offset_B), key_block, start)
        seen = sum_ > 0
        norm = jnp.where(seen, sum_, 1)
        out_block = (acc / norm[..., None]).astype(q.dtype)
        lse_block = jnp.where(seen, max_ + jnp.log(norm), -jnp.inf)
        return _update(out, out_block, i, o.block_q, 3), _update(lse, lse_block, i, o.block_q, 3)

    start = (jnp.zeros((B, K, G, T, D), q.dtype), jnp.zeros((B, K, G, T), acc_dtype))
    out, lse = _loop(0, blocks, query_block, start, unroll=_pairs(o, blocks) <= UNROLL)
    return (out, lse), (q, k, v, segments, offset_B, out, lse)


def _backward(o: _Options, residuals: Any, cotangents: Any) -> Any:
    q, k, v, segments, offset_B, out, lse = residuals
    d_out, d_lse = cotangents
    acc_dtype = lse.dtype
    blocks = q.shape[3] // o.block_q
    seen = lse > -jnp.inf
    lse = jnp.where(seen, lse, 0)
    # d score = p (dp - sum_s p dp + d lse), and sum_s p dp is out . d_out: both corrections are one number a row.
    correction = jnp.where(seen, d_lse - (out.astype(acc_dtype) * d_out.astype(acc_dtype)).sum(-1), 0)

    def query_block(i: Any, carry: Any) -> Any:
        dq, dk, dv = carry
        q_BKGtD, do_BKGtD = _slice(q, i, o.block_q, 3), _slice(d_out, i, o.block_q, 3)
        lse_BKGt, correction_BKGt = _slice(lse, i, o.block_q, 3), _slice(correction, i, o.block_q, 3)

        def key_block(j: Any, carry: Any) -> Any:
            dq_BKGtD, dk, dv = carry
            k_BKsD, v_BKsD = _slice(k, j, o.block_k, 2), _slice(v, j, o.block_k, 2)
            scores, mask = _scores(o, q_BKGtD, k_BKsD, i, j, segments, offset_B)
            p = jnp.exp(scores - lse_BKGt[..., None])
            if mask is not None:
                p = jnp.where(mask, p, 0)
            dp = _dot("bkgtd,bksd->bkgts", do_BKGtD, v_BKsD)
            ds = p * (dp + correction_BKGt[..., None]) * o.scale
            if o.softcap is not None:
                ds = ds * (1 - jnp.square(jnp.where(p > 0, scores, 0) / o.softcap))
            p, ds = p.astype(v.dtype), ds.astype(q.dtype)
            dv = _add(dv, _dot("bkgts,bkgtd->bksd", p, do_BKGtD), j, o.block_k, 2)
            dk = _add(dk, _dot("bkgts,bkgtd->bksd", ds, q_BKGtD), j, o.block_k, 2)
            return dq_BKGtD + _dot("bkgts,bksd->bkgtd", ds, k_BKsD), dk, dv

        start = (jnp.zeros(q_BKGtD.shape, acc_dtype), dk, dv)
        dq_BKGtD, dk, dv = _loop(*_key_range(o, i, offset_B), key_block, start)
        return _update(dq, dq_BKGtD.astype(q.dtype), i, o.block_q, 3), dk, dv

    start = (jnp.zeros(q.shape, q.dtype), jnp.zeros(k.shape, acc_dtype), jnp.zeros(v.shape, acc_dtype))
    dq, dk, dv = _loop(0, blocks, query_block, start, unroll=_pairs(o, blocks) <= UNROLL)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _scores(o: _Options, q: Any, k: Any, i: Any, j: Any, segments: Any, offset_B: Any) -> tuple[Any, Any]:
    """Scaled scores of a pair of blocks, MASKED where the mask (None: all seen) hides them, and the mask."""
    scores = _dot("bkgtd,bksd->bkgts", q, k) * o.scale
    if o.softcap is not None:
        scores = o.softcap * jnp.tanh(scores / o.softcap)
    mask_Bts = _mask(o, i, j, segments, offset_B)
    if mask_Bts is None:
        return scores, None
    mask = mask_Bts[:, None, None]
    return jnp.where(mask, scores, MASKED), mask


def _mask(o: _Options, i: Any, j: Any, segments: Any, offset_B: Any) -> Any:
    """What the queries of block i see of the keys of block j, [B or 1, t, s]; None when it is known to be all."""
    s = j * o.block_k + np.arange(o.block_k)
    p_B1 = np.full((1, 1), o.offset) if offset_B is None else offset_B[:, None]
    distance = (p_B1 + (i * o.block_q + np.arange(o.block_q)))[:, :, None] - s
    sees = [(s < o.S)[None, None]]
    if o.causal:
        sees.append(distance >= 0)
    if o.window is not None:
        sees.append(distance < o.window)
        sees.append(distance > -o.window)
    # Everything static is numpy, so what is not needed is known here and costs nothing.
    sees = [x for x in sees if not (isinstance(x, np.ndarray) and x.all())]
    if segments is not None:
        q_ids, k_ids = _slice(segments[0], i, o.block_q, 1), _slice(segments[1], j, o.block_k, 1)
        sees.append((q_ids[:, :, None] == k_ids[:, None, :]) & (q_ids != 0)[:, :, None])
    if not sees:
        return None
    mask = sees[0]
    for more in sees[1:]:
        mask = mask & more
    return jnp.broadcast_to(mask, (mask.shape[0], o.block_q, o.block_k))


def _key_range(o: _Options, i: Any, offset_B: Any) -> tuple[Any, Any]:
    """The key blocks [low, high) that a query block may see; ints when the offset and the block are."""
    low, high = 0, -(-o.S // o.block_k)
    first = i * o.block_q + (o.offset if offset_B is None else offset_B.min())
    last = (i + 1) * o.block_q - 1 + (o.offset if offset_B is None else offset_B.max())
    smallest, largest = (max, min) if isinstance(first, int) else (jnp.maximum, jnp.minimum)
    if o.causal:
        high = largest(high, last // o.block_k + 1)
    elif o.window is not None:
        high = largest(high, (last + o.window - 1) // o.block_k + 1)
    if o.window is not None:
        low = smallest(low, (first - o.window + 1) // o.block_k)
    return low, high


def _pairs(o: _Options, blocks: int) -> int:
    if o.offset is None:
        return UNROLL + 1
    return sum(max(0, high - low) for low, high in (_key_range(o, i, None) for i in range(blocks)))


def _loop(low: Any, high: Any, body: Callable[[Any, Any], Any], carry: Any, unroll: bool = True) -> Any:
    if not unroll or not isinstance(low, int) or not isinstance(high, int):
        return jax.lax.fori_loop(low, high, body, carry)
    for i in range(low, high):
        carry = body(i, carry)
    return carry


def _dot(subscripts: str, x: Any, y: Any) -> Any:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before (TPUs would)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT
    out_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=out_dtype)


def _slice(x: Any, i: Any, size: int, axis: int) -> Any:
    if isinstance(i, int):
        return jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _update(x: Any, block: Any, i: Any, size: int, axis: int) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * size, axis)


def _add(x: Any, block: Any, i: Any, size: int, axis: int) -> Any:
    return _update(x, _slice(x, i, size, axis) + block, i, size, axis)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zeros after axis 1 up to a multiple of the block (segment 0, for segment ids)."""
    extra = -x.shape[1] % block
    return x if extra == 0 else jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
