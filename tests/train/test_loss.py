"""Cross-entropy against its definition in float64, against Hugging Face's, and against its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import enable_x64

from twinax.train.loss import Logits, cross_entropy, token_logprobs

B, T, D, V = 3, 10, 8, 29


def arguments(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(dtype)
    weight = rng.normal(size=(V, D)).astype(dtype)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(dtype)
    return hidden, weight, targets, weights


def naive(hidden, weight, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, weight)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * nll), jnp.sum(weights)


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# One column a chunk, three with a short last chunk, five evenly, all at once.
@pytest.mark.parametrize("columns", [1, 3, 5, 10])
@pytest.mark.parametrize("cotangents", [(1.0, 0.0), (-2.5, 0.75)])
def test_values_and_gradients_match_the_definition_in_float64(columns, cotangents):
    with enable_x64(True):
        hidden, weight, targets, weights = arguments()

        def scaled(function, **options):
            def value(hidden, weight, weights):
                loss, total = function(hidden, weight, targets, weights, **options)
                return cotangents[0] * loss + cotangents[1] * total, (loss, total)

            return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(hidden, weight, weights)

        got = scaled(cross_entropy, logits=Logits(chunk_bytes=columns * B * V * 4))
        want = scaled(naive)
        dweights = np.where(weights != 0, want[1][2], cotangents[1])  # padding's own loss is not worth a product
        assert got[0][0].dtype == np.float64
        close(got[0][1], want[0][1], 1e-12)
        close(got[1][0], want[1][0], 1e-12)
        close(got[1][1], want[1][1], 1e-12)
        close(got[1][2], dweights, 1e-12)


def test_without_differentiation_it_gives_the_same_sums():
    hidden, weight, targets, weights = arguments(np.float32)
    def sums(hidden):
        return cross_entropy(hidden, weight, targets, weights, logits=Logits(chunk_bytes=0))

    plain = jax.jit(sums)(hidden)
    value, _ = jax.value_and_grad(lambda hidden: sums(hidden)[0])(hidden)
    close(plain[0], value, 1e-6)
    close(plain[1], weights.sum(), 0)


def test_logprobs_are_those_of_a_log_softmax():
    hidden, weight, targets, _ = arguments(np.float32)
    want = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, weight))), targets[..., None], -1
    )[..., 0]
    for chunk_bytes in (0, 3 * B * V * 4, None):
        close(token_logprobs(hidden, weight, targets, logits=Logits(chunk_bytes=chunk_bytes)), want, 1e-5)


def test_padding_may_hold_anything():
    hidden, weight, targets, weights = arguments(np.float32)
    targets = np.where(weights == 0, -100, targets)
    weights[0] = 0
    gradient = jax.grad(lambda h, w: cross_entropy(h, w, targets, weights)[0], argnums=(0, 1))
    hidden_gradient, weight_gradient = gradient(hidden, weight)
    assert np.isfinite(weight_gradient).all()
    assert (np.asarray(hidden_gradient)[weights == 0] == 0).all()


def test_bfloat16_products_with_a_float32_gradient_of_the_weight():
    hidden, weight, targets, weights = arguments(np.float32)
    value = jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, weights)[0], argnums=(0, 1))
    loss, (dhidden, dweight) = value(jnp.asarray(hidden, jnp.bfloat16), weight)
    want, (_, want_dweight) = value(hidden, weight)
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    close(loss / want, 1, 1e-2)
    close(np.linalg.norm(dweight - want_dweight) / np.linalg.norm(want_dweight), 0, 2e-2)


def test_huge_logits_stay_finite():
    hidden, weight, targets, weights = arguments(np.float32)
    loss, gradient = jax.value_and_grad(lambda h: cross_entropy(h, weight, targets, weights)[0])(hidden * 1e4)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_the_logits_of_a_batch_are_never_in_memory():
    rows, length, width, vocabulary = 4, 256, 16, 4096
    shapes = (rows, length, width), (vocabulary, width), (rows, length)
    hidden, weight, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def memory(chunk_bytes):
        def value(hidden, weight, targets, weights):
            return cross_entropy(hidden, weight, targets, weights, logits=Logits(chunk_bytes=chunk_bytes))[0]

        compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(
            hidden, weight, jax.ShapeDtypeStruct((rows, length), jnp.int32), weights
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    logits = rows * length * vocabulary * 4
    assert memory(logits // 16) < logits / 2 < logits < memory(logits)


def test_it_is_the_loss_of_hugging_face():
    torch = pytest.importorskip("torch")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    hidden, weight, targets, _ = arguments(np.float32)
    weights = np.ones((B, T), np.float32)
    weights[1, 4:] = 0
    labels = np.where(weights > 0, targets, -100)
    hidden_t, weight_t = (torch.tensor(x, requires_grad=True) for x in (hidden, weight))
    want = loss_utils.ForCausalLMLoss(
        hidden_t @ weight_t.T, labels=None, vocab_size=V, shift_labels=torch.tensor(labels, dtype=torch.long)
    )
    want.backward()

    def mean(hidden, weight):
        loss, total = cross_entropy(hidden, weight, targets, weights)
        return loss / total

    loss, (dhidden, dweight) = jax.value_and_grad(mean, argnums=(0, 1))(hidden, weight)
    close(loss, want.item(), 1e-6)
    close(dhidden, hidden_t.grad.numpy(), 1e-6)
    close(dweight, weight_t.grad.numpy(), 1e-6)
