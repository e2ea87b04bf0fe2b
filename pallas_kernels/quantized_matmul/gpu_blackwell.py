"""Products with weights of 8 bits for Blackwell (Mosaic GPU), on the frame of `gpu_steps_blackwell.py`.

tcgen05 takes its left side from tensor memory, so there the weights are: who issues the products makes 16 bits of what
came as bytes, a step ahead of the tensor cores, and multiplies them by rows in shared memory as columns. The result
comes out turned, and is turned back on its way to memory. Values are exact in 16 bits; where blocks of inputs have
scales of their own, weights are scaled and rounded once.

Zero points are a small product of blocks' sums, left to XLA, as is the sum over splits, which keep all processors busy
where outputs are few.

Shapes: M rows, I inputs, O outputs, G blocks of inputs, S splits; n rows of a tile, k inputs of a step, b of a part of
it that shares a scale; o: outputs of a tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..gpu_steps import CHUNK, MOST_STAGES, SHARED_MEMORY, divided, i32, in_bands, read, swizzled
from ..gpu_steps_blackwell import ORDERED, PROCESSORS, ROWS, SPREAD, Plan, launch
from .activations import ACTIVATIONS, finish
from .formats import FLOAT8, PACKED, QuantizedWeight, scales_of
from .gpu_hopper import IN_KERNEL, MOST_SPLITS, by_output, of_zeros

K = 128  # inputs of a step
LEFTS = 2  # steps' weights in tensor memory
OF_OUTPUT = SPREAD.reduce(1)


class Cut(NamedTuple):
    """Rows of a tile, splits, and the frame's plan."""

    n: int
    splits: int
    plan: Plan


def cut_of(M: int, I: int, O: int, processors: int = PROCESSORS) -> Cut:
    n = next((n for n in (16, 32, 64) if n >= M), 128)
    tiles, steps = pl.cdiv(M, n) * pl.cdiv(O, ROWS), I // K

    def time(splits: int) -> float:
        return pl.cdiv(tiles * splits, processors) * pl.cdiv(steps, splits) * (1 + 0.01 * splits)

    # Writing and reading parts in float32 is to cost half of what the weights do.
    splits = min(range(1, max(1, min(MOST_SPLITS, I // (8 * n), steps // 4)) + 1), key=time)
    stages = min(MOST_STAGES, (SHARED_MEMORY - 4 * ROWS * min(n, CHUNK)) // (K * (ROWS + 2 * n)))
    return Cut(n, splits, Plan(n, stages, processors))


def product(
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    cut: Cut | None = None,
) -> jax.Array:
    """[M, O]."""
    (M, I), (O, _), dtype = x_MI.shape, weight.shape[-2:], x_MI.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Blackwell kernel takes bfloat16 and float16, got {dtype}")
    if weight.format in PACKED or weight.inputs_first:
        raise NotImplementedError("the Blackwell kernel takes weights of whole bytes, outputs first")
    if I % K or O % 64 or O < ROWS:
        raise NotImplementedError(f"the Blackwell kernel takes 128, 256, ... inputs, 128, 192, ... outputs: {I}, {O}")
    size = weight.block_sizes[1] if weight.scales.shape[-2] > 1 else None
    if size is not None and (size % 32 or (size % K and K % size)):
        raise NotImplementedError(f"the Blackwell kernel takes blocks of 32, 64 or 128, 256, ... inputs, got {size}")
    if not M:
        return jnp.zeros((0, O), out_dtype)
    f = cut or cut_of(M, I, O)
    rows = max(f.n, -(-M // 8) * 8)
    x = x_MI if rows == M else jnp.pad(x_MI, ((0, rows - M), (0, 0)))
    given = {"x": x, "w": weight.values, "scales": by_output(weight.scales, weight)}
    if f.splits == 1 and weight.zeros is None and activation in IN_KERNEL:
        if bias_O is not None:
            given["bias"] = bias_O.astype(jnp.float32)
        return _launch(given, activation, out_dtype, size, f)[0, :M]
    sums_MO = jnp.sum(_launch(given, None, jnp.float32, size, f)[:, :M], axis=0)
    if weight.zeros is not None:
        sums_MO -= of_zeros(x_MI, weight, given["scales"])
    return finish(sums_MO, bias_O, activation, out_dtype)


def _launch(given: dict[str, jax.Array], activation: str | None, out_dtype: Any, size: int | None, f: Cut) -> jax.Array:
    """[S, M, O]: the sums of each split, scaled; with bias and activation where there is one."""
    (M, I), O, dtype, p = given["x"].shape, given["scales"].shape[-1], given["x"].dtype, f.plan
    bytes_dtype = given["w"].dtype
    steps, tiles, chunk = pl.cdiv(I // K, f.splits), (pl.cdiv(O, ROWS), pl.cdiv(M, f.n)), min(f.n, CHUNK)
    b = min(64, size or 64)
    scratch = {
        "x_smem": plgpu.SMEM((p.stages, f.n, K), dtype, transforms=swizzled(64, dtype)),
        "w_smem": plgpu.SMEM((p.stages, ROWS, K), bytes_dtype, transforms=swizzled(K, bytes_dtype)),
        "out": plgpu.SMEM(
            (chunk, ROWS), out_dtype, transforms=swizzled(128 // jnp.dtype(out_dtype).itemsize, out_dtype)
        ),
        "left": plgpu.TMEM((ROWS, LEFTS * K), dtype, packed=True),
        "read": plgpu.Barrier(num_barriers=LEFTS, **ORDERED),
    }

    def tile(refs: Any, nth: Any) -> dict[str, Any]:
        split, rest = divided(nth, i32(tiles[0] * tiles[1]))
        below, beside = in_bands(rest, i32(tiles[0]), tiles[1])
        first = split * i32(steps)
        return {
            "split": split,
            "output": jnp.minimum(below * i32(ROWS), i32(O - ROWS)),
            "row": jnp.minimum(beside * i32(f.n), i32(M - f.n)),
            "first": first,
            "steps": jnp.minimum(jnp.maximum(i32(I // K) - first, i32(0)), i32(steps)),
        }

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        inputs = pl.ds((t["first"] + s) * i32(K), K)
        plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(t["row"], f.n), inputs], refs["x_smem"].at[slot], ready)
        plgpu.copy_gmem_to_smem(refs["w"].at[pl.ds(t["output"], ROWS), inputs], refs["w_smem"].at[slot], ready)

    def multiply(refs: Any, t: Any, s: Any, slot: Any, sums: Any, nth: Any) -> None:
        half = lax.rem(nth, i32(LEFTS))
        pl.when(nth >= LEFTS)(lambda: plgpu.barrier_wait(refs["read"].at[half]))
        bytes_ok = read(refs["w_smem"].at[slot], SPREAD)
        for first in range(0, K, b):
            w_ob = _widened(lax.slice(bytes_ok, (0, first), (ROWS, first + b)), dtype)
            if size is not None:
                at = lax.div((t["first"] + s) * i32(K) + i32(first), i32(size))
                scale_o = scales_of(read(refs["scales"].at[at, pl.ds(t["output"], ROWS)], OF_OUTPUT), jnp.float32)
                w_ob = (w_ob.astype(jnp.float32) * lax.broadcast_in_dim(scale_o, w_ob.shape, [0])).astype(dtype)
            plgpu.async_store_tmem(refs["left"].at[:, pl.ds(half * i32(K) + i32(first), b)], w_ob)
        plgpu.commit_tmem()
        left, right = refs["left"].at[:, pl.ds(half * i32(K), K)], plgpu.transpose_ref(refs["x_smem"].at[slot], (1, 0))
        plgpu.tcgen05_mma(sums, left, right, accumulate=s > 0)
        plgpu.tcgen05_commit_arrive(refs["read"].at[half])

    def store(refs: Any, t: Any, place: int, sums_on: jax.Array) -> None:
        own = pl.ds(t["output"], ROWS)

        def spread(of_o: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(of_o, sums_on.shape, [0])

        if size is None:
            sums_on = sums_on * spread(scales_of(read(refs["scales"].at[0, own], OF_OUTPUT), jnp.float32))
        if "bias" in refs:
            sums_on = sums_on + spread(read(refs["bias"].at[own], OF_OUTPUT))
        if activation is not None:
            sums_on = ACTIVATIONS[activation](sums_on)
        turned = plgpu.layout_cast(sums_on.astype(out_dtype), plgpu.Layout.TCGEN05_TRANSPOSED)
        plgpu.transpose_ref(refs["out"], (1, 0))[...] = turned
        plgpu.commit_smem()
        rows = pl.ds(t["row"] + i32(place), chunk)
        plgpu.copy_smem_to_gmem(refs["out"], refs["y"].at[t["split"], rows, own])

    out, total = jax.ShapeDtypeStruct((f.splits, M, O), out_dtype), f.splits * tiles[0] * tiles[1]
    return launch("quantized_matmul", p, given, out, scratch, lambda _: i32(total), tile, load, multiply, store)


def _widened(bytes_ob: jax.Array, dtype: Any) -> jax.Array:
    if bytes_ob.dtype == FLOAT8 and dtype == jnp.bfloat16:
        bytes_ob = bytes_ob.astype(jnp.float32)  # there is no instruction from one to the other
    return bytes_ob.astype(dtype)
