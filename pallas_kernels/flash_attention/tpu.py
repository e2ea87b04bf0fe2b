"""Flash attention on TPU: what the kernels want of the arrays, and their block sizes.

The kernels take heads before tokens, lengths that are whole blocks and head sizes that are whole lanes (64 alone is no
faster): the copies that this takes are left to the compiler, which joins them with what made the arrays.

Not done: float64, and products of float8 (its numbers are exact in bfloat16, in which they are multiplied).

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import tuned
from ..chips import target_chip
from .block_plan import PADDING_K, PADDING_Q, Plan, padded_ids, tables
from .gradient import delta, differentiable, without_padding
from .tpu_backward import SIDES, backward
from .tpu_forward import LANES, Scores, forward

DQ_BYTES = 8 << 20  # of the queries' gradient at a time, which is held in vector memory
PART = 2048  # queries: a longer row's backward pass is cut at multiples of this
TABLE = 1 << 16  # pairs of blocks that are listed at a time (for segments), in scalar memory


def blocks(
    chip: str | None, T: int, S: int, causal: bool, plain: bool, bias: bool, wide: bool, is_backward: bool
) -> tuple[int, int]:
    """Queries and keys a block takes at most; powers of two of at least 128.

    `plain`: without window, segments and traced offsets. Else a kernel has up to four bodies, and blocks more edges. On
    v5e larger ones gain 3%, in a program four times as long. `wide`: float32, of which larger ones need 43 MiB, or
    backward heads over 256. Backward, v6e's and 7x's matrix units stand still for some 5% of a pair of 1,024, while it
    begins and ends; many keys make that rare, and fewer queries what is spilled and how long the program is.
    """
    if bias:
        return 512, 512
    if is_backward and plain and not wide and not causal and chip in SIDES and (keys := _fit(S, 4096)) > 1024:
        return 512, keys
    if is_backward or wide or not plain or chip in ("v5e", "v5p"):
        return 1024, 1024
    return (2048, 2048) if causal else (2048, 1024)


def tuning_space(chip: str, key: dict[str, Any]) -> list[dict[str, int]]:
    """Block sizes worth trying (see `benchmarks.tune`); the first is the closed form."""
    is_backward, causal, T, S = key["kernel"] == "backward", key["causal"], key["T"], key["S"]
    first = (*blocks(chip, T, S, causal, True, False, False, is_backward), Plan.chunk)
    more = [(1024, 1024, 512), (1024, 1024, 128), (512, 512, 256), (512, 512, 128), (512, 1024, 256), (1024, 512, 256)]
    more += [] if is_backward else [(2048, 2048, 256), (1024, 2048, 256), (512, 512, 512), (2048, 1024, 256)]
    fitting = [(min(q, T), min(k, S), chunk) for q, k, chunk in (first, *more)]
    if causal and T == S and not is_backward:  # other blocks have more edges than a diagonal
        fitting = [fitting[0], *(x for x in fitting[1:] if x[0] == x[1])]
    return [dict(zip(("block_q", "block_k", "chunk"), x, strict=True)) for x in dict.fromkeys(fitting)]


def flash_attention_backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
    **options: Any,
) -> tuple[jax.Array, ...]:
    return _backward(q_BTHD, k_BSKD, v_BSKE, d_out_BTHE, lse_BTH, {"delta": delta_BTH}, jnp.float32, **options)


def _gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    out_BTHE: jax.Array,
    d_lse_BTH: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Those of whole rows, in the inputs' dtype."""
    rest = {"out": out_BTHE} if d_lse_BTH is None else {"out": out_BTHE, "d_lse": d_lse_BTH}
    return _backward(q_BTHD, k_BSKD, v_BSKE, d_out_BTHE, lse_BTH, rest, q_BTHD.dtype, **options)


def _backward(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    rest: dict[str, jax.Array],
    dtype: Any,
    *,
    causal: bool,
    window: int | None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: int | jax.Array,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """`rest` holds delta, or the output and perhaps the gradient of its log-sum-exp; dq, dk and dv have `dtype`."""
    _check(q_BTHD)
    (B, T, H, D), (_, S, K, E) = q_BTHD.shape, v_BSKE.shape
    G = H // K
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
    segments, bias = q_segment_ids_BT is not None, bias_BHTS is not None
    plan = _plan((T, S, D, E), causal, window, q_offset, segments, bias, q_BTHD.dtype == jnp.float32, is_backward=True)
    longest = max(1, DQ_BYTES // (4 * G * max(D, LANES) * PART)) * PART
    if segments and B * plan.nk * plan.steps > TABLE:
        longest = min(longest, -(-T // (2 * PART)) * PART)
    if longest < T:  # parts of the queries, whose gradients of keys and values add up
        parts = []
        for start in range(0, T, longest):
            part = slice(start, start + longest)
            ids = q_segment_ids_BT
            parts.append(
                _backward(
                    q_BTHD[:, part], k_BSKD, v_BSKE, d_out_BTHE[:, part], lse_BTH[:, part],
                    {name: x[:, part] for name, x in rest.items()}, jnp.float32,
                    q_segment_ids_BT=None if ids is None else ids[:, part], kv_segment_ids_BS=kv_segment_ids_BS,
                    bias_BHTS=None if bias_BHTS is None else bias_BHTS[:, :, part],
                    q_offset=q_offset + start, **options,
                )
            )  # fmt: skip
        dq, dk, dv, *d_bias = zip(*parts, strict=True)
        whole = jnp.concatenate(dq, 1), functools.reduce(jnp.add, dk), functools.reduce(jnp.add, dv)
        return *(x.astype(dtype) for x in whole), *(jnp.concatenate(x, 2) for x in d_bias)

    Tp, Sp = plan.nq * plan.block_q, plan.nk * plan.block_k
    if "out" in rest and not plan.covered:
        rest = {"delta": delta(rest["out"], d_out_BTHE, rest.get("d_lse"), lse_BTH.dtype)}

    def queries(x_BTHD: jax.Array) -> jax.Array:
        return _heads(x_BTHD, Tp, q_segment_ids_BT).reshape(B, K, G, Tp, -1)

    def rows(x_BTH: jax.Array, value: float = 0) -> jax.Array:
        return _pad(jnp.swapaxes(x_BTH, 1, 2), 2, Tp, value).reshape(B, K, G, 1, Tp)

    arrays = {
        "q": queries(q_BTHD),
        "k": _heads(k_BSKD, Sp, kv_segment_ids_BS),
        "v": _heads(v_BSKE, Sp, kv_segment_ids_BS),
        "d_out": queries(d_out_BTHE),
    }
    if "out" in rest:
        arrays["out"] = queries(rest["out"])
    arrays["lse"] = rows(lse_BTH, -jnp.inf)
    arrays |= {name: rows(rest[name]) for name in ("delta", "d_lse") if name in rest}
    extras, found = _segments(plan, q_segment_ids_BT, kv_segment_ids_BS, q_offset)
    arrays |= extras
    if bias_BHTS is not None:
        shared = bias_BHTS.shape
        bias_BHST = _pad(_pad(jnp.swapaxes(bias_BHTS, 2, 3), 2, Sp), 3, Tp)
        arrays["bias"] = bias_BHST.reshape(shared[0], *((K, G) if shared[1] == H else (1, 1)), Sp, Tp)
    dq, dk, dv, *d_bias = backward(plan, Scores(scale, softcap, bias, scaled=False), arrays, found, dtype)
    dq_BTHD = jnp.swapaxes(dq.reshape(B, H, Tp, -1), 1, 2)[:, :T, :, :D]
    dk_BSKD, dv_BSKE = (jnp.swapaxes(x, 1, 2)[:, :S] for x in (dk[..., :D], dv[..., :E]))
    if bias_BHTS is None:
        return dq_BTHD, dk_BSKD, dv_BSKE
    d_bias_BHTS = jnp.swapaxes(d_bias[0].reshape(B, H, Sp, Tp), 2, 3)[:, :, :T, :S]
    alone = [axis for axis in (0, 1) if bias_BHTS.shape[axis] == 1]
    return dq_BTHD, dk_BSKD, dv_BSKE, d_bias_BHTS.sum(alone, keepdims=True) if alone else d_bias_BHTS


def _forward(
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
    if qk_scale_H is not None:
        q_BTHD, k_BSKD, v_BSKE = (x.astype(jnp.bfloat16) for x in (q_BTHD, k_BSKD, v_BSKE))
    _check(q_BTHD)
    (B, T, _, D), (_, S, _, E) = q_BTHD.shape, v_BSKE.shape
    segments, bias = q_segment_ids_BT is not None, bias_BHTS is not None
    plan = _plan((T, S, D, E), causal, window, q_offset, segments, bias, q_BTHD.dtype == jnp.float32, is_backward=False)
    if q_segment_ids_BT is not None and plan.nq > 1 and B * plan.nq * plan.steps > TABLE:
        options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "sinks_H": sinks_H}
        options |= {"kv_segment_ids_BS": kv_segment_ids_BS, "qk_scale_H": qk_scale_H, "v_scale_H": v_scale_H}
        half = plan.nq // 2 * plan.block_q
        parts = [
            _forward(
                q_BTHD[:, part], k_BSKD, v_BSKE, q_segment_ids_BT=q_segment_ids_BT[:, part],
                q_offset=q_offset + (part.start or 0), bias_BHTS=None if bias_BHTS is None else bias_BHTS[:, :, part],
                **options,
            )
            for part in (slice(half), slice(half, None))
        ]  # fmt: skip
        outs, lses = zip(*parts, strict=True)
        return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)
    Tp, Sp = plan.nq * plan.block_q, plan.nk * plan.block_k
    extras, found = _segments(plan, q_segment_ids_BT, kv_segment_ids_BS, q_offset)
    if bias_BHTS is not None:
        extras["bias"] = _pad(_pad(jnp.swapaxes(bias_BHTS, 2, 3), 2, Sp), 3, Tp)
    if sinks_H is not None:
        extras["sinks"] = sinks_H.astype(jnp.float32)
    if qk_scale_H is not None:
        extras["factors"] = qk_scale_H
    out_BHTE, lse_BH1T = forward(
        plan,
        Scores(scale, softcap, bias, scaled=qk_scale_H is not None),
        _heads(q_BTHD, Tp, q_segment_ids_BT),
        _heads(k_BSKD, Sp, kv_segment_ids_BS),
        _heads(v_BSKE, Sp, kv_segment_ids_BS),
        found,
        extras,
    )
    out_BTHE = jnp.swapaxes(out_BHTE, 1, 2)[:, :T, :, :E]
    if v_scale_H is not None:
        out_BTHE = (out_BTHE * v_scale_H[:, None]).astype(jnp.bfloat16)
    return out_BTHE, jnp.swapaxes(lse_BH1T[:, :, 0, :T], 1, 2)


flash_attention = differentiable(_forward, flash_attention_backward, _gradients)


def _check(q: jax.Array) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{q.dtype} on a TPU's matrix unit")


def _plan(
    sizes: tuple[int, ...],
    causal: bool,
    window: int | None,
    q_offset: Any,
    segments: bool,
    bias: bool,
    wide: bool,
    is_backward: bool,
) -> Plan:
    T, S, D, E = sizes
    offset = q_offset if isinstance(q_offset, int) else None
    plain = window is None and offset is not None and not segments
    wide = wide or (is_backward and max(D, E) > 256)
    most_q, most_k = blocks(target_chip(), T, S, causal, plain, bias, wide, is_backward)
    chunk = Plan.chunk
    if plain and not bias:
        kernel = "backward" if is_backward else "forward"
        key = {"kernel": kernel, "T": _power(T), "S": _power(S), "D": _power(D), "causal": causal}
        if found := tuned.best("flash_attention", target_chip(), key):
            most_q, most_k, chunk = found["block_q"], found["block_k"], found["chunk"]
    if window is not None:  # blocks much larger than the window are mostly edge
        fit = max(256, 1 << (window - 1).bit_length())
        most_q, most_k = min(most_q, fit), min(most_k, fit)
    block_q, block_k = _fit(T, most_q), _fit(S, most_k)
    return Plan(
        T, S, block_q, block_k, causal, window, offset, segments, D, E, bias and is_backward, is_backward, chunk
    )


def _power(size: int) -> int:
    """Rounded up to a power of two: what is close is tuned alike."""
    return max(LANES, 1 << max(0, size - 1).bit_length())


def _fit(length: int, most: int) -> int:
    """The largest block of at most `most` that pads `length` by no more than an eighth beyond whole lanes."""
    lanes, block = -(-length // LANES) * LANES, most
    while block > LANES and -(-length // block) * block > lanes * 9 // 8:
        block //= 2
    return block


def _heads(x_BTHD: jax.Array, length: int, ids_BT: jax.Array | None) -> jax.Array:
    """[B, H, length, D], with zeros where there is padding, and up to `_width`."""
    x_BHTD = jnp.swapaxes(without_padding(x_BTHD, ids_BT), 1, 2)
    return _pad(_pad(x_BHTD, 2, length), 3, _width(x_BTHD.shape[3]))


def _width(size: int) -> int:
    """Of a head in the kernels: half of the lanes take no copy, other parts are padded."""
    return size if size == LANES // 2 else -(-size // LANES) * LANES


def _segments(plan: Plan, q_ids: Any, kv_ids: Any, q_offset: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The kernels' rows of ids, and their tables."""
    if not plan.segments:
        return {}, tables(plan, None, None, q_offset)
    q_ids = padded_ids(q_ids, plan.nq * plan.block_q, PADDING_Q)
    kv_ids = padded_ids(kv_ids, plan.nk * plan.block_k, PADDING_K)
    return {"q_ids": q_ids[:, None], "kv_ids": kv_ids[:, None]}, tables(plan, q_ids, kv_ids, q_offset)


def _pad(x: jax.Array, axis: int, length: int, value: float = 0) -> jax.Array:
    extra = length - x.shape[axis]
    widths = [(0, extra if n == axis else 0) for n in range(x.ndim)]
    return x if extra == 0 else jnp.pad(x, widths, constant_values=value)
