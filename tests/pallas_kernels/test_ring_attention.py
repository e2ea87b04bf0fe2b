"""The contract of ring_attention, for every candidate and both ways of travelling: the numbers of one device.

Everything is held against flash_attention's reference on one device, in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.pallas_kernels.pairs import pairs
from tests.thorough import thorough
from twinax.pallas_kernels.flash_attention import flash_attention
from twinax.pallas_kernels.ring_attention import OPERATION, ring_attention, unzigzag, zigzag
from twinax.sharding.plan import Plan

B, D = 2, 4
# Devices, tokens of a chunk, query heads, key heads, options.
CASES = {
    "two devices": (2, 3, 2, 2, {}),
    "four devices": (4, 4, 4, 2, {}),
    "eight devices": (8, 2, 3, 1, {}),
    "an odd number of devices": (5, 3, 2, 1, {}),
    "segments on two": (2, 7, 2, 1, {"segments": True, "scale": 0.7}),
    "segments on four": (4, 4, 2, 2, {"segments": True}),
    "segments on eight": (8, 4, 4, 2, {"segments": True}),
    "window of one": (4, 2, 2, 1, {"window": 1}),
    "window within a chunk": (8, 4, 2, 2, {"window": 3}),
    "window of a few chunks": (8, 3, 2, 1, {"window": 8, "softcap": 1.5}),
    "values of another size": (4, 4, 2, 1, {"V": 6, "segments": True}),
    "sinks": (4, 4, 4, 2, {"sinks": True, "segments": True}),
    "window around the ring": (4, 4, 2, 1, {"window": 27, "segments": True, "softcap": 2.0}),
}
OPTIONS = (
    *("five devices", "odd chunks", "grouped", "window", "softcap", "scale", "segments", "sinks"),
    *("other values", "two ways"),
)


def paired() -> dict[str, tuple]:
    """Cases in which every two options meet."""
    found = {}
    for has in pairs(OPTIONS):
        given = {
            "window": {"window": 9},
            "softcap": {"softcap": 1.5},
            "scale": {"scale": 0.7},
            "segments": {"segments": True},
            "sinks": {"sinks": True},
            "other values": {"V": 6},
        }
        options = {name: x for option, one in given.items() if option in has for name, x in one.items()}
        sizes = 5 if "five devices" in has else 4, 3 if "odd chunks" in has else 4, 2, 1 if "grouped" in has else 2
        found[", ".join(option for option in OPTIONS if option in has) or "no option"] = (*sizes, options)
    return found


PAIRED = paired()
# Cases, and whether their rings go both ways: the named ones do and do not, of the pairs it is one of the options.
WAYS = [(case, two_way) for case in CASES for two_way in (False, True)]
WAYS += [(case, "two ways" in case) for case in PAIRED]
CASES |= PAIRED


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from twinax.pallas_kernels.flash_attention import xla

    monkeypatch.setattr(xla, "BLOCK", 8)


def order(devices: int, length: int) -> np.ndarray:
    """Which token of a row each place holds, from the words of the docstring."""
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * devices - 1 - i]]) for i in range(devices)])


def make(case, dtype=np.float64):
    """q, k, v and the output's gradient in the order of the row; segment ids with padding inside and at the end, where
    the inputs are infinite."""
    devices, chunk, H, K, options = CASES[case]
    length, options = 2 * devices * chunk, dict(options)
    rng = np.random.default_rng(list(CASES).index(case))
    V = options.pop("V", D)
    if options.pop("sinks", False):
        options["sinks_H"] = jnp.asarray(rng.standard_normal(H))
    sizes = ((H, D), (K, D), (K, V), (H, V))
    arrays = [rng.standard_normal((B, length, *size)).astype(dtype) for size in sizes]
    ids = None
    if options.pop("segments", False):
        ids = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
        ids[:, length // 3 : length // 3 + 2] = 0
        ids[0, -3:] = 0
        arrays[:3] = [np.where((ids == 0)[:, :, None, None], np.inf, x).astype(dtype) for x in arrays[:3]]
    return devices, arrays, ids, options


def on_one_device(arrays, ids, options):
    *inputs, d_out = map(jnp.asarray, arrays)

    @jax.jit
    def run(*inputs):
        attend = partial(flash_attention, q_segment_ids_BT=ids, implementation="reference", **options)
        out, pullback = jax.vjp(attend, *inputs)
        return out, *pullback(d_out)

    return run(*inputs)


def on_a_ring(devices, ids, options, backward=True):
    """The jitted function of (q, k, v, d_out), all in ring order, to (out, dq, dk, dv) or out alone."""
    mesh, cut = Plan(sequence=devices).mesh(), PartitionSpec(None, "sequence")
    island = partial(jax.shard_map, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)

    def attend(q, k, v):
        if ids is None:
            return island(partial(ring_attention, axis="sequence", **options))(q, k, v)
        inner = lambda q, k, v, ids: ring_attention(q, k, v, axis="sequence", segment_ids_BT=ids, **options)  # noqa: E731
        return island(inner)(q, k, v, jnp.asarray(ids))

    def run(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return (out, *pullback(d_out)) if backward else out

    return jax.jit(run)


def check(case, **way):
    with jax.enable_x64(True):
        devices, arrays, ids, options = make(case)
        places = order(devices, arrays[0].shape[1])
        got = on_a_ring(devices, None if ids is None else ids[:, places], {**options, **way})(
            *(jnp.asarray(x[:, places]) for x in arrays)
        )
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, on_one_device(arrays, ids, options), strict=True):
            y = np.asarray(y)[:, places]
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12 * np.abs(y).max(), err_msg=name)


@pytest.mark.parametrize(("case", "two_way"), thorough(WAYS, [n + way for n in (0, 6, 12, 14, 20) for way in (0, 1)]))
def test_a_ring_gives_the_output_and_gradients_of_one_device(case, two_way):
    check(case, two_way=two_way)


# Kernels for TPUs take no float64, and have tests of their own.
@pytest.mark.parametrize("two_way", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one way", "two ways"])
def test_the_gradient_of_sinks_is_that_of_one_device(two_way):
    with jax.enable_x64(True):
        devices, (*qkv, d_out), ids, options = make("sinks")
        places, sinks = order(devices, d_out.shape[1]), options["sinks_H"]
        mesh, cut, whole = Plan(sequence=devices).mesh(), PartitionSpec(None, "sequence"), PartitionSpec()

        def attend(q, k, v, ids, sinks):
            return ring_attention(q, k, v, axis="sequence", segment_ids_BT=ids, sinks_H=sinks, two_way=two_way)

        island = jax.shard_map(attend, mesh=mesh, in_specs=(cut,) * 4 + (whole,), out_specs=cut, check_vma=False)
        *placed, d_placed = (jnp.asarray(x[:, places]) for x in (*qkv, d_out))
        run = lambda sinks: jnp.sum(island(*placed, jnp.asarray(ids[:, places]), sinks) * d_placed)  # noqa: E731
        got = jax.jit(jax.grad(run))(sinks)

        def one(sinks):
            out = flash_attention(*qkv, q_segment_ids_BT=ids, sinks_H=sinks, implementation="reference")
            return jnp.sum(out * d_out)

        np.testing.assert_allclose(got, jax.grad(one)(sinks), rtol=1e-11)


@pytest.mark.parametrize("implementation", [name for name in OPERATION.names() if name != "tpu"])
def test_every_candidate_does(implementation):
    check("segments on four", implementation=implementation)


def test_bfloat16_keeps_its_dtype_and_nearly_its_numbers():
    devices, arrays, ids, options = make("segments on eight", jnp.bfloat16)
    places = order(devices, arrays[0].shape[1])
    run = on_a_ring(devices, ids[:, places], {**options, "two_way": True})
    got = run(*(jnp.asarray(x[:, places]) for x in arrays))
    with jax.enable_x64(True):
        wanted = on_one_device([x.astype(np.float64) for x in arrays], ids, options)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        y = np.asarray(y)[:, places]
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=2**-6, atol=2**-7 * np.abs(y).max())


@pytest.mark.parametrize("two_way", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one way", "two ways"])
def test_large_scores_stay_finite(two_way):
    """Beside padding, which holds inf."""
    devices, (q, k, v, d_out), ids, options = make("segments on four", np.float32)
    places = order(devices, q.shape[1])
    run = on_a_ring(devices, ids[:, places], {**options, "two_way": two_way})
    arrays = (q * 1e4, k * 1e4, v, d_out)
    out, *gradients = run(*(jnp.asarray(x[:, places], jnp.float32) for x in arrays))
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert not np.asarray(out)[ids[:, places] == 0].any()


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_is_the_order_and_unzigzag_its_inverse(devices):
    x = np.arange(48 * 2).reshape(2, 48)
    np.testing.assert_array_equal(zigzag(jnp.asarray(x), devices), x[:, order(devices, 48)])
    np.testing.assert_array_equal(unzigzag(zigzag(jnp.asarray(x), devices), devices), x)
    deep = np.arange(2 * 48 * 3).reshape(2, 48, 3)
    np.testing.assert_array_equal(zigzag(jnp.asarray(deep), devices, 1), deep[:, order(devices, 48)])
    np.testing.assert_array_equal(unzigzag(zigzag(jnp.asarray(deep), devices, 1), devices, 1), deep)


def test_bad_arguments():
    with pytest.raises(ValueError, match="a multiple of 8, got 12"):
        zigzag(jnp.zeros((1, 12)), 4)
    ones = [jnp.ones((1, 6, heads, 4)) for heads in (2, 1, 1, 2)]
    with pytest.raises(ValueError, match="number of tokens is even; got 3"):
        on_a_ring(2, None, {})(*ones)
    with pytest.raises(ValueError, match="of the same tokens"):
        on_a_ring(2, None, {})(ones[0][:, :4], *ones[1:])
    with pytest.raises(ValueError, match="window must be at least 1"):
        on_a_ring(1, None, {"window": 0})(*ones)
    with pytest.raises(ValueError, match="no implementation 'gpu': choose one of tpu, xla, reference"):
        on_a_ring(1, None, {"implementation": "gpu"})(*ones)
