"""AdamW against PyTorch's formula written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twinax.models.decoder import param_shapes
from twinax.train import optimizer
from twinax.train.recipe import ModelConfig, OptimizerConfig

CONFIG = OptimizerConfig(lr=1.0, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=0.0)
MATRIX, NORM, BIAS = "blocks.mlp.up.weight", "blocks.mlp_norm.weight", "blocks.attention.query.bias"


def run(config, params, gradients, rates):
    state = optimizer.init(params)
    for grads, rate in zip(gradients, rates, strict=True):
        params, state = jax.jit(optimizer.update, static_argnums=0)(
            config, params, state, grads, optax.tree.norm(grads), rate, True
        )
    return params, state


def reference(config, value, gradients, rates, decay):
    mu = nu = np.zeros_like(value)
    for i, (grad, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        mu = config.beta1 * mu + (1 - config.beta1) * grad
        nu = config.beta2 * nu + (1 - config.beta2) * grad**2
        direction = (mu / (1 - config.beta1**i)) / (np.sqrt(nu / (1 - config.beta2**i)) + config.eps)
        value = value - rate * (direction + (config.weight_decay * value if decay else 0))
    return value, mu, nu


def test_three_steps_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    rates = [1e-2, 3e-2, 2e-2]
    shapes = {MATRIX: (2, 3, 4), NORM: (2, 4), BIAS: (2, 4)}
    with jax.enable_x64(True):
        params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        gradients = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in rates]
        found, state = run(CONFIG, jax.tree.map(jnp.asarray, params), gradients, rates)
        for name in shapes:
            grads = [g[name] for g in gradients]
            value, mu, nu = reference(CONFIG, params[name], grads, rates, decay=name == MATRIX)
            np.testing.assert_allclose(found[name], value, rtol=1e-12)
            np.testing.assert_allclose(state["mu"][name], mu, rtol=1e-12)
            np.testing.assert_allclose(state["nu"][name], nu, rtol=1e-12)
    assert int(state["count"]) == 3


def test_clipping_scales_a_long_gradient_to_the_norm_and_leaves_a_short_one():
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.0)
    params = {MATRIX: jnp.ones((2, 2))}
    long, short = {MATRIX: jnp.full((2, 2), 3.0)}, {MATRIX: jnp.full((2, 2), 0.1)}
    _, state = run(config, params, [long], [1e-3])
    np.testing.assert_allclose(state["mu"][MATRIX], 0.1 * 0.5, rtol=1e-5)  # the norm was 6, each entry is now 1/2
    _, state = run(config, params, [short], [1e-3])
    np.testing.assert_allclose(state["mu"][MATRIX], 0.1 * 0.1, rtol=1e-5)


def test_a_gradient_of_zero_is_no_division_by_zero():
    params, _ = run(OptimizerConfig(), {MATRIX: jnp.ones(3)}, [{MATRIX: jnp.zeros(3)}], [1e-3])
    np.testing.assert_allclose(params[MATRIX], 1 - 1e-3 * 0.1, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_biases_of_the_real_model_do_not_decay_and_all_matrices_do(tied):
    model = ModelConfig(tie_embeddings=tied, attention_bias=True, mlp_bias=True).decoder(100, 16)
    spared = {name for name in param_shapes(model) if not optimizer.decayed(name)}
    small = {name for name in param_shapes(model) if name.endswith("bias") or "norm" in name}
    assert spared == small
    assert {len(param_shapes(model)[name].shape) for name in small} == {1, 2}  # one dimension a layer
    assert "embed.weight" not in spared


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"optimizer.lr is a positive number; got 0.0"),
        ({"lr": float("nan")}, r"optimizer.lr is a finite number; got nan"),
        ({"beta2": 1.0}, r"optimizer.beta2 is from 0 to below 1; got 1.0"),
        ({"clip_norm": -1.0}, r"optimizer.clip_norm is from 0 up, 0 for no clipping; got -1.0"),
        ({"lr": "1e-3"}, r"optimizer.lr is of type float; got '1e-3' \(str\)"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


def test_it_agrees_with_optax():
    rng = np.random.default_rng(1)
    config = OptimizerConfig(lr=1e-2, clip_norm=0.5)
    params = {name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in (MATRIX, NORM)}
    gradients = [{name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in params} for _ in range(4)]
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            config.lr,
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask={name: optimizer.decayed(name) for name in params},
        ),
    )
    want, state = params, chain.init(params)
    for grads in gradients:
        updates, state = chain.update(grads, state, want)
        want = optax.apply_updates(want, updates)
    got, _ = run(config, params, gradients, [config.lr] * 4)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_where_it_is_not_ok_nothing_moves():
    params = {MATRIX: jnp.ones((2, 2))}
    state = optimizer.init(params)
    grads = {MATRIX: jnp.full((2, 2), jnp.nan)}
    after, moments = jax.jit(optimizer.update, static_argnums=0)(CONFIG, params, state, grads, jnp.nan, 1e-3, False)
    assert jax.tree.all(jax.tree.map(np.array_equal, (after, moments), (params, state)))
