"""What products for Blackwell have in common (Mosaic GPU): `gpu_steps.py` with tcgen05, and two sums in tensor memory.

As many programs as there are processors each go through tiles of the result, of 128 rows. One warpgroup loads steps of
both operands, also the next tile's, one has them multiplied, and one stores a tile while the next one's sums are made
in the other half of tensor memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_steps import CHUNK, MOST_STAGES, SHARED_MEMORY, i32

ROWS = 128  # of a tile: the lanes of tensor memory
STEP = 64  # terms of a step
SUMS = 2  # tiles in tensor memory
PROCESSORS = 148
SPREAD = plgpu.Layout.TCGEN05  # a row over four threads, which write to shared memory without conflicts
STORES, LOADS, MULTIPLIES = range(3)  # warpgroups
ORDERED = {"orders_tensor_core": True}


class Plan(NamedTuple):
    """Columns of a tile, steps in flight, and programs."""

    c: int
    stages: int
    processors: int = PROCESSORS


def plan_of(C: int) -> Plan:
    """In closed form: the columns that waste little of what a tile loads."""
    c = min((c for c in (256, 192, 128, 64) if c <= C), key=lambda c: pl.cdiv(C, c) * (c + ROWS))
    return Plan(c, min(MOST_STAGES, (SHARED_MEMORY - 4 * ROWS * CHUNK) // (2 * STEP * (ROWS + c))))


def check(dtype: jnp.dtype, summed: int, columns: int) -> None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Blackwell kernels take bfloat16 and float16, got {dtype}")
    if summed % STEP or columns % CHUNK:
        raise NotImplementedError(
            f"the Blackwell kernels take 64, 128, ... inputs and outputs, not {summed}, {columns}"
        )


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
) -> jax.Array:
    """Runs tiles of steps; what is done in each is in the functions.

    Args:
      scratch: arrays in shared memory for the functions. In flight are p.stages steps of two copies each.
      count_tiles(refs): how many there are. tile(refs, nth): what the functions want to know of one, and its "steps".
      load(refs, t, s, slot, ready): starts the two copies of step s into a slot.
      multiply(refs, t, s, slot, sums, nth): adds the step's products to sums [128, p.c], or with s = 0 puts them there;
        nth counts this program's steps.
      store(refs, t, place, sums_rc): of up to 64 of a tile's columns from `place` on, 0 where it had no steps.
    """
    own = {
        "sums": plgpu.TMEM((ROWS, SUMS * p.c), jnp.float32),
        "ready": plgpu.Barrier(num_barriers=p.stages, num_arrivals=2),
        "free": plgpu.Barrier(num_barriers=p.stages, **ORDERED),
        "summed": plgpu.Barrier(num_barriers=SUMS, **ORDERED),
        "stored": plgpu.Barrier(num_barriers=SUMS, **ORDERED),
    }

    def body(*refs: Any) -> None:
        def scope(*allocated: Any) -> None:
            of_name = dict(zip((*given, "y", *scratch, *own), (*refs, *allocated), strict=True))
            _run(p, of_name, count_tiles, tile, load, multiply, store)

        pl.run_scoped(scope, *scratch.values(), *own.values(), collective_axes="warpgroup")

    body.__name__ = name  # what profilers show
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(p.processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*given.values())


def _run(p: Plan, refs: dict[str, Any], count_tiles: Any, tile: Any, load: Any, multiply: Any, store: Any) -> None:
    processor, group = lax.axis_index("processor"), lax.axis_index("warpgroup")
    turns = lax.div(count_tiles(refs) + i32(p.processors - 1) - processor, i32(p.processors))

    def tile_of(i: Any) -> dict[str, Any]:
        return tile(refs, processor + i * i32(p.processors))

    def sums_of(i: Any, start: int = 0, width: int = p.c) -> Any:
        return refs["sums"].at[:, pl.ds(lax.rem(i, i32(SUMS)) * i32(p.c) + i32(start), width)]

    def load_tile(i: Any, done: Any) -> Any:
        t = tile_of(i)

        def step(s: Any, _: None) -> None:
            slot = lax.rem(done + s, i32(p.stages))
            pl.when(done + s >= p.stages)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
            load(refs, t, s, slot, refs["ready"].at[slot])

        lax.fori_loop(i32(0), t["steps"], step, None)
        return done + t["steps"]

    def multiply_tile(i: Any, done: Any) -> Any:
        t, half = tile_of(i), lax.rem(i, i32(SUMS))
        pl.when(i >= SUMS)(lambda: plgpu.barrier_wait(refs["stored"].at[half]))

        def step(s: Any, _: None) -> None:
            slot = lax.rem(done + s, i32(p.stages))
            plgpu.barrier_wait(refs["ready"].at[slot])
            multiply(refs, t, s, slot, sums_of(i), done + s)
            plgpu.tcgen05_commit_arrive(refs["free"].at[slot])

        lax.fori_loop(i32(0), t["steps"], step, None)
        plgpu.tcgen05_commit_arrive(refs["summed"].at[half])
        return done + t["steps"]

    def store_tile(i: Any, _: None) -> None:
        t, half = tile_of(i), lax.rem(i, i32(SUMS))
        plgpu.barrier_wait(refs["summed"].at[half])
        chunk = min(CHUNK, p.c)
        for place in range(0, p.c, chunk):
            part_rc = plgpu.async_load_tmem(sums_of(i, place, chunk), layout=SPREAD)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(refs, t, place, jnp.where(t["steps"] > 0, part_rc, 0.0))  # without steps nobody has written there
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(refs["stored"].at[half])

    @pl.when(group == STORES)
    def _() -> None:
        lax.fori_loop(i32(0), turns, store_tile, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == LOADS)
    def _() -> None:
        lax.fori_loop(i32(0), turns, load_tile, i32(0))

    @pl.when(group == MULTIPLIES)
    def _() -> None:
        lax.fori_loop(i32(0), turns, multiply_tile, i32(0))
