"""Recipes: the frozen list of knobs, files, errors that name the repair."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from twinax.train import fields
from twinax.train.data import DataConfig
from twinax.train.recipe import (
    CheckpointConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RecipeError,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
)

# A new knob is a decision: add it here, and think of one to remove.
KNOBS = """
model.init_from model.family model.vocab_size model.hidden_size model.intermediate_size model.num_layers
model.num_heads model.num_kv_heads model.head_dim model.rope_theta model.norm_eps model.tie_embeddings
model.attention_bias model.mlp_bias model.max_position_embeddings
model.experts model.experts_per_token model.expert_size model.shared_experts model.router
model.balance_loss model.z_loss model.bias_update
data.path data.tokenizer data.text_key data.eval_fraction data.exclude data.cache_dir
optimizer.lr optimizer.beta1 optimizer.beta2 optimizer.eps optimizer.weight_decay optimizer.clip_norm
schedule.name schedule.warmup_steps schedule.decay_steps schedule.final_ratio
checkpoint.every checkpoint.keep_last checkpoint.keep_every
eval.every eval.batches
steps batch_size sequence_length accumulation dtype remat plan seed tensorboard output
""".split()  # noqa: SIM905


def test_the_knobs_are_frozen_and_fewer_than_a_hundred():
    assert fields.names(Recipe) == KNOBS
    assert len(KNOBS) < 100


def test_every_knob_is_documented():
    kinds = [Recipe, *(h for h in typing.get_type_hints(Recipe).values() if dataclasses.is_dataclass(h))]
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert f" {field.name}: " in (kind.__doc__ or ""), f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("name", ["small", "llama_60m"])
def test_the_recipes_of_the_repository_load_by_name_and_survive_json(name, repository, monkeypatch):
    monkeypatch.chdir(repository)
    recipe = load_recipe(name)
    assert load_recipe(repository / "recipes" / f"{name}.py") == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


def test_tuples_survive_json():
    recipe = Recipe(data=DataConfig(path=("a", "b")))
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


def test_llama_60m_has_60m_parameters():
    import math

    from twinax.models.decoder import param_shapes

    path = Path(__file__).parents[2] / "recipes" / "llama_60m.py"
    shapes = param_shapes(load_recipe(path).model.decoder(32000, 512))
    assert 55e6 < sum(math.prod(shape.shape) for shape in shapes.values()) < 65e6


def test_a_mixture_of_experts_is_as_wide_as_the_recipe_says():
    dense = ModelConfig(intermediate_size=96).decoder(64, 16)
    assert dense.moe is None
    moe = ModelConfig(intermediate_size=96, experts=8, router="sigmoid", shared_experts=1).decoder(64, 16).moe
    assert moe is not None
    assert (moe.num_experts, moe.experts_per_token, moe.expert_size, moe.shared_experts) == (8, 2, 96, 1)
    assert moe.router == "sigmoid"
    narrow = ModelConfig(experts=8, expert_size=24).decoder(64, 16).moe
    assert narrow is not None
    assert narrow.expert_size == 24


def test_a_recipe_is_read_without_jax():
    code = "import sys, twinax.train.recipe; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.py").write_text("")
    for wrong in ("recipes/smal.py", "small.py", "smal", "elsewhere/small.py"):
        with pytest.raises(RecipeError, match=r"There is no recipe .*; the nearest is 'recipes/small.py'"):
            load_recipe(wrong)
    with pytest.raises(RecipeError, match=r"There is no recipe 'qqqq'; a recipe is a Python file"):
        load_recipe("qqqq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"must define `recipe = Recipe\(...\)`; there `recipe` is NoneType"),
        ("recipe = 3", r"there `recipe` is int"),
        ("recipe = ", r"cannot be run as Python: SyntaxError"),
        ("import missing_module", r"cannot be run as Python: ModuleNotFoundError: No module named 'missing_module'"),
        (
            "from twinax.train.recipe import Recipe\nrecipe = Recipe(steps=0)",
            r"r.py: steps is a whole number from 1 up",
        ),
        ("from twinax.train.recipe import Recipe\nrecipe = Recipe(stepz=1)", r"TypeError.*stepz"),
    ],
)
def test_a_file_without_a_good_recipe_says_what_is_wrong(text, message, tmp_path):
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.py")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(steps="3"), r"steps is of type int; got '3' \(str\)"),
        (lambda: Recipe(steps=True), r"steps is of type int; got True"),
        (lambda: Recipe(steps=10**400), r"steps is of type int, of 64 bits at most; got 1000"),
        (lambda: Recipe(steps=2.0), r"steps is of type int; got 2.0 \(float\)"),
        (lambda: Recipe(batch_size=0), r"batch_size is a whole number from 1 up; got 0"),
        (lambda: Recipe(dtype="float16"), r"dtype is one of auto, float32, bfloat16; got 'float16'"),
        (lambda: Recipe(remat="half"), r"remat is one of none, dots, full, offload; got 'half'"),
        (lambda: Recipe(seed=-1), r"seed is a whole number from 0 to 2\^32 - 1; got -1"),
        (lambda: Recipe(batch_size=8, accumulation=3), r"batch_size=8 rows cannot be cut into accumulation=3"),
        (lambda: Recipe(model={}), r"model is of type ModelConfig; got {} \(dict\)"),
        (
            lambda: Recipe(model=ModelConfig(max_position_embeddings=64), sequence_length=65),
            r"sequence_length=65 is longer than model.max_position_embeddings=64",
        ),
        (lambda: ModelConfig(num_heads=8, num_kv_heads=3), r"num_kv_heads must divide num_heads"),
        (lambda: ModelConfig(hidden_size=100, num_heads=8), r"hidden_size=100 does not divide into model.num_heads=8"),
        (lambda: ModelConfig(num_layers=0), r"num_layers is a whole number from 1 up; got 0"),
        (
            lambda: ModelConfig(init_from="x", hidden_size=64, num_layers=2),
            r"init_from='x' brings its own sizes.*leave out model.hidden_size, model.num_layers",
        ),
        (lambda: ModelConfig(experts=-4), r"num_experts is a whole number from 1 up; got -4"),
        (lambda: ModelConfig(experts=4, router="hash"), r"router is one of softmax, sigmoid; got 'hash'"),
        (lambda: ModelConfig(router="sigmoid"), r"model.router='sigmoid' is for a mixture.*model.experts is 0; set"),
        (lambda: CheckpointConfig(every=-1), r"checkpoint.every is a number of steps from 0 up; got -1"),
        (lambda: CheckpointConfig(keep_last=0), r"checkpoint.keep_last is from 1 up; got 0"),
        (lambda: EvalConfig(batches=-2), r"eval.batches is a number from 0 up; got -2"),
        (lambda: OptimizerConfig(beta1="x"), r"optimizer.beta1 is of type float; got 'x'"),
        (lambda: recipe_from_dict({"optimizer": {"lrr": 1}}), r"optimizer.lrr is not a setting; the nearest is 'lr'"),
        (lambda: recipe_from_dict({"stepz": 1}), r"stepz is not a setting; the nearest is 'steps'"),
    ],
)
def test_wrong_values_are_refused_with_the_rule_and_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
