"""Softmax cross-entropy from hidden states, without ever holding all the logits.

Shapes: B rows, T tokens in a row, C tokens of one chunk of it, D hidden size, V vocabulary.

With ``logits_BTV = hidden_BTD @ weight_VD.T``, ``nll_BT = logsumexp(logits) - logits[target]`` and the loss is
``sum(weights_BT * nll_BT)``.

- Chunks are cut along T, so rows stay sharded as they come; one chunk of logits is alive at a time.
- The gradient is computed in the forward pass, while the chunk's logits are there: none is computed twice.
- Softmax and sums are float32 (float64 if the hidden states are); products take the hidden states' dtype.
- Sums, not means, are returned: accumulation and sharding then give the exact mean over tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ..layers.linear import matmul_precision
from ..sharding.rules import activation_sharding

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
    return _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, _columns(hidden_BTD, weight_VD, chunk_bytes))


def token_logprobs(hidden_BTD, weight_VD, targets_BT, *, chunk_bytes: int | None = None):
    """The log-probability, float32 [B, T] in nats, of each target. For scoring: no gradient flows through it."""
    columns = _columns(hidden_BTD, weight_VD, chunk_bytes)
    return lax.stop_gradient(-_nll(hidden_BTD, weight_VD, targets_BT, columns))


def _accumulator(hidden_BTD):
    return jnp.promote_types(hidden_BTD.dtype, jnp.float32)


def _columns(hidden_BTD, weight_VD, chunk_bytes: int | None) -> int:
    """Tokens of each row in a chunk: as even as the bound allows, so that the last chunk is seldom a short one."""
    rows, length, _ = hidden_BTD.shape
    token_bytes = weight_VD.shape[0] * 4
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES
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


def _zeros(shape, dtype, like):
    """Zeros that vary over the mesh axes that `like` varies over, as the carry of a loop under `shard_map` must."""
    return jnp.broadcast_to(jnp.zeros_like(like[0, 0, 0], dtype=dtype), shape)


def _slice(x, start, size: int):
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x, update, start):
    return lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), start, axis=1)


def _chunk(hidden_BCD, weight_VD, targets_BC):
    """(nll_BC, logits_BCV, logsumexp_BC) of one chunk."""
    dtype = hidden_BCD.dtype
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv",
        hidden_BCD,
        weight_VD.astype(dtype),
        precision=matmul_precision(dtype),
        preferred_element_type=_accumulator(hidden_BCD),
    )
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # "clip": a target of weight 0 may lie outside the vocabulary, and must not become a NaN.
    label_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    return lse_BC - label_BC, logits_BCV, lse_BC


def _nll(hidden_BTD, weight_VD, targets_BT, columns: int):
    def body(nll_BT, start, size):
        nll_BC, _, _ = _chunk(_slice(hidden_BTD, start, size), weight_VD, _slice(targets_BT, start, size))
        return _put(nll_BT, nll_BC, start)

    zeros = _zeros(targets_BT.shape, _accumulator(hidden_BTD), hidden_BTD)
    return _over_chunks(body, zeros, targets_BT.shape[1], columns)


def _sums(nll_BT, weights_BT):
    weights_BT = weights_BT.astype(nll_BT.dtype)
    return jnp.sum(jnp.where(weights_BT != 0, weights_BT * nll_BT, 0)), jnp.sum(weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, columns):
    return _sums(_nll(hidden_BTD, weight_VD, targets_BT, columns), weights_BT)


def _forward(hidden_BTD, weight_VD, targets_BT, weights_BT, columns):
    dtype, accumulator = hidden_BTD.dtype, _accumulator(hidden_BTD)
    precision = matmul_precision(dtype)
    compute_weight_VD = weight_VD.astype(dtype)
    # XLA:CPU refuses this product of bfloat16 with a float32 sum; widening it first changes no bit of the result.
    operand_dtype = accumulator if jax.default_backend() == "cpu" else dtype

    def body(carry, start, size):
        nll_BT, dhidden_BTD, dweight_DV = carry
        hidden_BCD, targets_BC = _slice(hidden_BTD, start, size), _slice(targets_BT, start, size)
        weights_BC1 = _slice(weights_BT, start, size)[..., None].astype(accumulator)
        nll_BC, logits_BCV, lse_BC = _chunk(hidden_BCD, compute_weight_VD, targets_BC)
        probability_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
        is_target_BCV = lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]
        dlogits_BCV = jnp.where(weights_BC1 != 0, weights_BC1 * (probability_BCV - is_target_BCV), 0).astype(dtype)
        dhidden_BCD = jnp.einsum(
            "bcv,vd->bcd", dlogits_BCV, compute_weight_VD, precision=precision, preferred_element_type=accumulator
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

    zeros = functools.partial(_zeros, like=hidden_BTD)
    carry = (
        zeros(targets_BT.shape, accumulator),
        zeros(hidden_BTD.shape, dtype),
        zeros(weight_VD.shape[::-1], accumulator),
    )
    nll_BT, dhidden_BTD, dweight_DV = _over_chunks(body, carry, targets_BT.shape[1], columns)
    # The weights ride along only for their dtype.
    residuals = dhidden_BTD, dweight_DV.T.astype(weight_VD.dtype), nll_BT, weights_BT
    return _sums(nll_BT, weights_BT), residuals


def _backward(columns, residuals, cotangents):
    del columns
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


def sharded_cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, mesh: Mesh, **options):
    """`cross_entropy` of rows cut over `mesh`: each device sums over its own rows, and only the sums travel.

    Left to itself the compiler adds up the weight's gradient over all devices once a chunk.
    """
    if mesh.size == 1:
        return cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, **options)
    rows = activation_sharding(("batch",), mesh).spec
    axes = rows[0]

    def local(hidden_BTD, weight_VD, targets_BT, weights_BT):
        # The transpose of pvary is the sum over devices of the weight's gradient.
        weight_VD = lax.pcast(weight_VD, axes, to="varying")
        sums = cross_entropy(hidden_BTD, weight_VD, targets_BT, weights_BT, **options)
        return lax.psum(sums, axes)

    specs = rows, PartitionSpec(), rows, rows
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(
        hidden_BTD, weight_VD, targets_BT, weights_BT
    )
