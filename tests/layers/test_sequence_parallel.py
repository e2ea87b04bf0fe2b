"""Rows cut over devices: every way of crossing them gives one device's attention, and one device's gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.thorough import thorough
from tests.train.helpers import MODEL, mean_gradients
from twinax.layers.contexts import PackedContext, in_order
from twinax.pallas_kernels.flash_attention import flash_attention
from twinax.planner.costs import count
from twinax.planner.hlo import Module
from twinax.sharding.all_to_all import over_heads
from twinax.sharding.plan import CHOICES, Plan
from twinax.sharding.rules import use

CONFIG = MODEL.decoder(64, 16)
ATTENTION = pytest.mark.parametrize("attention", CHOICES["attention"])

# Devices, query heads, key heads: as many as devices, more, fewer, and neither a multiple of the other.
HEADS = [(2, 4, 4), (4, 8, 8), (8, 8, 1), (4, 8, 2), (8, 16, 4), (4, 12, 6), (4, 12, 3)]


def close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12 * np.abs(y).max())


def inputs(H, K, T=16, B=2, D=4):
    rng = np.random.default_rng(H * 100 + K)
    arrays = [jnp.asarray(rng.standard_normal((B, T, heads, D))) for heads in (H, K, K, H)]
    ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    ids[:, 5:7] = ids[0, -3:] = 0
    return arrays, jnp.asarray(ids)


def outputs(attend, arrays):
    """The output and the gradients of q, k and v."""

    @jax.jit
    def run(*inputs):
        *inputs, d_out = inputs
        out, pullback = jax.vjp(attend, *inputs)
        return out, *pullback(d_out)

    return run(*arrays)


@pytest.mark.parametrize(("devices", "H", "K"), thorough(HEADS, 3))
def test_tokens_for_heads_is_attention_on_one_device(devices, H, K):
    def local(q, k, v, ids):
        return flash_attention(
            q, k, v, q_segment_ids_BT=ids, window=9, softcap=2.0, scale=0.7, implementation="reference"
        )

    with jax.enable_x64(True):
        arrays, ids = inputs(H, K)
        mesh, cut = Plan(sequence=devices).mesh(), PartitionSpec(None, "sequence")
        island = partial(jax.shard_map, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
        exchanged = island(partial(over_heads, local, axis="sequence"))
        got = outputs(lambda q, k, v: exchanged(q, k, v, ids), arrays)
        close(got, outputs(lambda q, k, v: local(q, k, v, ids), arrays))


def test_heads_that_do_not_divide_are_refused():
    arrays, ids = inputs(6, 2)
    mesh, cut = Plan(sequence=4).mesh(), PartitionSpec(None, "sequence")
    exchanged = partial(over_heads, lambda q, *rest: q, axis="sequence")
    with pytest.raises(ValueError, match="4 devices of 'sequence' the same number of query heads, and has 6"):
        jax.shard_map(exchanged, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)(*arrays[:3], ids)


@ATTENTION
@pytest.mark.parametrize("sizes", thorough(["sequence=2,tensor=2,data=2", "sequence=4,tensor=2", "sequence=8"]))
def test_a_context_on_a_mesh_is_one_on_a_device(sizes, attention):
    with jax.enable_x64(True):
        arrays, ids = inputs(8, 2)
        want = outputs(lambda *qkv: PackedContext(ids, ids).attend(*qkv, None, 0)[0], arrays)
        mesh = Plan.parse(sizes).mesh()

        def reorder(x):
            return in_order(x.swapaxes(1, -1), attention).swapaxes(1, -1)

        def attend(*qkv):
            context = PackedContext(in_order(ids, attention), ids, attention)
            return context.attend(*map(reorder, qkv), None, 0)[0]

        def run(*arrays):
            with use(mesh):
                *qkv, d_out = arrays
                out, pullback = jax.vjp(attend, *qkv)
                return out, *pullback(reorder(d_out))

        with use(mesh):
            want = reorder(want[0]), *want[1:]
        everywhere = NamedSharding(mesh, PartitionSpec())
        close(jax.jit(run)(*jax.device_put(arrays, everywhere)), want)


@pytest.mark.parametrize(
    ("attention", "kinds"),
    [
        ("ring", {"collective-permute"}),
        ("ring_two_way", {"collective-permute"}),
        ("all_to_all", {"all-to-all", "all-gather"}),  # gathered: the segment ids
    ],
)
def test_nothing_but_the_exchange_itself_crosses_devices(attention, kinds):
    """Arrays that rest as the layers keep them are where attention wants them."""
    plan = Plan.parse("sequence=4,tensor=2")
    mesh = plan.mesh()

    def attend(ids, *arrays):
        with use(mesh):
            return PackedContext(ids, ids, attention).attend(*arrays, None, 0)[0]

    rest = NamedSharding(mesh, PartitionSpec(None, "sequence", "tensor"))
    arrays = [jax.ShapeDtypeStruct((1, 64, heads, 16), jnp.float32, sharding=rest) for heads in (8, 2, 2)]
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "sequence")))
    program = jax.jit(attend, out_shardings=rest).lower(ids, *arrays).compile()
    found = count(Module.parse(program.as_text()), plan.sizes).collectives
    assert set(found) == {(kind, ("sequence",)) for kind in kinds}
    if attention == "all_to_all":
        assert found["all-gather", ("sequence",)].sent == 3 * 16 * 4


@ATTENTION
@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    thorough([("sequence=4", 2), ("sequence=2,tensor=2", 1), ("sequence=2,fsdp=2,data=2", 1)]),
)
def test_a_model_has_the_loss_and_gradients_of_one_device(sizes, accumulation, attention):
    with jax.enable_x64(True):
        want = mean_gradients(CONFIG)
        got = mean_gradients(CONFIG, Plan.parse(f"{sizes},attention={attention}"), accumulation)
    assert got[1] == pytest.approx(want[1], rel=1e-12)
    assert got[2] == want[2]
    for name, grad in want[0].items():
        assert np.linalg.norm(got[0][name] - grad) < 1e-9 * np.linalg.norm(grad), name


def test_order_of_the_tokens():
    x = jnp.arange(16)[None]
    assert in_order(x, "ring") is x
    with use(Plan(sequence=4).mesh()):
        assert in_order(x, "all_to_all") is x
        assert in_order(x, "ring").tolist() == [[0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]]
        with pytest.raises(ValueError, match="a multiple of 8, got 12"):
            in_order(x[:, :12], "ring_two_way")
    with use(Plan(tensor=2, data=4).mesh()):
        assert in_order(x, "ring") is x


def test_an_unknown_way_is_an_error_that_lists_the_choices():
    with pytest.raises(ValueError, match="attention is one of ring, ring_two_way, all_to_all; got 'rings'"):
        PackedContext(jnp.ones((1, 4)), jnp.ones((1, 4)), "rings")
