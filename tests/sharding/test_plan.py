"""Plans and rules: what they accept, and how they refuse."""

import jax
import pytest
from jax.sharding import PartitionSpec

from twinax.sharding.plan import Plan
from twinax.sharding.rules import PARAMETER_RULES, parameter_sharding, partition_spec


def test_parse_reads_what_str_writes():
    for plan in (Plan(), Plan(fsdp=4), Plan(data=2, fsdp=2)):
        assert Plan.parse("" if plan == Plan() else str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=4", "Did you mean 'fsdp'"),
        ("fsdp", "whole number"),
        ("fsdp=two", "whole number"),
        ("fsdp=0", "from 1 up"),
        ("fsdp=2,fsdp=2", "twice"),
    ],
)
def test_a_wrong_plan_names_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.parse(text)


def test_too_few_devices_says_how_many_there_are():
    with pytest.raises(ValueError, match=f"there are {len(jax.devices())}"):
        Plan(fsdp=4096).mesh()


def test_fsdp_cuts_the_model_width_only():
    mesh = Plan(fsdp=4).mesh()
    assert parameter_sharding(("layers", "mlp", "embed"), mesh, (3, 10, 8)).spec == PartitionSpec(None, None, ("fsdp",))


def test_an_indivisible_size_names_axis_size_and_fix():
    mesh = Plan(fsdp=4).mesh()
    with pytest.raises(ValueError, match=r"'embed' has size 6, .* 4 devices .*Use 3 devices"):
        parameter_sharding(("embed",), mesh, (6,))


def test_an_axis_without_a_rule_and_a_collision_are_errors():
    mesh = Plan(fsdp=4).mesh()
    with pytest.raises(ValueError, match="'width' has no rule"):
        parameter_sharding(("width",), mesh)
    with pytest.raises(ValueError, match="would cut both 'embed' and 'mlp'"):
        partition_spec(("embed", "mlp"), mesh, {**PARAMETER_RULES, "mlp": ("fsdp",)})
