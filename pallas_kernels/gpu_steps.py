"""What products for Hopper have in common (Mosaic GPU): tiles of a result, made step by step.

As many programs as there are processors each go through tiles of the result. Two warpgroups compute, and the third
keeps steps of both operands coming, also the next tile's while this one is stored.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

ROWS = 64  # of a warpgroup's accumulator: what one wgmma takes
CHUNK = 64  # of an accumulator's columns, that are stored at a time
PROCESSORS = 132
BAND = 8  # rows of tiles that are computed together
SHARED_MEMORY = 227 * 1024 - 2048  # bytes a block may have, less barriers
REGISTERS = (240, 24)  # of a thread that computes, and of one that loads: 2 x 240 + 24 = 3 x 168
MOST_STAGES = 6


@dataclass(frozen=True)
class Plan:
    """How many warpgroups are below and beside each other, columns of one's accumulator, and steps in flight."""

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


def read(ref: Any, layout: Any) -> jax.Array:
    """What a reference holds, laid out as asked: of a product's rows, say."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # JAX 0.10 wants one
    return plgpu.load(ref, *index, layout=layout, optimized=False)


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


def copy_rows(piece: Any, y: Any, low: Any, high: Any, row: Any, columns: Any, most: int = 32) -> None:
    """Starts copies of `piece`'s rows [low, high), fewer than 2 * most, to those of y from row + low on; a copy's shape
    is static, so in pieces of `most` and half as many, ... 1."""
    at, rows = low, high - low
    for size in (1 << bit for bit in reversed(range(most.bit_length()))):
        has = (rows & i32(size)) != 0

        @pl.when(has)
        def _(at: Any = at, size: int = size) -> None:
            plgpu.copy_smem_to_gmem(piece.at[pl.ds(at, size)], y.at[pl.ds(row + at, size), columns])

        at = at + (rows & i32(size))


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
    add: Any = None,
) -> jax.Array:
    """Runs tiles of steps on two warpgroups that compute and one that loads; what they do is in the functions.

    A `ready` barrier holds what `load` loads of a step; `free` comes when both warpgroups have multiplied it.

    Args:
      scratch: `NAME_smem` for the functions where `given` has the name too. Among them "ready" and "free", p.stages
        barriers each, "free" of two arrivals.
      count_tiles(refs): how many there are. tile(refs, nth): what the functions want to know of one, and its "steps".
      load(refs, t, s, slot, ready): starts the copies of step s into a slot.
      multiply(refs, t, s, slot, group, acc_ref): adds the step's products to a warpgroup's accumulator [64, p.c].
      add(refs, t, s, slot, group, acc): instead of `multiply`, of an accumulator that is a value, and returns the next.
      store(refs, t, group, acc): of a whole tile. idle(t, group): whether the warpgroup has nothing to do in it.
    """

    def entry(*refs: Any) -> None:
        of_call = dict(zip((*given, "y"), refs, strict=True))

        def scope(*allocated: Any) -> None:
            of_name = dict(zip(scratch, allocated, strict=True))
            own = {name + ("_smem" if name in of_call else ""): ref for name, ref in of_name.items()}
            _run(p, {**of_call, **own}, count_tiles, tile, load, multiply, store, idle, add)

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


def _run(
    p: Plan, refs: Any, count_tiles: Any, tile: Any, load: Any, multiply: Any, store: Any, idle: Any, add: Any
) -> None:
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

            def add_step(s: Any, acc: Any) -> Any:
                slot = lax.rem(done + s, i32(p.stages))
                plgpu.barrier_wait(ready.at[slot])
                acc = add(refs, t, s, slot, group, acc)
                plgpu.barrier_arrive(free.at[slot])
                return acc

            def work() -> None:
                if add is not None:
                    zeros = plgpu.layout_cast(jnp.full((ROWS, p.c), 0.0, jnp.float32), plgpu.Layout.WGMMA)
                    store(refs, t, group, lax.fori_loop(i32(0), t["steps"], add_step, zeros))
                    return
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
    band, rest = divided(nth, i32(BAND * columns))
    column, below = divided(rest, jnp.minimum(i32(BAND), rows - band * i32(BAND)))
    return band * i32(BAND) + below, column


def divided(x: Any, by: Any) -> tuple[Any, Any]:
    return lax.div(x, by), lax.rem(x, by)


def chosen(values: list[Any], at: Any) -> Any:
    return values[0] if len(values) == 1 else jnp.where(at == 0, values[0], values[1])
