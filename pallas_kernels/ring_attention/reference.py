"""What `ring_attention` means: every device attends over the whole rows and keeps its own tokens. For tests only."""

import jax

from ..flash_attention import flash_attention
from .zigzag import unzigzag, zigzag


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
    del two_way  # a way of travelling; nothing travels here
    devices, length = jax.lax.axis_size(axis), q_BTHD.shape[1]

    def whole(x: jax.Array) -> jax.Array:
        return unzigzag(jax.lax.all_gather(x, axis, axis=1, tiled=True), devices, 1)

    out_BTHD = flash_attention(
        *map(whole, (q_BTHD, k_BTKD, v_BTKD)),
        q_segment_ids_BT=None if segment_ids_BT is None else whole(segment_ids_BT),
        window=window,
        scale=scale,
        softcap=softcap,
        sinks_H=sinks_H,
        implementation="reference",
    )
    first = jax.lax.axis_index(axis) * length
    return jax.lax.dynamic_slice_in_dim(zigzag(out_BTHD, devices, 1), first, length, 1)
