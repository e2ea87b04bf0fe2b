"""Grouped products for Hopper: Mosaic GPU with wgmma, TMA and a warpgroup that only loads.

On the frame of `gpu_steps.py`. With many rows a group, each of two warpgroups has 64 rows of a tile and all of its
columns; with few, both have the same rows, and half of the columns.

Tiles of rows begin where groups do. What a tile reads beyond its group's rows it computes and does not store: its own
rows go out in pieces of 32, 16, ... 1, as a copy's shape is static. Columns are not a multiple of a tile's: the last
tile begins earlier, and writes what its neighbour writes, the same bits.

Shapes: N rows, sorted by group, G groups, A terms of a sum, C columns of the result (I and O, or O and I); n, c: what a
warpgroup has of them, k: terms of a step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..gpu_steps import (
    CHUNK,
    MOST_STAGES,
    ROWS,
    SHARED_MEMORY,
    Plan,
    chosen,
    copy_rows,
    divided,
    i32,
    in_bands,
    launch,
    swizzled,
    tiles_of,
)

STEP = 64  # terms of a step: a swizzled line of 128 bytes


def check(dtype: jnp.dtype, summed: int, columns: int) -> None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Hopper kernel takes bfloat16 and float16, got {dtype}")
    if summed % STEP or columns % CHUNK:
        raise NotImplementedError(f"the Hopper kernel takes 64, 128, ... inputs and outputs, got {summed}, {columns}")


def plan_of(N: int, G: int, C: int) -> Plan:
    """In closed form: tiles of 128 rows where groups have about as many, and columns that waste little."""
    down = 2 if N >= 96 * G else 1
    across = 2 // down
    fitting = [c for c in (256, 192, 128, 64) if c * across <= 256 and c <= C]

    def cost(c: int) -> float:
        return pl.cdiv(C, c * across) * (c * across + 64 * down)  # what its tiles load of weights and rows

    c = min(fitting, key=cost)
    return Plan(down, across, c, stages_of(2 * STEP * (ROWS * down + c * across)))


def stages_of(step_bytes: int) -> int:
    return min(MOST_STAGES, (SHARED_MEMORY - 8 * ROWS * CHUNK) // step_bytes)


def product(
    x_NA: jax.Array, weight_GOI: jax.Array, sizes_G: jax.Array, contract: int, plan: Plan | None = None
) -> jax.Array:
    """Rows times weights, summed over the weights' last dimension (`contract` 1) or the one before (0): [N, C]."""
    (N, A), dtype = x_NA.shape, x_NA.dtype
    G, C = len(weight_GOI), weight_GOI.shape[2 - contract]
    check(dtype, A, C)
    if rest := max(ROWS, -(-N // 8) * 8) - N:  # copies want eights of rows
        return product(jnp.pad(x_NA, ((0, rest), (0, 0))), weight_GOI, sizes_G, contract, plan)[:N]
    p = plan or plan_of(N, G, C)
    table_3V, count = tiles_of(sizes_G, N, ROWS * p.down)
    weight_step = (p.c, STEP) if contract == 1 else (STEP, p.c)
    scratch = {
        "x": plgpu.SMEM((p.stages, p.down, ROWS, STEP), dtype, transforms=swizzled(STEP, dtype)),
        "w": plgpu.SMEM((p.stages, p.across, *weight_step), dtype, transforms=swizzled(weight_step[1], dtype)),
        "out": plgpu.SMEM((2, ROWS, CHUNK), dtype, transforms=swizzled(CHUNK, dtype)),
        "piece": plgpu.SMEM((2, ROWS, CHUNK), dtype),
        "ready": plgpu.Barrier(num_barriers=p.stages, num_arrivals=p.down + p.across),
        "free": plgpu.Barrier(num_barriers=p.stages, num_arrivals=2),
    }
    given = {"table": table_3V, "count": count, "x": x_NA, "w": weight_GOI}
    out = jax.ShapeDtypeStruct((N, C), dtype)

    def tile(refs: dict[str, Any], nth: Any) -> dict[str, Any]:
        """What a processor's nth tile is."""
        at, column = in_bands(nth, refs["count"][0], pl.cdiv(C, p.c * p.across))
        group, first, left = (refs["table"][row, at] for row in range(3))
        return {
            "group": jnp.minimum(group, i32(G - 1)),
            "rows": [jnp.minimum(first + i32(ROWS * g), i32(N - ROWS)) for g in range(p.down)],
            "first": first,
            "left": left,
            "columns": [
                jnp.minimum((column * i32(p.across) + i32(g)) * i32(p.c), i32(C - p.c)) for g in range(p.across)
            ],
            "steps": jnp.where(group == i32(G), i32(0), i32(A // STEP)),
        }

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        terms = pl.ds(s * i32(STEP), STEP)
        for g, row in enumerate(t["rows"]):
            plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(row, ROWS), terms], refs["x_smem"].at[slot, g], ready)
        for g, column in enumerate(t["columns"]):
            own = pl.ds(column, p.c)
            part = refs["w"].at[t["group"], *((own, terms) if contract == 1 else (terms, own))]
            plgpu.copy_gmem_to_smem(part, refs["w_smem"].at[slot, g], ready)

    def multiply(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_ref: Any) -> None:
        down, across = divided(group, i32(p.across))
        x, w = refs["x_smem"].at[slot, down], refs["w_smem"].at[slot, across]
        plgpu.wgmma(acc_ref, x, plgpu.transpose_ref(w, (1, 0)) if contract == 1 else w)

    def store(refs: Any, t: Any, group: Any, acc_nc: jax.Array) -> None:
        down, across = divided(group, i32(p.across))
        row, column = chosen(t["rows"], down), chosen(t["columns"], across)
        low = t["first"] + down * i32(ROWS) - row
        high = jnp.minimum(low + t["left"] - down * i32(ROWS), i32(ROWS))
        whole = (low == 0) & (high == ROWS)
        for place in range(0, p.c, CHUNK):
            part_nc = lax.slice(acc_nc, (0, place), (ROWS, place + CHUNK)).astype(dtype)
            own = pl.ds(column + i32(place), CHUNK)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(whole)
            def _(part_nc: Any = part_nc, own: Any = own) -> None:
                refs["out"].at[group][...] = part_nc
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(refs["out"].at[group], refs["y"].at[pl.ds(row, ROWS), own])

            @pl.when(~whole & (low < high))
            def _(part_nc: Any = part_nc, own: Any = own) -> None:
                refs["piece"].at[group][...] = part_nc
                plgpu.commit_smem()
                copy_rows(refs["piece"].at[group], refs["y"], low, high, row, own)

    def idle(t: Any, group: Any) -> Any:
        """Whether a warpgroup has no rows of a tile."""
        return t["left"] <= lax.div(group, i32(p.across)) * i32(ROWS)

    def count_tiles(refs: Any) -> Any:
        return refs["count"][0] * i32(pl.cdiv(C, p.c * p.across))

    name = "grouped_matmul" if contract == 1 else "grouped_matmul_dx"
    return launch(name, p, given, out, scratch, count_tiles, tile, load, multiply, store, idle if p.down > 1 else None)
