"""The causal convolution against numpy, packed and paged; and that no mixer with a state sees another document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twinax.layers.contexts import PackedContext
from twinax.layers.convolution import Convolution, next_state, packed_inputs, paged_inputs
from twinax.layers.mixer_config import LightningConfig, Mamba2Config
from twinax.layers.mixers.lightning_attention import LightningAttention, slopes
from twinax.layers.mixers.mamba2 import Mamba2

WIDTH = 4


@pytest.fixture
def convolution():
    made = Convolution(3, WIDTH, rngs=nnx.Rngs(0))
    assert made.bias is not None
    made.bias.set_value(jnp.asarray([0.1, -0.2, 0.3]))
    return made


def by_hand(convolution: Convolution, x_TC: np.ndarray) -> np.ndarray:
    weight_CW, bias_C = np.asarray(convolution.weight[...])[:, 0], np.asarray(convolution.bias[...])
    before = np.concatenate([np.zeros((WIDTH - 1, x_TC.shape[1])), x_TC])
    return np.stack([(before[t : t + WIDTH].T * weight_CW).sum(1) + bias_C for t in range(len(x_TC))])


def test_documents_of_a_row_are_convolved_alone(convolution):
    x = np.random.default_rng(0).standard_normal((1, 12, 3)).astype(np.float32)
    ids = np.array([[1] * 5 + [2] * 2 + [1] * 4 + [0]], np.int32)  # an id that comes back is another document
    y = np.asarray(convolution(packed_inputs(jnp.asarray(x), jnp.asarray(ids), WIDTH)))[0]
    for start, end in ((0, 5), (5, 7), (7, 11)):
        np.testing.assert_allclose(y[start:end], by_hand(convolution, x[0, start:end]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 9), (2, 8, 9), (4, 5, 9)])
def test_a_request_in_pieces_is_convolved_as_a_whole(convolution, cuts):
    x = np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32)
    state, found, start = jnp.full((2, 3, WIDTH - 1, 3), 7.0), [], 0
    for end in cuts:
        # Two idle rows before, and one after.
        rows = np.concatenate([np.ones((2, 3)), x[start:end], np.ones((1, 3))]).astype(np.float32)
        offset, count = np.arange(len(rows)) - 2, end - start
        slot = np.where((offset >= 0) & (offset < count), 1, 3)
        inputs = paged_inputs(jnp.asarray(rows), state, 1, jnp.asarray(slot), jnp.asarray(offset), offset + start)
        found.append(np.asarray(convolution(inputs))[2 : 2 + count])
        state = next_state(inputs, state, 1, jnp.asarray([0, 1 + count]), jnp.asarray([3, 1]))
        start = end
    np.testing.assert_allclose(np.concatenate(found), by_hand(convolution, x), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(state[1, 1], x[-WIDTH + 1 :])
    assert np.all(np.asarray(state)[0] == 7) and np.all(np.asarray(state)[1, [0, 2]] == 7)


@pytest.mark.parametrize("name", ["mamba2", "lightning_attention"])
def test_a_document_is_mixed_as_if_alone(name):
    if name == "mamba2":
        sizes = Mamba2Config(num_heads=4, head_dim=8, state_size=6, groups=2)
        mixer = Mamba2(16, sizes, norm_options={"epsilon": 1e-5}, rngs=nnx.Rngs(0))
    else:
        mixer = LightningAttention(16, LightningConfig(2, 8), layers=(1, 3), num_layers=4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mixer)

    @jax.jit
    def mix(x, ids):
        return nnx.merge(graph, state)(x, None, PackedContext(ids, 0 * ids), None, 1)[0]

    x = np.random.default_rng(2).standard_normal((1, 90, 16)).astype(np.float32)
    ids = np.zeros((1, 90), np.int32)
    ids[0, :70], ids[0, 70:88] = 1, 2
    together = np.asarray(mix(x, ids))[0]
    for start, end in ((0, 70), (70, 88)):
        alone, own = np.zeros_like(x), np.zeros_like(ids)
        alone[0, : end - start], own[0, : end - start] = x[0, start:end], 1
        np.testing.assert_allclose(together[start:end], np.asarray(mix(alone, own))[0, : end - start], atol=2e-6)


def test_slopes_are_those_of_alibi_and_gentler_with_depth():
    np.testing.assert_allclose(slopes(8, 0, 5), 2.0 ** -np.arange(1, 9), rtol=2e-5)
    np.testing.assert_allclose(slopes(8, 2, 5), 2.0 ** -np.arange(1, 9) / 2, rtol=5e-5)
    assert np.all(np.asarray(slopes(8, 4, 5)) > 0)
