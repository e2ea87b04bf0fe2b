"""What every policy promises, and each one's own idea, on the real scheduler. Random use: test_scheduler_machine.py."""

import itertools
import subprocess
import sys

import pytest

from twinax.serving import schedulers
from twinax.serving.output_lengths import OutputLengths
from twinax.serving.request import InvalidRequest, Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig
from twinax.serving.step_times import StepTimes

# What a request asks that goes after all others, and what those ask that would all go before it if nobody aged.
LAST = {"priority": {"priority": 3}, "deadline": {"deadline_seconds": 30.0}}
FIRST = {"priority": {"priority": -3}, "deadline": {"deadline_seconds": 0.5, "stages_left": 5}}


def make(policy, max_running=2, page_size=4, num_pages=400, chunk_tokens=16, max_token_ms=None, max_waiting=20_000):
    config = SchedulerConfig(
        max_running, page_size, num_pages, 1024, chunk_tokens, max_waiting, policy=policy, max_token_ms=max_token_ms
    )
    return Scheduler(config)


def add(scheduler, id, prompt=4, max_tokens=4, **asks):
    return scheduler.add(Request(id, [7] * prompt, SamplingParams(max_tokens=max_tokens), **asks))


def step(scheduler):
    plan = scheduler.schedule()
    if plan is not None:
        grown = scheduler.commit(plan, {e.sequence.id: 0 for e in plan.entries if e.is_last_chunk})
        for sequence in grown:
            if sequence.length_reached:
                scheduler.finish(sequence.id)
    return plan


def let_in(scheduler, count):
    """The ids of the next `count` requests that are let in, one after another."""
    found = []
    while len(found) < count:
        found += [sequence.id for sequence in step(scheduler).admitted]
    return found


# -- all policies


@pytest.mark.parametrize("policy", schedulers.names())
def test_a_request_that_ranks_last_is_served_in_an_endless_stream_of_others(policy, monkeypatch):
    """As many come as are served, so the queue is never empty. The bound is of requests that overtake it."""
    monkeypatch.setattr("twinax.serving.schedulers.priority.AGE", 20)
    monkeypatch.setattr("twinax.serving.schedulers.shortest_predicted.PATIENCE", 8)
    scheduler = make(policy)
    for number in range(4):
        add(scheduler, f"before{number}", tenant="others", arrival=0.0)
    # A long prompt and a long answer; its tenant has been served before.
    if policy == "fair":
        add(scheduler, "own", prompt=150, max_tokens=1, tenant="own")
        while scheduler.get("own"):
            step(scheduler)
    last = add(scheduler, "last", prompt=60, max_tokens=40, tenant="own", **LAST.get(policy, {}))
    for number in itertools.count():
        while scheduler.num_waiting < 4:
            more = {"tenant": f"new{number}" if policy == "fair" else "others", **FIRST.get(policy, {})}
            add(scheduler, f"s{number}-{scheduler.num_waiting}", arrival=number * 0.05, **more)
        step(scheduler)
        if last.finished:
            break
        assert number < 2500, f"{policy} lets it starve"
    assert len(last.output_ids) == 40


@pytest.mark.parametrize("policy", schedulers.names())
def test_a_decision_costs_no_more_with_a_hundred_times_the_queue(policy):
    """Lines of Python that run in a step, as the queue goes from 100 to 10,000, with 64 that run."""
    lines = {}
    for waiting in (100, 10_000):
        scheduler = make(policy, max_running=64, num_pages=4000, chunk_tokens=512)
        for number in range(64 + waiting):
            asks = FIRST[policy] if policy in FIRST and number % 3 else {}
            tenant = f"t{number % 50}"
            add(scheduler, str(number), 3 + number % 60, 40 + number % 9, tenant=tenant, arrival=number * 0.01, **asks)
        while len(scheduler.running) < 64:
            step(scheduler)
        most = 0
        for _ in range(3):
            most = max(most, count_lines(lambda scheduler=scheduler: step(scheduler)))
        lines[waiting] = most
    assert lines[10_000] < 1.3 * lines[100], lines


@pytest.mark.parametrize("policy", schedulers.names())
def test_a_decision_grows_with_those_that_run(policy):
    lines = {}
    for running in (32, 256):
        scheduler = make(policy, max_running=running, num_pages=4000, chunk_tokens=512)
        for number in range(running + 50):
            add(scheduler, str(number), 3, 200, tenant=f"t{number % 50}", arrival=float(number))
        while len(scheduler.running) < running:
            step(scheduler)
        lines[running] = max(count_lines(lambda scheduler=scheduler: step(scheduler)) for _ in range(4))
    assert lines[256] < 8.5 * lines[32], lines


def test_a_decision_costs_no_more_with_a_long_prompt_that_waits():
    """Its beginning is in the prefix cache, and there is no room for it yet."""
    lines = {}
    for prompt in (200, 20_000):
        config = SchedulerConfig(2, 4, prompt // 4 + 80, prompt + 300, 5000, 9, prefix_cache="lru")
        scheduler = Scheduler(config)
        add(scheduler, "runs", prompt, 300)
        while not scheduler.get("runs").output_ids:
            step(scheduler)
        half = prompt // 2
        scheduler.add(Request("waits", [7] * half + [8] * (half + 250), SamplingParams(max_tokens=9)))
        step(scheduler)
        lines[prompt] = max(count_lines(lambda scheduler=scheduler: step(scheduler)) for _ in range(8))
        waits = scheduler.get("waits")
        assert waits.slot < 0 and len(waits.found) == prompt // 8
    assert lines[20_000] < 1.3 * lines[200], lines


def count_lines(call):
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("policy", schedulers.names())
def test_iterating_gives_the_order_in_which_they_are_let_in(policy):
    scheduler = make(policy, max_running=1, chunk_tokens=64)
    for number, prompt in enumerate((9, 3, 30, 5, 5, 12)):
        asks = {"priority": number % 3} if policy == "priority" else {}
        add(scheduler, str(number), prompt, 1, tenant="ab"[number % 2], **asks)
    first, asked = next(iter(scheduler.waiting)), scheduler.waiting.first(64)
    assert asked is first
    assert len(scheduler.waiting) == len(list(scheduler.waiting)) == 6
    assert let_in(scheduler, 1) == [first.id]
    scheduler.cancel("4")
    assert len(scheduler.waiting) == len(list(scheduler.waiting)) == 4 + (first.id == "4")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"no scheduler 'lifo'; choose one of deadline, fair, first_come"):
        make("lifo")
    with pytest.raises(ValueError, match="max_token_ms must be above 0, got 0"):
        make("sarathi", max_token_ms=0)


@pytest.mark.parametrize(
    ("field", "value", "policy"), [("priority", 1, "priority"), ("deadline_seconds", 2.0, "deadline")]
)
def test_a_field_that_the_policy_does_not_honour_is_refused(field, value, policy):
    with pytest.raises(
        InvalidRequest, match=f"{field} means nothing to the scheduler 'first_come'.*={policy}"
    ) as caught:
        add(make("first_come"), "a", **{field: value})
    assert caught.value.param == field
    add(make(policy), "a", **{field: value})


def test_no_jax_is_imported():
    code = "from twinax.serving import schedulers\nfor n in schedulers.names(): schedulers._module(n)\n"
    assert subprocess.run([sys.executable, "-c", code + "import sys; sys.exit('jax' in sys.modules)"]).returncode == 0


# -- each one's idea


def test_priority_overtakes_the_queue_and_takes_the_place_of_one_that_runs():
    scheduler = make("priority", max_running=1)
    low = add(scheduler, "low", max_tokens=20, priority=2)
    step(scheduler)
    for id, priority in (("a", 2), ("b", 0), ("c", -1), ("d", 0)):
        add(scheduler, id, max_tokens=1, priority=priority)
    plan = step(scheduler)
    assert ([s.id for s in plan.preempted], [s.id for s in plan.admitted]) == (["low"], ["c"])
    assert let_in(scheduler, 4) == ["b", "d", "low", "a"], "in the order in which they came, where they are alike"
    assert low.preemptions == 1


def test_fair_shares_tokens_between_tenants_not_requests():
    """One tenant asks for ten times as much in each request and has more of them; it gets no more than the other."""
    scheduler = make("fair", max_running=1)
    for number in range(40):
        add(scheduler, f"greedy{number}", prompt=40, max_tokens=10, tenant="greedy")
    for number in range(40):
        add(scheduler, f"modest{number}", prompt=4, max_tokens=1, tenant="modest")
    order = let_in(scheduler, 33)
    assert sum(id.startswith("modest") for id in order) in (29, 30, 31), "60 tokens of one weigh as 6 of the other"
    served = [id for id in order if id.startswith("greedy")]
    assert served == [f"greedy{number}" for number in range(len(served))]


def test_fair_preempts_who_is_far_ahead_and_who_comes_back_has_saved_nothing(monkeypatch):
    monkeypatch.setattr("twinax.serving.schedulers.fair.LEAD", 50)
    scheduler = make("fair", max_running=1)
    add(scheduler, "seen", prompt=4, max_tokens=1, tenant="other")
    step(scheduler)
    add(scheduler, "long", prompt=4, max_tokens=200, tenant="own")
    for _ in range(60):
        step(scheduler)
    add(scheduler, "other", prompt=4, max_tokens=60, tenant="other")
    assert step(scheduler).preempted == [], "both were there for as many tokens as were served in all"
    for _ in range(30):
        assert scheduler.get("long").slot == 0
        step(scheduler)
        if scheduler.get("other").slot == 0:
            break
    assert scheduler.get("other").slot == 0
    for _ in range(300):
        step(scheduler)
    assert not scheduler.has_work


def test_deadlines_of_jobs_are_shared_by_their_stages():
    scheduler = make("deadline", max_running=1)
    for id, arrival, asks in (
        ("none", 0.0, {}),
        ("job", 1.0, {"deadline_seconds": 20.0}),
        ("first of five", 2.0, {"deadline_seconds": 20.0, "stages_left": 5}),
        ("soon", 3.0, {"deadline_seconds": 2.5}),
        ("none, later", 4.0, {}),
    ):
        add(scheduler, id, max_tokens=1, arrival=arrival, **asks)
    assert let_in(scheduler, 5) == ["soon", "first of five", "job", "none", "none, later"]


def test_the_latest_start_is_earlier_for_what_takes_longer():
    scheduler = make("deadline", max_running=1)
    for _ in range(3):
        scheduler.times.add((1, 0), 10.0, 0.5)
    add(scheduler, "short", max_tokens=2, deadline_seconds=30.0)
    add(scheduler, "long", max_tokens=20, deadline_seconds=31.0)
    assert let_in(scheduler, 2) == ["long", "short"]


def test_the_shortest_goes_first_by_what_its_tenant_took_before():
    scheduler = make("shortest_predicted", max_running=1, chunk_tokens=64)
    for number in range(5):
        add(scheduler, f"chat{number}", max_tokens=60, tenant="chat")
        add(scheduler, f"label{number}", max_tokens=2, tenant="label")
    while scheduler.has_work:
        step(scheduler)
    for number in range(3):
        add(scheduler, f"c{number}", max_tokens=200, tenant="chat")
        add(scheduler, f"l{number}", max_tokens=200, tenant="label")
    assert let_in(scheduler, 4) == ["l0", "l1", "l2", "c0"]


def test_prepacking_fills_a_step_with_prompts_that_fit_whole_and_lets_the_first_be_passed_so_often_only():
    scheduler = make("prepacking", max_running=100, chunk_tokens=16)
    add(scheduler, "long", prompt=40)
    for number in range(100):
        add(scheduler, f"s{number}", prompt=(3, 7, 5)[number % 3], max_tokens=3)
    plan = step(scheduler)
    assert [entry.length for entry in plan.chunks] == [7, 5, 3], "of those that fit, and none in pieces"
    scheduler = make("prepacking", max_running=200, num_pages=4000, chunk_tokens=16)
    add(scheduler, "long", prompt=40)
    for number in range(100):
        add(scheduler, f"s{number}", prompt=8, max_tokens=3)
    order = let_in(scheduler, 80)
    assert order.index("long") == 64


def times(**seconds):
    """Of steps of 8 rows, by their prompt tokens."""
    known = StepTimes([(8, 0), (8, 64), (8, 256)])
    for chunk, value in seconds.items():
        for _ in range(3):
            known.add((8, int(chunk[1:])), 100.0, value)
    return known


def test_sarathi_cuts_prompts_so_that_a_step_stays_within_the_bound():
    scheduler = make("sarathi", max_running=8, chunk_tokens=256, max_token_ms=50, num_pages=4000)
    for size, seconds in ((0, 0.01), (64, 0.03), (256, 0.09)):
        scheduler.times.add((8, size), 10.0, seconds)
    add(scheduler, "a", prompt=300, max_tokens=50)
    assert [e.length for e in step(scheduler).chunks] == [256], "nobody waits for a token yet"
    step(scheduler)
    add(scheduler, "b", prompt=300)
    lengths = []
    while scheduler.running[-1].id == "a" or scheduler.get("b").num_scheduled < 300:
        plan = step(scheduler)
        assert plan.decodes, "those that generate always do"
        lengths += [entry.length for entry in plan.chunks]
    assert lengths == [64, 64, 64, 64, 44]


def test_without_a_bound_sarathi_takes_a_multiple_of_a_step_without_prompts():
    plan = type("Plan", (), {"decodes": [1], "pairs": 100})()
    for largest, chosen in ((0.04, 256), (0.06, 64)):
        policy = schedulers.load("sarathi", times(c0=0.01, c64=0.02, c256=largest))
        assert policy.budget(plan, 0, 256) == chosen
        assert schedulers.load("first_come", policy.times).budget(plan, 0, 256) == 256


def test_the_bound_of_sarathi_does_not_shrink_with_those_that_generate():
    known = StepTimes([(8, 0), (8, 64), (8, 256)])
    for pairs in (100, 800):  # each one that generates takes a millisecond
        known.add((8, 0), pairs, 0.002 + 1e-5 * pairs)
    for size, seconds in ((64, 0.012), (256, 0.04)):
        known.add((8, size), 100.0, seconds)
    policy = schedulers.load("sarathi", known)
    for decodes in (1, 8):
        plan = type("Plan", (), {"decodes": [1] * decodes, "pairs": 100 * decodes})()
        assert policy.budget(plan, 0, 256) == 256


def test_a_size_that_was_too_slow_once_is_tried_again():
    policy = schedulers.load("sarathi", times(c0=0.01, c64=0.02, c256=0.06), max_token_ms=50)
    plan = type("Plan", (), {"decodes": [1], "pairs": 100})()
    tries = [policy.budget(plan, 0, 256) for _ in range(200)]
    assert tries[0] == 64 and tries[-1] == 256


def test_a_size_that_was_never_timed_is_tried_some_day():
    policy = schedulers.load("sarathi", times(c0=0.01, c64=0.016), max_token_ms=50)  # 256 would take four times as long
    plan = type("Plan", (), {"decodes": [1], "pairs": 100})()
    tries = [policy.budget(plan, 0, 256) for _ in range(200)]
    assert tries[0] == 64 and tries[-1] == 256


def test_step_times_find_the_line_and_follow_a_change():
    known = StepTimes([(8, 0), (32, 0), (32, 64)])
    assert known.seconds((8, 0), 5) is None
    for pairs in (100, 200, 400, 800):
        known.add((8, 0), pairs, 0.01 + 1e-5 * pairs)
    assert known.seconds((8, 0), 1000) == pytest.approx(0.02)
    assert known.seconds((32, 0), 4000) == pytest.approx(0.02 * 4), "not seen: as four of eight rows"
    assert known.seconds((32, 64), 1000) is None
    known.add((8, 0), 100, 5.0)
    assert known.seconds((8, 0), 100) < 0.03, "one slow step is not believed"
    for number in range(400):
        known.add((8, 0), 100 + number % 7, 0.05)
    assert known.seconds((8, 0), 103) == pytest.approx(0.05, rel=1e-3)


def test_output_lengths_fall_back_from_a_kind_to_all():
    lengths = OutputLengths()
    request = Request("a", [1] * 10, tenant="t")
    assert lengths.predict(request, 99) == 99
    lengths.learn(Request("b", [1] * 900, tenant="other"), 30)
    assert lengths.predict(request, 99) == 30
    for _ in range(4):
        lengths.learn(request, 5)
    assert lengths.predict(request, 99) == 5
    assert lengths.predict(Request("c", [1] * 500, tenant="t"), 99) == 5, "its tenant's"
    assert lengths.predict(Request("d", [1] * 9), 99) == 5, "its length's"
    assert lengths.predict(request, 3) == 3
