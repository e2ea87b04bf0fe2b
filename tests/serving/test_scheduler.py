"""The policy, case by case. Random use: test_scheduler_machine.py and test_scheduler_reference.py."""

import random
import subprocess
import sys

import pytest

from twinax.serving.request import InvalidRequest, QueueFull, Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig


def make(max_running=4, page_size=2, num_pages=100, max_model_len=64, chunk_tokens=8, max_waiting=16):
    return Scheduler(SchedulerConfig(max_running, page_size, num_pages, max_model_len, chunk_tokens, max_waiting))


def add(scheduler, id, prompt, max_tokens=4):
    return scheduler.add(Request(id, list(range(prompt)), SamplingParams(max_tokens=max_tokens)))


def rows(entries):
    return [(e.sequence.id, e.slot, e.start, e.length, e.is_last_chunk) for e in entries]


def commit(scheduler, plan, finish=True):
    """Commits with each new token being its own position; finishes at the length limit."""
    sampled = {e.sequence.id: e.start + e.length for e in plan.entries if e.is_last_chunk}
    grown = scheduler.commit(plan, sampled)
    for sequence in grown:
        if finish and sequence.length_reached:
            scheduler.finish(sequence.id)
    return grown


def step(scheduler):
    plan = scheduler.schedule()
    if plan is not None:
        commit(scheduler, plan)
    return plan


def test_chunks_and_decodes_share_a_step():
    scheduler = make()
    a = add(scheduler, "a", 3)
    plan = step(scheduler)
    assert (rows(plan.decodes), rows(plan.chunks)) == ([], [("a", 0, 0, 3, True)])
    assert (a.num_computed, a.output_ids, plan.admitted, len(a.pages)) == (3, [3], [a], 2)

    b = add(scheduler, "b", 12)
    plan = step(scheduler)
    assert (rows(plan.decodes), rows(plan.chunks)) == ([("a", 0, 3, 1, True)], [("b", 1, 0, 8, False)])
    assert (a.output_ids, b.output_ids, b.num_computed, plan.chunk_tokens) == ([3, 4], [], 8, 8)
    assert len(b.pages) == 7, "pages for the whole prompt and one more token are held from admission"

    plan = step(scheduler)
    assert (rows(plan.decodes), rows(plan.chunks)) == ([("a", 0, 4, 1, True)], [("b", 1, 8, 4, True)])
    assert (a.output_ids, b.output_ids) == ([3, 4, 5], [12])


def test_the_last_single_token_of_a_prompt_is_a_decode_row_and_uses_no_budget():
    scheduler = make()
    add(scheduler, "a", 9)
    step(scheduler)
    add(scheduler, "b", 8)
    add(scheduler, "c", 1)
    plan = step(scheduler)
    assert rows(plan.decodes) == [("a", 0, 8, 1, True), ("c", 2, 0, 1, True)]
    assert rows(plan.chunks) == [("b", 1, 0, 8, True)]


def test_a_leftover_budget_of_one_token_waits():
    """A decode row always samples, and the chunk region has no entry of one token."""
    scheduler = make()
    for id, prompt in (("a", 7), ("b", 3), ("c", 1)):
        add(scheduler, id, prompt)
    plan = step(scheduler)
    assert rows(plan.entries) == [("a", 0, 0, 7, True)]
    assert [s.id for s in scheduler.waiting] == ["b", "c"], "nobody overtakes the head of the queue"
    assert rows(step(scheduler).entries) == [("a", 0, 7, 1, True), ("c", 2, 0, 1, True), ("b", 1, 0, 3, True)]


def test_the_lowest_free_slot_is_given_and_kept():
    scheduler = make(max_running=3)
    for id in "abc":
        add(scheduler, id, 2, max_tokens=10)
    step(scheduler)
    assert [scheduler.get(id).slot for id in "abc"] == [0, 1, 2]
    scheduler.cancel("b")
    scheduler.cancel("a")
    d, e = add(scheduler, "d", 2), add(scheduler, "e", 2)
    step(scheduler)
    assert (d.slot, e.slot, scheduler.get("c").slot) == (0, 1, 2)


def test_the_youngest_is_preempted_and_its_tokens_are_kept():
    scheduler = make(num_pages=6)
    a, b = add(scheduler, "a", 3, max_tokens=8), add(scheduler, "b", 3, max_tokens=8)
    for _ in range(4):
        step(scheduler)
    assert (a.output_ids, b.output_ids, len(a.pages), len(b.pages)) == ([3, 4, 5, 6], [3, 4, 5, 6], 3, 3)

    plan = step(scheduler)  # a needs a fourth page
    assert (rows(plan.entries), plan.preempted, plan.admitted) == ([("a", 0, 6, 1, True)], [b], [])
    assert (b.slot, b.pages, b.num_computed, b.output_ids, b.preemptions) == (-1, [], 0, [3, 4, 5, 6], 1)
    assert list(scheduler.waiting) == [b]
    assert scheduler.stats().preemptions == 1

    c = add(scheduler, "c", 1, max_tokens=1)
    for _ in range(3):
        assert [e.sequence for e in step(scheduler).entries] == [a]
    assert list(scheduler.waiting) == [b, c], "c would fit, but doesn't overtake b"

    plan = step(scheduler)  # a is done: b is computed anew, with the tokens it had, and gets the next one
    assert rows(plan.entries) == [("c", 1, 0, 1, True), ("b", 0, 0, 7, True)]
    assert (plan.admitted, b.output_ids) == ([b, c], [3, 4, 5, 6, 7])


def test_the_watermark_counts_those_that_may_still_grow():
    scheduler = make(num_pages=4)
    add(scheduler, "a", 4, max_tokens=3)  # holds 3 pages
    step(scheduler)
    b = add(scheduler, "b", 1, max_tokens=3)  # holds the last one: a won't grow, so no watermark
    step(scheduler)
    assert b.output_ids == [1]
    plan = step(scheduler)
    assert rows(plan.decodes) == [("a", 0, 5, 1, True), ("b", 1, 1, 1, True)]
    plan = step(scheduler)
    assert plan.preempted == []
    assert rows(plan.decodes) == [("b", 1, 2, 1, True)]

    scheduler = make(num_pages=4)
    add(scheduler, "a", 4, max_tokens=5)
    b = add(scheduler, "b", 1, max_tokens=5)
    step(scheduler)
    assert list(scheduler.waiting) == [b], "the watermark keeps the last page for a, which may still grow"


def test_the_youngest_waits_in_its_slot_for_a_page():
    scheduler = make(page_size=1, num_pages=8)
    a, b = add(scheduler, "a", 3, max_tokens=4), add(scheduler, "b", 2, max_tokens=5)
    for _ in range(2):  # each writes into the pages it holds already: 7 of 8 are used
        assert len(step(scheduler).entries) == 2
    c = add(scheduler, "c", 1)
    for position in (4, 5):
        plan = step(scheduler)  # a takes the eighth page, and then one of b's
        assert rows(plan.entries) == [("a", 0, position, 1, True)]
    assert (plan.preempted, b.preemptions, a.finished) == ([b], 1, True)
    assert list(scheduler.waiting) == [b, c]

    scheduler = make(page_size=1, num_pages=8)
    a, b = add(scheduler, "a", 3, max_tokens=3), add(scheduler, "b", 2, max_tokens=5)
    for _ in range(3):
        plan = step(scheduler)
    assert (rows(plan.entries), a.finished) == ([("a", 0, 4, 1, True)], True)
    assert rows(step(scheduler).entries) == [("b", 1, 3, 1, True)]
    assert (b.preemptions, b.slot) == (0, 1), "nothing is computed twice"


def test_cancel_frees_at_once_wherever_the_request_is():
    scheduler = make(num_pages=6, max_running=2)
    a, b = add(scheduler, "a", 3, max_tokens=8), add(scheduler, "b", 3, max_tokens=8)
    waiting = add(scheduler, "c", 3)
    for _ in range(5):
        plan = step(scheduler)
    assert plan.preempted == [b]
    assert scheduler.cancel("b") is True, "preempted"
    assert scheduler.cancel("c") is True, "waiting"
    assert waiting.finished
    used = scheduler.stats().pages_used
    assert used == len(a.pages) == 4
    assert scheduler.cancel("a") is True, "running"
    stats = scheduler.stats()
    assert (stats.pages_used, stats.running, stats.waiting, stats.pages_total) == (0, 0, 0, 6)
    assert scheduler.cancel("a") is False
    assert scheduler.cancel("never") is False
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_cancel_between_schedule_and_commit_and_the_same_id_again():
    scheduler = make()
    add(scheduler, "a", 3)
    b = add(scheduler, "b", 3)
    plan = scheduler.schedule()
    scheduler.cancel("a")
    again = add(scheduler, "a", 5)
    assert scheduler.commit(plan, {"a": 7, "b": 8}) == [b]
    assert (again.output_ids, again.num_computed, b.output_ids) == ([], 0, [8])


def test_steps_may_be_scheduled_before_earlier_ones_are_committed():
    scheduler = make()
    a = add(scheduler, "a", 10, max_tokens=3)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [rows(plan.entries) for plan in plans] == [
        [("a", 0, 0, 8, False)],
        [("a", 0, 8, 2, True)],
        [("a", 0, 10, 1, True)],
        [("a", 0, 11, 1, True)],
    ]
    assert (a.num_computed, a.num_scheduled, a.in_flight) == (0, 12, 3)
    assert scheduler.schedule() is None, "the third token is the last"
    for number, plan in enumerate(plans):
        scheduler.commit(plan, {"a": number} if number else {})
    assert (a.output_ids, a.num_computed, a.in_flight, a.length_reached) == ([1, 2, 3], 12, 0, True)


def test_a_token_in_flight_outlives_preemption_and_readmission_waits_for_it():
    scheduler = make(num_pages=6)
    add(scheduler, "a", 3, max_tokens=8)
    b = add(scheduler, "b", 3, max_tokens=8)
    for _ in range(3):
        step(scheduler)
    in_flight = scheduler.schedule()
    preempting = scheduler.schedule()
    assert preempting.preempted == [b]
    scheduler.cancel("a")
    assert scheduler.schedule() is None, "b's recomputation needs the token that is still in flight"
    commit(scheduler, in_flight)
    assert (b.output_ids, b.num_computed) == ([3, 4, 5, 6], 0)
    commit(scheduler, preempting)
    assert rows(scheduler.schedule().entries) == [("b", 0, 0, 7, True)]


def test_commit_refuses_disorder_and_missing_tokens_and_changes_nothing():
    scheduler = make()
    a = add(scheduler, "a", 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match="in order: expected number 0, got 1"):
        scheduler.commit(second, {"a": 1})
    with pytest.raises(ValueError, match=r"none was given for \['a'\]"):
        scheduler.commit(first, {"b": 1})
    assert (a.output_ids, a.num_computed) == ([], 0)
    scheduler.commit(first, {"a": 1})
    with pytest.raises(ValueError, match="in order: expected number 1, got 0"):
        scheduler.commit(first, {"a": 1})


def test_finish_is_for_live_requests():
    scheduler = make()
    add(scheduler, "a", 3)
    scheduler.finish("a")
    with pytest.raises(KeyError, match="isn't live"):
        scheduler.finish("a")


def test_add_refuses_what_can_never_run():
    scheduler = make(max_model_len=8, num_pages=3)
    for prompt, max_tokens, param, match in [
        (0, 1, "prompt", "from 1 to 7 tokens .* got 0"),
        (8, 1, "prompt", "from 1 to 7 tokens .* got 8"),
        (7, 0, "max_tokens", "at least 1, got 0"),
        (4, 99, "max_tokens", r"the cache of 6 tokens, got 4 \+ 4; lower max_tokens"),
    ]:
        with pytest.raises(InvalidRequest, match=match) as caught:
            add(scheduler, "a", prompt, max_tokens)
        assert caught.value.param == param
    assert not scheduler.has_work
    add(scheduler, "a", 4, 3)  # computes 6 positions: the last token is never an input
    with pytest.raises(InvalidRequest, match="id must be unique, 'a' is already"):
        add(scheduler, "a", 1)
    while scheduler.has_work:
        step(scheduler)


def test_the_context_caps_the_output():
    scheduler = make(max_model_len=8)
    a = add(scheduler, "a", 5, max_tokens=100)
    assert a.max_output == 3
    while scheduler.has_work:
        step(scheduler)
    assert a.output_ids == [5, 6, 7]


def test_a_full_queue():
    scheduler = make(max_waiting=2)
    add(scheduler, "a", 3)
    add(scheduler, "b", 3)
    with pytest.raises(QueueFull, match="2 requests are waiting, the most allowed"):
        add(scheduler, "c", 3)
    assert scheduler.get("c") is None
    step(scheduler)
    add(scheduler, "c", 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running", 0),
        ("page_size", 0),
        ("num_pages", -1),
        ("max_model_len", 1),
        ("chunk_tokens", 1),
        ("max_waiting", 0),
    ],
)
def test_config_limits(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {max(1, value + 1)}, got {value}"):
        make(**{name: value})


def test_the_same_calls_give_the_same_plans_and_pages():
    def replay():
        scheduler, random_, log = make(num_pages=30, max_running=6), random.Random(5), []
        for number in range(300):
            if random_.random() < 0.3 and len(scheduler.waiting) < 16:
                add(scheduler, str(number), random_.randint(1, 25), random_.randint(1, 20))
            if random_.random() < 0.05:
                log.append(scheduler.cancel(str(random_.randrange(number + 1))))
            if (plan := step(scheduler)) is not None:
                log.append((rows(plan.entries), [list(e.sequence.pages) for e in plan.entries]))
        assert scheduler.stats().preemptions > 0
        return log

    assert replay() == replay()


def test_no_jax_is_imported():
    code = "import sys, twinax.serving.scheduler; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
