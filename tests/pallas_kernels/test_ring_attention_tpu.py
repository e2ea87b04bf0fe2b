"""Ring attention's TPU kernels: the numbers of one device in interpret mode, without races; and that they compile."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.pallas_kernels.pairs import pairs

QUICK = [
    {"n": 3, "mode": "on_wait", "chunk": 100, "segments": True, "softcap": 2.0},
    {"n": 4, "mode": "on_wait", "chunk": 128, "H": 1, "window": 100},  # the second round brings nothing to see
]
SLOW = [
    {"n": 5, "mode": "eager", "chunk": 90, "window": 200, "segments": True},  # three chunks, no tile is whole
    {"n": 3, "mode": "on_wait", "chunk": 384, "H": 1, "window": 300},  # tiles that are whole, and that are edges
    {"n": 4, "mode": "eager", "chunk": 128, "H": 1, "window": 1},  # nothing travels
    {"n": 2, "mode": "eager", "chunk": 256, "B": 2, "K": 2, "large": 50.0},
    {"n": 5, "mode": "on_wait", "chunk": 128, "dtype": "bfloat16", "K": 2},
]
OPTIONS = (
    *("three devices", "a rest", "grouped", "two rows", "window", "softcap", "scale", "segments", "bfloat16", "eager"),
)
GIVEN = {
    "two rows": {"B": 2},
    "window": {"window": 100},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.7},
    "segments": {"segments": True},
    "bfloat16": {"dtype": "bfloat16"},
}
PAIRS = [
    {
        "n": 3 if "three devices" in has else 4,
        "mode": "eager" if "eager" in has else "on_wait",
        "chunk": 90 if "a rest" in has else 128,
        "K": 1 if "grouped" in has else 2,
        **{name: x for option, given in GIVEN.items() if option in has for name, x in given.items()},
    }
    for has in pairs(OPTIONS)
]
# Of float32: sums of 2,000 terms, and the softmax of scores up to 1,000 with `large`. bfloat16 rounds p and ds.
LIMITS = {"float32": 1e-5, "bfloat16": 2.0**-6}


def find(cases):
    environment = {**os.environ, "NPROC": "32", "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pallas_kernels.ring_tpu", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(cases)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "cases",
    [QUICK, *(pytest.param(cases, marks=pytest.mark.slow) for cases in (SLOW, PAIRS[:6], PAIRS[6:]))],
    ids=["quick", "slow", "pairs", "more pairs"],
)
def test_the_numbers_of_one_device_and_no_races(cases):
    for case, found in zip(cases, find(cases), strict=True):
        dtype = case.get("dtype", "float32")
        assert not found["races"] and found["finite"], case
        assert found["dtypes"] == [dtype] * 4, case
        assert max(found["errors"]) < LIMITS[dtype] * case.get("large", 1.0), (case, found["errors"])


BUILDER = """
import jax
from jax.sharding import PartitionSpec
from benchmarks.static import Program
from twinax.pallas_kernels.ring_attention import ring_attention


def both(target, segments=False, **options):
    cut = PartitionSpec(None, "x")

    def attend(q, k, v, *ids):
        more = options | ({"segment_ids_BT": ids[0]} if ids else {})
        return ring_attention(q, k, v, axis="x", implementation="tpu", **more)

    def run(q, k, v, d_out, *ids):
        island = jax.shard_map(attend, mesh=target.mesh, in_specs=cut, out_specs=cut, check_vma=False)
        out, pullback = jax.vjp(lambda q, k, v: island(q, k, v, *ids), q, k, v)
        return out, *pullback(d_out)

    q, k = (target.array((1, 512 * target.mesh.size, heads, 128), "bfloat16", cut) for heads in (2, 1))
    ids = (target.array((1, 512 * target.mesh.size), "int32", cut),) if segments else ()
    return Program(run, (q, k, k, q, *ids), 0, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is the compiler, and is not installed")
def test_it_compiles_for_several_chips(tmp_path):
    from benchmarks.static import Request, compile_all

    file = tmp_path / "builders.py"
    file.write_text(BUILDER)
    machines = [("v5p:2x2x1", {}), ("v6e:2x2", {"segments": True}), ("v6e:2x2", {"window": 300})]
    requests = [Request(name, f"{file}:both", options) for name, options in machines]
    for request, found in zip(requests, compile_all(requests, profiled=False), strict=True):
        assert found.failed is None, (request.chip, found.failed)


def test_what_it_refuses_another_candidate_takes():
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from twinax.pallas_kernels.ring_attention import ring_attention
    from twinax.sharding.plan import Plan

    cut, x = PartitionSpec(None, "sequence"), jnp.ones((1, 8, 1, 4))

    def run(devices, **options):
        mesh = Plan(sequence=devices).mesh()
        inner = lambda q: ring_attention(q, q, q, axis="sequence", implementation="tpu", **options)  # noqa: E731
        return jax.shard_map(inner, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)(x)

    with pytest.raises(NotImplementedError, match="no ring"):
        run(1)
    x = jnp.ones((1, 1 << 17, 1, 128))
    with pytest.raises(NotImplementedError, match="MiB of VMEM, 100 are there"):
        run(2)
