"""Rotary embedding against its definition, in complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from twinax.layers.rope import angles, frequencies, rotate
from twinax.layers.rope_config import Llama3Scaling, RopeConfig


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 8))
    positions = np.array([0, 1, 7, 100, 1000])
    turned = rotate(jnp.asarray(x, jnp.float32), *angles(RopeConfig(theta=500.0), 8, jnp.asarray(positions)))
    factor = np.exp(1j * positions[:, None, None] * 500.0 ** -(np.arange(4) / 4))
    expected = (x[..., :4] + 1j * x[..., 4:]) * factor
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-4)


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))
    config = RopeConfig()

    def score(i: int, j: int) -> float:
        q_i = rotate(q, *angles(config, 16, jnp.asarray([i])))
        k_j = rotate(k, *angles(config, 16, jnp.asarray([j])))
        return float(jnp.sum(q_i * k_j))

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)


def test_llama3_scaling_keeps_the_quick_and_slows_the_slow():
    plain = frequencies(RopeConfig(theta=500000.0), 128)
    scaled = frequencies(RopeConfig(theta=500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)), 128)
    wavelength = 2 * np.pi / plain
    quick, slow = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[quick], plain[quick])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8)
    between = ~quick & ~slow
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_theta_that_is_no_positive_number_is_refused(theta):
    with pytest.raises(ValueError, match="positive number"):
        RopeConfig(theta=theta)
