"""Ring attention on TPU: keys and values travel inside the kernel, while those that are here are used.

What is computed where is in `tpu_forward.py` and `tpu_backward.py`; this file brings arrays into their shape: heads
first, and each of a device's two chunks padded to whole blocks (padding is segment 0).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .. import tuned
from ..chips import target_chip
from ..flash_attention.block_plan import PADDING_K, PADDING_Q
from ..flash_attention.tpu_forward import LOG2E, LOWEST, Scores
from . import tpu_backward, tpu_forward, xla
from .tpu_forward import LANES, Ring

BLOCK = 512  # queries and keys of a tile, at most, where nothing better is known
VMEM_BYTES = {"7x": 56 << 20}  # that the kernel may use
VMEM_ELSEWHERE = 100 << 20


def ring_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    axis: str,
    segment_ids_BT: jax.Array | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks_H: jax.Array | None,
    two_way: bool,
) -> jax.Array:
    del two_way  # keys always travel both ways here
    n = jax.lax.axis_size(axis)
    (_, T, H, D), K = q_BTHD.shape, k_BTKD.shape[2]
    if n == 1:
        raise NotImplementedError("a ring of one device is no ring")
    if sinks_H is not None:
        raise NotImplementedError("the kernel has no attention sinks")
    if v_BTKD.shape[-1] != D:
        raise NotImplementedError(f"the kernel takes values of the size of a head, {D}; got {v_BTKD.shape[-1]}")
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32, got {q_BTHD.dtype}")
    chunk = -(-(T // 2) // LANES) * LANES
    found = tuned.best("ring_attention", target_chip(), _key(chunk, D)) if window is None else None
    block = _fit(chunk, found["block"] if found else BLOCK if window is None else _near(window))
    scores = Scores(D**-0.5 if scale is None else scale, softcap, bias=False, scaled=False)
    limit = _limit()
    o = Ring(axis, n, H // K, chunk, block, scores, segment_ids_BT is not None or 2 * chunk != T, T // 2, window)
    if (needed := o.vmem(D, q_BTHD.dtype.itemsize)) > limit:
        raise NotImplementedError(
            f"{T} tokens a device and {H // K} query heads a key head need {needed >> 20} MiB of VMEM, "
            f"{limit >> 20} are there; cut the rows over more devices"
        )
    return _attention(o, q_BTHD, k_BTKD, v_BTKD, segment_ids_BT)


def tuning_space(chip: str, key: dict[str, Any]) -> list[dict[str, int]]:
    """Tiles worth trying (see `benchmarks.tune`); the first is the closed form."""
    sizes = dict.fromkeys(_fit(key["chunk"], size) for size in (BLOCK, 256, 1024))
    return [{"block": size} for size in sizes]


def _key(chunk: int, D: int) -> dict[str, int]:
    """What is tuned alike: the lengths that have the same power of two above them."""
    return {"chunk": 1 << (chunk - 1).bit_length(), "D": D}


def _fit(chunk: int, most: int) -> int:
    """The largest power of two that divides the chunk, up to `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if chunk % size == 0 and size & (size - 1) == 0)


def _near(window: int) -> int:
    """Tiles much larger than the window are mostly edge."""
    return min(BLOCK, max(2 * LANES, 1 << (window - 1).bit_length()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(o: Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    return _run(o, q, k, v, ids)[0]


def _run(o: Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """out [B, T, H, D] in q's dtype and lse [B, T, H] in float32."""
    B, T, H, D = q.shape
    q_ids, kv_ids = _ids(o, ids, B, T)
    out, lse = tpu_forward.forward(o, _heads_first(o, q), _stacked(o, k, v), q_ids, kv_ids)
    return _tokens_first(o, out, B, T), _tokens_first(o, jnp.swapaxes(lse, 2, 3), B, T)[..., 0]


def _attention_forward(o: Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> Any:
    out, lse = _run(o, q, k, v, ids)
    return out, (q, k, v, ids, out, lse)


def _attention_backward(o: Ring, residuals: Any, d_out: jax.Array) -> Any:
    q, k, v, ids, out, lse = residuals
    B, T, H, D = q.shape
    if tpu_backward.vmem(o, D, q.dtype.itemsize) > _limit():  # it keeps more than the forward pass
        plain = xla._Ring(o.axis, o.n, T // 2, o.window, o.scores.scale, o.scores.softcap, False)
        return xla._attention_backward(plain, residuals, d_out)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    lse2 = jnp.where(lse > -jnp.inf, lse * LOG2E, -LOWEST)
    rows = {"q": _heads_first(o, q), "d_out": _heads_first(o, d_out.astype(q.dtype))}
    rows |= {name: _row(_heads_first(o, x[..., None])) for name, x in (("lse2", lse2), ("delta", delta))}
    dq, dkv = tpu_backward.backward(o, rows, _stacked(o, k, v), *_ids(o, ids, B, T))
    dq = _tokens_first(o, jnp.swapaxes(dq, 2, 3), B, T) * o.scores.scale
    dk, dv = (_tokens_first(o, jnp.swapaxes(dkv[:, i, None], 2, 3), B, T) for i in (0, 1))
    return dq.astype(q.dtype), (dk * o.scores.scale).astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _row(x_NGT1: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_NGT1, 2, 3)


def _limit() -> int:
    return VMEM_BYTES.get(target_chip() or "", VMEM_ELSEWHERE)


def _pad(o: Ring, x_BTX: jax.Array) -> jax.Array:
    """Each half of the tokens gets zeros after it, up to a whole chunk."""
    B, T, *rest = x_BTX.shape
    if 2 * o.chunk == T:
        return x_BTX
    halves = x_BTX.reshape(B, 2, T // 2, *rest)
    padded = jnp.pad(halves, [(0, 0), (0, 0), (0, o.chunk - T // 2)] + [(0, 0)] * len(rest))
    return padded.reshape(B, 2 * o.chunk, *rest)


def _heads_first(o: Ring, x_BTHD: jax.Array) -> jax.Array:
    """[B * K, G, T, D], padded."""
    x = jnp.swapaxes(_pad(o, x_BTHD), 1, 2)
    return x.reshape(-1, o.G, *x.shape[2:])


def _stacked(o: Ring, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
    """Keys and values as one message a head: [B * K, 2, T, D], padded."""
    both = jnp.stack([jnp.swapaxes(_pad(o, x), 1, 2) for x in (k_BTKD, v_BTKD)], 2)
    return both.reshape(-1, *both.shape[2:])


def _tokens_first(o: Ring, x_NGTD: jax.Array, B: int, T: int) -> jax.Array:
    """The inverse of `_heads_first`, for B rows of T tokens without padding."""
    N, G, length, D = x_NGTD.shape
    if length != T:
        x_NGTD = x_NGTD.reshape(N, G, 2, o.chunk, D)[:, :, :, : T // 2].reshape(N, G, T, D)
    return jnp.swapaxes(x_NGTD.reshape(B, -1, T, D), 1, 2)


def _ids(o: Ring, ids_BT: jax.Array | None, B: int, T: int) -> tuple[Any, Any]:
    """Segment ids of this device's tokens [B, 1, T] and of all devices' [B, n, 1, T]; 0 equals nothing."""
    if not o.segments:
        return None, None
    ids = jnp.ones((B, T), jnp.int32) if ids_BT is None else ids_BT.astype(jnp.int32)
    ids = _pad(o, ids)
    everyone = jax.lax.all_gather(jnp.where(ids == 0, PADDING_K, ids), o.axis, axis=1)
    return jnp.where(ids == 0, PADDING_Q, ids)[:, None], everyone[:, :, None]
