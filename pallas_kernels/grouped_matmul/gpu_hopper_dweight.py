"""The gradient of the weights for Hopper, on the frame of `gpu_steps.py`: each group's `dy.T @ x`.

A tile is 128 outputs, 64 of each warpgroup, by some inputs. Its steps are 64 of the group's rows; in the last one, rows
of others are zeroed where they lie, in x and dy: they may hold anything, and 0 times infinity is not 0.

Shapes: N rows, sorted by group, G groups, I inputs, O outputs; n rows of a step, o and i of a warpgroup.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..gpu_steps import CHUNK, ROWS, Plan, i32, in_bands, launch, swizzled
from .gpu_hopper import check, stages_of


def plan_of(I: int) -> Plan:
    fitting = [c for c in (256, 192, 128, 64) if c <= I]
    c = min(fitting, key=lambda c: pl.cdiv(I, c) * (c + 2 * ROWS))
    return Plan(2, 1, c, stages_of(2 * ROWS * (2 * ROWS + c)))


def dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array, plan: Plan | None = None) -> jax.Array:
    (N, I), O, G, dtype = x_NI.shape, dy_NO.shape[1], len(sizes_G), x_NI.dtype
    check(dtype, O, I)
    if rest := max(ROWS, -(-N // 8) * 8) - N:
        x_NI, dy_NO = (jnp.pad(a, ((0, rest), (0, 0))) for a in (x_NI, dy_NO))
        return dweight(x_NI, dy_NO, sizes_G, plan)
    p = plan or plan_of(I)
    scratch = {
        "x": plgpu.SMEM((p.stages, ROWS, p.c), dtype, transforms=swizzled(CHUNK, dtype)),
        "dy": plgpu.SMEM((p.stages, 2, ROWS, ROWS), dtype, transforms=swizzled(ROWS, dtype)),
        "out": plgpu.SMEM((2, ROWS, CHUNK), dtype, transforms=swizzled(CHUNK, dtype)),
        "ready": plgpu.Barrier(num_barriers=p.stages, num_arrivals=3),
        "free": plgpu.Barrier(num_barriers=p.stages, num_arrivals=2),
        "zeroed": plgpu.Barrier(num_arrivals=2),
    }
    first_G = jnp.cumsum(sizes_G, dtype=jnp.int32) - sizes_G
    given = {"first": first_G, "sizes": sizes_G, "x": x_NI, "dy": dy_NO}
    tiles = pl.cdiv(O, 2 * ROWS), pl.cdiv(I, p.c)
    chunks = p.c // CHUNK

    def tile(refs: Any, nth: Any) -> dict[str, Any]:
        group = lax.div(nth, i32(tiles[0] * tiles[1]))
        row, column = in_bands(nth - group * i32(tiles[0] * tiles[1]), i32(tiles[0]), tiles[1])
        size = refs["sizes"][group]
        return {
            "group": group,
            "first": refs["first"][group],
            "size": size,
            "outputs": [jnp.minimum(row * i32(2 * ROWS) + i32(ROWS * g), i32(O - ROWS)) for g in range(2)],
            "input": jnp.minimum(column * i32(p.c), i32(I - p.c)),
            "steps": lax.div(size + i32(ROWS - 1), i32(ROWS)),
        }

    def row_of(t: Any, s: Any) -> Any:
        return jnp.minimum(t["first"] + s * i32(ROWS), i32(N - ROWS))

    def load(refs: Any, t: Any, s: Any, slot: Any, ready: Any) -> None:
        rows = pl.ds(row_of(t, s), ROWS)
        plgpu.copy_gmem_to_smem(refs["x"].at[rows, pl.ds(t["input"], p.c)], refs["x_smem"].at[slot], ready)
        for g, output in enumerate(t["outputs"]):
            plgpu.copy_gmem_to_smem(refs["dy"].at[rows, pl.ds(output, ROWS)], refs["dy_smem"].at[slot, g], ready)

    def multiply(refs: Any, t: Any, s: Any, slot: Any, group: Any, acc_ref: Any) -> None:
        x, dy = refs["x_smem"].at[slot], refs["dy_smem"].at[slot, group]
        low = t["first"] + s * i32(ROWS) - row_of(t, s)
        high = jnp.minimum(low + t["size"] - s * i32(ROWS), i32(ROWS))

        @pl.when((low > 0) | (high < ROWS))
        def _() -> None:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 0, layout=plgpu.Layout.WGMMA)

            def zero(ref: Any) -> None:
                ref[...] = jnp.where((row >= low) & (row < high), ref[...], 0)

            zero(dy)
            for own in range(2):

                @pl.when(group == own)
                def _(own: int = own) -> None:
                    for chunk in range(own, chunks, 2):
                        zero(x.at[:, pl.ds(chunk * CHUNK, CHUNK)])

            plgpu.commit_smem()
            plgpu.barrier_arrive(refs["zeroed"])
            plgpu.barrier_wait(refs["zeroed"])

        plgpu.wgmma(acc_ref, plgpu.transpose_ref(dy, (1, 0)), x)

    def store(refs: Any, t: Any, group: Any, acc_oi: jax.Array) -> None:
        output = jnp.where(group == 0, *t["outputs"])
        for place in range(0, p.c, CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs["out"].at[group][...] = lax.slice(acc_oi, (0, place), (ROWS, place + CHUNK)).astype(dtype)
            plgpu.commit_smem()
            part = refs["y"].at[t["group"], pl.ds(output, ROWS), pl.ds(t["input"] + i32(place), CHUNK)]
            plgpu.copy_smem_to_gmem(refs["out"].at[group], part)

    out = jax.ShapeDtypeStruct((G, O, I), dtype)
    total = G * tiles[0] * tiles[1]
    return launch("grouped_matmul_dweight", p, given, out, scratch, lambda _: i32(total), tile, load, multiply, store)
