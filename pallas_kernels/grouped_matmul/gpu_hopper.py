"""Grouped products for Hopper: Mosaic GPU with wgmma, TMA and a warpgroup that only loads.

As many programs as there are processors each go through tiles of the result. Two warpgroups compute: with many rows a
group, each has 64 rows of a tile and all of its columns; with few, the same rows and half of the columns. The third
keeps steps of rows and weights coming, also the next tile's while this one is stored.

Tiles of rows begin where groups do. What a tile reads beyond its group's rows it computes and does not store: its own
rows go out in pieces of 32, 16, ... 1, as a copy's shape is static. Columns are not a multiple of a tile's: the last
tile begins earlier, and writes what its neighbour writes, the same bits.

Shapes: N rows, sorted by group, G groups, A terms of a sum, C columns of the result (I and O, or O and I); n, c: what a
warpgroup has of them, k: terms of a step.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

ROWS = 64  # of a warpgroup: what one wgmma takes
STEP = 64  # terms of a step: a swizzled line of 128 bytes
CHUNK = 64  # columns that are stored at a time
PROCESSORS = 132
BAND = 8  # tiles of rows that share weights in the cache
SHARED_MEMORY = 227 * 1024 - 2048  # bytes a block may have, less barriers
REGISTERS = (240, 24)  # of a thread that computes, and of one that loads: 2 x 240 + 24 = 3 x 168
MOST_STAGES = 6


@dataclass(frozen=True)
class Plan:
    """How many warpgroups are below and beside each other, columns of one, and steps in flight."""

    down: int
    across: int
    c: int
    stages: int
    processors: int = PROCESSORS


def i32(x: int) -> jax.Array:
    return jnp.array(x, jnp.int32)


def swizzled(width: int, dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory that wgmma reads, for rows of `width`."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


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


def tiles_of(sizes_G: jax.Array, N: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """[3, V]: each tile's group, first row, and the group's rows from there; and how many tiles there are, [1].

    Group G has the rows of none.
    """
    sizes_G = jnp.concatenate([sizes_G, N - jnp.sum(sizes_G, keepdims=True)]).astype(jnp.int32)
    tiles_G = (sizes_G + (tile - 1)) // tile
    stop_G, end_G = jnp.cumsum(tiles_G), jnp.cumsum(sizes_G)
    tile_V = jnp.arange(-(-N // tile) + len(sizes_G) - 1, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.sum(stop_G <= tile_V[:, None], axis=1, dtype=jnp.int32), len(sizes_G) - 1)
    done_V = (tile_V - (stop_G - tiles_G)[group_V]) * tile
    table_3V = jnp.stack([group_V, (end_G - sizes_G)[group_V] + done_V, sizes_G[group_V] - done_V])
    return table_3V.astype(jnp.int32), stop_G[-1:].astype(jnp.int32)


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
        down, across = _divided(group, i32(p.across))
        x, w = refs["x_smem"].at[slot, down], refs["w_smem"].at[slot, across]
        plgpu.wgmma(acc_ref, x, plgpu.transpose_ref(w, (1, 0)) if contract == 1 else w)

    def store(refs: Any, t: Any, group: Any, acc_nc: jax.Array) -> None:
        down, across = _divided(group, i32(p.across))
        row, column = _chosen(t["rows"], down), _chosen(t["columns"], across)
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
                at, rows = low, high - low
                for size in (32, 16, 8, 4, 2, 1):
                    has = (rows & i32(size)) != 0

                    @pl.when(has)
                    def _(at: Any = at, size: int = size) -> None:
                        piece = refs["piece"].at[group, pl.ds(at, size)]
                        plgpu.copy_smem_to_gmem(piece, refs["y"].at[pl.ds(row + at, size), own])

                    at = at + (rows & i32(size))

    def idle(t: Any, group: Any) -> Any:
        """Whether a warpgroup has no rows of a tile."""
        return t["left"] <= lax.div(group, i32(p.across)) * i32(ROWS)

    def count_tiles(refs: Any) -> Any:
        return refs["count"][0] * i32(pl.cdiv(C, p.c * p.across))

    name = "grouped_matmul" if contract == 1 else "grouped_matmul_dx"
    return launch(name, p, given, out, scratch, count_tiles, tile, load, multiply, store, idle if p.down > 1 else None)


def launch(
    name: str,
    p: Plan,
    given: dict[str, jax.Array],
    out: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    count_tiles: Any,
    tile: Any,
    load: Any,
    multiply: Any,
    store: Any,
    idle: Any = None,
) -> jax.Array:
    """Runs tiles of steps on two warpgroups that compute and one that loads; what they do is in the functions.

    A `ready` barrier holds what `load` loads of a step; `free` comes when both warpgroups have multiplied it.
    """

    def entry(*refs: Any) -> None:
        of_call = dict(zip((*given, "y"), refs, strict=True))

        def scope(*allocated: Any) -> None:
            of_name = dict(zip(scratch, allocated, strict=True))
            own = {name + ("_smem" if name in of_call else ""): ref for name, ref in of_name.items()}
            _run(p, {**of_call, **own}, count_tiles, tile, load, multiply, store, idle)

        pl.run_scoped(scope, *scratch.values(), collective_axes="warpgroup")

    entry.__name__ = name  # what profilers show
    return plgpu.kernel(
        entry,
        out_type=out,
        grid=(p.processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*given.values())


def _run(p: Plan, refs: Any, count_tiles: Any, tile: Any, load: Any, multiply: Any, store: Any, idle: Any) -> None:
    processor, group = lax.axis_index("processor"), lax.axis_index("warpgroup")
    turns = lax.div(count_tiles(refs) + i32(p.processors - 1) - processor, i32(p.processors))
    ready, free = refs["ready"], refs["free"]

    @pl.when(group < 2)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")

        def turn(i: Any, done: Any) -> Any:
            t = tile(refs, processor + i * i32(p.processors))

            def scope(acc_ref: Any) -> Any:
                def step(s: Any, _: None) -> None:
                    slot = lax.rem(done + s, i32(p.stages))
                    plgpu.barrier_wait(ready.at[slot])
                    multiply(refs, t, s, slot, group, acc_ref)
                    plgpu.wgmma_wait(1)

                    @pl.when(s > 0)  # the step before is multiplied
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[lax.rem(done + s - i32(1), i32(p.stages))])

                lax.fori_loop(i32(0), t["steps"], step, None)
                return acc_ref[...]

            def work() -> None:
                acc = pl.run_scoped(scope, ACC((ROWS, p.c), jnp.float32))

                @pl.when(t["steps"] > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[lax.rem(done + t["steps"] - i32(1), i32(p.stages))])

                store(refs, t, group, acc)

            def rest() -> None:
                def step(s: Any, _: None) -> None:
                    slot = lax.rem(done + s, i32(p.stages))
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                lax.fori_loop(i32(0), t["steps"], step, None)

            if idle is None:
                work()
            else:
                has_none = idle(t, group)
                pl.when(~has_none)(work)
                pl.when(has_none)(rest)
            return done + t["steps"]

        lax.fori_loop(i32(0), turns, turn, i32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def turn(i: Any, done: Any) -> Any:
            t = tile(refs, processor + i * i32(p.processors))

            def step(s: Any, _: None) -> None:
                slot = lax.rem(done + s, i32(p.stages))

                @pl.when(done + s >= p.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                load(refs, t, s, slot, ready.at[slot])

            lax.fori_loop(i32(0), t["steps"], step, None)
            return done + t["steps"]

        lax.fori_loop(i32(0), turns, turn, i32(0))


def in_bands(nth: Any, rows: Any, columns: int) -> tuple[Any, Any]:
    """(row, column) of the nth tile, so that tiles that are computed together share rows and columns."""
    band, rest = _divided(nth, i32(BAND * columns))
    column, below = _divided(rest, jnp.minimum(i32(BAND), rows - band * i32(BAND)))
    return band * i32(BAND) + below, column


def _divided(x: Any, by: Any) -> tuple[Any, Any]:
    return lax.div(x, by), lax.rem(x, by)


def _chosen(values: list[Any], at: Any) -> Any:
    return values[0] if len(values) == 1 else jnp.where(at == 0, values[0], values[1])
