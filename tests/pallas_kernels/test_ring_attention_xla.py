"""What ring_attention's XLA candidate promises beyond the contract, read from the compiled program of eight devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twinax.pallas_kernels.ring_attention import ring_attention, xla
from twinax.planner.costs import count
from twinax.planner.hlo import Module

B, C, H, K, D = 1, 32, 2, 1, 64  # C tokens of a chunk, two chunks a device
WAYS = pytest.mark.parametrize("two_way", [False, True], ids=["one way", "two ways"])
BOTH = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
PERMUTE = ("collective-permute", ("ring",))


@cache
def compiled(devices=8, backward=False, implementation=None, **options):
    """The program of one pass. The backward pass is called by itself: in one program with the forward pass, where no
    model has it, XLA:CPU finds that the two send some of the same."""
    mesh, cut = Mesh(np.array(jax.devices()[:devices]), ("ring",)), PartitionSpec(None, "ring")

    def forward_pass(q, k, v, ids):
        return ring_attention(q, k, v, axis="ring", segment_ids_BT=ids, implementation=implementation, **options)

    def backward_pass(q, k, v, ids, out, lse, d_out):
        ring = xla._Ring("ring", devices, C, **{"window": None, "scale": None, "softcap": None, **options})
        return xla._attention_backward(ring, (q, k, v, ids, None, out, lse), d_out)[:3]

    def spec(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((B, 2 * devices * C, *sizes), dtype, sharding=NamedSharding(mesh, cut))

    given = [spec(H, D), spec(K, D), spec(K, D), spec(dtype=jnp.int32)]
    given += [spec(H, D), spec(H), spec(H, D)] if backward else []
    one_pass = backward_pass if backward else forward_pass
    run = jax.shard_map(one_pass, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    return jax.jit(run).lower(*given).compile()


def costs(**options):
    return count(Module.parse(compiled(**options).as_text()), {"ring": options.get("devices", 8)})


def largest(**options):
    module = Module.parse(compiled(**options).as_text())
    return max(
        shape.elements for computation in module.computations.values() for i in computation for shape in i.shapes
    )


@BOTH
@WAYS
def test_no_device_holds_a_whole_row(two_way, backward):
    assert largest(two_way=two_way, backward=backward) < B * 2 * 8 * C * K * D
    assert set(costs(two_way=two_way, backward=backward).collectives) == {PERMUTE}


def test_which_the_reference_does():
    assert largest(implementation="reference", two_way=False) >= B * 2 * 8 * C * K * D


@WAYS
def test_what_is_sent_is_what_the_docstring_says(two_way):
    """Messages and bytes, the loop's turns counted."""
    forward, backward = (costs(two_way=two_way, backward=b).collectives[PERMUTE] for b in (False, True))
    rows, four = B * 2 * C, 4
    q, kv, ids, number = rows * H * D * four, rows * 2 * K * D * four, rows * four, rows * H * four
    if two_way:
        a, b = 4, 3
        assert forward.count == a * 3 + b * 2 + b * 2  # k v ids; q ids; out lse
        assert forward.sent == a * (kv + ids) + b * (q + ids) + b * (q + number)
        assert backward.count == a * 3 + a * 2 + b * 5 + b * 1  # k v ids; dk dv; q d_out lse delta ids; dq
        assert backward.sent == a * (2 * kv + ids) + b * (2 * q + 2 * number + ids) + b * q
    else:
        assert forward.count == 7 * 3  # k v ids
        assert forward.sent == 7 * (kv + ids)
        assert backward.count == 7 * 5  # and dk dv
        assert backward.sent == 7 * (2 * kv + ids)


def test_a_window_sends_to_neighbours_only():
    """A window of a chunk reaches the two devices next to one's own; forward the keys, backward their gradients too."""
    sent = [costs(window=C, two_way=False, backward=b).collectives[PERMUTE].count for b in (False, True)]
    assert sent == [2 * 3, 2 * 5]


@WAYS
def test_work_that_causality_empties_is_not_done(two_way, monkeypatch):
    """Of 16 x 16 chunks, a device meets 3 at home and 2 with each other device: half, and the same on all."""
    from twinax.pallas_kernels.flash_attention import xla as flash

    monkeypatch.setattr(flash, "BLOCK", C)
    products = 2 * 2 * B * H * D * C * C  # of one pair of chunks, forward; backward makes five where this makes two
    program = compiled.__wrapped__(two_way=two_way)
    assert count(Module.parse(program.as_text()), {"ring": 8}).flops == (3 + 2 * 7) * products


@BOTH
def test_program_and_memory_do_not_grow_with_the_ring(backward):
    """For the same tokens on each device; a whole row is a third larger on eight devices than on six."""
    six, eight = (compiled(devices=n, two_way=False, backward=backward) for n in (6, 8))
    sends = [program.as_text().count(" collective-permute(") for program in (six, eight)]
    assert sends[0] == sends[1] > 0
    memory = [program.memory_analysis().temp_size_in_bytes for program in (six, eight)]
    assert memory[1] < 1.02 * memory[0]
