"""Blockwise attention in plain XLA: the forward and the backward pass hold one tile of scores at a time.

The softmax is taken online over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867); the backward pass
recomputes each tile's probabilities from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135; Dao 2023,
arXiv:2307.08691). Blocks that the causal mask or the window empties are never computed.

Written for XLA:CPU, where a product is quick only if its left operand is contracted over the last axis: hence scores
[query, key] forward and [key, query] backward, and the gradient of the queries transposed. A tile that fits a core's
second-level cache matters as much, hence the groups of batch rows.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E head size of
values. All of a key head's queries are rows: R = T * G, row t * G + g. r, s: the rows and keys of one tile.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .gradient import differentiable, without_padding

BLOCK = 128  # queries or keys: the unit in which work is skipped
FORWARD_CHUNK = 1  # blocks of keys a tile of the forward pass spans at most, when its loop is unrolled
BACKWARD_CHUNK = 2  # blocks of queries a tile of the backward pass spans at most, likewise
UNROLL = 16  # tiles up to which loops are unrolled; beyond, compile time matters more
TILE_BYTES = 1 << 20  # batch rows are taken together as long as their tile is no larger
LOWEST = -1e30  # a running maximum's start: finite, so that what is hidden, -inf, has no weight beside it


@dataclass(frozen=True)
class _Options:
    """The static part of a call. `offset` is None when it differs by batch row or is traced."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    offset: int | None
    T: int
    S: int
    G: int
    block_q: int
    block_k: int


def flash_attention_backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
    *,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    o, offset_B = _options(q_BTHD, k_BSKD, causal, window, q_offset, scale, softcap)
    segments = None if q_segment_ids_BT is None else (q_segment_ids_BT, kv_segment_ids_BS)
    inputs = q_BTHD, k_BSKD, v_BSKE, segments, offset_B, bias_BHTS, d_out_BTHE, lse_BTH, delta_BTH
    return _by_groups(o, _backward, BACKWARD_CHUNK, inputs)


def _attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    *,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    qk_scale_H: jax.Array | None = None,
    v_scale_H: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    o, offset_B = _options(q_BTHD, k_BSKD, causal, window, q_offset, scale, softcap)
    segments = None if q_segment_ids_BT is None else (q_segment_ids_BT, kv_segment_ids_BS)
    if qk_scale_H is not None and v_scale_H is not None:
        q_BTHD, k_BSKD, v_BSKE = (x.astype(jnp.float32) for x in (q_BTHD, k_BSKD, v_BSKE))
        q_BTHD = q_BTHD * qk_scale_H[:, None]
    v_BSKE = without_padding(v_BSKE, kv_segment_ids_BS)  # of the others only scores are made, which are hidden
    out_BTHE, lse_BTH = _by_groups(o, _forward, FORWARD_CHUNK, (q_BTHD, k_BSKD, v_BSKE, segments, offset_B, bias_BHTS))
    if sinks_H is not None:
        seen_lse_BTH, lse_BTH = lse_BTH, jnp.logaddexp(lse_BTH, sinks_H.astype(lse_BTH.dtype))
        share_BTH = jnp.exp(seen_lse_BTH - jnp.where(lse_BTH > -jnp.inf, lse_BTH, 0))
        out_BTHE = (out_BTHE * share_BTH[..., None]).astype(out_BTHE.dtype)
    if v_scale_H is not None:
        out_BTHE = (out_BTHE * v_scale_H[:, None]).astype(jnp.bfloat16)
    return out_BTHE, lse_BTH


flash_attention = differentiable(_attention, flash_attention_backward)


def _options(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    causal: bool,
    window: int | None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[_Options, jax.Array | None]:
    """The static part of a call, and the offsets by batch row if they are not."""
    T, H = q_BTHD.shape[1:3]
    S, K = k_BSKD.shape[1:3]
    offset, offset_B = (q_offset, None) if isinstance(q_offset, int) else (None, q_offset)
    return _Options(causal, window, scale, softcap, offset, T, S, H // K, min(BLOCK, T), min(BLOCK, S)), offset_B


def _forward(
    o: _Options, q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, segments: Any, offset_B: Any, bias: Any
) -> tuple[jax.Array, jax.Array]:
    q, k, v = _to_rows(o, q_BTHD), _to_keys(o, k_BSKD), _to_keys(o, v_BSKE)
    acc_dtype = jnp.promote_types(q.dtype, jnp.float32)
    segments, bias = _pad_segments(o, segments), _pad_bias(o, bias, acc_dtype)
    (B, K, R, _), E = q.shape, v.shape[3]

    def query_block(i: Any, _: int, carry: Any) -> Any:
        out, lse = carry
        rows = (i * o.block_q * o.G, o.block_q * o.G)
        q_BKrD = _slice(q, *rows, 2)

        def key_tile(j: Any, blocks: int, carry: Any) -> Any:
            acc_BKrE, max_BKr1, sum_BKr1 = carry
            keys = (j * o.block_k, blocks * o.block_k)
            scores = _dot("bkrd,bksd->bkrs", q_BKrD, _slice(k, *keys, 2)) * o.scale
            if o.softcap is not None:
                scores = o.softcap * jnp.tanh(scores / o.softcap)
            if bias is not None:
                scores = scores + _bias_rows(o, _slice(_slice(bias, i * o.block_q, o.block_q, 2), *keys, 3))
            mask = _mask(o, rows, keys, segments, offset_B)
            if mask is not None:
                scores = jnp.where(mask, scores, -jnp.inf)
            new_max = jnp.maximum(max_BKr1, scores.max(-1, keepdims=True))
            p_BKrs = jnp.exp(scores - new_max)
            decay = jnp.exp(max_BKr1 - new_max)
            pv_BKrE = _dot("bkrs,bksd->bkrd", p_BKrs.astype(v.dtype), _slice(v, *keys, 2))
            return acc_BKrE * decay + pv_BKrE, new_max, sum_BKr1 * decay + p_BKrs.sum(-1, keepdims=True)

        shape = (B, K, o.block_q * o.G)
        zeros_BKr1 = jnp.zeros((*shape, 1), acc_dtype)
        start = (jnp.zeros((*shape, E), acc_dtype), jnp.full_like(zeros_BKr1, LOWEST), zeros_BKr1)
        acc, max_, sum_ = _loop(*_keys_seen(o, i, offset_B), FORWARD_CHUNK, key_tile, start)
        norm = jnp.where(sum_ > 0, sum_, 1)
        lse_block = jnp.where(sum_ > 0, max_ + jnp.log(norm), -jnp.inf)[..., 0]
        return _update(out, (acc / norm).astype(q.dtype), rows[0], 2), _update(lse, lse_block, rows[0], 2)

    blocks = R // (o.block_q * o.G)
    start = (jnp.zeros((B, K, R, E), q.dtype), jnp.zeros((B, K, R), acc_dtype))
    unroll = _tiles(o, blocks, _keys_seen, FORWARD_CHUNK) <= UNROLL
    out, lse = _loop(0, blocks, 1, query_block, start, unroll)
    return _from_rows(o, out), _from_rows(o, lse[..., None])[..., 0]


def _backward(
    o: _Options,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    segments: Any,
    offset_B: Any,
    bias: Any,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, ...]:
    acc_dtype, shared = lse_BTH.dtype, None if bias is None else bias.shape[:2]
    seen_BTH = lse_BTH > -jnp.inf
    delta = _to_rows(o, jnp.where(seen_BTH, delta_BTH, 0)[..., None])[..., 0]
    lse = _to_rows(o, jnp.where(seen_BTH, lse_BTH, 0)[..., None])[..., 0]
    q, k, v, d_out = _to_rows(o, q_BTHD), _to_keys(o, k_BSKD), _to_keys(o, v_BSKE), _to_rows(o, d_out_BTHE)
    kT_BKDS = jnp.swapaxes(k, 2, 3)
    segments, bias = _pad_segments(o, segments), _pad_bias(o, bias, acc_dtype)
    B, K, R, D = q.shape

    def key_block(j: Any, _: int, carry: Any) -> Any:
        dqT_BKDR, d_bias, dk, dv = carry
        keys = (j * o.block_k, o.block_k)
        k_BKsD, v_BKsE, kT_BKDs = _slice(k, *keys, 2), _slice(v, *keys, 2), _slice(kT_BKDS, *keys, 3)

        def query_tile(i: Any, blocks: int, carry: Any) -> Any:
            dqT_BKDR, d_bias, dk_BKsD, dv_BKsE = carry
            rows = (i * o.block_q * o.G, blocks * o.block_q * o.G)
            q_BKrD, do_BKrE = _slice(q, *rows, 2), _slice(d_out, *rows, 2)
            scores = _dot("bksd,bkrd->bksr", k_BKsD, q_BKrD) * o.scale
            slope = o.scale
            if o.softcap is not None:
                bent = jnp.tanh(scores / o.softcap)
                scores, slope = o.softcap * bent, o.scale * (1 - bent * bent)
            queries = (i * o.block_q, blocks * o.block_q)
            if bias is not None:
                bias_BKrs = _bias_rows(o, _slice(_slice(bias, *queries, 2), *keys, 3))
                scores = scores + jnp.swapaxes(bias_BKrs, 2, 3)
            p_BKsr = jnp.exp(scores - _slice(lse, *rows, 2)[:, :, None])
            mask = _mask(o, rows, keys, segments, offset_B, keys_first=True)
            if mask is not None:
                p_BKsr = jnp.where(mask, p_BKsr, 0)
            dp_BKsr = _dot("bksd,bkrd->bksr", v_BKsE, do_BKrE)
            ds_BKsr = p_BKsr * (dp_BKsr - _slice(delta, *rows, 2)[:, :, None])
            if shared is not None:  # every tile comes once
                tile = jnp.moveaxis(ds_BKsr.reshape(B, K, o.block_k, -1, o.G), (1, 4, 3, 2), (1, 2, 3, 4))
                tile = tile.reshape(B, K * o.G, *tile.shape[3:])
                tile = tile.sum([axis for axis in (0, 1) if shared[axis] == 1], keepdims=True)
                start = [jnp.asarray(n, jnp.int32) for n in (0, 0, queries[0], keys[0])]
                d_bias = jax.lax.dynamic_update_slice(d_bias, tile, start)
            ds_BKsr = ds_BKsr * slope
            p_BKsr, ds_BKsr = p_BKsr.astype(v.dtype), ds_BKsr.astype(q.dtype)
            dqT_BKDr = _slice(dqT_BKDR, *rows, 3) + _dot("bkds,bksr->bkdr", kT_BKDs, ds_BKsr)
            return (
                _update(dqT_BKDR, dqT_BKDr, rows[0], 3),
                d_bias,
                dk_BKsD + _dot("bksr,bkrd->bksd", ds_BKsr, q_BKrD),
                dv_BKsE + _dot("bksr,bkrd->bksd", p_BKsr, do_BKrE),
            )

        zeros = (jnp.zeros((B, K, o.block_k, x.shape[3]), acc_dtype) for x in (k, v))
        start = (dqT_BKDR, d_bias, *zeros)
        done = _loop(*_queries_seeing(o, j, R, offset_B), BACKWARD_CHUNK, query_tile, start)
        dqT_BKDR, d_bias, dk_BKsD, dv_BKsE = done
        return (
            dqT_BKDR,
            d_bias,
            _update(dk, dk_BKsD, keys[0], 2),
            _update(dv, dv_BKsE, keys[0], 2),
        )

    blocks = k.shape[2] // o.block_k
    d_bias = None if bias is None else jnp.zeros_like(bias)
    start = (jnp.zeros((B, K, D, R), acc_dtype), d_bias, jnp.zeros(k.shape, acc_dtype), jnp.zeros(v.shape, acc_dtype))
    unroll = _tiles(o, blocks, partial(_queries_seeing, R=R), BACKWARD_CHUNK) <= UNROLL
    dqT_BKDR, d_bias, dk, dv = _loop(0, blocks, 1, key_block, start, unroll)
    dq = jnp.swapaxes(dqT_BKDR, 2, 3)
    grads = _from_rows(o, dq), jnp.swapaxes(dk, 1, 2)[:, : o.S], jnp.swapaxes(dv, 1, 2)[:, : o.S]
    return grads if d_bias is None else (*grads, d_bias[:, :, : o.T, : o.S])


def _to_rows(o: _Options, x_BTHD: jax.Array) -> jax.Array:
    """[B, K, R, D]: each key head's queries, with padding up to whole blocks."""
    B, _, H, D = x_BTHD.shape
    x_BTKGD = _pad(x_BTHD, o.block_q).reshape(B, -1, H // o.G, o.G, D)
    return jnp.swapaxes(x_BTKGD, 1, 2).reshape(B, H // o.G, -1, D)


def _from_rows(o: _Options, x_BKRD: jax.Array) -> jax.Array:
    B, K, _, D = x_BKRD.shape
    x_BKTGD = x_BKRD.reshape(B, K, -1, o.G, D)[:, :, : o.T]
    return jnp.swapaxes(x_BKTGD, 1, 2).reshape(B, o.T, K * o.G, D)


def _to_keys(o: _Options, x_BSKD: jax.Array) -> jax.Array:
    return jnp.swapaxes(_pad(x_BSKD, o.block_k), 1, 2)


def _pad_segments(o: _Options, segments: Any) -> Any:
    """The segment of each row and of each key; padding is segment 0."""
    if segments is None:
        return None
    return jnp.repeat(_pad(segments[0], o.block_q), o.G, axis=1), _pad(segments[1], o.block_k)


def _pad_bias(o: _Options, bias: Any, dtype: Any) -> Any:
    """In the accumulators' dtype, up to whole blocks."""
    if bias is None:
        return None
    extra = [(0, 0), (0, 0), (0, -o.T % o.block_q), (0, -o.S % o.block_k)]
    return jnp.pad(bias.astype(dtype), extra)


def _bias_rows(o: _Options, bias_BHts: jax.Array) -> jax.Array:
    """A tile's [B or 1, K or 1, r, s]."""
    B, H, t, s = bias_BHts.shape
    shape = (B, H // o.G, o.G, t, s) if H > 1 else (B, 1, 1, t, s)
    bias_BKtGs = jnp.swapaxes(bias_BHts.reshape(shape), 2, 3)
    return jnp.broadcast_to(bias_BKtGs, (*bias_BKtGs.shape[:3], o.G, s)).reshape(B, -1, t * o.G, s)


def _mask(
    o: _Options, rows: tuple[Any, int], keys: tuple[Any, int], segments: Any, offset_B: Any, keys_first: bool = False
) -> jax.Array | np.ndarray | None:
    """What a tile's rows see of its keys, [B or 1, 1, r, s] (or [.., s, r]); None when it is known to be all."""
    s = keys[0] + np.arange(keys[1])
    t = (rows[0] + np.arange(rows[1])) // o.G
    offset_B1 = np.full((1, 1), o.offset) if offset_B is None else offset_B[:, None]
    distance = (t + offset_B1)[:, :, None] - s
    sees = [(s < o.S)[None, None]]
    if o.causal:
        sees.append(distance >= 0)
    if o.window is not None:
        sees += [distance < o.window, distance > -o.window]
    # What is static is numpy, so a mask that hides nothing is known to here and costs nothing.
    sees = [x for x in sees if not (isinstance(x, np.ndarray) and x.all())]
    if segments is not None:
        q_ids, k_ids = _slice(segments[0], *rows, 1)[:, :, None], _slice(segments[1], *keys, 1)[:, None]
        sees.append((q_ids == k_ids) & (q_ids != 0))
    if not sees:
        return None
    mask = sees[0]
    for more in sees[1:]:
        mask = mask & more
    return (jnp.swapaxes(mask, 1, 2) if keys_first else mask)[:, None]


def _keys_seen(o: _Options, i: Any, offset_B: Any) -> tuple[Any, Any]:
    """The key blocks [low, high) that query block i may see; ints when the offset and i are."""
    low, high = 0, -(-o.S // o.block_k)
    first = i * o.block_q + (o.offset if offset_B is None else offset_B.min())
    last = (i + 1) * o.block_q - 1 + (o.offset if offset_B is None else offset_B.max())
    largest, smallest = (max, min) if isinstance(first, int) else (jnp.maximum, jnp.minimum)
    if o.causal:
        high = smallest(high, last // o.block_k + 1)
    elif o.window is not None:
        high = smallest(high, (last + o.window - 1) // o.block_k + 1)
    if o.window is not None:
        low = largest(low, (first - o.window + 1) // o.block_k)
    return low, high


def _queries_seeing(o: _Options, j: Any, R: int, offset_B: Any) -> tuple[Any, Any]:
    """The query blocks [low, high) that may see key block j: the inverse of `_keys_seen`."""
    low, high = 0, R // (o.block_q * o.G)
    first = j * o.block_k - (o.offset if offset_B is None else offset_B.max())
    last = (j + 1) * o.block_k - 1 - (o.offset if offset_B is None else offset_B.min())
    largest, smallest = (max, min) if isinstance(first, int) else (jnp.maximum, jnp.minimum)
    if o.causal:
        low = largest(low, first // o.block_q)
    elif o.window is not None:
        low = largest(low, (first - o.window + 1) // o.block_q)
    if o.window is not None:
        high = smallest(high, (last + o.window - 1) // o.block_q + 1)
    return low, high


def _tiles(o: _Options, blocks: int, bounds: Callable[..., tuple[Any, Any]], chunk: int) -> float:
    """How many tiles the unrolled loops would have; infinitely many when the bounds are traced."""
    if o.offset is None:
        return math.inf
    ranges = (bounds(o, i, offset_B=None) for i in range(blocks))
    return sum(max(0, -(-(high - low) // chunk)) for low, high in ranges)


def _loop(
    low: Any, high: Any, chunk: int, body: Callable[[Any, int, Any], Any], carry: Any, unroll: bool = True
) -> Any:
    """`carry = body(first, count, carry)` over blocks [low, high): unrolled `chunk` at a time, or one a turn."""
    if not unroll or not isinstance(low, int) or not isinstance(high, int):
        return jax.lax.fori_loop(low, high, lambda i, carry: body(i, 1, carry), carry)
    for i in range(low, high, chunk):
        carry = body(i, min(chunk, high - i), carry)
    return carry


def _by_groups(o: _Options, f: Callable[..., Any], chunk: int, inputs: tuple[Any, ...]) -> Any:
    """`f(o, *inputs)`, over so many batch rows at a time that their tiles stay in cache."""
    B, _, H, _ = inputs[0].shape
    if any(x is not None and x.shape[0] != B for x in jax.tree.leaves(inputs)):
        return f(o, *inputs)  # a bias that batch rows share
    tile = H * chunk * o.block_q * o.block_k * 4  # bytes, of one batch row
    size = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or n * tile <= TILE_BYTES))
    if size == B:
        return f(o, *inputs)
    grouped = jax.tree.map(lambda x: x.reshape(B // size, size, *x.shape[1:]), inputs)
    outputs = jax.lax.map(lambda xs: f(o, *xs), grouped)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), outputs)


def _dot(subscripts: str, x: Any, y: Any) -> jax.Array:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before (TPUs would)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT
    out_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=out_dtype)


def _slice(x: Any, start: Any, size: int, axis: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _update(x: Any, block: Any, start: Any, axis: int) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis)


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zeros after axis 1 up to a multiple of the block (segment 0, for segment ids)."""
    extra = -x.shape[1] % block
    return x if extra == 0 else jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
