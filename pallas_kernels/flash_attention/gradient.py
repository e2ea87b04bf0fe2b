"""The gradient of attention from a forward and a backward pass of one's own, the same for every candidate.

d score = p (dp - sum_s p dp + d lse), and sum_s p dp is out . d_out: one number a row, `delta`, holds both. A sink is a
score without a value: its dp is 0.

Shapes: B batch rows, T queries, H query heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

ARRAYS = ("q_segment_ids_BT", "kv_segment_ids_BS", "q_offset", "bias_BHTS", "sinks_H", "qk_scale_H", "v_scale_H")
FORWARD_ONLY = ("sinks_H", "qk_scale_H", "v_scale_H")


def differentiable(
    forward: Callable[..., Any], backward: Callable[..., Any], from_out: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A candidate's `flash_attention` out of what computes (out, lse) and its `flash_attention_backward`.

    `forward` takes the keywords of a candidate. An option that is None stays None, and an int `q_offset` an int.
    `from_out`, where a candidate has it, takes the output and the gradient of its log-sum-exp, None where nobody takes
    one, in place of `delta`.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(static: tuple[tuple[str, Any], ...], inputs: tuple[jax.Array, ...], arrays: dict[str, Any]) -> Any:
        return forward(*inputs, **dict(static), **arrays)

    def attend_forward(static: Any, *given: Any) -> Any:
        inputs, arrays = jax.tree.map(lambda x: x.value, given, is_leaf=lambda x: hasattr(x, "perturbed"))
        out_BTHE, lse_BTH = forward(*inputs, **dict(static), **arrays)
        return (out_BTHE, lse_BTH), (inputs, arrays, out_BTHE, lse_BTH)

    def attend_backward(static: Any, residuals: Any, cotangents: Any) -> Any:
        inputs, arrays, out_BTHE, lse_BTH = residuals
        d_out_BTHE, d_lse_BTH = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
        d_out_BTHE = jnp.zeros_like(out_BTHE) if d_out_BTHE is None else d_out_BTHE
        sinks_H = arrays.get("sinks_H")
        options = {name: x for name, x in (*static, *arrays.items()) if name not in FORWARD_ONLY}
        ids = (options["q_segment_ids_BT"], *[options["kv_segment_ids_BS"]] * 2)
        inputs = tuple(without_padding(x, own) for x, own in zip(inputs, ids, strict=True))
        if from_out is not None and sinks_H is None:
            grads = from_out(*inputs, d_out_BTHE, lse_BTH, out_BTHE, d_lse_BTH, **options)
        else:
            delta_BTH = delta(out_BTHE, d_out_BTHE, d_lse_BTH, lse_BTH.dtype)
            grads = backward(*inputs, d_out_BTHE, lse_BTH, delta_BTH, **options)
        d_inputs = tuple(grad.astype(x.dtype) for grad, x in zip(grads[:3], inputs, strict=True))
        d_arrays = dict.fromkeys(arrays)
        if len(grads) > 3:
            d_arrays["bias_BHTS"] = grads[3].astype(arrays["bias_BHTS"].dtype)
        if sinks_H is not None:
            d_arrays["sinks_H"] = _sinks_gradient(sinks_H, lse_BTH, delta_BTH)
        return d_inputs, d_arrays

    attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)

    def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        arrays = {name: options.pop(name) for name in ARRAYS if isinstance(options.get(name), jax.Array)}
        return attend(tuple(sorted(options.items())), (q, k, v), arrays)

    return flash_attention


def without_padding(x_BTHD: jax.Array, ids_BT: jax.Array | None) -> jax.Array:
    """Zeros where the segment is 0: what is there may not be finite, which a weight of 0 would not hide."""
    return x_BTHD if ids_BT is None else jnp.where((ids_BT != 0)[:, :, None, None], x_BTHD, 0)


def delta(out_BTHE: jax.Array, d_out_BTHE: jax.Array, d_lse_BTH: jax.Array | None, wide: Any) -> jax.Array:
    found = (out_BTHE.astype(wide) * d_out_BTHE.astype(wide)).sum(-1)
    return found if d_lse_BTH is None else found - d_lse_BTH


def _sinks_gradient(sinks_H: jax.Array, lse_BTH: jax.Array, delta_BTH: jax.Array) -> jax.Array:
    p_BTH = jnp.exp(sinks_H.astype(lse_BTH.dtype) - lse_BTH)
    return -(p_BTH * delta_BTH).sum((0, 1)).astype(sinks_H.dtype)
