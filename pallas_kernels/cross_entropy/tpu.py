"""Cross-entropy on TPUs (Mosaic): the loss without its logits ever leaving the chip.

Shapes: B rows, T tokens in a row, N = B * T tokens, D hidden size, V vocabulary; n, v: tokens and words of a block.

The softmax's sum is taken online over tiles of the vocabulary (Milakov and Gimelshein 2018, arXiv:1805.02867), and for
each of 128 lanes by itself: what a tile adds is element by element, and lanes meet once, after the last tile.

Gradients are left to XLA: a kernel that keeps no logits computes them again, a fourth product of tokens, words and
width where XLA has three. By `python -m benchmarks.kernels --target v5p --op cross_entropy` (2,048 tokens, 6,144 words,
width 4,096) that product is 417,000 cycles, and all that XLA does to the logits of a forward pass 43,000; what it does
backward was not measured.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from . import Options

LANES = 128
TOKENS, WORDS = 1024, 768  # of a block at most, of 16 bits
PIECE = 512, 256  # tokens and words that are multiplied at a time: their program is unrolled
NOTHING = -1e30  # stands for -inf where a difference of two of them must not be nan
VMEM_BYTES = {"v5e": 96 << 20, "v6e": 96 << 20}
VMEM_ELSEWHERE = 56 << 20
BESIDE = 14 << 20  # for what is no block of hidden states or words: sums, results, spilled registers
MOST_WIDTH = 1 << 14


def cross_entropy_gradients(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a kernel would compute the logits twice, which costs more than XLA's passes over them")


def cross_entropy(hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, *, options: Options) -> jax.Array:
    lse_BT, label_BT, mean_BT = _statistics(hidden_BTD, weight_VD, targets_BT, options)
    if options.axis:
        largest_BT = lax.pmax(lse_BT, options.axis)
        lse_BT = largest_BT + jnp.log(lax.psum(jnp.exp(lse_BT - largest_BT), options.axis))
        # Of a target that is another device's, nothing was found here.
        label_BT, mean_BT = lax.psum(label_BT, options.axis), lax.pmean(mean_BT, options.axis)
    if e := options.label_smoothing:
        label_BT = (1 - e) * label_BT + e * mean_BT
    loss_BT = lse_BT - label_BT
    return loss_BT + options.z_loss * lse_BT**2 if options.z_loss else loss_BT


def _statistics(
    hidden_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-sum-exp, the target's logit (0 if it is not here) and the logits' mean, of these words."""
    (B, T, D), V = hidden_BTD.shape, weight_VD.shape[0]
    N, size = B * T, hidden_BTD.dtype.itemsize
    if hidden_BTD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"this kernel takes bfloat16 and float32, not {hidden_BTD.dtype}")
    if D * size > MOST_WIDTH:
        raise NotImplementedError(f"this kernel holds whole hidden states, of up to {MOST_WIDTH} bytes, not {D * size}")
    # Half as many of twice the bytes. Both blocks are there twice.
    tokens, most_words = TOKENS * 2 // size, WORDS * 2 // size
    while 2 * (tokens + most_words) * D * size > VMEM_BYTES.get(target_chip() or "", VMEM_ELSEWHERE) - BESIDE:
        tokens //= 2
    n = min(tokens, -(-N // 16) * 16)
    rows, words = (PIECE if size == 2 else (256, 128)) if n % PIECE[0] == 0 else (n, LANES)
    v = min(most_words, -(-V // words) * words)
    smooth = bool(options.label_smoothing)

    def kernel(hidden: Any, weight: Any, target: Any, lse: Any, label: Any, mean: Any, *scratch: Any) -> None:
        tile, last = pl.program_id(1), pl.num_programs(1) - 1
        most, total, found, summed = scratch

        @pl.when(tile == 0)
        def _() -> None:
            most[...] = jnp.full_like(most, NOTHING)
            for each in (total, found, summed):
                each[...] = jnp.zeros_like(each)

        def piece(index: Any, _: None) -> None:
            own = pl.ds(pl.multiple_of(index * rows, rows), rows)
            target_n1 = target[own, :]

            def part(word: Any, _: None) -> None:
                first = pl.multiple_of(word * words, words)
                logits = _logits(hidden[own, :], weight[pl.ds(first, words), :], options)
                column = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) + (tile * v + first)
                # Of each lane: words that far apart, and whether they are any.
                lanes = [(logits[:, at : at + LANES], column + at) for at in range(0, words, LANES)]
                seen = [jnp.where(at < V, x, NOTHING) for x, at in lanes] if V % v else [x for x, _ in lanes]
                old = most[own, :]
                new = old
                for x in seen:
                    new = jnp.maximum(new, x)
                added = sum(jnp.exp(x - new) for x in seen)
                most[own, :] = new
                total[own, :] = total[own, :] * jnp.exp(old - new) + added
                found[own, :] += sum(jnp.where(at == target_n1, x, 0) for x, (_, at) in zip(seen, lanes, strict=True))
                if smooth:
                    summed[own, :] += sum(jnp.where(at < V, x, 0) for x, at in lanes)

            lax.fori_loop(0, v // words, part, None)

        lax.fori_loop(0, n // rows, piece, None)

        @pl.when(tile == last)
        def _() -> None:
            largest = jnp.max(most[...], axis=1, keepdims=True)
            whole = jnp.sum(total[...] * jnp.exp(most[...] - largest), axis=1, keepdims=True)
            lse[...] = largest + jnp.log(whole)
            label[...] = jnp.sum(found[...], axis=1, keepdims=True)
            mean[...] = jnp.sum(summed[...], axis=1, keepdims=True) / V

    one = pl.BlockSpec((n, 1), lambda i, j: (i, 0))
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(N, n), pl.cdiv(V, v)),
        in_specs=[pl.BlockSpec((n, D), lambda i, j: (i, 0)), pl.BlockSpec((v, D), lambda i, j: (j, 0)), one],
        out_specs=[one] * 3,
        out_shape=[jax.ShapeDtypeStruct((N, 1), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((n, LANES), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=2 * (n + v) * D * size + BESIDE,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * D, transcendentals=N * V, bytes_accessed=(N * D + pl.cdiv(N, n) * V * D) * size
        ),
        name="cross_entropy",
    )(hidden_BTD.reshape(N, D), weight_VD, targets_BT.reshape(N, 1).astype(jnp.int32))
    return tuple(x.reshape(B, T) for x in found)


def _logits(hidden_nD: jax.Array, weight_vD: jax.Array, options: Options) -> jax.Array:
    precision = lax.Precision.HIGHEST if hidden_nD.dtype == jnp.float32 else lax.Precision.DEFAULT
    logits_nv = lax.dot_general(
        hidden_nD, weight_vD, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    if options.scale != 1:
        logits_nv = logits_nv * options.scale
    if options.softcap is not None:
        logits_nv = options.softcap * jnp.tanh(logits_nv / options.softcap)
    return logits_nv
