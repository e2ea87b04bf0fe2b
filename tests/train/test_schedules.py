"""Schedules against their closed forms in Python's own floats, and what every schedule owes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from twinax.train import schedules
from twinax.train.schedules import ScheduleConfig

STEPS, PEAK = 100, 3e-4


def rates(config: ScheduleConfig, steps=STEPS):
    schedule = jax.jit(jax.vmap(schedules.make(config, PEAK, steps)))
    return [float(rate) for rate in schedule(jnp.arange(steps + 10, dtype=jnp.int32))]


@pytest.mark.parametrize("name", schedules.names())
@pytest.mark.parametrize("warmup", [None, 0, 1, 10])
def test_every_schedule_rises_to_its_peak_and_ends_at_its_final_rate(name, warmup):
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=0.2)
    found = rates(config)
    rise = config.warmup(STEPS)
    assert found[:rise] == pytest.approx([PEAK * (s + 1) / rise for s in range(rise)])
    assert max(found) == found[rise] == pytest.approx(PEAK)
    assert all(a >= b for a, b in zip(found[rise:], found[rise + 1 :], strict=False))
    assert found[STEPS:] == pytest.approx([0.2 * PEAK] * 10)


def test_cosine_is_its_formula():
    found = rates(ScheduleConfig(name="cosine", warmup_steps=20, final_ratio=0.1))
    for s in (20, 21, 50, 60, 99):
        cosine = (1 + math.cos(math.pi * (s - 20) / 80)) / 2
        assert found[s] == pytest.approx(PEAK * (0.1 + 0.9 * cosine), rel=1e-5)
    assert found[60] == pytest.approx(PEAK * 0.55)  # half way


def test_wsd_is_its_formula():
    found = rates(ScheduleConfig(name="wsd", warmup_steps=5, decay_steps=25, final_ratio=0.0))
    assert found[5:76] == pytest.approx([PEAK] * 71)
    for s in (76, 80, 99):
        assert found[s] == pytest.approx(PEAK * (1 - math.sqrt((s - 75) / 25)), rel=1e-5)


def test_the_stable_part_of_wsd_does_not_know_how_long_the_run_is():
    config = ScheduleConfig(name="wsd", warmup_steps=5, decay_steps=10)
    assert rates(config, 50)[:40] == rates(config, 100)[:40]


def test_wrong_settings_name_the_rule_and_the_value():
    with pytest.raises(ValueError, match=r"schedule.name is one of cosine, wsd; the nearest is 'cosine'; got 'cosin'"):
        ScheduleConfig(name="cosin")
    with pytest.raises(ValueError, match="There is no schedule 'x'; Twinax has cosine, wsd"):
        schedules.load("x")
    with pytest.raises(ValueError, match="warmup_steps is a number of steps from 0 up; got -1"):
        ScheduleConfig(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"final_ratio is a share of the peak, from 0 to 1; got 1.5"):
        ScheduleConfig(final_ratio=1.5)
    with pytest.raises(ValueError, match="final_ratio is a finite number; got nan"):
        ScheduleConfig(final_ratio=math.nan)


def test_a_schedule_that_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=101 does not fit into steps=100"):
        rates(ScheduleConfig(warmup_steps=101))
    with pytest.raises(ValueError, match="60 warm-up steps and 50 decay steps do not fit into steps=100"):
        rates(ScheduleConfig(name="wsd", warmup_steps=60, decay_steps=50))
    with pytest.raises(ValueError, match="decay_steps=10 has no meaning for the cosine schedule"):
        rates(ScheduleConfig(name="cosine", decay_steps=10))


def test_the_recipe_documents_every_field():
    for field in dataclasses.fields(ScheduleConfig):
        assert f"{field.name}:" in (ScheduleConfig.__doc__ or "")
