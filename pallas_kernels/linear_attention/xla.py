"""Linear attention on any platform: in chunks when all tokens are there, token by token when serving.

Shapes: see `__init__.py`; C tokens of a chunk, F heads of a group (H = G * F).

A chunk (Dao and Gu 2024, section 6) is three products: queries with keys, decayed and masked, with values, as attention
has them; queries with the state before the chunk; keys with values, decayed to its end, for the state after it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..chips import known_platform
from .reference import recur

CHUNK = 64
EXACT = jax.lax.Precision.HIGHEST


def linear_attention(
    q_BTGN: jax.Array, k_BTGN: jax.Array, v_BTHP: jax.Array, log_decay_BTH: jax.Array, ids_BT: jax.Array
) -> jax.Array:
    B, T, G, N = k_BTGN.shape
    H, P = v_BTHP.shape[2:]
    wide = jnp.promote_types(v_BTHP.dtype, jnp.float32)
    chunk = min(CHUNK, T)

    def chunks(x: jax.Array) -> jax.Array:
        """[B, T, ...] to [chunks, B, C, ...]."""
        x = jnp.pad(x, [(0, 0), (0, -T % chunk), *[(0, 0)] * (x.ndim - 2)])
        return jnp.swapaxes(x.reshape(B, -1, chunk, *x.shape[2:]), 0, 1)

    v_BTHP = jnp.where((ids_BT != 0)[..., None, None], v_BTHP, 0)
    changed_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    run_BT = jnp.cumsum(changed_BT, axis=1, dtype=jnp.int32)  # an id that comes back is another document
    inputs = (q_BTGN, k_BTGN, v_BTHP.reshape(B, T, G, H // G, P), log_decay_BTH.reshape(B, T, G, H // G), run_BT)
    start = (jnp.zeros((B, G, H // G, N, P), wide), jnp.zeros(B, jnp.int32))
    # Without `checkpoint` the backward pass would keep the decays of all pairs of tokens.
    _, y = jax.lax.scan(jax.checkpoint(_one_chunk, prevent_cse=False), start, tuple(map(chunks, inputs)))
    return jnp.swapaxes(y, 0, 1).reshape(B, -1, H, P)[:, :T].astype(v_BTHP.dtype)


def _one_chunk(carry: Any, inputs: Any) -> Any:
    state_BGFNP, run_B = carry
    q_BCGN, k_BCGN, v_BCGFP, log_decay_BCGF, run_BC = inputs
    wide = state_BGFNP.dtype
    q_BGCN, k_BGCN = (jnp.swapaxes(x.astype(wide), 1, 2) for x in (q_BCGN, k_BCGN))
    v_BGFCP = jnp.moveaxis(v_BCGFP.astype(wide), 1, 3)
    sum_BGFC = jnp.cumsum(jnp.moveaxis(log_decay_BCGF.astype(wide), 1, 3), axis=-1)
    last_BGF1 = sum_BGFC[..., -1:]

    sees_BCC = (run_BC[:, :, None] == run_BC[:, None]) & jnp.tri(run_BC.shape[1], dtype=bool)
    difference_BGFCC = sum_BGFC[..., :, None] - sum_BGFC[..., None, :]
    decay_BGFCC = jnp.exp(jnp.where(sees_BCC[:, None, None], difference_BGFCC, -jnp.inf))
    scores_BGCC = jnp.einsum("bgcn,bgsn->bgcs", q_BGCN, k_BGCN, precision=EXACT)
    y_BGFCP = jnp.einsum("bgfcs,bgfsp->bgfcp", scores_BGCC[:, :, None] * decay_BGFCC, v_BGFCP, precision=EXACT)

    before_BGFC = jnp.where((run_BC == run_B[:, None])[:, None, None], jnp.exp(sum_BGFC), 0)
    from_state = jnp.einsum("bgcn,bgfnp->bgfcp", q_BGCN, state_BGFNP, precision=EXACT)
    y_BGFCP += before_BGFC[..., None] * from_state

    end_B = run_BC[:, -1]
    after_BGFC = jnp.where((run_BC == end_B[:, None])[:, None, None], jnp.exp(last_BGF1 - sum_BGFC), 0)
    added = jnp.einsum("bgcn,bgfcp->bgfnp", k_BGCN, after_BGFC[..., None] * v_BGFCP, precision=EXACT)
    kept_BGF1 = jnp.where((end_B == run_B)[:, None, None, None], jnp.exp(last_BGF1), 0)
    return (kept_BGF1[..., None] * state_BGFNP + added, end_B), jnp.moveaxis(y_BGFCP, 3, 1)


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
    """Request by request, and each token by token. On a CPU that is all: one state fills its caches.

    Elsewhere requests that have one token go together.
    """
    slots = states_LSHNP.shape[1]
    inputs = (q_TGN, k_TGN, v_THP, log_decay_TH)
    y_THP = jnp.zeros(v_THP.shape, states_LSHNP.dtype)
    is_left_R = length_R > 0
    if known_platform() != "cpu":
        is_one_R = length_R == 1
        is_left_R &= ~is_one_R
        row_R = jnp.where(is_one_R, start_R, len(y_THP))
        before = states_LSHNP[layer, jnp.minimum(slot_R, slots - 1)]
        before = jnp.where(is_new_R[:, None, None, None], 0, before)
        after, y = jax.vmap(recur)(before, *(x[jnp.minimum(row_R, len(x) - 1)] for x in inputs))
        states_LSHNP = states_LSHNP.at[layer, jnp.where(is_one_R, slot_R, slots)].set(after, mode="drop")
        y_THP = y_THP.at[row_R].set(y, mode="drop")
    order_R = jnp.argsort(~is_left_R, stable=True)

    def token(t: jax.Array, carry: Any) -> Any:
        state_HNP, y_THP = carry
        state_HNP, y_HP = recur(state_HNP, *(jax.lax.dynamic_index_in_dim(x, t, keepdims=False) for x in inputs))
        return state_HNP, jax.lax.dynamic_update_index_in_dim(y_THP, y_HP, t, 0)

    def request(nth: jax.Array, carry: Any) -> Any:
        states_LSHNP, y_THP = carry
        r = order_R[nth]
        # Slices, which are moved whole; a scatter would go number by number.
        at = (layer, slot_R[r], 0, 0, 0)
        state_HNP = jax.lax.dynamic_slice(states_LSHNP, at, (1, 1, *states_LSHNP.shape[2:]))[0, 0]
        state_HNP = jnp.where(is_new_R[r], 0, state_HNP)
        state_HNP, y_THP = jax.lax.fori_loop(start_R[r], start_R[r] + length_R[r], token, (state_HNP, y_THP))
        return jax.lax.dynamic_update_slice(states_LSHNP, state_HNP[None, None], at), y_THP

    states_LSHNP, y_THP = jax.lax.fori_loop(0, jnp.sum(is_left_R), request, (states_LSHNP, y_THP))
    return y_THP.astype(v_THP.dtype), states_LSHNP
