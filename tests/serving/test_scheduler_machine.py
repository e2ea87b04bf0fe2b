"""Random use of the scheduler, checked after every operation, with a simulated cache that plans are really run on.

The simulated device keeps (request, position, token) in pages. It "samples" a hash of the whole context that it reads
back through the page table, so a page shared, lost or not recomputed, and a token lost or emitted twice, all change
what comes out, which is compared with the same hash computed from the prompt alone.
"""

from collections import deque

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from twinax.serving import kv_policies, schedulers
from twinax.serving.prefix_cache import OWNER
from twinax.serving.request import InvalidRequest, QueueFull, Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig

SETTINGS = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None, database=None)
IN_TURN = ("first_come", "sarathi")  # policies under which nobody is overtaken
GIVE_WAY = ("fair", "priority")  # under which one that runs is preempted for one that waits
STOP = 0  # one of the tokens that the simulated device samples ends a request


def pages_of(cache):
    """All pages of the device in the tree."""
    todo, found = list(cache._roots.values()), []
    while todo:
        node = todo.pop()
        todo += node.children.values()
        found += [child.page for child in node.children.values() if child.page >= 0]
    return found


def next_token(context):
    value = 17
    for token in context:
        value = (value * 31 + token + 7) % 1009
    return value % 37


class Live:
    """What the test knows of a live request: `tokens` as on the device, `computed` positions in the cache."""

    def __init__(self, number, sequence):
        self.number = number
        self.sequence = sequence
        self.tokens = list(sequence.prompt_ids)
        self.computed = 0
        self.emitted = []

    def expected(self, count):
        context = list(self.sequence.prompt_ids)
        for _ in range(count):
            context.append(next_token(context))
        return context[len(self.sequence.prompt_ids) :]


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_class = Scheduler
    prefix_cache = None
    policy = "first_come"
    host_pages = 0
    brought_back = 0
    examples_that_preempted = 0
    tokens_found = 0
    copies = 0

    @initialize(
        # Mostly crowded: several requests run, of which two fill the pages.
        max_running=st.sampled_from([3, 4, 5, 3, 4, 5, 2, 1]),
        page_size=st.sampled_from([1, 1, 1, 2, 2, 3]),
        num_pages=st.sampled_from([10, 12, 14, 16, 10, 12, 6, 2]),
        max_model_len=st.sampled_from([10, 12, 14, 16, 10, 12, 24, 3]),
        chunk_tokens=st.integers(2, 9),
        max_waiting=st.sampled_from([4, 5, 6, 1]),
        depth=st.sampled_from([1, 1, 2, 3]),
        crowd=st.lists(st.integers(2, 9), max_size=5),
    )
    def start(self, depth, crowd, **config):
        more = {"prefix_cache": self.prefix_cache, "policy": self.policy, "host_pages": self.host_pages}
        self.config = SchedulerConfig(**config, **more)
        self.scheduler = self.scheduler_class(self.config)
        self.depth = depth  # so many plans may be in flight
        self.in_flight = deque()
        self.cache, self.host = {}, {}
        self.live = {}  # id -> Live, oldest first
        self.added = 0
        # How often later rules make a crowd by themselves hangs on which modules hypothesis finds loaded.
        self.add([3, 3, *crowd], 16, 16, alike=False)

    # Operations

    @rule(
        prompts=st.lists(st.integers(1, 3) | st.integers(1, 24), min_size=1, max_size=4),
        max_tokens=st.sampled_from([10, 24, 16, 3, 1]),
        steps=st.sampled_from([0, 4, 8]),
        alike=st.sampled_from([False, False, False, True]),
    )
    def add(self, prompts, max_tokens, steps, alike):
        number = self.added
        for prompt in prompts:
            if alike:
                self.add_one(prompts[0], max_tokens, number)
            else:
                self.add_one(prompt, max_tokens, self.added)
            self.check()
        self.run_ahead(steps)

    def add_one(self, prompt, max_tokens, number):
        config = self.config
        # With a prefix cache most begin alike.
        first = number if self.prefix_cache is None or number % 4 == 3 else 0
        salt = "other" if self.prefix_cache and number % 5 == 4 else ""
        params = SamplingParams(max_tokens=max_tokens)
        ids = list(range(first, first + prompt))
        request = Request(f"r{self.added}", ids, params, float(self.added), salt, **self.asks())
        positions = prompt + min(max_tokens, config.max_model_len - prompt) - 1
        if prompt >= config.max_model_len or positions > config.num_pages * config.page_size:
            with pytest.raises(InvalidRequest):
                self.scheduler.add(request)
        elif self.scheduler.num_waiting >= config.max_waiting:
            with pytest.raises(QueueFull):
                self.scheduler.add(request)
        else:
            self.live[request.id] = Live(self.added, self.scheduler.add(request))
            self.added += 1

    def asks(self):
        """What tells this request from others, to the policies that look at it."""
        number = self.added
        asks = {"tenant": "" if self.prefix_cache else "abc"[number * number % 3]}
        if self.policy == "priority":
            asks["priority"] = number * number % 5 - 2
        if self.policy == "deadline" and number % 4:
            asks |= {"deadline_seconds": 1.0 + 7 * number % 50, "stages_left": 1 + number % 2}
        return asks

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cancel=st.booleans())
    def remove(self, data, cancel):
        id = data.draw(st.sampled_from(list(self.live)))
        if not cancel:
            self.finish(id)
            return
        sequence, free = self.live.pop(id).sequence, self.scheduler.free_pages
        shared = sum(node.users > 1 for node in sequence.nodes)
        held = len(sequence.pages) - shared
        assert self.scheduler.cancel(id)
        assert self.scheduler.free_pages == free + held, "cancelling frees pages at once"
        assert not self.scheduler.cancel(id)

    @rule(count=st.integers(3, 12))
    def run_ahead(self, count):
        """As an engine does: keep `depth` plans in flight. Without this, random use seldom gets far enough."""
        for _ in range(count):
            while len(self.in_flight) < self.depth and self.live:
                before = len(self.in_flight)
                self.schedule()
                self.check()
                if len(self.in_flight) == before:
                    break
            if self.in_flight:
                self.commit()
                self.check()

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule(self):
        plan = self.scheduler.schedule()
        self.check_progress([] if plan is None else plan.entries)
        if plan is None:
            return
        for sequence in plan.preempted:
            self.live[sequence.id].computed = 0
        for sequence in plan.admitted:
            self.live[sequence.id].computed = sequence.num_cached
            assert sequence.num_cached < len(self.live[sequence.id].tokens), "the last one is computed, to sample"
            copied = any(to in sequence.pages for _, to in plan.copies)
            whole = sequence.num_cached % self.config.page_size == 0
            assert (sequence.num_cached == len(sequence.prompt_ids) - 1 and not whole) if copied else whole
            type(self).copies += copied
            type(self).tokens_found += sequence.num_cached
        self.check_plan(plan)
        self.in_flight.append((plan, self.run(plan)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self):
        plan, sampled = self.in_flight.popleft()
        alive = [e.sequence for e in plan.entries if e.is_last_chunk and e.sequence.id in self.live]
        grown = self.scheduler.commit(plan, sampled)
        assert [s.id for s in grown] == [s.id for s in alive]
        for sequence in grown:
            live = self.live[sequence.id]
            live.emitted.append(sampled[sequence.id])
            assert sequence.output_ids == live.emitted == live.expected(len(live.emitted))
            assert len(live.emitted) <= sequence.max_output
            if sequence.length_reached or live.emitted[-1] == STOP:
                self.finish(sequence.id)

    def finish(self, id):
        sequence = self.live.pop(id).sequence
        self.scheduler.finish(id)
        assert (sequence.pages, sequence.slot, sequence.finished) == ([], -1, True)

    def run(self, plan):
        """The device: writes the new tokens of all entries, then reads each context back and samples."""
        page_size = self.config.page_size

        def where(entry, position):
            return entry.sequence.pages[position // page_size], position % page_size

        for copy, page in plan.moves.out.items():
            self.host[copy] = [self.cache[page, slot] for slot in range(page_size)]
        for copy, page in plan.moves.back.items():
            self.cache |= {(page, slot): value for slot, value in enumerate(self.host.pop(copy))}
            type(self).brought_back += 1
        for copy in plan.moves.gone:
            del self.host[copy]
        if plan.moves:
            assert len(self.host) == self.scheduler.host_pages.used
        before = dict(self.cache)
        for page, to in plan.copies:
            for slot in range(page_size):
                self.cache[to, slot] = before.get((page, slot))
        for entry in plan.entries:
            for position in range(entry.start, entry.start + entry.length):
                self.cache[where(entry, position)] = self.kept(entry.sequence, position)
        sampled = {}
        for entry in plan.entries:
            live = self.live[entry.sequence.id]
            live.computed = entry.start + entry.length
            cached = [self.cache[where(entry, position)] for position in range(live.computed)]
            assert cached == [self.kept(entry.sequence, i) for i in range(live.computed)]
            if entry.is_last_chunk:
                sampled[entry.sequence.id] = next_token(token for _, _, token in cached)
                live.tokens.append(sampled[entry.sequence.id])
        return sampled

    def kept(self, sequence, position):
        """What is kept of a token: it hangs on all before it, and the salt; without a prefix cache on the request."""
        tokens = self.live[sequence.id].tokens
        whose = sequence.id
        if self.scheduler.cache is not None:
            whose = (sequence.request.cache_salt, tuple(tokens[: position + 1]))
        return whose, position, tokens[position]

    # Checks

    def check_progress(self, entries):
        """The running request that ranks first progresses; nothing runs where nothing has room; the oldest does both
        where it is that which comes first."""
        order = [*self.scheduler.running, *self.scheduler.waiting]
        first = next(iter(self.live.values())).sequence if self.live and self.policy in IN_TURN else None
        for sequence in [first, *order[:1]]:
            if sequence is not None:
                made = len(self.live[sequence.id].tokens) - len(sequence.prompt_ids)
                exempt = (
                    made == sequence.max_output  # only to be committed
                    or (sequence.slot < 0 and sequence.in_flight > 0)  # preempted, and its token not yet known
                    or (sequence.slot < 0 and sequence.original is not None)  # was held back, and overtaken meanwhile
                )
                assert exempt or any(e.sequence is sequence for e in entries), "the first request always progresses"

    def check_plan(self, plan):
        scheduler, config = self.scheduler, self.config
        if self.policy in IN_TURN:
            order = [self.live[e.sequence.id].number for e in plan.chunks]
            assert order == sorted(order), "chunks go to the oldest first"
        assert all(e.is_last_chunk for e in plan.chunks[:-1]), "the budget is spent on the first"
        assert all(e.length == 1 and e.is_last_chunk for e in plan.decodes)
        assert all(e.length > 1 for e in plan.chunks)
        assert plan.chunk_tokens == sum(e.length for e in plan.chunks) <= config.chunk_tokens
        assert (
            len({e.sequence.id for e in plan.entries}) == len({e.slot for e in plan.entries}) == len(plan.entries) > 0
        )
        for entry in plan.entries:
            live = self.live[entry.sequence.id]
            assert entry.slot == entry.sequence.slot
            assert entry.start == live.computed, "positions are computed in order, once, and from 0 after preemption"
            assert entry.start + entry.length <= len(live.tokens)
            assert entry.is_last_chunk == (entry.start + entry.length == len(live.tokens))
        for sequence in plan.admitted:
            assert sequence.slot >= 0
        assert not set(plan.admitted) & set(plan.preempted)
        assert not (plan.admitted and plan.preempted) or self.policy in GIVE_WAY
        served = {e.sequence.id for e in plan.entries}
        for sequence in scheduler.running:
            ready = len(self.live[sequence.id].tokens) - len(sequence.prompt_ids) < sequence.max_output
            if sequence.id not in served and ready:
                spent = plan.chunk_tokens >= config.chunk_tokens - 1
                full = len(sequence.pages) * config.page_size == sequence.num_scheduled
                youngest = sequence is scheduler.running[-1]
                assert spent or (full and youngest and scheduler.free_pages == 0), "nothing else holds it up"

    @invariant()
    def check(self):
        if not hasattr(self, "scheduler"):  # before `start`
            return
        scheduler, config = self.scheduler, self.config
        allocator = scheduler.allocator
        running, waiting = scheduler.running, list(scheduler.waiting)
        owned = [page for sequence in running for page in sequence.pages[len(sequence.nodes) :]]
        kept = {} if scheduler.cache is None else {page: OWNER for page in pages_of(scheduler.cache)}
        assert len(set(owned)) == len(owned) == allocator.used_pages - len(kept), "no page is owned twice, none leaked"
        assert allocator.used_pages + allocator.free_pages == config.num_pages
        owners = {page: sequence.id for sequence in running for page in sequence.pages[len(sequence.nodes) :]} | kept
        used = {page for sequence in running for page in sequence.pages}
        assert config.num_pages - scheduler.free_pages == len(used), "what nobody uses is as good as free"
        assert [allocator.owner(page) for page in range(config.num_pages)] == [
            owners.get(page) for page in range(config.num_pages)
        ]
        for sequence in running:
            live = self.live[sequence.id]
            assert [node.page for node in sequence.nodes] == sequence.pages[: len(sequence.nodes)]
            assert sequence.num_scheduled == live.computed
            assert sequence.num_tokens == len(live.tokens)
            least, most = allocator.pages_for(live.computed), allocator.pages_for(len(live.tokens) + 1)
            assert least <= len(sequence.pages) <= min(most, sequence.max_pages)
        held = [fork for sequence in running + waiting for fork in sequence.forks]
        assert not any(fork.forks for fork in held)
        waiting += held
        for sequence in waiting:
            assert (sequence.pages, sequence.slot, sequence.num_computed, sequence.num_scheduled) == ([], -1, 0, 0)
        for sequence in running + waiting:
            assert sequence.num_computed <= sequence.num_scheduled
            if not self.in_flight:
                assert (sequence.num_computed, sequence.in_flight) == (sequence.num_scheduled, 0)
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(config.max_running))
        if self.policy in IN_TURN:
            in_turn = [s.id for s in running + waiting if s.original is None]
            forks = {s.id for s in waiting if s.original is not None}
            assert in_turn == [id for id in self.live if id not in forks], "running before waiting, each oldest first"
        assert {s.id for s in running + waiting} == set(self.live)
        if not scheduler.waiting.moves:
            ranks = [[sequence.rank for sequence in some] for some in (running, scheduler.waiting)]
            assert ranks == [sorted(some) for some in ranks]
        assert scheduler.host_pages.used <= config.host_pages
        stats = scheduler.stats()
        assert (stats.running, stats.waiting) == (len(running), len(waiting))
        assert (stats.pages_used, stats.pages_total) == (len(used), config.num_pages)
        assert scheduler.has_work == bool(self.live)

    def teardown(self):
        """Every request finishes: one computes a position in each step, so the steps are bounded."""
        if not hasattr(self, "scheduler"):
            return
        bound = (len(self.live) + 1) * self.config.max_model_len
        while self.live or self.in_flight:
            assert bound > 0, f"requests never finish: {list(self.live)}"
            bound -= 1
            if not self.in_flight:
                self.schedule()
                self.check()
            self.commit()
            self.check()
        assert self.scheduler.free_pages == self.config.num_pages
        assert not self.scheduler.has_work
        type(self).examples_that_preempted += self.scheduler.preemptions > 0


def test_random_use_keeps_every_invariant():
    SchedulerMachine.examples_that_preempted = 0
    run_state_machine_as_test(SchedulerMachine, settings=settings(SETTINGS, max_examples=200))
    assert SchedulerMachine.examples_that_preempted > 10, "the random use is too tame to mean anything"


@pytest.mark.parametrize("policy", kv_policies.names())
def test_random_use_with_a_prefix_cache(policy):
    machine = type("CachedMachine", (SchedulerMachine,), {"prefix_cache": policy, "examples_that_preempted": 0})
    machine.tokens_found = machine.copies = 0
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=150))
    assert machine.examples_that_preempted > 10 and machine.tokens_found > 500 and machine.copies > 5


@pytest.mark.parametrize("policy", [name for name in schedulers.names() if name not in ("first_come", "sarathi")])
def test_random_use_under_each_policy(policy, monkeypatch):
    monkeypatch.setattr("twinax.serving.schedulers.fair.LEAD", 3)
    monkeypatch.setattr("twinax.serving.schedulers.prepacking.MOST_PASSED", 2)
    machine = type("Machine", (SchedulerMachine,), {"policy": policy, "examples_that_preempted": 0})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=50))
    assert machine.examples_that_preempted > 3


@pytest.mark.parametrize(("cache", "host_pages"), [("lru", 30), ("cost_aware", 3)])
def test_random_use_with_room_on_the_host(cache, host_pages):
    more = {"host_pages": host_pages, "prefix_cache": cache, "brought_back": 0, "policy": "priority"}
    machine = type("TwoLevelMachine", (SchedulerMachine,), more)
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=60))
    assert machine.brought_back > 10


# The checks must be able to fail: each scheduler below has one bug that they are to find.


class LeaksOnCancel(Scheduler):
    def cancel(self, request_id):
        if (sequence := self.get(request_id)) is not None:
            sequence.pages = []
        return super().cancel(request_id)


class ForgetsToRecompute(Scheduler):
    def _preempt(self, plan, sequence):
        scheduled = sequence.num_scheduled
        super()._preempt(plan, sequence)
        sequence.num_scheduled = scheduled


class PreemptedGoToTheBack(Scheduler):
    def _preempt(self, plan, sequence):
        sequence.rank = (1.0, sequence.number)
        super()._preempt(plan, sequence)


class SharesAPage(Scheduler):
    def _grow(self, plan, sequence):
        grown = super()._grow(plan, sequence)
        if grown:
            sequence.pages[-1] = self.running[0].pages[0]
        return grown


class OverspendsItsBudget(Scheduler):
    def _admit(self, plan, budget):
        super()._admit(plan, budget + 1)


class BringsTooFewPagesBack(Scheduler):
    def schedule(self):
        plan = super().schedule()
        if plan is not None and plan.moves.back:
            plan.moves.back.popitem()
        return plan


class LosesTokensOfPreempted(Scheduler):
    def commit(self, plan, sampled):
        grown = super().commit(plan, sampled)
        for sequence in grown:
            if sequence.slot < 0:
                sequence.output_ids.pop()
        return grown


class NeverReturnsSlots(Scheduler):
    def _stop_running(self, sequence, preempted=False):
        super()._stop_running(sequence, preempted)
        self._free_slots.remove(min(self._free_slots))


class Overtakes(Scheduler):
    def _admit(self, plan, budget):
        super()._admit(plan, budget)
        if self.waiting and not plan.admitted:
            head = self.waiting.first(budget)
            self.waiting._queue.drop(head)
            super()._admit(plan, budget)
            self.waiting._queue.push(head)


@pytest.mark.parametrize(
    "buggy",
    [
        LeaksOnCancel,
        ForgetsToRecompute,
        PreemptedGoToTheBack,
        SharesAPage,
        OverspendsItsBudget,
        BringsTooFewPagesBack,
        LosesTokensOfPreempted,
        NeverReturnsSlots,
        Overtakes,
    ],
)
def test_a_planted_bug_is_found(buggy):
    more = {"host_pages": 30, "prefix_cache": "lru"} if buggy is BringsTooFewPagesBack else {}
    machine = type("Machine", (SchedulerMachine,), {"scheduler_class": buggy, **more})
    # The first failure is enough: it is neither shrunk nor explained.
    quick = settings(SETTINGS, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=quick)
