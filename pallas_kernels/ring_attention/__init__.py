"""Causal attention of rows whose tokens are cut over a ring of devices: exact, and no device ever holds a whole row.

What it means is in `reference.py`. Shapes, here and in every candidate, all of one device's part:
  B batch rows   T tokens   H query heads   K key/value heads (K divides H)   D head size
"""

import jax
import jax.numpy as jnp

from ..candidates import Operation
from ..flash_attention.gradient import without_padding
from .zigzag import unzigzag, zigzag

__all__ = ["OPERATION", "ring_attention", "unzigzag", "zigzag"]

OPERATION = Operation(__name__, "ring_attention")


def ring_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    *,
    axis: str,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    two_way: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention over the rows of all devices of the mesh axis `axis`; reverse mode in q, k, v and sinks.

    To be called inside `jax.shard_map`. The n devices hold a row's tokens in `zigzag` order. Window, segments, scale,
    softcap, head groups and dtypes are as in `flash_attention`; positions are those of the whole row.

    Args:
      q_BTHD: this device's queries. k_BTKD, v_BTKV: its keys and values, of the same dtype; V may be another size.
      sinks_H: as in `flash_attention`; the same on every device of the ring, where each has its own part of their
        gradient.
      two_way: whether queries and outputs go round against the keys and values, so that links carry both ways. It is
        the same function; what travels, and when it pays, is in `xla.py`.
      implementation: a candidate's name, or None for the best one of the platform.

    Returns:
      `out_BTHV` in q's dtype.

    Raises:
      ValueError: as `flash_attention`, and when T is odd. NotImplementedError: no candidate takes the arguments.
    """
    q_BTHD, k_BTKD, v_BTKV = map(jnp.asarray, (q_BTHD, k_BTKD, v_BTKV))
    if q_BTHD.ndim != 4 or q_BTHD.shape[:2] != k_BTKD.shape[:2]:
        raise ValueError(
            "ring_attention takes q [B, T, H, D] k [B, T, K, D] and v [B, T, K, V] of the same tokens, "
            f"got q {q_BTHD.shape}, k {k_BTKD.shape}, v {v_BTKV.shape}"
        )
    if q_BTHD.shape[1] % 2 and jax.lax.axis_size(axis) > 1:
        raise ValueError(
            f"each device of a ring holds two chunks of a row, so its number of tokens is even; got {q_BTHD.shape[1]}. "
            "Pad the rows to a multiple of twice the devices."
        )
    if sinks_H is not None:
        sinks_H = jnp.asarray(sinks_H)
        H = q_BTHD.shape[2]
        if sinks_H.shape != (H,) or not jnp.issubdtype(sinks_H.dtype, jnp.floating):
            raise ValueError(f"sinks are one float a query head, ({H},), got {sinks_H.dtype}{sinks_H.shape}")
    return OPERATION(
        *(without_padding(x, segment_ids_BT) for x in (q_BTHD, k_BTKD, v_BTKV)),
        axis=axis,
        segment_ids_BT=segment_ids_BT,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks_H=sinks_H,
        two_way=two_way,
        implementation=implementation,
    )
