"""Cross-entropy in plain XLA: one chunk of logits is alive at a time.

Shapes: B rows, T tokens in a row, C tokens of one chunk of it, D hidden size, V vocabulary (this device's part).

- Chunks are cut along T, so rows stay sharded as they come.
- Gradients are computed in the forward pass, while the chunk's logits are there: none is computed twice.
- With a cut vocabulary, the softmax takes its maximum and its sum over the parts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..chips import known_platform
from . import Options


def cross_entropy(hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, *, options: Options) -> jax.Array:
    def body(loss_BT: jax.Array, start: Any, size: int) -> jax.Array:
        hidden_BCD, targets_BC = _slice(hidden_BTD, start, size), _slice(targets_BT, start, size)
        return _put(loss_BT, _chunk(hidden_BCD, weight_VD, targets_BC, options)[0], start)

    zeros = jnp.zeros(targets_BT.shape, _wide(hidden_BTD))
    return _over_chunks(body, zeros, targets_BT.shape[1], columns(hidden_BTD, weight_VD, options.chunk_bytes))


def cross_entropy_gradients(
    hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype, accumulator = hidden_BTD.dtype, _wide(hidden_BTD)
    precision = _precision(dtype)
    # XLA:CPU refuses this product of bfloat16 with a float32 sum; widening it first changes no bit of the result.
    operand_dtype = accumulator if (known_platform() or jax.default_backend()) == "cpu" else dtype

    def body(carry: Any, start: Any, size: int) -> Any:
        loss_BT, dhidden_BTD, dweight_DV = carry
        hidden_BCD, targets_BC = _slice(hidden_BTD, start, size), _slice(targets_BT, start, size)
        weights_BC1 = _slice(weights_BT, start, size)[..., None].astype(accumulator)
        loss_BC, logits_BCV, lse_BC = _chunk(hidden_BCD, weight_VD, targets_BC, options)
        dlogits_BCV = _dlogits(logits_BCV, lse_BC, targets_BC, weights_BC1, options).astype(dtype)
        dhidden_BCD = jnp.einsum(
            "bcv,vd->bcd", dlogits_BCV, weight_VD, precision=precision, preferred_element_type=accumulator
        )
        # What nobody looks at may not be finite, and 0 times that is not 0.
        hidden_BCD = jnp.where(weights_BC1 != 0, hidden_BCD, 0)
        # [D, V], not [V, D]: the left side of this product is transposed on a CPU, and the logits are the larger one.
        dweight_DV += jnp.einsum(
            "bcd,bcv->dv",
            hidden_BCD.astype(operand_dtype),
            dlogits_BCV.astype(operand_dtype),
            precision=precision,
            preferred_element_type=accumulator,
        )
        return _put(loss_BT, loss_BC, start), _put(dhidden_BTD, dhidden_BCD, start), dweight_DV

    carry = (
        jnp.zeros(targets_BT.shape, accumulator),
        # Parts of the vocabulary are yet to be added up, so these are not rounded here.
        jnp.zeros(hidden_BTD.shape, accumulator if options.axis else dtype),
        jnp.zeros(weight_VD.shape[::-1], accumulator),
    )
    return _over_chunks(body, carry, targets_BT.shape[1], columns(hidden_BTD, weight_VD, options.chunk_bytes))


def columns(hidden_BTD: jax.Array, weight_VD: jax.Array, chunk_bytes: int) -> int:
    """Tokens of each row in a chunk: as even as the bound allows, so that the last chunk is seldom a short one."""
    rows, length, _ = hidden_BTD.shape
    most = max(1, chunk_bytes // (rows * weight_VD.shape[0] * 4))
    chunks = -(-length // most)
    return -(-length // chunks)


def _chunk(
    hidden_BCD: jax.Array, weight_VD: jax.Array, targets_BC: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss_BC, logits_BCV, logsumexp_BC) of one chunk.

    Targets count from the part's first row; those outside it are another device's, or anybody's where nobody looks.
    """
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv",
        hidden_BCD,
        weight_VD,
        precision=_precision(hidden_BCD.dtype),
        preferred_element_type=_wide(hidden_BCD),
    )
    if options.scale != 1:
        logits_BCV = logits_BCV * options.scale
    if options.softcap is not None:
        logits_BCV = options.softcap * jnp.tanh(logits_BCV / options.softcap)
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # "clip": a target that nobody looks at may lie outside the vocabulary, and must not become a NaN.
    label_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    if options.axis:
        largest_BC = lax.pmax(lse_BC, options.axis)
        lse_BC = largest_BC + jnp.log(lax.psum(jnp.exp(lse_BC - largest_BC), options.axis))
        is_here_BC = (targets_BC >= 0) & (targets_BC < logits_BCV.shape[-1])
        label_BC = lax.psum(jnp.where(is_here_BC, label_BC, 0), options.axis)
    if e := options.label_smoothing:
        mean_BC = jnp.mean(logits_BCV, axis=-1)
        label_BC = (1 - e) * label_BC + e * (lax.pmean(mean_BC, options.axis) if options.axis else mean_BC)
    loss_BC = lse_BC - label_BC
    if options.z_loss:
        loss_BC = loss_BC + options.z_loss * lse_BC**2
    return loss_BC, logits_BCV, lse_BC


def _dlogits(
    logits_BCV: jax.Array, lse_BC: jax.Array, targets_BC: jax.Array, weights_BC1: jax.Array, options: Options
) -> jax.Array:
    """The gradient of the weighted loss with respect to the products of hidden states and weight."""
    probability_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
    if options.z_loss:
        probability_BCV = probability_BCV * (1 + 2 * options.z_loss * lse_BC[..., None])
    target_BCV = lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]
    if e := options.label_smoothing:
        parts = lax.axis_size(options.axis) if options.axis else 1
        target_BCV = (1 - e) * target_BCV.astype(logits_BCV.dtype) + e / (parts * logits_BCV.shape[-1])
    difference_BCV = probability_BCV - target_BCV
    if options.softcap is not None:
        difference_BCV = difference_BCV * (1 - (logits_BCV / options.softcap) ** 2)
    if options.scale != 1:
        difference_BCV = difference_BCV * options.scale
    return jnp.where(weights_BC1 != 0, weights_BC1 * difference_BCV, 0)


def _over_chunks(body: Callable[..., Any], carry: Any, length: int, columns: int) -> Any:
    """Runs `carry = body(carry, start, size)` over the chunks; sizes are static, a shorter last chunk comes apart."""
    full, rest = divmod(length, columns)
    if full == 1:
        carry = body(carry, 0, columns)
    elif full > 1:
        carry = lax.fori_loop(0, full, lambda i, carry: body(carry, i * columns, columns), carry)
    return body(carry, full * columns, rest) if rest else carry


def _slice(x: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x: jax.Array, update: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), start, axis=1)


def _wide(hidden: jax.Array) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _precision(dtype: jnp.dtype) -> lax.Precision:
    """Full precision for float32 and wider (TPUs would round to bfloat16), the native one for narrower types."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT
