"""The scheduler's decisions against a reference that recomputes everything from the requests' histories in each step.

The reference keeps no free lists, queues or counters: a request is a row of facts, pages are counted by arithmetic, and
whether it runs is whether it has a slot. It is slow and says what the policy means.
"""

import itertools
import random
from dataclasses import dataclass

import pytest

from twinax.serving.request import Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig


@dataclass
class Row:
    id: str
    prompt: int
    limit: int  # of new tokens
    generated: int = 0
    computed: int = 0
    pages: int = 0
    slot: int | None = None

    @property
    def left(self):
        return self.prompt + self.generated - self.computed


class Reference:
    def __init__(self, config):
        self.config = config
        self.rows: list[Row] = []  # by age, oldest first

    def pages_for(self, tokens):
        return (tokens + self.config.page_size - 1) // self.config.page_size

    def running(self):
        return [row for row in self.rows if row.slot is not None]

    def free_pages(self):
        return self.config.num_pages - sum(row.pages for row in self.rows)

    def most_pages(self, row):
        return self.pages_for(row.prompt + row.limit - 1)

    def step(self):
        """(decodes, chunks, preempted): what the next step computes, as (id, slot, start, length, samples)."""
        decodes, chunks, preempted = [], [], []
        # Decodes, which take pages from the youngest.
        for row in list(self.rows):
            if row.slot is None or row.left != 1:
                continue
            need = max(0, self.pages_for(row.computed + 1) - row.pages)
            while need > self.free_pages() and self.running()[-1] is not row:
                youngest = self.running()[-1]
                youngest.slot, youngest.pages, youngest.computed = None, 0, 0
                preempted.append(youngest.id)
            if need <= self.free_pages():
                row.pages += need
                decodes.append((row.id, row.slot, row.computed, 1, True))
        # Chunks: first for those that run, then for those that can be admitted, until the first that can't.
        busy = {id for id, *_ in decodes}
        budget = self.config.chunk_tokens
        for row in self.rows:
            if row.id in busy or (row.slot is not None and row.left == 1):
                continue
            if row.slot is None:
                slots = [slot for slot in range(self.config.max_running) if slot not in {r.slot for r in self.rows}]
                need = min(self.pages_for(row.prompt + row.generated + 1), self.most_pages(row))
                spare = sum(other.pages < self.most_pages(other) for other in self.running())
                if preempted or not slots or need + spare > self.free_pages() or (budget < 2 and row.left > 1):
                    break
                row.slot, row.pages = slots[0], need
            if row.left == 1:
                decodes.append((row.id, row.slot, row.computed, 1, True))
            elif min(row.left, budget) >= 2:
                length = min(row.left, budget)
                budget -= length
                chunks.append((row.id, row.slot, row.computed, length, length == row.left))
        return decodes, chunks, preempted

    def commit(self, decodes, chunks):
        """Returns the ids of those that have generated their last token."""
        rows = {row.id: row for row in self.rows}
        for id, _, _, length, samples in decodes + chunks:
            rows[id].computed += length
            rows[id].generated += samples
        return [id for id, _, _, _, samples in decodes + chunks if samples and rows[id].generated == rows[id].limit]

    def remove(self, id):
        self.rows = [row for row in self.rows if row.id != id]


def as_rows(entries):
    return [(e.sequence.id, e.slot, e.start, e.length, e.is_last_chunk) for e in entries]


def compare(config, events, max_steps=2000):
    """Runs both on `events`, a map from step to a list of ("add", id, prompt, max_tokens) and ("cancel", id)."""
    scheduler, reference = Scheduler(config), Reference(config)
    last_event = max(events)
    for number in range(max_steps):
        for kind, id, *sizes in events.get(number, []):
            if kind == "add":
                prompt, max_tokens = sizes
                scheduler.add(Request(id, [0] * prompt, SamplingParams(max_tokens=max_tokens)))
                reference.rows.append(Row(id, prompt, min(max_tokens, config.max_model_len - prompt)))
            else:
                scheduler.cancel(id)
                reference.remove(id)
        plan = scheduler.schedule()
        decodes, chunks, preempted = reference.step()
        if plan is None:
            assert not decodes + chunks + preempted + reference.rows
            if number > last_event:
                return scheduler
            continue
        assert as_rows(plan.decodes) == decodes
        assert as_rows(plan.chunks) == chunks
        assert [sequence.id for sequence in plan.preempted] == preempted
        assert {s.id: len(s.pages) for s in scheduler.running} == {row.id: row.pages for row in reference.running()}
        grown = scheduler.commit(plan, {e.sequence.id: 0 for e in plan.entries if e.is_last_chunk})
        done = reference.commit(decodes, chunks)
        assert [sequence.id for sequence in grown if sequence.length_reached] == done
        for id in done:
            scheduler.finish(id)
            reference.remove(id)
    raise AssertionError("requests never finish")


@pytest.mark.parametrize("page_size", [1, 2])
@pytest.mark.parametrize("max_running", [1, 2, 3])
def test_every_small_case(page_size, max_running):
    """Three requests at once, every combination of small sizes, in a cache that fits hardly more than one of them."""
    preemptions = cases = 0
    config = SchedulerConfig(max_running, page_size, 8 // page_size, 16, chunk_tokens=3, max_waiting=3)
    for sizes in itertools.product(itertools.product([1, 2, 3, 5], [1, 2, 4]), repeat=3):
        events = {0: [("add", f"r{i}", prompt, max_tokens) for i, (prompt, max_tokens) in enumerate(sizes)]}
        preemptions += compare(config, events).preemptions
        cases += 1
    assert cases == 12**3
    if max_running > 1:
        assert preemptions > 0


@pytest.mark.parametrize("seed", range(8))
def test_random_arrivals_and_cancellations(seed):
    preemptions = 0
    for case in range(40):
        rng = random.Random(seed * 1000 + case)
        page_size = rng.choice([1, 2, 3, 4])
        num_pages = rng.randint(4, 24)
        room = num_pages * page_size
        config = SchedulerConfig(
            rng.randint(1, 6), page_size, num_pages, min(room, rng.randint(6, 40)), rng.randint(2, 12), max_waiting=1000
        )
        events = {}
        for number in range(rng.randint(1, 30)):
            at = rng.randint(0, 40)
            prompt = rng.randint(1, rng.choice([3, config.max_model_len - 1]))
            events.setdefault(at, []).append(("add", f"r{number}", prompt, rng.randint(1, 30)))
            if rng.random() < 0.15:
                events.setdefault(at + rng.randint(1, 30), []).append(("cancel", f"r{number}"))
        preemptions += compare(config, events).preemptions
    assert preemptions > 5
