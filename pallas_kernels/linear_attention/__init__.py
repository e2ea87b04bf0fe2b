"""Linear attention with a scalar decay for each head: a state instead of keys and values.

    S_t = a_t S_(t-1) + k_t v_t^T        y_t = S_t^T q_t

That is the state space duality of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060: decay exp(dt A), key B, value dt x, query
C, keys and queries shared by the heads of a group) and lightning attention (Qin et al. 2024, arXiv:2401.04658: a fixed
decay for each head). Shapes, here and in every candidate:
  B rows   T tokens   G groups   H heads (a multiple of G)   N key size   P value size   L layers   S slots
  R requests
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..candidates import Operation

OPERATION = Operation(__name__, "linear_attention")
RAGGED = Operation(__name__, "ragged_linear_attention")


def linear_attention(
    q_BTGN: jax.Array,
    k_BTGN: jax.Array,
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`y` [B, T, H, P] in the dtype of `v`, over packed rows; differentiable in all but the segments.

    Sums and states are float32 (float64 for float64). Decays are multiplied as exponentials of differences of sums over
    a chunk of tokens, so their relative rounding is that of the sum of `-log_decay` over a chunk.

    Args:
      q_BTGN, k_BTGN: queries and keys of each group. v_BTHP: values of each head.
      log_decay_BTH: log(a), none positive (not checked), float32 or wider.
      segment_ids_BT: int32; where the id changes, the state starts from zero. 0 is padding: it gives zeros and passes
        no gradient, but should hold finite numbers. None: each row is one document.
      implementation: a candidate's name, or None for the best one of the platform.

    Raises:
      ValueError: shapes or dtypes that break the rules above. NotImplementedError: no candidate takes them.
    """
    q_BTGN, k_BTGN, v_BTHP, log_decay_BTH = map(jnp.asarray, (q_BTGN, k_BTGN, v_BTHP, log_decay_BTH))
    _check(q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, ("B", "T"))
    ids_BT = jnp.ones(v_BTHP.shape[:2], jnp.int32) if segment_ids_BT is None else jnp.asarray(segment_ids_BT)
    if ids_BT.shape != v_BTHP.shape[:2] or ids_BT.dtype != jnp.int32:
        raise ValueError(f"segment_ids is int32 [B, T] = {v_BTHP.shape[:2]}; got {ids_BT.dtype}{ids_BT.shape}")
    return OPERATION(q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, ids_BT, implementation=implementation)


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
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`y` [T, H, P] in the dtype of `v` for a flat batch of many requests, and the states after it. Not differentiable.

    A token's numbers depend on its own request alone: not on the rows beside it, nor on how many of the request's
    tokens came with it.

    Args:
      states_LSHNP: the state of each slot, float32 or wider. layer: which of L is meant, an int or a traced one.
      slot_R: int32, the slot of each request. start_R, length_R: int32, its rows, in the order of their positions;
        length 0: it has none in this step. Rows of no request give zeros.
      is_new_R: bool, whether these are a request's first tokens, before which its state is zero.
      Otherwise as `linear_attention`.
    """
    q_TGN, k_TGN, v_THP, log_decay_TH = arrays = [jnp.asarray(x) for x in (q_TGN, k_TGN, v_THP, log_decay_TH)]
    _check(q_TGN, k_TGN, v_THP, log_decay_TH, ("T",))
    shape = (v_THP.shape[1], k_TGN.shape[-1], v_THP.shape[-1])
    if states_LSHNP.shape[2:] != shape or states_LSHNP.dtype.itemsize < 4:
        raise ValueError(
            f"states is [L, S, H, N, P] with H, N, P = {shape}, float32 or wider; got {states_LSHNP.dtype}"
            f"{states_LSHNP.shape}"
        )
    requests = {"slot_R": slot_R, "start_R": start_R, "length_R": length_R, "is_new_R": is_new_R}
    return RAGGED(*arrays, states_LSHNP, implementation=implementation, layer=layer, **requests)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, rows: tuple[str, ...]) -> None:
    before = len(rows)
    fits = q.shape == k.shape and q.ndim == v.ndim == before + 2 and q.shape[:before] == v.shape[:before]
    if not fits or v.shape[before] % q.shape[before] or log_decay.shape != v.shape[: before + 1]:
        names = ", ".join(rows)
        raise ValueError(
            f"linear attention takes q and k [{names}, G, N], v [{names}, H, P] and log_decay [{names}, H], with H a "
            f"multiple of G; got {q.shape}, {k.shape}, {v.shape} and {log_decay.shape}"
        )
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)) or log_decay.dtype.itemsize < 4:
        raise ValueError(
            f"q, k and v are floating, log_decay is float32 or wider; got {q.dtype}, {k.dtype}, {v.dtype} and "
            f"{log_decay.dtype}"
        )
