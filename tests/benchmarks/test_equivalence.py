"""The equivalence matrix: a part of it, and that it would notice. `python -m benchmarks.equivalence` runs the whole."""

import jax
import pytest
from jax import lax

from benchmarks import equivalence
from benchmarks.equivalence import EVERY_OPTION, LATENT, LIMIT, MODELS, STATES, STATES_ALIKE, VARIANTS, compare, plans
from tests.thorough import thorough
from twinax.sharding.plan import Plan

DENSE, MOE = MODELS


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("model", "plan", "variant"),
    thorough(
        [
            (DENSE, "stage=2,data=2,sequence=2,attention=all_to_all,schedule=interleaved,rounds=2", VARIANTS[0]),
            (DENSE, "fsdp=2,sequence=2,tensor=2", VARIANTS[3]),
            (MOE, "stage=2,expert=2,schedule=1f1b", VARIANTS[1]),
        ]
    ),
)
def test_layouts_give_the_numbers_of_one_device(model, plan, variant):
    found = compare(model, Plan.parse(plan), variant)
    assert isinstance(found, dict) and max(found.values()) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "plan", "variant"),
    [
        (EVERY_OPTION, "stage=2,sequence=2,tensor=2", VARIANTS[3]),
        (LATENT, "sequence=2,tensor=2,expert=2", VARIANTS[3]),
        (STATES_ALIKE, "stage=2,fsdp=2,schedule=1f1b", VARIANTS[0]),
    ],
    ids=["every option of a decoder", "latent attention, layers that differ", "mixers that keep a state"],
)
def test_other_models_give_the_numbers_of_one_device(model, plan, variant):
    found = compare(model, Plan.parse(plan), variant)
    assert isinstance(found, dict) and max(found.values()) < LIMIT


def test_plans_that_cut_what_has_a_state_are_refused():
    for axis in ("sequence", "tensor"):
        said = compare(STATES, Plan.parse(f"{axis}=2"), VARIANTS[0])
        assert f"{axis}=2 cannot cut layers that keep a state" in str(said)
    said = compare(STATES, Plan(stage=2), VARIANTS[0])
    assert "8 layers whose kinds repeat every 8 cannot be cut over stage x rounds = 2" in str(said)


def test_a_missing_sum_is_caught(monkeypatch):
    """The loss without its sum over devices of the weight's gradient: the losses stay right, one gradient does not."""
    from twinax.train import loss

    class Lax:
        def __getattr__(self, name):
            return getattr(lax, name)

        @staticmethod
        def psum(x, axes):
            return x if axes == ("data",) else lax.psum(x, axes)

    monkeypatch.setattr(loss, "lax", Lax())
    found = compare(DENSE, Plan(data=2), VARIANTS[0])
    assert isinstance(found, dict) and min(found.values()) > 1e-3


def test_refused_plans_say_why():
    assert compare(DENSE, Plan(tensor=8), VARIANTS[0]) == "kv_heads of 4 cannot be cut over tensor = 8"
    assert compare(DENSE, Plan(expert=2), VARIANTS[0]) == "expert=2 needs a mixture of experts, and the model is dense"


def test_every_division_of_every_power_of_two_is_there():
    sizes = [tuple(plan.sizes.values()) for plan in plans(full=False)]
    assert len(sizes) == len(set(sizes)) == 1 + 6 + 21 + 56
    every = list(plans(full=True))
    assert set(sizes) == {tuple(plan.sizes.values()) for plan in every}
    assert {plan.attention for plan in every} == {"ring", "ring_two_way", "all_to_all"}
    work = {(model, variant) for model, _, variant in equivalence.work("quick")}
    assert work == {(model, variant) for model in MODELS for variant in VARIANTS}


def test_the_table_says_what_was_found(tmp_path):
    cells = {
        (DENSE, Plan(fsdp=2), VARIANTS[0]): {False: 1e-15, True: 2e-14},
        (MOE, Plan(fsdp=2), VARIANTS[1]): {False: 3e-15, True: 4e-15},
        (DENSE, Plan(expert=2), VARIANTS[0]): "the model is dense",
    }
    equivalence.write(cells, tmp_path / "table.md", "quick")
    text = (tmp_path / "table.md").read_text()
    assert "| fsdp=2 | 1e-15 2e-14 | · | · | · |" in text and "**2.0e-14**" in text
    assert "| expert=2 | refused: the model is dense |" in text


def test_a_stopped_run_goes_on(tmp_path):
    one, other = (DENSE, Plan(fsdp=2), VARIANTS[0]), (DENSE, Plan(expert=2), VARIANTS[1])
    for key, result in ((one, {False: 1e-15, True: float("inf")}), (other, "the model is dense")):
        equivalence.Kept(tmp_path / "kept").add(key, result)
    kept = equivalence.Kept(tmp_path / "kept")
    assert kept.get(one) == {False: 1e-15, True: float("inf")}
    assert kept.get(other) == "the model is dense"
    assert kept.get((DENSE, Plan(fsdp=2), VARIANTS[1])) is None
