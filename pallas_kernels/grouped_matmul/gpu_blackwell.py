"""Grouped products for Blackwell, on the frame of `gpu_steps_blackwell.py`: rows times weights, and their gradients.

Tiles of rows begin where groups do, and the last tile of columns may overlap its neighbour, as in `gpu_hopper.py`.
The gradient of the weights is each group's `dy.T @ x`, in steps of 64 of its rows; rows of others are zeroed where they
lie, as in `gpu_hopper_dweight.py`.

Shapes: N rows, sorted by group, G groups, I inputs, O outputs, A terms of a sum, C columns of the result (I and O, or O
and I); c: columns of a tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..gpu_steps import CHUNK, copy_rows, i32, in_bands, swizzled, tiles_of
from ..gpu_steps_blackwell import ROWS, STEP, Plan, check, launch, plan_of


def product(
    x_NA: jax.Array, weight_GOI: jax.Array, sizes_G: jax.Array, contract: int, plan: Plan | None = None
) -> jax.Array:
    """Rows times weights, summed over the weights' last dimension (`contract` 1) or the one before (0): [N, C]."""
    (N, A), dtype = x_NA.shape, x_NA.dtype
    G, C = len(weight_GOI), weight_GOI.shape[2 - contract]
    check(dtype, A, C)
    if rest := max(ROWS, -(-N // 8) * 8) - N:  # copies want eights of rows
        return product(jnp.pad(x_NA, ((0, rest), (0, 0))), weight_GOI, sizes_G, contract, plan)[:N]
    p = plan or plan_of(C)
    table_3V, count = tiles_of(sizes_G, N, ROWS)
    weight_step, wide = (p.c, STEP) if contract == 1 else (STEP, p.c), pl.cdiv(C, p.c)
    scratch = {
        "x_smem": plgpu.SMEM((p.stages, ROWS, STEP), dtype, transforms=swizzled(STEP, dtype)),
        "w_smem": plgpu.SMEM((p.stages, *weight_step), dtype, transforms=swizzled(weight_step[1], dtype)),
        "out": plgpu.SMEM((ROWS, CHUNK), dtype, transforms=swizzled(CHUNK, dtype)),
        "piece": plgpu.SMEM((ROWS, CHUNK), dtype),
    }

    def tile(refs: Any, nth: Any) -> dict[str, Any]:
        at, column = in_bands(nth, refs["count"][0], wide)
        group, first, left = (refs["table"][row, at] for row in range(3))
        return {
            "group": jnp.minimum(group, i32(G - 1)),
            "row": jnp.minimum(first, i32(N - ROWS)),
            "first": first,
            "left": left,
            "column": jnp.minimum(column * i32(p.c), i32(C - p.c)),
            "steps": jnp.where(group == i32(G), i32(0), i32(A // STEP)),
        }

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        terms, own = pl.ds(s * i32(STEP), STEP), pl.ds(t["column"], p.c)
        plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(t["row"], ROWS), terms], refs["x_smem"].at[slot], ready)
        part = refs["w"].at[t["group"], *((own, terms) if contract == 1 else (terms, own))]
        plgpu.copy_gmem_to_smem(part, refs["w_smem"].at[slot], ready)

    def multiply(refs: Any, t: Any, s: Any, slot: Any, sums: Any, _: Any) -> None:
        w = refs["w_smem"].at[slot]
        w = plgpu.transpose_ref(w, (1, 0)) if contract == 1 else w
        plgpu.tcgen05_mma(sums, refs["x_smem"].at[slot], w, accumulate=s > 0)

    def store(refs: Any, t: Any, place: int, sums_rc: jax.Array) -> None:
        low = t["first"] - t["row"]
        high = jnp.minimum(low + t["left"], i32(ROWS))
        whole = (low == 0) & (high == ROWS)
        own = pl.ds(t["column"] + i32(place), CHUNK)

        @pl.when(whole)
        def _() -> None:
            refs["out"][...] = sums_rc.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs["out"], refs["y"].at[pl.ds(t["row"], ROWS), own])

        @pl.when(~whole & (low < high))
        def _() -> None:
            refs["piece"][...] = sums_rc.astype(dtype)
            plgpu.commit_smem()
            copy_rows(refs["piece"], refs["y"], low, high, t["row"], own, ROWS // 2)

    given = {"table": table_3V, "count": count, "x": x_NA, "w": weight_GOI}
    out, name = jax.ShapeDtypeStruct((N, C), dtype), "grouped_matmul" if contract == 1 else "grouped_matmul_dx"
    return launch(name, p, given, out, scratch, lambda refs: refs["count"][0] * i32(wide), tile, load, multiply, store)


def dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array, plan: Plan | None = None) -> jax.Array:
    """[G, O, I]: a tile is 128 outputs by some inputs."""
    (N, I), O, G, dtype = x_NI.shape, dy_NO.shape[1], len(sizes_G), x_NI.dtype
    check(dtype, O, I)
    if O < ROWS:
        raise NotImplementedError(f"the Blackwell kernel takes at least {ROWS} outputs, got {O}")
    if rest := max(STEP, -(-N // 8) * 8) - N:
        x_NI, dy_NO = (jnp.pad(a, ((0, rest), (0, 0))) for a in (x_NI, dy_NO))
        return dweight(x_NI, dy_NO, sizes_G, plan)
    p = plan or plan_of(I)
    scratch = {
        "x_smem": plgpu.SMEM((p.stages, STEP, p.c), dtype, transforms=swizzled(CHUNK, dtype)),
        "dy_smem": plgpu.SMEM((p.stages, STEP, ROWS), dtype, transforms=swizzled(CHUNK, dtype)),
        "out": plgpu.SMEM((ROWS, CHUNK), dtype, transforms=swizzled(CHUNK, dtype)),
    }
    tiles = pl.cdiv(O, ROWS), pl.cdiv(I, p.c)

    def tile(refs: Any, nth: Any) -> dict[str, Any]:
        group = lax.div(nth, i32(tiles[0] * tiles[1]))
        row, column = in_bands(nth - group * i32(tiles[0] * tiles[1]), i32(tiles[0]), tiles[1])
        size = refs["sizes"][group]
        return {
            "group": group,
            "first": refs["first"][group],
            "size": size,
            "output": jnp.minimum(row * i32(ROWS), i32(O - ROWS)),
            "input": jnp.minimum(column * i32(p.c), i32(I - p.c)),
            "steps": lax.div(size + i32(STEP - 1), i32(STEP)),
        }

    def row_of(t: Any, s: Any) -> Any:
        return jnp.minimum(t["first"] + s * i32(STEP), i32(N - STEP))

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        rows = pl.ds(row_of(t, s), STEP)
        plgpu.copy_gmem_to_smem(refs["x"].at[rows, pl.ds(t["input"], p.c)], refs["x_smem"].at[slot], ready)
        plgpu.copy_gmem_to_smem(refs["dy"].at[rows, pl.ds(t["output"], ROWS)], refs["dy_smem"].at[slot], ready)

    def multiply(refs: Any, t: Any, s: Any, slot: Any, sums: Any, _: Any) -> None:
        x, dy = refs["x_smem"].at[slot], refs["dy_smem"].at[slot]
        low = t["first"] + s * i32(STEP) - row_of(t, s)
        high = jnp.minimum(low + t["size"] - s * i32(STEP), i32(STEP))

        @pl.when((low > 0) | (high < STEP))
        def _() -> None:
            row = plgpu.broadcasted_iota(jnp.int32, (STEP, CHUNK), 0, layout=plgpu.Layout.WGMMA)
            for ref, width in ((x, p.c), (dy, ROWS)):
                for first in range(0, width, CHUNK):
                    part = ref.at[:, pl.ds(first, CHUNK)]
                    part[...] = jnp.where((row >= low) & (row < high), part[...], 0)
            plgpu.commit_smem()

        plgpu.tcgen05_mma(sums, plgpu.transpose_ref(dy, (1, 0)), x, accumulate=s > 0)

    def store(refs: Any, t: Any, place: int, sums_rc: jax.Array) -> None:
        refs["out"][...] = sums_rc.astype(dtype)
        plgpu.commit_smem()
        part = refs["y"].at[t["group"], pl.ds(t["output"], ROWS), pl.ds(t["input"] + i32(place), CHUNK)]
        plgpu.copy_smem_to_gmem(refs["out"], part)

    first_G = jnp.cumsum(sizes_G, dtype=jnp.int32) - sizes_G
    given = {"first": first_G, "sizes": sizes_G, "x": x_NI, "dy": dy_NO}
    out, total = jax.ShapeDtypeStruct((G, O, I), dtype), G * tiles[0] * tiles[1]
    return launch("grouped_matmul_dweight", p, given, out, scratch, lambda _: i32(total), tile, load, multiply, store)
