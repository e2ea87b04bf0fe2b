"""The simulator against times worked out by hand, and its model of a machine against steps that follow known lines."""

import random
import subprocess
import sys

import pytest

from twinax.serving import schedulers
from twinax.serving.bench.traces import Arrival, Trace
from twinax.serving.request import Request, SamplingParams
from twinax.serving.scheduler import SchedulerConfig
from twinax.serving.simulator import requests_of, simulate
from twinax.serving.step_model import StepModel, TimedStep

SIZES = [(8, 0), (8, 64), (8, 256)]
CONFIG = SchedulerConfig(8, 16, 400, 512, 256, 100)


def times(decode=1.0, small=2.0, large=5.0, per_pair=0.0, surprises=(1.0,), start=0.0):
    lines = {size: (seconds, per_pair, 0.0) for size, seconds in zip(SIZES, (decode, small, large), strict=True)}
    return StepModel(lines, surprises, start)


def request(id, prompt, tokens, at=0.0):
    return Request(id, [1] * prompt, SamplingParams(max_tokens=tokens), at)


def test_times_of_tokens_are_those_of_the_steps():
    """a: a chunk of 256 and one of 44, then decodes. b comes during the second step, whose successor is planned when it
    starts, so b's prompt is in the step after that, which makes a wait."""
    found = simulate(CONFIG, [request("a", 300, 5), request("b", 20, 2, at=6.0)], times())
    a, b = found.tracks
    assert a.tokens == pytest.approx([7.0, 8.0, 10.0, 11.0, 12.0])
    assert b.tokens == pytest.approx([10.0, 11.0])
    assert (a.to_first, b.to_first, b.seconds) == pytest.approx((7.0, 4.0, 5.0))
    assert a.gaps == pytest.approx([1.0, 2.0, 1.0, 1.0])
    assert (found.seconds, found.computed, found.refused) == (pytest.approx(12.0), 300 + 20 + 4 + 1, 0)


def test_an_idle_engine_waits_for_the_next_request_and_context_costs():
    found = simulate(CONFIG, [request("a", 20, 2), request("b", 20, 2, at=50.0)], times(per_pair=0.01))
    first = 2.0 + 0.01 * 210
    for track in found.tracks:
        assert track.tokens == pytest.approx([track.at + first, track.at + first + 1.0 + 0.01 * 21])


@pytest.mark.parametrize("policy", schedulers.names())
def test_under_every_policy_all_tokens_come_in_a_crowded_cache_and_the_device_is_never_idle(policy):
    rng = random.Random(3)
    config = SchedulerConfig(8, 16, 40, 512, 256, 200, policy=policy)
    asked = [request(str(n), rng.randint(1, 150), rng.randint(1, 60), at=0.01 * n) for n in range(120)]
    found = simulate(config, asked, times())
    assert [len(track.tokens) for track in found.tracks] == [one.params.max_tokens for one in asked]
    assert all(track.tokens == sorted(track.tokens) and track.tokens[0] > track.at for track in found.tracks)
    least = sum(len(one.prompt_ids) + one.params.max_tokens - 1 for one in asked)
    assert found.computed >= least and (found.computed > least) == (found.preemptions > 0)
    assert found.steps <= found.seconds <= 5 * found.steps + 1


def test_what_waits_for_too_long_a_queue_is_refused():
    config = SchedulerConfig(1, 16, 40, 512, 256, 3)
    found = simulate(config, [request(str(n), 20, 4) for n in range(9)], times())
    assert found.refused == 6 and sum(bool(track.tokens) for track in found.tracks) == 3


def test_steps_take_their_surprises_in_turn_and_an_idle_engine_starts_late():
    model = times(surprises=(1.0, 3.0, 1.0, 1.0), start=0.25)
    found = simulate(CONFIG, [request("a", 20, 4), request("b", 20, 2, at=50.0)], model)
    a, b = found.tracks
    assert a.tokens == pytest.approx([0.25 + 2.0, 5.25, 6.25, 7.25])
    assert b.tokens == pytest.approx([50.25 + 2.0, 50.25 + 5.0])


def test_so_many_at_a_time():
    """The next one is planned when the last token of the one before it is seen, a step after that was planned."""
    found = simulate(CONFIG, [request(str(n), 20, 2) for n in range(3)], times(), concurrency=1)
    assert [track.at for track in found.tracks] == pytest.approx([0.0, 3.0, 6.0])
    assert [track.tokens for track in found.tracks] == [pytest.approx([at + 2.0, at + 3.0]) for at in (0.0, 3.0, 6.0)]
    both = simulate(CONFIG, [request(str(n), 20, 2) for n in range(3)], times(), concurrency=2)
    assert [track.at for track in both.tracks] == pytest.approx([0.0, 0.0, 3.0])


def test_a_size_that_was_not_timed_lies_between_its_neighbours():
    model = StepModel({(8, 0): (1.0, 0.0, 0.0), (40, 64): (2.0, 0.0, 0.5), (40, 256): (6.0, 0.0, 0.5)})
    assert model.seconds((40, 160), 2, 0.0) == pytest.approx(1 + (2 + 6) / 2)
    assert model.seconds((8, 64), 2, 0.0) == pytest.approx(3.0), "fewer tokens than in any: as the smallest"
    assert model.seconds((40, 552), 2, 0.0) == pytest.approx(2 * 7.0), "twice the tokens of the largest"
    assert model.seconds((40, 0), 1, 0.0) == pytest.approx(5.0), "with no prompts it is another line"
    with pytest.raises(ValueError, match="no step of 8 rows and 64 prompt tokens was timed"):
        simulate(CONFIG, [request("a", 20, 2)], StepModel({(8, 0): (1.0, 0.0, 0.0)}))


def test_prompts_of_a_trace_share_what_its_blocks_share():
    arrivals = (Arrival(0.0, 5, 2, (7, 8)), Arrival(1.0, 4, 2, (7, 9)), Arrival(2.0, 3, 1))
    found = requests_of(Trace("here", arrivals, block_tokens=3))
    assert [one.prompt_ids for one in found] == [[7, 7, 7, 8, 8], [7, 7, 7, 9], [0, 0, 0]]
    assert [(one.arrival, one.params.max_tokens) for one in found] == [(0.0, 2), (1.0, 2), (2.0, 1)]


def test_the_fit_finds_the_lines_behind_noise_and_keeps_its_order():
    rng = random.Random(1)
    steps, factors = [], []
    for number in range(3000):
        at = rng.randrange(3)
        base, pairs, rows = (0.002, 0.005, 0.02)[at], rng.uniform(100, 50_000), rng.randint(1, 8)
        factor = 1.3 if number // 20 % 4 == 0 else 0.9  # slow stretches
        pause = 0.8 if rng.random() < 0.02 else 0.0  # the machine was stopped
        seconds = (base + 2e-7 * pairs + 1e-4 * rows) * factor
        steps.append(TimedStep(SIZES[at], rows, pairs, seconds + pause))
        factors += [] if pause else [factor]
    known = StepModel.from_json(StepModel.fit(steps, start=0.001).to_json())
    assert known.start == 0.001
    for size, base in zip(SIZES, (0.002, 0.005, 0.02), strict=True):
        for pairs, rows in ((500, 8), (40_000, 1)):
            assert known.seconds(size, rows, pairs) == pytest.approx(base + 2e-7 * pairs + 1e-4 * rows, rel=0.1)
    assert known.surprises == pytest.approx(factors, rel=0.15)


def test_a_term_that_does_not_vary_or_says_that_more_is_less_is_left_out():
    steps = [TimedStep((8, 0), 8, pairs, 0.01 - 1e-7 * pairs) for pairs in range(0, 5000, 100)]
    (line,) = StepModel.fit(steps).lines.values()
    assert line[1:] == (0.0, 0.0) and line[0] == pytest.approx(sum(step.seconds for step in steps) / len(steps))


def test_no_jax_is_imported():
    code = "import sys, twinax.serving.simulator; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
