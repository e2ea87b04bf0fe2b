"""Quantised weights as floats: the same model, which training can take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_families import GOLDEN, logits_of
from twinax.checkpoints.load import LoadedModel, load_model
from twinax.models import families
from twinax.models.dequantize import dequantized
from twinax.sharding.plan import Plan


@pytest.mark.parametrize("case", ["gpt_oss_mxfp4", "deepseek_v3_fp8"])
def test_it_gives_the_golden_logits_and_goes_back_to_hugging_face(case):
    golden, loaded = np.load(GOLDEN / case / "logits.npz"), load_model(GOLDEN / case)
    config, params = dequantized(loaded.config, loaded.params)
    assert config.quantization is None
    assert {array.dtype.name for array in params.values()} <= {"float32", "bfloat16"}
    wide = {name: array.astype(jnp.float32) for name, array in params.items()}
    model = LoadedModel(config, wide, None, config.family, {}, GOLDEN, "step")
    np.testing.assert_allclose(
        logits_of(model, golden["tokens"], golden["lengths"]), golden["logits"], rtol=0, atol=1e-4
    )
    family = families.load(config.family)
    assert {entry.name for entry in family.tensor_table(config)} == set(params)
    assert "quantization_config" not in family.to_hf(config)


def test_on_a_mesh_its_weights_lie_as_the_plan_says():
    mesh = Plan.parse("fsdp=2,expert=2").mesh()
    loaded = load_model(GOLDEN / "gpt_oss_mxfp4", mesh=mesh)
    config, params = dequantized(loaded.config, loaded.params, mesh=mesh)
    weight = params["blocks.moe.gate.weight"]
    assert weight.shape == (4, 4, 64, 32) and weight.addressable_shards[0].data.shape == (4, 2, 64, 16)
    want = dequantized(*(lambda one: (one.config, one.params))(load_model(GOLDEN / "gpt_oss_mxfp4")))[1]
    np.testing.assert_array_equal(jax.device_get(weight), want["blocks.moe.gate.weight"])


def test_a_model_of_floats_stays_as_it_is():
    loaded = load_model(GOLDEN / "gpt_oss")
    config, params = dequantized(loaded.config, loaded.params)
    assert config == loaded.config and params.keys() == loaded.params.keys()
