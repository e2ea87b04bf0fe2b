"""A short causal depthwise convolution over tokens, as recurrent mixers have it before their state.

Shapes: B rows, T tokens, C channels, W width, R requests, S slots, L layers. Inputs are W arrays: the tokens 0, 1, ...
before each.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Convolution(nnx.Module):
    """The parameters: `weight` [C, 1, W] as files have it, whose last tap is the token's own, and `bias` [C]."""

    def __init__(
        self, channels: int, width: int, *, bias: bool = True, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.width, bound = width, width**-0.5
        draw = jax.random.uniform(rngs.params(), (channels, 1, width), param_dtype, -bound, bound)
        self.weight = nnx.Param(draw, axes=(None, None, None))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype), axes=(None,)) if bias else None

    def __call__(self, inputs: Sequence[jax.Array]) -> jax.Array:
        """W inputs [..., C] to results [..., C] in their dtype; sums are float32 or wider."""
        dtype = inputs[0].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        weight_CW = self.weight[...].astype(wide)[:, 0]
        y = inputs[0].astype(wide) * weight_CW[:, -1]
        for w in range(1, self.width):
            y += inputs[w].astype(wide) * weight_CW[:, -1 - w]
        return (y if self.bias is None else y + self.bias[...].astype(wide)).astype(dtype)


def packed_inputs(x_BTC: jax.Array, ids_BT: jax.Array, width: int) -> list[jax.Array]:
    """Of packed rows; zeros before a document's first token."""

    def before(x: jax.Array, w: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (w, 0), *[(0, 0)] * (x.ndim - 2)])[:, : x.shape[1]]

    changed_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    run_BT = jnp.cumsum(changed_BT, axis=1, dtype=jnp.int32) + 1
    return [jnp.where((before(run_BT, w) == run_BT)[..., None], before(x_BTC, w), 0) for w in range(width)]


def paged_inputs(
    x_TC: jax.Array,
    state_LSWC: jax.Array,
    layer: Any,
    slot_T: jax.Array,
    offset_T: jax.Array,
    positions_T: jax.Array,
) -> list[jax.Array]:
    """Of a flat batch: from this step, before that from the state, and before the request zeros.

    Args:
        state_LSWC: of each slot the W - 1 last tokens before this step, the latest last.
        slot_T: of each row's request; S and more for none. offset_T: place among the request's rows of this step.
        positions_T: place in the request.
    """
    slots, kept = state_LSWC.shape[1:3]
    slot_T = jnp.minimum(slot_T, slots - 1)

    def before(w: int) -> jax.Array:
        old_TC = state_LSWC[layer, slot_T, jnp.clip(kept + offset_T - w, 0, kept - 1)].astype(x_TC.dtype)
        x = jnp.where((offset_T >= w)[:, None], jnp.roll(x_TC, w, axis=0), old_TC)
        return jnp.where((positions_T >= w)[:, None], x, 0)

    return [x_TC, *[before(w) for w in range(1, kept + 1)]]


def next_state(
    inputs: Sequence[jax.Array], state_LSWC: jax.Array, layer: Any, last_R: jax.Array, slot_R: jax.Array
) -> jax.Array:
    """The state after a step, of the requests whose last rows are `last_R`; slots of S and more are left out."""
    latest_RWC = jnp.stack([x_TC[last_R] for x_TC in inputs[-2::-1]], axis=1)
    return state_LSWC.at[layer, slot_R].set(latest_RWC.astype(state_LSWC.dtype), mode="drop")
