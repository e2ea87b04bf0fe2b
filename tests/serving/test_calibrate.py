"""Steps of a real engine, timed; that its simulation does what it did is `benchmarks.step_times`' to say."""

import dataclasses

import pytest

from tests.serving.engines import engine_of
from tests.serving.test_engine_host_pages import CONFIG
from twinax.serving.bench.traces import poisson
from twinax.serving.calibrate import calibrate, model_of, renamed, replay
from twinax.serving.scheduler_config import SchedulerConfig
from twinax.serving.simulator import requests_of, simulate


@pytest.mark.slow
def test_every_step_is_timed_and_the_simulator_can_go_by_them():
    engine = engine_of(CONFIG, bits=False, prefix_cache="", max_waiting=100)
    asked = renamed(requests_of(poisson(12, 1000.0, (2, 40), (2, 9), 0)), "a")
    found = replay(engine, asked)
    assert [len(track.tokens) for track in found.outcome.tracks] == [one.params.max_tokens for one in asked]
    assert len(found.steps) == found.outcome.steps == engine.stats().steps
    assert len(found.starts) >= 1 and {step.size for step in found.steps} <= set(engine.scheduler.times.sizes)
    known = engine.scheduler.config
    config = SchedulerConfig(**{field.name: getattr(known, field.name) for field in dataclasses.fields(known)})
    pretended = simulate(config, asked, model_of([found]))
    assert [len(track.tokens) for track in pretended.tracks] == [one.params.max_tokens for one in asked]

    short = replay(engine, renamed(requests_of(poisson(9, 1e9, (30, 40), (40, 50), 1)), "b"), seconds=0.0)
    assert not short.steps and not engine.has_work and engine.stats().pages_used == 0

    timed = calibrate(engine, requests=20, name="c")
    assert {bool(size[1]) for size in {step.size for step in timed.steps}} == {False, True}
