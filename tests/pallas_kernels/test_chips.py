"""Which chip a program is traced for."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from twinax.pallas_kernels.chips import known_platform, target_chip


@pytest.mark.parametrize(
    ("kind", "platform", "chip", "known"),
    [
        ("TPU v5 lite", "tpu", "v5e", "tpu"),
        ("TPU v5", "tpu", "v5p", "tpu"),
        ("TPU v6 lite", "tpu", "v6e", "tpu"),
        ("TPU7x", "tpu", "7x", "tpu"),
        ("NVIDIA H200 141GB HBM3e", "cuda", "h200", "cuda"),
        ("NVIDIA GB200", "gpu", "gb200", "cuda"),
        ("AMD Instinct MI300X", "gpu", None, "rocm"),
        ("cpu", "cpu", None, "cpu"),
    ],
)
def test_it_is_that_of_the_mesh(kind, platform, chip, known):
    device = AbstractDevice(kind, None, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert (target_chip(), known_platform()) == (chip, known)


def test_it_is_this_machine_s_without_one():
    assert (target_chip(), known_platform()) == (None, "cpu")  # tests run on a CPU
