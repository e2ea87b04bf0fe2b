"""Costs of programs that XLA compiled for eight simulated devices, against what was put into them by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from twinax.planner.costs import Costs, count
from twinax.planner.hlo import Module

SIZES = {"data": 2, "fsdp": 4}
N, K = 64, 48
FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def costs(function, *shapes: tuple[int, ...], mesh: Mesh | None = None, specs=None, out=None) -> Costs:
    """Of a jitted function of float32 arrays; on a mesh, of an island on every device."""
    if mesh is not None:
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    places = [None if mesh is None else NamedSharding(mesh, spec) for spec in specs or [None] * len(shapes)]
    like = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, places, strict=True)]
    text = jax.jit(function).lower(*like).compile(compiler_options=FAST).as_text()
    return count(Module.parse(text), SIZES if mesh is not None else {"data": 1})


def test_a_product():
    assert costs(lambda a, b: a @ b, (N, K), (K, N)).flops == 2 * N * K * N


def test_a_scanned_product_counts_once_a_turn():
    def f(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    assert costs(f, (N, K), (7, K, K)).flops == 7 * 2 * N * K * K


def test_loops_within_loops_multiply():
    def inner(x, w):
        return lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x)

    def f(x, weights):
        return lax.scan(lambda x, w: (inner(x, w), None), x, weights)[0]

    assert costs(f, (N, K), (3, K, K)).flops == 3 * 5 * 2 * N * K * K


def test_a_loop_whose_length_depends_on_the_outer_counter():
    """As in causal attention: turn i of the outer loop runs the inner one i + 1 times."""

    def f(x, w):
        def outer(i, x):
            return lax.fori_loop(0, i + 1, lambda j, x: jnp.tanh(x @ w), x)

        return lax.fori_loop(0, 6, outer, x)

    assert costs(f, (N, K), (K, K)).flops == 21 * 2 * N * K * K


def test_a_loop_with_bounds_and_steps_of_its_own():
    def f(x, w):
        def turn(carry):
            i, x = carry
            return i + 3, jnp.tanh(x @ w)

        return lax.while_loop(lambda carry: carry[0] < 20, turn, (jnp.int32(4), x))[1]

    assert costs(f, (N, K), (K, K)).flops == 6 * 2 * N * K * K


def test_a_loop_that_depends_on_data_is_counted_once_and_named():
    def f(x, w):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.abs(x @ w), x)

    found = costs(f, (N, K), (K, K))
    assert found.flops == 2 * N * K * K
    assert len(found.unknown) == 1
    assert "loop" in min(found.unknown)


def test_the_dearest_branch_counts():
    def f(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert costs(f, (N, K), (K, K)).flops == 2 * 2 * N * K * K


def test_a_gather_over_one_axis_in_a_loop(mesh: Mesh):
    def f(x, weights):
        def turn(x, w):
            whole = lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        return lax.scan(turn, x, weights)[0]

    found = costs(
        f, (N, K), (5, K, K), mesh=mesh,
        specs=(PartitionSpec("data"), PartitionSpec(None, "fsdp")), out=PartitionSpec("data"),
    )  # fmt: skip
    assert found.flops == 5 * 2 * (N // 2) * K * K
    assert set(found.collectives) == {("all-gather", ("fsdp",))}
    traffic = found.collectives["all-gather", ("fsdp",)]
    assert traffic.count == 5
    assert traffic.sent == 5 * 3 * (K // 4) * K * 4


@pytest.mark.parametrize(
    ("collective", "kind", "axes", "sent"),
    [
        (lambda x: lax.psum(x, "data"), "all-reduce", ("data",), 2 * 0.5 * N * K * 4),
        (lambda x: lax.psum(x, ("data", "fsdp")), "all-reduce", ("data", "fsdp"), 2 * 7 / 8 * N * K * 4),
        (
            lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True),
            "reduce-scatter", ("fsdp",), 3 / 4 * N * K * 4,
        ),
        (lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True), "all-to-all", ("fsdp",), 3 / 4 * N * K * 4),
        (lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", ("fsdp",),
         N * K * 4),
        (lambda x: lax.ppermute(x, "fsdp", [(0, 1)]), "collective-permute", ("fsdp",), N * K * 4 / 4),
    ],
)  # fmt: skip
def test_what_a_device_sends(collective, kind: str, axes: tuple[str, ...], sent: float, mesh: Mesh):
    found = costs(
        lambda x: collective(x[0]), (8, N, K), mesh=mesh, specs=(PartitionSpec(("data", "fsdp")),),
        out=PartitionSpec(("data", "fsdp")),
    )  # fmt: skip
    assert {key: traffic.sent for key, traffic in found.collectives.items()} == {(kind, axes): pytest.approx(sent)}


def test_traffic_of_an_update_is_the_update():
    def f(x, row):
        return lax.fori_loop(0, 4, lambda i, x: lax.dynamic_update_slice(x, row, (i, 0)), x)

    # The compiler may copy the whole array once, as it was not donated; the loop writes single rows.
    found = costs(f, (1000, K), (1, K)).hbm_bytes
    assert found < 3 * 1000 * K * 4


def test_a_start_and_its_steps_count_once():
    """What a TPU's compiler makes of a gather that runs beside other work: three fusions with one channel."""
    fused = "\n".join(
        f"""%fused_{part} (p: bf16[16,32]) -> bf16[64,32] {{
  %p = bf16[16,32]{{1,0}} parameter(0)
  ROOT %g = bf16[64,32]{{1,0}} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={{0}}, \
backend_config={{"async_collective_name":"g"}}
}}"""
        for part in ("start", "step", "done")
    )
    calls = "\n".join(
        f"  %{part} = bf16[64,32]{{1,0}} fusion(%p), kind=kCustom, calls=%fused_{part}" for part in ("start", "step")
    )
    text = f"""{fused}
ENTRY %main (p: bf16[16,32]) -> bf16[64,32] {{
  %p = bf16[16,32]{{1,0}} parameter(0)
{calls}
  ROOT %done = bf16[64,32]{{1,0}} fusion(%p), kind=kCustom, calls=%fused_done
}}"""
    (traffic,) = count(Module.parse(text), SIZES).collectives.values()
    assert (traffic.sent, traffic.count, traffic.beside) == (3 * 16 * 32 * 2, 1, 3 * 16 * 32 * 2)


def test_attention_is_counted_apart():
    def f(x, w):
        y = x @ w
        with jax.named_scope("attend"):
            return y @ y.T

    found = costs(f, (N, K), (K, K))
    assert found.flops == 2 * N * K * K + 2 * N * K * N
    assert found.attend[0] == 2 * N * K * N


def test_a_kernel_s_metadata_may_go_on_over_several_lines():
    """As libtpu prints them; what comes after is still of the same computation."""
    module = Module.parse(
        """HloModule test

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"sequence\\"]"
}}, metadata={op_name="attend/kernel"}
  ROOT %last = f32[4]{0} add(%kernel, %x)
}
"""
    )
    assert module.entry.root.name == "last"
    assert module.entry["kernel"].op_name == "attend/kernel"
