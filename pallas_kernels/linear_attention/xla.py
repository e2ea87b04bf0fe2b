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
    slot_T: jax.Array,
    is_first_T: jax.Array,
    decode_rows: int,
) -> tuple[jax.Array, jax.Array]:
    """Token by token, those of no request passed over. On a CPU that is all: a state fills its caches.

    Elsewhere the first rows, which are of different requests, go together.
    """
    slots = states_LSHNP.shape[1]
    inputs = (q_TGN, k_TGN, v_THP, log_decay_TH)
    y_THP = jnp.zeros(v_THP.shape, states_LSHNP.dtype)
    together = 0 if known_platform() == "cpu" else decode_rows
    if together:
        slot_R = slot_T[:together]
        before = states_LSHNP[layer, jnp.minimum(slot_R, slots - 1)]
        before = jnp.where(is_first_T[:together, None, None, None], 0, before)
        after, y = jax.vmap(recur)(before, *(x[:together] for x in inputs))
        states_LSHNP = states_LSHNP.at[layer, slot_R].set(after, mode="drop")
        y_THP = y_THP.at[:together].set(jnp.where((slot_R < slots)[:, None, None], y, 0))
    is_left_T = (slot_T < slots) & (jnp.arange(len(slot_T)) >= together)
    order_T = jnp.argsort(~is_left_T, stable=True)

    def step(nth: jax.Array, carry: Any) -> Any:
        states_LSHNP, y_THP = carry
        t = order_T[nth]
        state_HNP = jnp.where(is_first_T[t], 0, states_LSHNP[layer, slot_T[t]])
        state_HNP, y_HP = recur(state_HNP, *(x[t] for x in inputs))
        return states_LSHNP.at[layer, slot_T[t]].set(state_HNP), y_THP.at[t].set(y_HP)

    states_LSHNP, y_THP = jax.lax.fori_loop(0, jnp.sum(is_left_T), step, (states_LSHNP, y_THP))
    return y_THP.astype(v_THP.dtype), states_LSHNP
