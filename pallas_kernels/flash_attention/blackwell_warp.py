"""What the Blackwell kernel does with a warp on its own, and what else Pallas, which thinks in warpgroups, has no words
for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

OF_ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE.reduce(1)
EVERY_LANE = -1


def any_of_warp(holds_q: jax.Array) -> jax.Array:
    """A condition that is the same in a warp but not in the warpgroup: what hangs on it may not wait for other warps.

    Args:
      holds_q: bool, one element a thread.
    """
    from jax.experimental.mosaic import gpu as mgpu  # jaxlib may have been built without
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, nvvm

    of_kernel: Any = plgpu.inline_mgpu(
        arg_types=(OF_ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )

    @of_kernel
    def vote_of_warp(_: Any, x: Any) -> Any:
        i1, i32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
        every = arith.constant(i32, EVERY_LANE)
        own = llvm.extractelement(x.registers.item(), arith.constant(i32, 0))
        holds = arith.cmpi(arith.CmpIPredicate.ne, own, arith.constant(i32, 0))
        found = nvvm.vote_sync(every, holds, nvvm.VoteSyncKind.any, results=[i1])
        return mgpu.FragmentedArray.splat(arith.extui(i32, found), (), is_signed=True)

    return vote_of_warp(holds_q.astype(jnp.int32)) > 0


def wait_load_of_warp() -> None:
    """`plgpu.wait_load_tmem` for the warp itself: that one waits for the whole warpgroup too."""
    from jaxlib.mlir.dialects import nvvm

    of_kernel: Any = plgpu.inline_mgpu()

    @of_kernel
    def wait_load_of_warp(_: Any) -> None:
        nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)

    wait_load_of_warp()


def in_fours(x_qc: jax.Array) -> jax.Array:
    """In float8, four of a row in a register, as tensor memory keeps them."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    fours: Any = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
    of_kernel: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.TCGEN05_TMEM_NATIVE,),
        return_type=plgpu.ShapeDtypeStruct(x_qc.shape, jnp.float8_e4m3fn, layout=fours),
    )

    @of_kernel
    def in_fours(_: Any, x: Any) -> Any:
        layout = fours.to_mgpu()
        pairs = x.astype(ir.Float8E4M3FNType.get()).registers.reshape(-1, 2)
        registers = np.empty(len(pairs), dtype=object)
        for i, pair in enumerate(pairs):
            registers[i] = utils.vector_concat(list(pair))
        shape = layout.registers_shape(x.shape)
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return in_fours(x_qc)
