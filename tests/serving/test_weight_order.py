"""Float8 weights that lie as the chip reads them are the same weights."""

import jax
import numpy as np

from tests.serving.engines import loaded
from tests.serving.test_engine_latent import FLOAT8, MXFP4
from twinax.layers.contexts import PackedContext
from twinax.models.decoder import functional, param_shapes
from twinax.models.dequantize import dequantized
from twinax.serving.weight_order import in_order


def test_a_model_with_inputs_first_is_the_same_model():
    plain = loaded(FLOAT8)
    names, kept = list(plain.params), {name: np.asarray(array) for name, array in plain.params.items()}
    turned = in_order(plain, "7x")
    assert list(turned.params) == names and not plain.params  # none is there twice
    assert {name: x.shape for name, x in param_shapes(turned.config).items()} == {
        name: x.shape for name, x in turned.params.items()
    }
    moved = [name for name in names if turned.params[name].shape != kept[name].shape]
    assert {turned.params[name].ndim for name in moved} == {3, 4}  # of layers, and of layers' experts

    tokens, place = np.arange(12)[None] % FLOAT8.vocab_size, np.arange(12)[None]
    context = PackedContext(np.ones_like(place), place)

    def hidden_of(config, params):
        return jax.jit(lambda params: functional(config).hidden(params, tokens, context)[0])(params)

    hidden = hidden_of(FLOAT8, kept), hidden_of(turned.config, turned.params)
    # Sums in another order: a number near 0 has the rounding of its terms, which are as large as others are.
    np.testing.assert_allclose(hidden[1], hidden[0], rtol=1e-5, atol=1e-6 * np.abs(hidden[0]).max())
    floats = [dequantized(config, params)[1] for config, params in ((FLOAT8, kept), (turned.config, turned.params))]
    jax.tree.map(np.testing.assert_array_equal, *floats)


def test_other_chips_and_formats_keep_theirs():
    for config, chip in ((FLOAT8, "h200"), (FLOAT8, None), (MXFP4, "7x")):
        given = loaded(config)
        assert in_order(given, chip) is given
