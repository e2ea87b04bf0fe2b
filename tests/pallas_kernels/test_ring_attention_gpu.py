"""ring_attention on GPUs: permutes around flash_attention's GPU kernels, on simulated devices and interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from twinax.pallas_kernels import candidates
from twinax.pallas_kernels.flash_attention import flash_attention, gpu, triton
from twinax.pallas_kernels.ring_attention import ring_attention, unzigzag, zigzag

DEVICES, C, H, K, D = 2, 12, 2, 1, 16


@pytest.fixture
def on_gpus(monkeypatch):
    """What is traced is for GPUs older than Hopper, whose kernels Pallas can interpret."""
    monkeypatch.setattr(candidates, "known_platform", lambda: "cuda")
    monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
    monkeypatch.setattr(gpu, "target_chip", lambda: "a100")
    monkeypatch.setattr(triton, "blocks", lambda *_: (16, 16, 4))
    monkeypatch.setattr(triton.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def primitives(jaxpr, kernels):
    """Names of all primitives of a program but inside kernels, whose names go to `kernels`."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name == "pallas_call":
            kernels.add(eqn.params["name"])
            continue
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner, kernels)


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("two_way", [False, True], ids=["one way", "two ways"])
def test_permutes_around_the_gpu_kernels(two_way):
    rng = np.random.default_rng(0)
    sizes = (H, D), (K, D), (K, D), (H, D)
    *inputs, d_out = (jnp.asarray(rng.standard_normal((1, 2 * DEVICES * C, *x)), jnp.float32) for x in sizes)
    mesh, cut = Mesh(np.array(jax.devices()[:DEVICES]), ("ring",)), PartitionSpec(None, "ring")
    attend = partial(ring_attention, axis="ring", window=20, two_way=two_way)
    on_ring = jax.shard_map(attend, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)

    def whole(q, k, v):
        return unzigzag(on_ring(*(zigzag(x, DEVICES, 1) for x in (q, k, v))), DEVICES, 1)

    def pulled(f):
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(d_out)

    got = jax.jit(partial(pulled, whole))()
    wanted = pulled(partial(flash_attention, window=20, implementation="reference"))
    for x, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))

    kernels = set()
    names = set(primitives(jax.make_jaxpr(partial(pulled, whole))().jaxpr, kernels))
    assert kernels == {"flash_attention", "flash_attention_dq", "flash_attention_dkv"}
    assert "ppermute" in names and "dot_general" not in names
