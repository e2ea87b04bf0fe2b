"""Products with quantised weights for Hopper (Mosaic GPU), on the frame of `gpu_steps.py`.

wgmma takes its left side from registers, so there the weights are: a warpgroup has 64 outputs, makes bfloat16 of what
it read as bytes, and multiplies by rows in shared memory as columns. So 8 rows of decoding are 8 columns and no more,
and a weight is read once for each 256 rows. The result comes out turned, and is turned back on its way to memory.

A byte of two inputs lies there outputs first, which no wide load turns, so it is read byte by byte; its low and its
high bits are two left sides, which meet the even inputs of rows and the odd ones.

Values are exact in 16 bits and multiplied bare: with several blocks of inputs, each block's sums are scaled and added.
With many rows that is more work than to scale weights, which are then rounded once. Zero points are a small product of
blocks' sums, left to XLA, as is the sum over splits, which keep all processors busy where outputs are few.

With groups of rows (`grouped_matmul`), tiles of rows begin where groups do, and each is as wide as groups are long.

Shapes: M rows, I inputs, O outputs, G blocks of inputs, S splits, E groups (experts); n rows of a tile, k inputs of a
step, b of a product.
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
    copy_rows,
    divided,
    i32,
    in_bands,
    launch,
    read,
    swizzled,
    tiles_of,
)
from .activations import ACTIVATIONS, finish
from .formats import FLOAT8, PACKED, QuantizedWeight, expand, scales_of

IN_KERNEL = (None, "relu", "silu")
MOST_SPLITS = 8
MOST_APART = 64  # rows up to which sums of blocks are scaled, and not weights
# Bytes of a line of packed weights: sixteen more than are used, so that a warp's four lines lie in different banks.
WIDE = 2 * ROWS + 16
OF_OUTPUT = plgpu.Layout.WGMMA.reduce(1)
# WGMMA's, but loaded element by element, as what lies the other way round must be; JAX means to take it away.
SINGLY = getattr(plgpu.Layout, "_WGMMA_ACC_32BIT", None)


@dataclass(frozen=True)
class Cut:
    """Rows of a tile, inputs of a step and of one product (bytes of packed ones), splits, and the frame's plan."""

    n: int
    k: int
    b: int
    splits: int
    plan: Plan


def cut_of(
    M: int, I: int, O: int, size: int | None, packed: bool = False, processors: int = PROCESSORS, E: int | None = None
) -> Cut:
    """In closed form; `size` is how many inputs share a scale, None for all. With groups, their sums are not split."""
    if E is not None:
        M = pl.cdiv(2 * M, E)  # of a tile: most groups fit in one
    if I % 64 or O % ROWS or (packed and O < WIDE):
        raise NotImplementedError(
            f"the Hopper kernel takes 64, 128, ... inputs and outputs (four bits: of these 192), got {I} and {O}"
        )
    n = next((n for n in (8, 16, 32, 64, 128) if n >= M), 256)
    inputs, halves = 128 if n < 256 and I % 128 == 0 else 64, 2 if packed else 1
    if size is not None and (size % 32 or (size % inputs and inputs % size)):
        raise NotImplementedError(f"the Hopper kernel takes blocks of 32, 64 or 128, 256, ... inputs, got {size}")
    k = inputs // halves
    b = min(64, k, (size or inputs) // halves)
    tiles, steps = pl.cdiv(M, n) * pl.cdiv(O, 2 * ROWS), I // halves // k

    def time(splits: int) -> float:
        return pl.cdiv(tiles * splits, processors) * pl.cdiv(steps, splits) * (1 + 0.01 * splits)

    # Writing and reading parts in float32 is to cost half of what the weights do.
    cheap = 1 if E is not None else max(1, min(MOST_SPLITS, I // halves // (8 * n), steps // 4))
    splits = min(range(1, cheap + 1), key=time)
    stage = (
        (WIDE if packed else 2 * ROWS) * k + 2 * n * k * halves + (2 * ROWS * 4 * max(1, inputs // size) if size else 0)
    )
    out = 2 * (4 if E is None else 2 * 2) * ROWS * min(n, CHUNK)
    return Cut(n, k, b, splits, Plan(2, 1, n, min(MOST_STAGES, (SHARED_MEMORY - out) // stage), processors))


def product(
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    cut: Cut | None = None,
    sizes_E: jax.Array | None = None,
) -> jax.Array:
    """[M, O]; with sizes_E and a stack of weights each row with its group's, zeros for rows of none."""
    (M, I), (O, _), dtype = x_MI.shape, weight.shape[-2:], x_MI.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Hopper kernel takes bfloat16 and float16, got {dtype}")
    if weight.inputs_first:
        raise NotImplementedError("the Hopper kernel takes weights outputs first, not `with_inputs_first`")
    if weight.zeros is not None and sizes_E is not None:
        raise NotImplementedError("the Hopper kernel takes no zero points with groups of rows")
    size = weight.block_sizes[1] if weight.scales.shape[-2] > 1 else None
    packed = weight.format in PACKED
    if packed and SINGLY is None:
        raise NotImplementedError("this JAX has no layout to load packed weights in")
    f = cut or cut_of(M, I, O, size, packed, E=None if sizes_E is None else len(sizes_E))
    if not M:
        return jnp.zeros((0, O), out_dtype)
    rows = max(f.n, -(-M // 8) * 8)
    x = x_MI if rows == M else jnp.pad(x_MI, ((0, rows - M), (0, 0)))
    given = {"x": x, "w": weight.values, "scales": by_output(weight.scales, weight)}
    if packed:  # even inputs and odd ones, as a byte has them
        given["x"] = jnp.moveaxis(x.reshape(rows, I // 2, 2), 2, 0)
    if sizes_E is not None:
        given["table"], given["count"] = tiles_of(sizes_E, rows, f.n)
        return _launch(given, weight.format, None, out_dtype, size, f)[0, :M]
    alone = f.splits == 1 and weight.zeros is None and activation in IN_KERNEL
    if not alone:
        sums_MO = jnp.sum(_launch(given, weight.format, None, jnp.float32, size, f)[:, :M], axis=0)
        if weight.zeros is not None:
            sums_MO -= of_zeros(x_MI, weight, given["scales"])
        return finish(sums_MO, bias_O, activation, out_dtype)
    if bias_O is not None:
        given["bias"] = bias_O.astype(jnp.float32)
    return _launch(given, weight.format, activation, out_dtype, size, f)[0, :M]


def of_zeros(x_MI: jax.Array, weight: QuantizedWeight, scales_GO: jax.Array) -> jax.Array:
    """What zero points take from the sums, [M, O]."""
    G, size = len(scales_GO), weight.block_sizes[1]
    assert weight.zeros is not None
    x_MGB = jnp.pad(x_MI, ((0, 0), (0, G * size - x_MI.shape[1]))).reshape(len(x_MI), G, size)
    offsets_GO = scales_of(scales_GO, jnp.float32) * by_output(weight.zeros.astype(jnp.float32), weight)
    totals_MG = jnp.sum(x_MGB, axis=2, dtype=jnp.float32)
    return jnp.matmul(totals_MG, offsets_GO, precision=lax.Precision.HIGHEST)


def by_output(blocks_GP: jax.Array, weight: QuantizedWeight) -> jax.Array:
    *stack, G, _ = blocks_GP.shape
    O = weight.shape[-2]
    each = expand(blocks_GP, (weight.block[0], 1), (O, G)).swapaxes(-1, -2)
    return jnp.broadcast_to(each, (*stack, G, O))


def _launch(
    given: dict[str, jax.Array], format: str, activation: str | None, out_dtype: Any, size: int | None, f: Cut
) -> jax.Array:
    """[S, M, O]: the sums of each split, scaled; with bias and activation where there is one."""
    packed, grouped = format in PACKED, "table" in given
    # Of packed ones, the inputs are bytes.
    (M, I), O, dtype, p = given["x"].shape[-2:], given["scales"].shape[-1], given["x"].dtype, f.plan
    values_dtype = given["w"].dtype
    halves = 2 if packed else 1
    size = None if size is None else size // halves
    steps = pl.cdiv(I // f.k, f.splits)
    tiles = pl.cdiv(O, 2 * ROWS), pl.cdiv(M, f.n)
    chunk = min(f.n, CHUNK)
    # Of a step: products of b inputs, some of which share a scale.
    products = f.k // f.b
    shared = min(f.k, size or f.k) // f.b
    scratch = {
        "x": plgpu.SMEM((p.stages, halves, f.n, f.k), dtype, transforms=swizzled(f.b, dtype)),
        "w": plgpu.SMEM((p.stages, f.k, WIDE), values_dtype)
        if packed
        else plgpu.SMEM((p.stages, 2, ROWS, f.k), values_dtype, transforms=swizzled(f.k, values_dtype)),
        "out": plgpu.SMEM(
            (2, chunk, ROWS), out_dtype, transforms=swizzled(128 // jnp.dtype(out_dtype).itemsize, out_dtype)
        ),
        "ready": plgpu.Barrier(num_barriers=p.stages, num_arrivals=3 if size is None else 5),
        "free": plgpu.Barrier(num_barriers=p.stages, num_arrivals=2),
    }
    scales = products // shared
    if size is not None:
        scratch["scales"] = plgpu.SMEM((p.stages, 2, scales, ROWS), given["scales"].dtype)
    if grouped:
        scratch["piece"] = plgpu.SMEM((2, chunk, ROWS), out_dtype)

    def tile(refs: dict[str, Any], nth: Any) -> dict[str, Any]:
        more = {}
        if grouped:
            at, below = in_bands(nth, refs["count"][0], tiles[0])
            group, row, left = (refs["table"][i, at] for i in range(3))
            split, first = i32(0), i32(0)
            is_rest = group == i32(given["w"].shape[0])
            found = jnp.where(is_rest, i32(0), i32(I // f.k))
            more = {"group": jnp.where(is_rest, i32(0), group), "begin": row, "left": left}
        else:
            split, rest = divided(nth, i32(tiles[0] * tiles[1]))
            below, beside = in_bands(rest, i32(tiles[0]), tiles[1])
            row, first = beside * i32(f.n), split * i32(steps)
            found = jnp.minimum(jnp.maximum(i32(I // f.k) - first, i32(0)), i32(steps))
        return {
            **more,
            "split": split,
            "outputs": [
                jnp.minimum(below * i32(2 * ROWS), i32(O - 2 * ROWS)) + i32(ROWS * g)
                if packed
                else jnp.minimum(below * i32(2 * ROWS) + i32(ROWS * g), i32(O - ROWS))
                for g in range(2)
            ],
            "row": jnp.minimum(row, i32(M - f.n)),
            "first": first,
            "steps": found,
        }

    def of_group(refs: Any, name: str, t: Any) -> Any:
        return refs[name].at[t["group"]] if grouped else refs[name]

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        at = t["first"] + s
        inputs = pl.ds(at * i32(f.k), f.k)
        rows = pl.ds(t["row"], f.n)
        for half in range(halves):
            part = refs["x"].at[half, rows, inputs] if packed else refs["x"].at[rows, inputs]
            plgpu.copy_gmem_to_smem(part, refs["x_smem"].at[slot, half], ready)
        if packed:
            part = of_group(refs, "w", t).at[inputs, pl.ds(jnp.minimum(t["outputs"][0], i32(O - WIDE)), WIDE)]
            plgpu.copy_gmem_to_smem(part, refs["w_smem"].at[slot], ready)
        for g, output in enumerate(t["outputs"]):
            own = pl.ds(output, ROWS)
            if not packed:
                part = of_group(refs, "w", t).at[own, inputs]
                plgpu.copy_gmem_to_smem(part, refs["w_smem"].at[slot, g], ready)
            if size is not None:
                groups = pl.ds(lax.div(at * i32(f.k), i32(size)), scales)
                part = of_group(refs, "scales", t).at[groups, own]
                plgpu.copy_gmem_to_smem(part, refs["scales_smem"].at[slot, g], ready)

    def weights(refs: Any, t: Any, slot: Any, group: Any) -> list[list[jax.Array]]:
        """Of each product, [64, b]: one, or of packed inputs the even ones' and the odd ones'."""
        if packed:
            first = t["outputs"][0] - jnp.minimum(t["outputs"][0], i32(O - WIDE)) + group * i32(ROWS)
            turned = plgpu.transpose_ref(refs["w_smem"].at[slot, :, pl.ds(first, ROWS)], (1, 0))
            bytes_ok = plgpu.layout_cast(read(turned, SINGLY), plgpu.Layout.WGMMA)
        else:
            bytes_ok = read(refs["w_smem"].at[slot, group], plgpu.Layout.WGMMA_UPCAST_2X)
        parts = [lax.slice(bytes_ok, (0, j), (ROWS, j + f.b)) for j in range(0, f.k, f.b)]
        return [_unpacked(part, format, dtype) if packed else [_widened(part, dtype)] for part in parts]

    def times(refs: Any, slot: Any, j: int, of_product: list[jax.Array], acc_ref: Any) -> None:
        for half, w_ob in enumerate(of_product):
            x_nb = refs["x_smem"].at[slot, half, :, pl.ds(j * f.b, f.b)]
            plgpu.wgmma(acc_ref, w_ob, plgpu.transpose_ref(x_nb, (1, 0)))

    def scale(refs: Any, slot: Any, group: Any, j: int, shape: tuple[int, ...]) -> jax.Array:
        scale_o = read(refs["scales_smem"].at[slot, group, j // shared], OF_OUTPUT)
        return lax.broadcast_in_dim(scales_of(scale_o, jnp.float32), shape, [0])

    def multiply(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_ref: Any) -> None:
        for j, of_product in enumerate(weights(refs, t, slot, group)):
            if size is not None:
                scale_ob = scale(refs, slot, group, j, (ROWS, f.b))
                of_product = [(w_ob.astype(jnp.float32) * scale_ob).astype(dtype) for w_ob in of_product]
            times(refs, slot, j, of_product, acc_ref)
        plgpu.wgmma_wait(0)  # its registers are the next step's

    def add(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_on: jax.Array) -> jax.Array:
        of_step = weights(refs, t, slot, group)
        for j in range(0, products, shared):

            def scope(acc_ref: Any, j: int = j) -> Any:
                for i in range(shared):
                    times(refs, slot, j + i, of_step[j + i], acc_ref)
                return acc_ref[...]

            part_on = pl.run_scoped(scope, ACC((ROWS, f.n), jnp.float32))
            acc_on = acc_on + part_on * scale(refs, slot, group, j, acc_on.shape)
        return acc_on

    def store(refs: Any, t: Any, group: Any, acc_on: jax.Array) -> None:
        output = jnp.where(group == 0, *t["outputs"])
        own = pl.ds(output, ROWS)

        def spread(of_o: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(of_o, acc_on.shape, [0])

        if size is None:
            scale_o = read(of_group(refs, "scales", t).at[0, own], OF_OUTPUT)
            acc_on = acc_on * spread(scales_of(scale_o, jnp.float32))
        if "bias" in refs:
            acc_on = acc_on + spread(read(refs["bias"].at[own], OF_OUTPUT))
        if activation is not None:
            acc_on = ACTIVATIONS[activation](acc_on)
        for place in range(0, f.n, chunk):
            part_on = lax.slice(acc_on, (0, place), (ROWS, place + chunk)).astype(out_dtype)
            part_on = plgpu.layout_cast(part_on, plgpu.Layout.WGMMA_TRANSPOSED)
            y, row = refs["y"].at[t["split"]], t["row"] + i32(place)

            def all_rows(part_on: Any = part_on, y: Any = y, row: Any = row) -> None:
                plgpu.transpose_ref(refs["out"].at[group], (1, 0))[...] = part_on
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(refs["out"].at[group], y.at[pl.ds(row, chunk), own])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if not grouped:
                all_rows()
                continue
            low = jnp.maximum(t["begin"] - row, i32(0))
            high = jnp.minimum(t["begin"] + t["left"] - row, i32(chunk))
            whole = (low == 0) & (high == chunk)
            pl.when(whole)(all_rows)

            @pl.when(~whole & (low < high))
            def _(part_on: Any = part_on, y: Any = y, row: Any = row, low: Any = low, high: Any = high) -> None:
                plgpu.transpose_ref(refs["piece"].at[group], (1, 0))[...] = part_on
                plgpu.commit_smem()
                copy_rows(refs["piece"].at[group], y, low, high, row, own)

    out = jax.ShapeDtypeStruct((f.splits, M, O), out_dtype)

    def count_tiles(refs: Any) -> Any:
        return refs["count"][0] * i32(tiles[0]) if grouped else i32(f.splits * tiles[0] * tiles[1])

    apart = size is not None and f.n <= MOST_APART
    multiplied = {"multiply": None, "add": add} if apart else {"multiply": multiply}
    name = "grouped_matmul" if grouped else "quantized_matmul"
    return launch(name, p, given, out, scratch, count_tiles, tile, load, store=store, **multiplied)


def _widened(bytes_ob: jax.Array, dtype: Any) -> jax.Array:
    if bytes_ob.dtype == FLOAT8 and dtype == jnp.bfloat16:
        bytes_ob = bytes_ob.astype(jnp.float32)  # there is no instruction from one to the other
    return plgpu.layout_cast(bytes_ob.astype(dtype), plgpu.Layout.WGMMA)


def _unpacked(bytes_ob: jax.Array, format: str, dtype: Any) -> list[jax.Array]:
    """The values of low and of high bits, by putting these into the bits of a bfloat16."""
    bits = bytes_ob.astype(jnp.uint16)

    def value(code: jax.Array) -> jax.Array:
        if format == "int4":  # 0x4300 is 128, whose last bit means 1
            wide = lax.bitcast_convert_type(code | jnp.uint16(0x4300), jnp.bfloat16) - jnp.bfloat16(136)
        else:  # the bits of e2m1, with its exponent less by 126
            moved = ((code & jnp.uint16(8)) << jnp.uint16(12)) | ((code & jnp.uint16(7)) << jnp.uint16(6))
            wide = lax.bitcast_convert_type(moved, jnp.bfloat16) * jnp.bfloat16(2.0**126)
        return wide if dtype == jnp.bfloat16 else wide.astype(jnp.float32).astype(dtype)

    return [value(bits & jnp.uint16(15)), value(bits >> jnp.uint16(4))]
