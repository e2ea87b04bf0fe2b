"""The emulator runs a right kernel right, and sees each of the faults that it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.gpu_emulator import emulate
from twinax.pallas_kernels.flash_attention.blackwell_warp import any_of_warp

N, ROWS, BLOCKS = 64, 64, 5
LANES = 128  # of Blackwell's tensor memory
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


def two_products(fault):
    """bfloat16(sum_i a_i @ b_i) @ c on Blackwell: a warp that loads, one that multiplies, and a warpgroup between."""

    def body(a_ref, b_ref, c_ref, out_ref, a_smem, b_smem, c_smem, out_smem, tmem, acc, *barriers):
        ready, of_c, free, summed, given, done = barriers
        sum_tmem, rounded_tmem = tmem
        group = lax.axis_index("group")

        @pl.when(group == 1)
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    for i in range(BLOCKS):
                        if i >= 2 and fault != "overwritten":
                            plgpu.barrier_wait(free.at[i % 2])
                        plgpu.copy_gmem_to_smem(a_ref.at[i], a_smem.at[i % 2], ready.at[i % 2])
                        plgpu.copy_gmem_to_smem(b_ref.at[i], b_smem.at[i % 2], ready.at[i % 2])
                        if i == 0:
                            plgpu.copy_gmem_to_smem(c_ref, c_smem, of_c)
                    if fault == "loaded for nothing":
                        plgpu.barrier_wait(of_c)
                        plgpu.copy_gmem_to_smem(c_ref, c_smem, of_c)

                @pl.when(warp == 1)
                def _():
                    for i in range(BLOCKS):
                        if fault != "multiplied too early":
                            plgpu.barrier_wait(ready.at[i % 2])
                        plgpu.tcgen05_mma(sum_tmem, a_smem.at[i % 2], b_smem.at[i % 2], accumulate=i > 0)
                        if fault != "never freed":
                            plgpu.tcgen05_commit_arrive(free.at[i % 2])
                    plgpu.tcgen05_commit_arrive(summed)
                    if fault != "loaded for nothing":
                        plgpu.barrier_wait(of_c)
                    if fault != "weights too early":
                        plgpu.barrier_wait(given)
                    plgpu.tcgen05_mma(acc, rounded_tmem.at[:, : sum_tmem.shape[1]], c_smem, done, accumulate=False)

        @pl.when(group == 0)
        def _():
            if fault != "read before the commit":
                plgpu.barrier_wait(summed)
            x = plgpu.async_load_tmem(sum_tmem)
            if fault == "waiting where warps part":
                pl.when(any_of_warp(x.max(axis=1) > 0))(plgpu.wait_load_tmem)
            elif fault != "overwritten while loaded":
                plgpu.wait_load_tmem()
            plgpu.async_store_tmem(rounded_tmem.at[:, : sum_tmem.shape[1]], x.astype(jnp.bfloat16))
            if fault != "tensor memory not committed":
                plgpu.commit_tmem()
            plgpu.barrier_arrive(given)
            if fault != "result too early":
                plgpu.barrier_wait(done)
            out_smem[...] = plgpu.async_load_tmem(acc)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref)
            plgpu.wait_smem_to_gmem(0)

    ordered = {"orders_tensor_core": True}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((LANES, N), jnp.float32),
        scratch_types=(
            plgpu.SMEM((2, LANES, N), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, N, N), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((N, N), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((LANES, N), jnp.float32),
            plgpu.RefUnion(plgpu.TMEM((LANES, N), jnp.float32), plgpu.TMEM((LANES, 2 * N), jnp.bfloat16, packed=True)),
            plgpu.TMEM((LANES, N), jnp.float32),
            plgpu.Barrier(num_arrivals=1 if fault == "one arrival too few" else 2, num_barriers=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=2, **ordered),
            plgpu.Barrier(**ordered),
            plgpu.Barrier(num_arrivals=2 if fault == "one arrival too many" else 1, **ordered),
            plgpu.Barrier(**ordered),
        ),
        grid=(1,),
        grid_names=("nothing",),
        num_threads=2,
        thread_name="group",
    )


def run_two_products(fault, seed):
    rng = np.random.default_rng(0)
    shapes = (BLOCKS, LANES, N), (BLOCKS, N, N), (N, N)
    a, b, c = (jnp.asarray(rng.integers(-1, 2, shape), jnp.bfloat16) for shape in shapes)
    got = emulate(two_products(fault), seed)(a, b, c)
    a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
    return np.array_equal(got, np.einsum("imk,ikn->mn", a, b) @ c)


@pytest.mark.parametrize("seed", range(3))
def test_a_right_kernel_for_blackwell_is_right_in_any_order(seed):
    assert run_two_products(None, seed)


@pytest.mark.parametrize(
    "fault",
    [
        "overwritten",
        "multiplied too early",
        "weights too early",
        "read before the commit",
        "tensor memory not committed",
        "result too early",
        "one arrival too few",
        "loaded for nothing",
    ],
)
def test_a_race_of_blackwell_shows(fault):
    def shows(seed):
        try:
            return not run_two_products(fault, seed)
        except AssertionError:
            return True

    assert any(shows(seed) for seed in range(5))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("never freed", "deadlock"),
        ("one arrival too many", "deadlock"),
        ("overwritten while loaded", "wait_load_tmem"),
        ("waiting where warps part", "wait_load_tmem"),
    ],
)
def test_what_hangs_or_loses_a_load_on_blackwell_is_an_error(fault, words):
    with pytest.raises(AssertionError, match=words):
        run_two_products(fault, seed=0)
