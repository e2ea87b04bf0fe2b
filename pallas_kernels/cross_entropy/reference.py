"""What cross_entropy means, in the plainest `jax.numpy`: all logits, and `jax.vjp`. For tests only.

Shapes: B rows, T tokens, D hidden size, V vocabulary of this device, W of all.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import Options


def cross_entropy(hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, *, options: Options) -> jax.Array:
    return _loss(hidden_BTD, _whole(options, weight_VD), _targets(options, weight_VD, targets_BT), options)


def cross_entropy_gradients(
    hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    V, wide = weight_VD.shape[0], jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    weight_WD, targets_BT = _whole(options, weight_VD), _targets(options, weight_VD, targets_BT)
    loss_BT = _loss(hidden_BTD, weight_WD, targets_BT, options)
    counts_BT1 = weights_BT[..., None] != 0
    _, pullback = jax.vjp(
        lambda hidden, weight: _loss(jnp.where(counts_BT1, hidden, 0), weight, targets_BT, options),
        hidden_BTD.astype(wide),
        weight_WD.astype(wide),
    )
    dhidden_BTD, dweight_WD = pullback(weights_BT.astype(wide))
    if not options.axis:
        return loss_BT, dhidden_BTD.astype(hidden_BTD.dtype), dweight_WD.T
    # Terms that sum up to it.
    dweight_VD = lax.dynamic_slice_in_dim(dweight_WD, lax.axis_index(options.axis) * V, V)
    return loss_BT, dhidden_BTD / lax.axis_size(options.axis), dweight_VD.T


def _whole(options: Options, weight_VD: jax.Array) -> jax.Array:
    return lax.all_gather(weight_VD, options.axis, tiled=True) if options.axis else weight_VD


def _targets(options: Options, weight_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return targets_BT + lax.axis_index(options.axis) * weight_VD.shape[0] if options.axis else targets_BT


def _loss(hidden_BTD: jax.Array, weight_WD: jax.Array, targets_BT: jax.Array, options: Options) -> jax.Array:
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    exact = lax.Precision.HIGHEST
    logits_BTW = jnp.einsum("btd,wd->btw", hidden_BTD.astype(wide), weight_WD.astype(wide), precision=exact)
    logits_BTW = logits_BTW * options.scale
    if options.softcap is not None:
        logits_BTW = options.softcap * jnp.tanh(logits_BTW / options.softcap)
    lse_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
    label_BT = jnp.take_along_axis(logits_BTW, targets_BT[..., None], axis=-1, mode="clip")[..., 0]
    e = options.label_smoothing
    return lse_BT - (1 - e) * label_BT - e * logits_BTW.mean(-1) + options.z_loss * lse_BT**2
