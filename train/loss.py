"""Softmax cross-entropy from hidden states, without ever holding all the logits.

Shapes: B rows, T tokens in a row, D hidden size, V vocabulary.

The mathematics is the operation `cross_entropy`; here is what it has to do with rows, weights and meshes. With the
``nll_BT`` of each token, the loss is ``sum(weights_BT * nll_BT)``.

- The gradient is computed in the forward pass, while a chunk's logits are there: none is computed twice.
- On a mesh each device sums over its own rows and tokens, and over its own part of the vocabulary; the softmax takes
  its maximum and its sum over the parts, and the weight's gradient travels once, not once a chunk.
- Sums, not means, are returned: accumulation and sharding then give the exact mean over tokens.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ..pallas_kernels import cross_entropy as operation
from ..sharding.platform import platform
from ..sharding.rules import ACTIVATION_RULES, PARAMETER_RULES, current, mesh_axes, partition_spec

# Every chunk adds to the whole weight gradient, so a chunk must be large enough to hide that (256 tokens on a CPU, by
# the ratio of its arithmetic to its memory speed; some 2,000 on an accelerator); beyond that a CPU loses its cache.
CPU_CHUNK_BYTES, CHUNK_BYTES, LEAST_TOKENS = 32 * 2**20, 512 * 2**20, 256


@dataclasses.dataclass(frozen=True)
class Logits:
    """How logits come from hidden states beside the product, and in what chunks.

    Attributes:
        scale, softcap: as the operation `cross_entropy` takes them.
        chunk_bytes: bound on one chunk's float32 logits (at least one token of each row is taken). None: 32 MiB on a
            CPU and 512 MiB elsewhere, but never fewer than 256 tokens.
    """

    scale: float = 1.0
    softcap: float | None = None
    chunk_bytes: int | None = None

    def options(self, weight_VD) -> dict[str, Any]:
        """For the operation; V is this device's part of the vocabulary."""
        chunk_bytes = self.chunk_bytes
        if chunk_bytes is None:
            chunk_bytes = CPU_CHUNK_BYTES if platform() == "cpu" else CHUNK_BYTES
            chunk_bytes = max(chunk_bytes, LEAST_TOKENS * weight_VD.shape[0] * 4)
        return {"scale": self.scale, "softcap": self.softcap, "chunk_bytes": chunk_bytes}


PLAIN = Logits()


def cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, *, logits: Logits = PLAIN):
    """The weighted sum of the tokens' negative log-likelihoods in nats, and the sum of the weights.

    Args:
        hidden_BTD: Hidden states after the final norm; their dtype is that of the products.
        weight_VD: Unembedding weight. Its gradient is summed in float32 and returned in its own dtype.
        targets_BT: int32 token ids; where the weight is 0 they may be anything.
        weights_BT: float32 weight of each token, 0 for padding.
        logits: What lies between the product and the softmax.

    Returns:
        ``(loss_sum, weight_sum)``, two float32 scalars, differentiable in hidden_BTD, weight_VD and weights_BT.
        Without differentiation no gradient is computed, so evaluation calls the same function.
    """
    return _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, logits)


def token_logprobs(hidden_BTD, weight_VD, targets_BT, *, logits: Logits = PLAIN):
    """The log-probability, float32 [B, T] in nats, of each target. For scoring: no gradient flows through it."""
    return lax.stop_gradient(-_nll(hidden_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, logits))


def _nll(hidden_BTD, weight_VD, targets_BT, logits: Logits, vocab_axes=()):
    return operation.cross_entropy(hidden_BTD, weight_VD, targets_BT, axis=vocab_axes, **logits.options(weight_VD))


def _nll_and_gradients(hidden_BTD, weight_VD, targets_BT, weights_BT, logits: Logits, vocab_axes=()):
    return operation.cross_entropy_and_gradients(
        hidden_BTD, weight_VD, targets_BT, weights_BT, axis=vocab_axes, **logits.options(weight_VD)
    )


class _Local:
    """What one device does of a loss that is cut over `mesh`: its rows and tokens, and its part of the vocabulary."""

    def __init__(self, mesh, targets_BT, weight_VD):
        rules, tokens = ACTIVATION_RULES, ("batch", "tokens")
        # A pipeline's stages hold the same hidden states: each takes its share of the tokens.
        share = mesh.shape.get("stage", 1) * math.prod(mesh.shape[axis] for axis in mesh_axes("tokens", mesh))
        if targets_BT.shape[1] % share == 0:
            rules = {**rules, "tokens": (*rules["tokens"], "stage")}
        self.rows = partition_spec(tokens, mesh, rules, targets_BT.shape)
        self.weight = partition_spec(("vocab", "embed"), mesh, PARAMETER_RULES, weight_VD.shape)
        self.token_axes = tuple(axis for name in tokens for axis in mesh_axes(name, mesh, rules))
        self.vocab_axes, self.width_axes = (mesh_axes(name, mesh, PARAMETER_RULES) for name in ("vocab", "embed"))

    def take(self, weight_VD, dtype):
        """This part of the vocabulary, all of the width."""
        weight_VD = weight_VD.astype(dtype)
        if self.width_axes:
            weight_VD = lax.all_gather(weight_VD, self.width_axes, axis=1, tiled=True)
        return weight_VD

    def nll(self, hidden_BTD, weight_VD, targets_BT, logits):
        return _nll(hidden_BTD, self.take(weight_VD, hidden_BTD.dtype), targets_BT, logits, self.vocab_axes)

    def nll_and_gradients(self, hidden_BTD, weight_VD, targets_BT, weights_BT, logits):
        nll_BT, dhidden_BTD, dweight_DV = _nll_and_gradients(
            hidden_BTD,
            self.take(weight_VD, hidden_BTD.dtype),
            targets_BT,
            weights_BT,
            logits,
            self.vocab_axes,
        )
        if self.vocab_axes:
            dhidden_BTD = lax.psum(dhidden_BTD, self.vocab_axes).astype(hidden_BTD.dtype)
        if self.width_axes:
            dweight_DV = lax.psum_scatter(dweight_DV, self.width_axes, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in self.token_axes if axis not in self.width_axes)
        return nll_BT, dhidden_BTD, lax.psum(dweight_DV, others) if others else dweight_DV


def _sums(nll_BT, weights_BT):
    weights_BT = weights_BT.astype(nll_BT.dtype)
    return jnp.sum(jnp.where(weights_BT != 0, weights_BT * nll_BT, 0)), jnp.sum(weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, logits):
    mesh = current()
    if mesh is None:
        return _sums(_nll(hidden_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, logits), weights_BT)
    local = _Local(mesh, targets_BT, weight_VD)
    specs = PartitionSpec(*local.rows, None), local.weight, local.rows
    nll = functools.partial(local.nll, logits=logits)
    nll_BT = jax.shard_map(nll, in_specs=specs, out_specs=local.rows, check_vma=False)(
        hidden_BTD, weight_VD, targets_BT
    )
    return _sums(nll_BT, weights_BT)


def _forward(hidden_BTD, weight_VD, targets_BT, weights_BT, logits):
    mesh = current()
    if mesh is None:
        compute_weight_VD = weight_VD.astype(hidden_BTD.dtype)
        found = _nll_and_gradients(hidden_BTD, compute_weight_VD, targets_BT, weights_BT, logits)
    else:
        local = _Local(mesh, targets_BT, weight_VD)
        hidden = PartitionSpec(*local.rows, None)
        found = jax.shard_map(
            functools.partial(local.nll_and_gradients, logits=logits),
            in_specs=(hidden, local.weight, local.rows, local.rows),
            out_specs=(local.rows, hidden, PartitionSpec(*local.weight[::-1])),
            check_vma=False,
        )(hidden_BTD, weight_VD, targets_BT, weights_BT)
    nll_BT, dhidden_BTD, dweight_DV = found
    # The weights ride along only for their dtype.
    residuals = dhidden_BTD, dweight_DV.T.astype(weight_VD.dtype), nll_BT, weights_BT
    return _sums(nll_BT, weights_BT), residuals


def _backward(logits, residuals, cotangents):
    del logits
    dhidden_BTD, dweight_VD, nll_BT, weights_BT = residuals
    dloss, dweight_sum = cotangents
    dweights_BT = dloss * jnp.where(weights_BT != 0, nll_BT, 0) + dweight_sum
    return (
        dloss.astype(dhidden_BTD.dtype) * dhidden_BTD,
        dloss.astype(dweight_VD.dtype) * dweight_VD,
        None,
        dweights_BT.astype(weights_BT.dtype),
    )


_cross_entropy.defvjp(_forward, _backward)
