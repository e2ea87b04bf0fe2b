"""Presets: each divides all the devices it is given, and gives way to what a model can be cut by."""

import pytest

from twinax.sharding import plans
from twinax.sharding.plan import Plan, PlanError

MODEL = {"embed": 64, "heads": 4, "kv_heads": 2, "mlp": 96, "vocab": 256, "layers": 6, "experts": 0}
BATCH = {"rows": 64, "tokens": 256}


@pytest.mark.parametrize("name", plans.names())
@pytest.mark.parametrize("devices", [1, 2, 4, 6, 8, 64])
def test_every_preset(name, devices):
    preset = plans.load(name)
    assert preset.__doc__
    assert preset.plan(devices).devices == devices
    fitting = plans.resolve(name, devices, {**MODEL, **BATCH})
    assert not fitting.problems({**MODEL, **BATCH}) and fitting.devices <= devices
    assert plans.resolve(name, devices) == preset.plan(devices)


def test_it_gives_way_where_it_must():
    assert plans.resolve("tensor_parallel", 8, MODEL) == Plan(fsdp=4, tensor=2)
    assert plans.resolve("pipeline", 8, MODEL) == Plan(fsdp=4, stage=2, schedule="1f1b")
    assert plans.resolve("expert_parallel", 4, {**MODEL, "experts": 8}) == Plan(expert=4)
    assert plans.resolve("expert_parallel", 4, MODEL).expert == 1


def test_written_plans_pass_through():
    assert plans.resolve("fsdp=4,tensor=2", 1) == Plan(fsdp=4, tensor=2)
    assert plans.resolve("", 8) == Plan()


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(PlanError, match=r"fsdp=4,tensor=2, or is one of data_parallel, .*Did you mean 'fully_sharded'"):
        plans.resolve("fuly_sharded", 8)
