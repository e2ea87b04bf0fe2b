"""What linear attention means: its recurrence, a token at a time. Shapes: see `__init__.py`; F heads of a group."""

from typing import Any

import jax
import jax.numpy as jnp


def linear_attention(
    q_BTGN: jax.Array, k_BTGN: jax.Array, v_BTHP: jax.Array, log_decay_BTH: jax.Array, ids_BT: jax.Array
) -> jax.Array:
    wide = jnp.promote_types(v_BTHP.dtype, jnp.float32)
    heads = v_BTHP.shape[2]

    def one_row(q_TGN: jax.Array, k_TGN: jax.Array, v_THP: jax.Array, log_decay_TH: jax.Array, ids_T: jax.Array):
        before_T = jnp.concatenate([jnp.zeros(1, ids_T.dtype), ids_T[:-1]])

        def step(state_HNP: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            q_GN, k_GN, v_HP, log_decay_H, id_, before = token
            state_HNP = jnp.where(id_ == before, state_HNP, 0)
            state_HNP, y_HP = recur(state_HNP, q_GN, k_GN, v_HP, log_decay_H)
            return state_HNP, jnp.where(id_ == 0, 0, y_HP)

        start = jnp.zeros((heads, k_TGN.shape[-1], v_THP.shape[-1]), wide)
        return jax.lax.scan(step, start, (q_TGN, k_TGN, v_THP, log_decay_TH, ids_T, before_T))[1]

    return jax.vmap(one_row)(q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, ids_BT).astype(v_BTHP.dtype)


def ragged_linear_attention(
    q_TGN: jax.Array,
    k_TGN: jax.Array,
    v_THP: jax.Array,
    log_decay_TH: jax.Array,
    states_LSHNP: jax.Array,
    *,
    layer: Any,
    slot_R: jax.Array,
    start_R: jax.Array,
    length_R: jax.Array,
    is_new_R: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    slots = states_LSHNP.shape[1]
    row_T1 = jnp.arange(len(v_THP))[:, None]
    is_of_TR = (start_R <= row_T1) & (row_T1 < start_R + length_R)
    slot_T = jnp.min(jnp.where(is_of_TR, slot_R, slots), axis=1)
    is_first_T = jnp.any(is_of_TR & is_new_R & (row_T1 == start_R), axis=1)

    def step(states_LSHNP: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        *inputs, slot, is_first = token
        state_HNP = jnp.where(is_first, 0, states_LSHNP[layer, jnp.minimum(slot, slots - 1)])
        state_HNP, y_HP = recur(state_HNP, *inputs)
        return states_LSHNP.at[layer, slot].set(state_HNP, mode="drop"), jnp.where(slot < slots, y_HP, 0)

    tokens = (q_TGN, k_TGN, v_THP, log_decay_TH, slot_T, is_first_T)
    states_LSHNP, y_THP = jax.lax.scan(step, states_LSHNP, tokens)
    return y_THP.astype(v_THP.dtype), states_LSHNP


def recur(
    state_HNP: jax.Array, q_GN: jax.Array, k_GN: jax.Array, v_HP: jax.Array, log_decay_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The state after a token, and `y` [H, P], both in the dtype of the state."""
    (G, N), (H, P), wide = k_GN.shape, v_HP.shape, state_HNP.dtype
    state_GFNP = state_HNP.reshape(G, H // G, N, P)
    decay_GF11 = jnp.exp(log_decay_H.astype(wide)).reshape(G, H // G, 1, 1)
    k_G1N1, v_GF1P = k_GN.astype(wide)[:, None, :, None], v_HP.astype(wide).reshape(G, H // G, 1, P)
    state_GFNP = decay_GF11 * state_GFNP + k_G1N1 * v_GF1P
    # A dot for each head, as the state lies. (XLA:CPU takes 15 times as long for a product and a sum over N.)
    q_GFN = jnp.broadcast_to(q_GN.astype(wide)[:, None], (G, H // G, N))
    y_GFP = jnp.einsum("gfn,gfnp->gfp", q_GFN, state_GFNP, precision=jax.lax.Precision.HIGHEST)
    return state_GFNP.reshape(H, N, P), y_GFP.reshape(H, P)
