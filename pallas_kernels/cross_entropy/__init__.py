"""Softmax cross-entropy over a large vocabulary from hidden states, and its gradients, never holding all the logits.

What it means is in `reference.py`. That the loss's gradients can be taken chunk by chunk of the sequence, exactly, is
the idea of StreamBP (Luo et al. 2025, arXiv:2506.03077). Shapes, here and in every candidate:
  B rows   T tokens in a row   D hidden size   V vocabulary (inside `shard_map`, this device's part of it)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..candidates import Operation

OPERATION = Operation(__name__, "cross_entropy")
GRADIENTS = Operation(__name__, "cross_entropy_gradients")
CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Options:
    """What a candidate takes besides arrays; see `cross_entropy`. `axis` is a tuple of names."""

    axis: tuple[str, ...] = ()
    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_bytes: int = CHUNK_BYTES


def cross_entropy(
    hidden_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    axis: str | tuple[str, ...] = (),
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    implementation: str | None = None,
) -> jax.Array:
    """The loss of each token in nats, [B, T], float32 (float64 for float64).

    With `logits = hidden @ weight.T * scale`, bent to `c * tanh(logits / c)` by `softcap` c (Gemma 2), and
    `lse = logsumexp(logits)`, it is `lse - logits[target]`. `label_smoothing` e takes `(1 - e) * logits[target] + e *
    mean(logits)` in place of the target's logit (Szegedy et al. 2016, arXiv:1512.00567); `z_loss` z adds `z * lse ** 2`
    (PaLM, arXiv:2204.02311).

    Products take the dtype of `hidden` and accumulate in float32 (float64 for float64), as does all else.

    Differentiable in hidden and weight (reverse mode) where the vocabulary is whole. Its backward pass computes the
    logits again; who knows the weight of each token beforehand saves that with `cross_entropy_and_gradients`.

    Args:
      hidden_BTD: hidden states after the final norm. weight_VD: unembedding weight of the same floating dtype.
      targets_BT: int32 token ids. Where a loss is not used the target may be anything.
      axis: mesh axes over which the vocabulary is cut, inside `jax.shard_map`: each device has its rows of the weight,
        in the order of the axes, and the same hidden states and targets (numbered in the whole vocabulary).
      chunk_bytes: bound on the float32 logits that are alive at a time, for candidates that keep any in memory (one
        token of each row at least).
      implementation: a candidate's name, or None for the best one of the platform.

    Raises:
      ValueError: shapes, dtypes or options that break the rules above. NotImplementedError: no candidate takes them,
        or a gradient is asked for with `axis`.
    """
    options = _options(axis, scale, softcap, label_smoothing, z_loss, chunk_bytes)
    hidden_BTD, weight_VD, targets_BT = _check(hidden_BTD, weight_VD, targets_BT)
    return _differentiable(options, implementation, hidden_BTD, weight_VD, targets_BT)


def cross_entropy_and_gradients(
    hidden_BTD: jax.Array,
    weight_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    axis: str | tuple[str, ...] = (),
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy`, and the gradients of `sum(weights * loss)`, computed while the logits are there.

    Args:
      weights_BT: weight of each token. A token of weight 0 passes no gradient, whatever it holds.
      Others as `cross_entropy`.

    Returns:
      loss_BT: as `cross_entropy`.
      dhidden_BTD: in the dtype of hidden; with `axis` unrounded in that of the loss, and yet to be summed over it.
      dweight_DV: of this part of the vocabulary, in the dtype of the loss. **[D, V]**, as products give it.

    Raises:
      As `cross_entropy`.
    """
    options = _options(axis, scale, softcap, label_smoothing, z_loss, chunk_bytes)
    hidden_BTD, weight_VD, targets_BT = _check(hidden_BTD, weight_VD, targets_BT)
    if weights_BT.shape != targets_BT.shape:
        raise ValueError(f"weights has one number a token, {targets_BT.shape}, got {weights_BT.shape}")
    targets_BT = _own(options, weight_VD, targets_BT)
    return GRADIENTS(hidden_BTD, weight_VD, targets_BT, weights_BT, options=options, implementation=implementation)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    options: Options, implementation: str | None, hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    targets_BT = _own(options, weight_VD, targets_BT)
    return OPERATION(hidden_BTD, weight_VD, targets_BT, options=options, implementation=implementation)


def _forward(options: Options, implementation: str | None, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    if options.axis:
        # What a device's cotangent means there depends on how the caller's shard_map is set up.
        raise NotImplementedError(
            "cross_entropy over a cut vocabulary has no gradient of its own: use cross_entropy_and_gradients"
        )
    return _differentiable(options, implementation, *arrays), arrays


def _backward(options: Options, implementation: str | None, kept: Any, d_loss_BT: jax.Array) -> Any:
    hidden_BTD, weight_VD, targets_BT = kept
    _, dhidden_BTD, dweight_DV = GRADIENTS(
        hidden_BTD, weight_VD, targets_BT, d_loss_BT, options=options, implementation=implementation
    )
    return dhidden_BTD, dweight_DV.T.astype(weight_VD.dtype), None


_differentiable.defvjp(_forward, _backward)


def _own(options: Options, weight_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Targets counted from the first row of this device's part; those outside it are another's."""
    first = jax.lax.axis_index(options.axis) * weight_VD.shape[0] if options.axis else 0
    return targets_BT - first


def _options(
    axis: str | tuple[str, ...],
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
) -> Options:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no cap")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is a share from 0 up to below 1, got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"z_loss is a number from 0 up, got {z_loss}")
    return Options(
        (axis,) if isinstance(axis, str) else tuple(axis), scale, softcap, label_smoothing, z_loss, chunk_bytes
    )


def _check(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden, weight, targets = map(jnp.asarray, (hidden, weight, targets))
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(f"cross_entropy takes hidden [B, T, D] and weight [V, D], got {hidden.shape}, {weight.shape}")
    if hidden.dtype != weight.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"hidden and weight have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets has an integer a token, {hidden.shape[:2]}, got {targets.dtype}{targets.shape}")
    return hidden, weight, targets
