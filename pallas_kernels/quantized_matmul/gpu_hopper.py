"""Products with int8 and float8 weights for Hopper (Mosaic GPU), on the frame of `gpu_steps.py`.

wgmma takes its left side from registers, so there the weights are: a warpgroup has 64 outputs, makes bfloat16 of what
it read as bytes, and multiplies by rows in shared memory as columns. So 8 rows of decoding are 8 columns and no more,
and a weight is read once for each 256 rows. The result comes out turned, and is turned back on its way to memory.

Values are exact in 16 bits and multiplied bare: with several blocks of inputs, each block's sums are scaled and added
(at few rows that is less work than to scale weights). Zero points are a small product of blocks' sums, left to XLA, as
is the sum over splits, which keep all processors busy where outputs are few.

Shapes: M rows, I inputs, O outputs, G blocks of inputs, S splits; n rows of a tile, k inputs of a step, b of a product.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from ..gpu_steps import (
    CHUNK,
    MOST_STAGES,
    PROCESSORS,
    ROWS,
    SHARED_MEMORY,
    Plan,
    divided,
    i32,
    in_bands,
    launch,
    read,
    swizzled,
)
from .activations import ACTIVATIONS, finish
from .formats import QuantizedWeight, expand, scales_of

FORMATS = ("int8", "fp8_e4m3")
IN_KERNEL = (None, "relu", "silu")
MOST_SPLITS = 8
OF_OUTPUT = plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Cut:
    """Rows of a tile, inputs of a step and of one product, splits, and the frame's plan."""

    n: int
    k: int
    b: int
    splits: int
    plan: Plan


def cut_of(M: int, I: int, O: int, size: int | None, processors: int = PROCESSORS) -> Cut:
    """In closed form; `size` is how many inputs share a scale, None for all."""
    n = next((n for n in (8, 16, 32, 64, 128) if n >= M), 256)
    k = 64 if n == 256 else 128
    b = min(64, size or 64)
    if size is not None:
        n = min(n, 64)  # two accumulators
        k = 128
        if size % 32 or (size % 128 and 128 % size):
            raise NotImplementedError(f"the Hopper kernel takes blocks of 32, 64 or 128, 256, ... inputs, got {size}")
    if I % 128 or O % ROWS:
        raise NotImplementedError(f"the Hopper kernel takes I in multiples of 128 and O of 64, got {I} and {O}")
    tiles, steps = pl.cdiv(M, n) * pl.cdiv(O, 2 * ROWS), I // k

    def time(splits: int) -> float:
        return pl.cdiv(tiles * splits, processors) * pl.cdiv(steps, splits) * (1 + 0.01 * splits)

    # Writing and reading parts in float32 is to cost half of what the weights do.
    cheap = max(1, min(MOST_SPLITS, I // (8 * n), steps // 4))
    splits = min(range(1, cheap + 1), key=time)
    stage = 2 * ROWS * k + 2 * n * k + (4 * 2 * ROWS * 4 if size else 0)
    out = 2 * 4 * ROWS * min(n, CHUNK)
    return Cut(n, k, b, splits, Plan(2, 1, n, min(MOST_STAGES, (SHARED_MEMORY - out) // stage), processors))


def product(
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    cut: Cut | None = None,
) -> jax.Array:
    (M, I), (O, _), dtype = x_MI.shape, weight.shape, x_MI.dtype
    if weight.format not in FORMATS:
        raise NotImplementedError(f"the Hopper kernel takes weights in {' and '.join(FORMATS)}, got {weight.format}")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Hopper kernel takes bfloat16 and float16, got {dtype}")
    grouped = weight.scales.shape[0] > 1
    size = weight.block_sizes[1] if grouped else None
    f = cut or cut_of(M, I, O, size)
    if not M:
        return jnp.zeros((0, O), out_dtype)
    scales_GO = _by_output(scales_of(weight.scales, jnp.float32), weight)
    rows = max(f.n, -(-M // 8) * 8)
    x = x_MI if rows == M else jnp.pad(x_MI, ((0, rows - M), (0, 0)))
    alone = f.splits == 1 and weight.zeros is None and activation in IN_KERNEL
    bias = bias_O.astype(jnp.float32) if alone and bias_O is not None else None
    sums_SMO = _launch(
        x, weight.values, scales_GO, bias, activation if alone else None, out_dtype if alone else jnp.float32, size, f
    )
    if alone:
        return sums_SMO[0, :M]
    sums_MO = jnp.sum(sums_SMO[:, :M], axis=0)
    if weight.zeros is not None:
        size = weight.block_sizes[1]
        G = len(weight.scales)
        x_MGB = jnp.pad(x_MI, ((0, 0), (0, G * size - I))).reshape(M, G, size)
        offsets_GO = scales_GO * _by_output(weight.zeros.astype(jnp.float32), weight)
        totals_MG = jnp.sum(x_MGB, axis=2, dtype=jnp.float32)
        sums_MO -= jnp.matmul(totals_MG, offsets_GO, precision=lax.Precision.HIGHEST)
    return finish(sums_MO, bias_O, activation, out_dtype)


def _by_output(blocks_GP: jax.Array, weight: QuantizedWeight) -> jax.Array:
    G, O = len(blocks_GP), weight.shape[0]
    return jnp.broadcast_to(expand(blocks_GP, (weight.block[0], 1), (O, G)).T, (G, O))


def _launch(
    x_MI: jax.Array,
    values_OI: jax.Array,
    scales_GO: jax.Array,
    bias_O: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    size: int | None,
    f: Cut,
) -> jax.Array:
    """[S, M, O]: the sums of each split, scaled; with bias and activation where there is one."""
    (M, I), O, dtype, p = x_MI.shape, len(values_OI), x_MI.dtype, f.plan
    steps = pl.cdiv(I // f.k, f.splits)
    tiles = pl.cdiv(O, 2 * ROWS), pl.cdiv(M, f.n)
    chunk = min(f.n, CHUNK)
    # Of a step: products of b inputs, some of which share a scale.
    products = f.k // f.b
    shared = min(f.k, size or f.k) // f.b
    scratch = {
        "x": plgpu.SMEM((p.stages, f.n, f.k), dtype, transforms=swizzled(f.b, dtype)),
        "w": plgpu.SMEM((p.stages, 2, ROWS, f.k), values_OI.dtype, transforms=swizzled(f.k, values_OI.dtype)),
        "out": plgpu.SMEM(
            (2, chunk, ROWS), out_dtype, transforms=swizzled(128 // jnp.dtype(out_dtype).itemsize, out_dtype)
        ),
        "ready": plgpu.Barrier(num_barriers=p.stages, num_arrivals=3 if size is None else 5),
        "free": plgpu.Barrier(num_barriers=p.stages, num_arrivals=2),
    }
    scales = products // shared
    if size is not None:
        scratch["scales"] = plgpu.SMEM((p.stages, 2, scales, ROWS), jnp.float32)
    given = {"x": x_MI, "w": values_OI, "scales": scales_GO}
    if bias_O is not None:
        given["bias"] = bias_O

    def tile(refs: dict[str, Any], nth: Any) -> dict[str, Any]:
        split, rest = divided(nth, i32(tiles[0] * tiles[1]))
        below, beside = in_bands(rest, i32(tiles[0]), tiles[1])
        first = split * i32(steps)
        return {
            "split": split,
            "outputs": [jnp.minimum(below * i32(2 * ROWS) + i32(ROWS * g), i32(O - ROWS)) for g in range(2)],
            "row": jnp.minimum(beside * i32(f.n), i32(M - f.n)),
            "first": first,
            "steps": jnp.minimum(jnp.maximum(i32(I // f.k) - first, i32(0)), i32(steps)),
        }

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        at = t["first"] + s
        inputs = pl.ds(at * i32(f.k), f.k)
        plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(t["row"], f.n), inputs], refs["x_smem"].at[slot], ready)
        for g, output in enumerate(t["outputs"]):
            own = pl.ds(output, ROWS)
            plgpu.copy_gmem_to_smem(refs["w"].at[own, inputs], refs["w_smem"].at[slot, g], ready)
            if size is not None:
                groups = pl.ds(lax.div(at * i32(f.k), i32(size)), scales)
                plgpu.copy_gmem_to_smem(refs["scales"].at[groups, own], refs["scales_smem"].at[slot, g], ready)

    def weights(refs: Any, slot: Any, group: Any) -> list[jax.Array]:
        """[64, b] of each product."""
        bytes_ok = read(refs["w_smem"].at[slot, group], plgpu.Layout.WGMMA_UPCAST_2X)

        def part(j: int) -> jax.Array:
            own = lax.slice(bytes_ok, (0, j * f.b), (ROWS, (j + 1) * f.b))
            return plgpu.layout_cast(own.astype(dtype), plgpu.Layout.WGMMA)

        return [part(j) for j in range(products)]

    def times(refs: Any, slot: Any, j: int, w_ob: jax.Array, acc_ref: Any) -> None:
        x_nb = refs["x_smem"].at[slot, :, pl.ds(j * f.b, f.b)]
        plgpu.wgmma(acc_ref, w_ob, plgpu.transpose_ref(x_nb, (1, 0)))

    def multiply(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_ref: Any) -> None:
        for j, w_ob in enumerate(weights(refs, slot, group)):
            times(refs, slot, j, w_ob, acc_ref)
        plgpu.wgmma_wait(0)  # its registers are the next step's

    def add(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_on: jax.Array) -> jax.Array:
        of_step = weights(refs, slot, group)
        for j in range(0, products, shared):

            def scope(acc_ref: Any, j: int = j) -> Any:
                for i in range(shared):
                    times(refs, slot, j + i, of_step[j + i], acc_ref)
                return acc_ref[...]

            part_on = pl.run_scoped(scope, ACC((ROWS, f.n), jnp.float32))
            scale_o = read(refs["scales_smem"].at[slot, group, j // shared], OF_OUTPUT)
            acc_on = acc_on + part_on * lax.broadcast_in_dim(scale_o, acc_on.shape, [0])
        return acc_on

    def store(refs: Any, t: Any, group: Any, acc_on: jax.Array) -> None:
        output = jnp.where(group == 0, *t["outputs"])
        own = pl.ds(output, ROWS)

        def spread(of_o: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(of_o, acc_on.shape, [0])

        if size is None:
            acc_on = acc_on * spread(read(refs["scales"].at[0, own], OF_OUTPUT))
        if bias_O is not None:
            acc_on = acc_on + spread(read(refs["bias"].at[own], OF_OUTPUT))
        if activation is not None:
            acc_on = ACTIVATIONS[activation](acc_on)
        for place in range(0, f.n, chunk):
            part_on = lax.slice(acc_on, (0, place), (ROWS, place + chunk)).astype(out_dtype)
            turned = plgpu.transpose_ref(refs["out"].at[group], (1, 0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            turned[...] = plgpu.layout_cast(part_on, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            rows = pl.ds(t["row"] + i32(place), chunk)
            plgpu.copy_smem_to_gmem(refs["out"].at[group], refs["y"].at[t["split"], rows, own])

    out = jax.ShapeDtypeStruct((f.splits, M, O), out_dtype)
    total = f.splits * tiles[0] * tiles[1]
    multiplied = {"multiply": multiply} if size is None else {"multiply": None, "add": add}
    return launch(
        "quantized_matmul", p, given, out, scratch, lambda _: i32(total), tile, load, store=store, **multiplied
    )
