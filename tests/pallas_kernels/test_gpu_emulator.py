"""The emulator runs a right kernel right, and sees each of the faults that it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.gpu_emulator import emulate

N, ROWS, BLOCKS = 64, 64, 5
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def product(fault):
    """sum_i a_i @ b_i by one warpgroup that computes and one that loads, two blocks in flight."""

    def body(a_ref, b_ref, out_ref, a_smem, b_smem, out_smem, ready, free):
        @pl.when(lax.axis_index("group") == 1)
        def _():
            for i in range(BLOCKS):
                if i >= 2 and fault != "overwritten":
                    plgpu.barrier_wait(free.at[i % 2])
                plgpu.copy_gmem_to_smem(a_ref.at[i], a_smem.at[i % 2], ready.at[i % 2])
                plgpu.copy_gmem_to_smem(b_ref.at[i], b_smem.at[i % 2], ready.at[i % 2])

        @pl.when(lax.axis_index("group") == 0)
        def _():
            def compute(acc_ref):
                for i in range(BLOCKS):
                    if fault != "read too early":
                        plgpu.barrier_wait(ready.at[i % 2])
                    plgpu.wgmma(acc_ref, a_smem.at[i % 2], b_smem.at[i % 2])
                    if fault != "freed too early":
                        plgpu.wgmma_wait(0)
                    if fault != "never freed":
                        plgpu.barrier_arrive(free.at[i % 2])
                return acc_ref[...]

            out_smem[...] = pl.run_scoped(compute, plgpu.ACC((ROWS, N), jnp.float32))
            if fault != "not committed":
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, N), jnp.float32),
        scratch_types=(
            plgpu.SMEM((2, ROWS, N), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, N, N), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((ROWS, N), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ),
        grid=(1,),
        grid_names=("nothing",),
        num_threads=2,
        thread_name="group",
    )


def run(fault, seed):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-3, 4, (BLOCKS, N, N)), jnp.bfloat16) for _ in range(2))
    got = emulate(product(fault), seed)(a, b)
    return np.array_equal(got, np.einsum("imk,ikn->mn", *(np.asarray(x, np.float32) for x in (a, b))))


@pytest.mark.parametrize("seed", range(5))
def test_a_right_kernel_is_right_in_any_order(seed):
    assert run(None, seed)


@pytest.mark.parametrize("fault", ["overwritten", "read too early", "freed too early"])
def test_a_race_shows(fault):
    def shows(seed):
        try:
            return not run(fault, seed)
        except AssertionError:
            return True

    assert any(shows(seed) for seed in range(5))


@pytest.mark.parametrize(("fault", "words"), [("never freed", "deadlock"), ("not committed", "commit_smem")])
def test_what_hangs_or_is_not_committed_is_an_error(fault, words):
    with pytest.raises(AssertionError, match=words):
        run(fault, seed=0)
