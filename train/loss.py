"""Softmax cross-entropy from hidden states, without ever holding all the logits.

Shapes: B rows, T tokens in a row, C tokens of one chunk of it, D hidden size, V vocabulary.

With ``logits_BTV = hidden_BTD @ weight_VD.T``, ``nll_BT = logsumexp(logits) - logits[target]`` and the loss is
``sum(weights_BT * nll_BT)``.

- Chunks are cut along T, so rows stay sharded as they come; one chunk of logits is alive at a time.
- The gradient is computed in the forward pass, while the chunk's logits are there: none is computed twice.
- Softmax and sums are float32 (float64 if the hidden states are); products take the hidden states' dtype.
- On a mesh each device sums over its own rows and tokens, and over its own part of the vocabulary; the softmax takes
  its maximum and its sum over the parts, and the weight's gradient travels once, not once a chunk.
- Sums, not means, are returned: accumulation and sharding then give the exact mean over tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ..layers.linear import matmul_precision
from ..sharding.platform import platform
from ..sharding.rules import ACTIVATION_RULES, PARAMETER_RULES, current, mesh_axes, partition_spec

# Every chunk adds to the whole weight gradient, so a chunk must be large enough to hide that (256 tokens on a CPU, by
# the ratio of its arithmetic to its memory speed; some 2,000 on an accelerator); beyond that a CPU loses its cache.
CPU_CHUNK_BYTES, CHUNK_BYTES, LEAST_TOKENS = 32 * 2**20, 512 * 2**20, 256


def cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, *, chunk_bytes: int | None = None):
    """The weighted sum of the tokens' negative log-likelihoods in nats, and the sum of the weights.

    Args:
        hidden_BTD: Hidden states after the final norm; their dtype is that of the products.
        weight_VD: Unembedding weight. Its gradient is summed in float32 and returned in its own dtype.
        targets_BT: int32 token ids; where the weight is 0 they may be anything.
        weights_BT: float32 weight of each token, 0 for padding.
        chunk_bytes: Bound on one chunk's float32 logits (at least one token of each row is taken). By default 32 MiB
            on a CPU and 512 MiB elsewhere, but never fewer than 256 tokens.

    Returns:
        ``(loss_sum, weight_sum)``, two float32 scalars, differentiable in hidden_BTD, weight_VD and weights_BT.
        Without differentiation no gradient is computed, so evaluation calls the same function.
    """
    return _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, chunk_bytes)


def token_logprobs(hidden_BTD, weight_VD, targets_BT, *, chunk_bytes: int | None = None):
    """The log-probability, float32 [B, T] in nats, of each target. For scoring: no gradient flows through it."""
    columns = _columns(hidden_BTD, weight_VD, chunk_bytes)
    return lax.stop_gradient(-_nll(hidden_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, columns))


def _accumulator(hidden_BTD):
    return jnp.promote_types(hidden_BTD.dtype, jnp.float32)


def _columns(hidden_BTD, weight_VD, chunk_bytes: int | None) -> int:
    """Tokens of each row in a chunk: as even as the bound allows, so that the last chunk is seldom a short one."""
    rows, length, _ = hidden_BTD.shape
    token_bytes = weight_VD.shape[0] * 4
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if platform() == "cpu" else CHUNK_BYTES
        chunk_bytes = max(chunk_bytes, LEAST_TOKENS * token_bytes)
    most = max(1, chunk_bytes // (rows * token_bytes))
    chunks = -(-length // most)
    return -(-length // chunks)


def _over_chunks(body, carry, length: int, columns: int):
    """Runs ``carry = body(carry, start, size)`` over the chunks; sizes are static, a shorter last chunk comes apart."""
    full, rest = divmod(length, columns)
    if full == 1:
        carry = body(carry, 0, columns)
    elif full > 1:
        carry = lax.fori_loop(0, full, lambda i, carry: body(carry, i * columns, columns), carry)
    return body(carry, full * columns, rest) if rest else carry


def _slice(x, start, size: int):
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x, update, start):
    return lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), start, axis=1)


def _chunk(hidden_BCD, weight_VD, targets_BC, vocab_axes=()):
    """(nll_BC, logits_BCV, logsumexp_BC) of one chunk; V is this device's part of the vocabulary.

    Targets count from the part's first row; those outside it are another device's, or anybody's where the weight is 0.
    """
    dtype = hidden_BCD.dtype
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv",
        hidden_BCD,
        weight_VD,
        precision=matmul_precision(dtype),
        preferred_element_type=_accumulator(hidden_BCD),
    )
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # "clip": a target of weight 0 may lie outside the vocabulary, and must not become a NaN.
    label_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    if vocab_axes:
        largest_BC = lax.pmax(lse_BC, vocab_axes)
        lse_BC = largest_BC + jnp.log(lax.psum(jnp.exp(lse_BC - largest_BC), vocab_axes))
        is_here_BC = (targets_BC >= 0) & (targets_BC < logits_BCV.shape[-1])
        label_BC = lax.psum(jnp.where(is_here_BC, label_BC, 0), vocab_axes)
    return lse_BC - label_BC, logits_BCV, lse_BC


def _nll(hidden_BTD, weight_VD, targets_BT, columns: int, vocab_axes=()):
    def body(nll_BT, start, size):
        nll_BC, _, _ = _chunk(_slice(hidden_BTD, start, size), weight_VD, _slice(targets_BT, start, size), vocab_axes)
        return _put(nll_BT, nll_BC, start)

    zeros = jnp.zeros(targets_BT.shape, _accumulator(hidden_BTD))
    return _over_chunks(body, zeros, targets_BT.shape[1], columns)


def _nll_and_gradients(hidden_BTD, weight_VD, targets_BT, weights_BT, columns: int, vocab_axes=()):
    """nll_BT, and the gradients of the weighted sum: dhidden_BTD (this part of the vocabulary's) and dweight_DV."""
    dtype, accumulator = hidden_BTD.dtype, _accumulator(hidden_BTD)
    precision = matmul_precision(dtype)
    # XLA:CPU refuses this product of bfloat16 with a float32 sum; widening it first changes no bit of the result.
    operand_dtype = accumulator if platform() == "cpu" else dtype

    def body(carry, start, size):
        nll_BT, dhidden_BTD, dweight_DV = carry
        hidden_BCD, targets_BC = _slice(hidden_BTD, start, size), _slice(targets_BT, start, size)
        weights_BC1 = _slice(weights_BT, start, size)[..., None].astype(accumulator)
        nll_BC, logits_BCV, lse_BC = _chunk(hidden_BCD, weight_VD, targets_BC, vocab_axes)
        probability_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
        is_target_BCV = lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]
        dlogits_BCV = jnp.where(weights_BC1 != 0, weights_BC1 * (probability_BCV - is_target_BCV), 0).astype(dtype)
        dhidden_BCD = jnp.einsum(
            "bcv,vd->bcd", dlogits_BCV, weight_VD, precision=precision, preferred_element_type=accumulator
        )
        # [D, V], not [V, D]: the left side of this product is transposed on a CPU, and the logits are the larger one.
        dweight_DV += jnp.einsum(
            "bcd,bcv->dv",
            hidden_BCD.astype(operand_dtype),
            dlogits_BCV.astype(operand_dtype),
            precision=precision,
            preferred_element_type=accumulator,
        )
        return _put(nll_BT, nll_BC, start), _put(dhidden_BTD, dhidden_BCD, start), dweight_DV

    carry = (
        jnp.zeros(targets_BT.shape, accumulator),
        # Parts of the vocabulary are yet to be added up, so these are not rounded here.
        jnp.zeros(hidden_BTD.shape, accumulator if vocab_axes else dtype),
        jnp.zeros(weight_VD.shape[::-1], accumulator),
    )
    return _over_chunks(body, carry, targets_BT.shape[1], columns)


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

    def take(self, weight_VD, targets_BT, dtype):
        """This part of the vocabulary, all of the width; targets counted from its first row."""
        weight_VD = weight_VD.astype(dtype)
        if self.width_axes:
            weight_VD = lax.all_gather(weight_VD, self.width_axes, axis=1, tiled=True)
        first = lax.axis_index(self.vocab_axes) * weight_VD.shape[0] if self.vocab_axes else 0
        return weight_VD, targets_BT - first

    def nll(self, hidden_BTD, weight_VD, targets_BT, chunk_bytes):
        weight_VD, targets_BT = self.take(weight_VD, targets_BT, hidden_BTD.dtype)
        columns = _columns(hidden_BTD, weight_VD, chunk_bytes)
        return _nll(hidden_BTD, weight_VD, targets_BT, columns, self.vocab_axes)

    def nll_and_gradients(self, hidden_BTD, weight_VD, targets_BT, weights_BT, chunk_bytes):
        weight_VD, targets_BT = self.take(weight_VD, targets_BT, hidden_BTD.dtype)
        columns = _columns(hidden_BTD, weight_VD, chunk_bytes)
        nll_BT, dhidden_BTD, dweight_DV = _nll_and_gradients(
            hidden_BTD, weight_VD, targets_BT, weights_BT, columns, self.vocab_axes
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
def _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, chunk_bytes):
    mesh = current()
    if mesh is None:
        columns = _columns(hidden_BTD, weight_VD, chunk_bytes)
        return _sums(_nll(hidden_BTD, weight_VD.astype(hidden_BTD.dtype), targets_BT, columns), weights_BT)
    local = _Local(mesh, targets_BT, weight_VD)
    specs = PartitionSpec(*local.rows, None), local.weight, local.rows
    nll = functools.partial(local.nll, chunk_bytes=chunk_bytes)
    nll_BT = jax.shard_map(nll, in_specs=specs, out_specs=local.rows, check_vma=False)(
        hidden_BTD, weight_VD, targets_BT
    )
    return _sums(nll_BT, weights_BT)


def _forward(hidden_BTD, weight_VD, targets_BT, weights_BT, chunk_bytes):
    mesh = current()
    if mesh is None:
        columns, compute_weight_VD = _columns(hidden_BTD, weight_VD, chunk_bytes), weight_VD.astype(hidden_BTD.dtype)
        found = _nll_and_gradients(hidden_BTD, compute_weight_VD, targets_BT, weights_BT, columns)
    else:
        local = _Local(mesh, targets_BT, weight_VD)
        hidden = PartitionSpec(*local.rows, None)
        found = jax.shard_map(
            functools.partial(local.nll_and_gradients, chunk_bytes=chunk_bytes),
            in_specs=(hidden, local.weight, local.rows, local.rows),
            out_specs=(local.rows, hidden, PartitionSpec(*local.weight[::-1])),
            check_vma=False,
        )(hidden_BTD, weight_VD, targets_BT, weights_BT)
    nll_BT, dhidden_BTD, dweight_DV = found
    # The weights ride along only for their dtype.
    residuals = dhidden_BTD, dweight_DV.T.astype(weight_VD.dtype), nll_BT, weights_BT
    return _sums(nll_BT, weights_BT), residuals


def _backward(chunk_bytes, residuals, cotangents):
    del chunk_bytes
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
