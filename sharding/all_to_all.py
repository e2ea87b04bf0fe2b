"""Attention over rows whose tokens are cut over devices, by exchanging tokens for heads and back.

Before attention each device has some tokens of every head, during it every token of some heads (Ulysses: Jacobs et al.
2023, arXiv:2309.14509).

Shapes, of one device: B rows, T tokens, S tokens of the whole row, H query heads, K key/value heads, D head size.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def over_heads(
    attend: Callable[..., jax.Array],
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segment_ids_BT: jax.Array,
    sinks_H: jax.Array | None = None,
    *,
    axis: str,
) -> jax.Array:
    """`attend(q, k, v, segment_ids_BS)` of whole rows, this device's share of the heads; its output cut as q was.

    Given sinks, one a query head, `attend` gets those of its heads after all else. To be called inside `jax.shard_map`
    over the mesh axis `axis`, the tokens in their natural order. A key/value head whose queries end up on several
    devices is sent to each of them, and its gradients are added up.

    Raises:
      ValueError: when H does not divide over the devices.
    """
    devices, heads, kv_heads = jax.lax.axis_size(axis), q_BTHD.shape[2], k_BTKD.shape[2]
    if heads % devices:
        raise ValueError(
            f"all_to_all gives each of the {devices} devices of {axis!r} the same number of query heads, and has "
            f"{heads} heads to give. Use a number of devices that divides {heads}, or a ring."
        )
    # As many copies as make each device's query heads read whole key/value heads of their own, in order.
    copies = math.lcm(kv_heads, devices) // kv_heads
    q_BSHD, k_BSKD, v_BSKD = (
        jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
        for x in (q_BTHD, jnp.repeat(k_BTKD, copies, axis=2), jnp.repeat(v_BTKD, copies, axis=2))
    )
    segment_ids_BS = jax.lax.all_gather(segment_ids_BT, axis, axis=1, tiled=True)
    sinks = ()
    if sinks_H is not None:
        each = heads // devices
        sinks = (jax.lax.dynamic_slice_in_dim(sinks_H, jax.lax.axis_index(axis) * each, each),)
    out_BSHD = attend(q_BSHD, k_BSKD, v_BSKD, segment_ids_BS, *sinks)
    return jax.lax.all_to_all(out_BSHD, axis, split_axis=1, concat_axis=2, tiled=True)
