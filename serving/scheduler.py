"""Decides what each engine step computes: continuous batching with chunked prompts, first come first served.

A step mixes one token for every request that generates ("decodes") with pieces of prompts ("chunks"). The policy:
1. Oldest first, each running request with one token left to compute gets a decode row. If that needs a page and none
   is free, the youngest running request is preempted: it gives back pages and slot, returns to the front of the queue,
   and is later recomputed from its prompt and the tokens it has already produced, which are kept. The youngest itself
   waits in its slot for a page: its pages go to the older ones only when they need them.
2. Oldest first, the running requests with more left share the step's `chunk_tokens`.
3. While budget remains, the head of the queue is admitted if a slot is free and so are pages for all its tokens plus
   one, and beside them a page for each running request that may still grow: without that watermark a preempted request
   comes back too early, only to be preempted again (a fifth more tokens computed in a crowded cache). Nobody overtakes
   the head. A step that preempted admits nobody.

With a prefix cache, a request begins behind the full pages that it shares with what was computed before; it gives
back pages to the cache, from which they are taken when none is free. A preempted request finds most of its own again.

Invariants:
- every running request is older than every waiting one, so the oldest always progresses, and nobody starves;
- pages belong to running requests and to the prefix cache, and cover every position that has been scheduled;
- a request computes its positions in order, each once between two preemptions;
- no decision looks at a token's value: step n + 1 may be scheduled before step n is committed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import kv_policies
from .allocator import PageAllocator
from .prefix_cache import Node, PrefixCache
from .request import InvalidRequest, QueueFull, Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits: `max_running` slots, `num_pages` pages of `page_size` tokens, `max_model_len` tokens of prompt and
    output together, `chunk_tokens` prompt tokens a step, `max_waiting` requests in the queue. `prefix_cache`: the
    eviction policy of a prefix cache (`kv_policies`), None for none."""

    max_running: int
    page_size: int
    num_pages: int
    max_model_len: int
    chunk_tokens: int
    max_waiting: int
    prefix_cache: str | None = None

    def __post_init__(self) -> None:
        # A chunk of one token travels in a decode row, so the chunk region is only of use from two tokens up.
        for name in ("max_running", "page_size", "num_pages", "max_model_len", "chunk_tokens", "max_waiting"):
            low = 2 if name in ("max_model_len", "chunk_tokens") else 1
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}; raise it")


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state. The scheduler writes it; the engine reads it to pack a step.

    - `output_ids`: sampled tokens, as committed. Kept over preemptions.
    - `max_output`: `params.max_tokens`, capped by the context; `max_pages`: the most pages it ever holds.
    - `slot`: stable while running, -1 while waiting. `pages[i]` holds positions `i * page_size ...`.
    - `num_computed`: positions in the cache, as committed; `num_scheduled`: the same, with steps still in flight.
    - `num_cached`: positions that were in the prefix cache when the request was let in.
    - `nodes`: the cache's, of its first pages.
    - `in_flight`: tokens being sampled by steps that aren't committed.
    """

    request: Request
    prompt_ids: list[int]
    max_output: int
    max_pages: int
    output_ids: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    nodes: list[Node] = field(default_factory=list)
    in_flight: int = 0
    preemptions: int = 0
    finished: bool = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those in flight included."""
        return len(self.prompt_ids) + len(self.output_ids) + self.in_flight

    @property
    def length_reached(self) -> bool:
        """No more tokens may be generated: the engine finishes such a request with "length"."""
        return len(self.output_ids) >= self.max_output


@dataclass(slots=True, eq=False)
class Entry:
    """Compute positions `start .. start + length - 1` of `sequence` in `slot`.

    `is_last_chunk`: no known token is left after these, so the last one's logits sample the token at `start + length`.
    `preemptions` is the sequence's count at the time, to tell whether the work still stands when it is committed.
    """

    sequence: Sequence
    slot: int
    start: int
    length: int
    is_last_chunk: bool
    preemptions: int


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step, in the shape that paged attention wants; a sequence has at most one entry.

    - `decodes`: entries of length 1, all sampling (also a prompt's last single token); token row == slot.
    - `chunks`: entries of length 2 and more; `chunk_tokens` of them in total, at most the configured number.
    - `admitted`: sequences that got their slot in this step (new ones, and preempted ones that come back): whatever is
      kept per slot on the device is to be set up for them. `preempted`: those that lost theirs.
    """

    number: int
    decodes: list[Entry] = field(default_factory=list)
    chunks: list[Entry] = field(default_factory=list)
    chunk_tokens: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return self.decodes + self.chunks


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    waiting: int
    running: int
    preemptions: int
    pages_used: int
    pages_total: int
    queried_tokens: int
    cached_tokens: int


class Scheduler:
    """See the module's docstring. Calls: `add`, `cancel`; then `schedule`, `commit`, `finish` in each step."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.allocator = PageAllocator(config.num_pages, config.page_size)
        policy = None if config.prefix_cache is None else kv_policies.load(config.prefix_cache)
        self.cache = None if policy is None else PrefixCache(self.allocator, policy)
        self.queried_tokens = self.cached_tokens = 0  # those of requests that were let in, and what they found
        self.waiting: deque[Sequence] = deque()  # oldest first, as is `running`
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_running))
        self._next_plan = 0
        self._next_commit = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> SchedulerStats:
        total = self.config.num_pages
        used = total - self.free_pages
        return SchedulerStats(
            len(self.waiting), len(self.running), self.preemptions, used, total, self.queried_tokens, self.cached_tokens
        )

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses: those of the prefix cache are freed when they are needed."""
        return self.allocator.free_pages + (0 if self.cache is None else self.cache.idle)

    def get(self, request_id: str) -> Sequence | None:
        """The live (waiting or running) sequence of that id."""
        return self._sequences.get(request_id)

    def add(self, request: Request) -> Sequence:
        """Queues `request`. Raises `InvalidRequest` if it could never run, `QueueFull` if it can't wait now."""
        config = self.config
        if request.id in self._sequences:
            raise InvalidRequest("id", f"id must be unique, {request.id!r} is already being served; choose another")
        prompt = len(request.prompt_ids)
        if not 0 < prompt < config.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"prompt must have from 1 to {config.max_model_len - 1} tokens (the context of {config.max_model_len} "
                f"less one to generate), got {prompt}; shorten it or serve with a longer max_model_len",
            )
        max_output = min(request.params.max_tokens, config.max_model_len - prompt)
        if max_output < 1:
            raise InvalidRequest("max_tokens", f"max_tokens must be at least 1, got {max_output}; raise it")
        # The last token that may be generated is never an input, so it takes no place in the cache.
        max_pages = self.allocator.pages_for(prompt + max_output - 1)
        if max_pages > config.num_pages:
            raise InvalidRequest(
                "max_tokens",
                f"prompt and output must fit the cache of {config.num_pages * config.page_size} tokens, got {prompt} + "
                f"{max_output}; lower max_tokens, shorten the prompt or serve with more pages",
            )
        if len(self.waiting) >= config.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, the most allowed; try again later")
        sequence = Sequence(request, request.prompt_ids, max_output, max_pages)
        self._sequences[request.id] = sequence
        self.waiting.append(sequence)
        return sequence

    def cancel(self, request_id: str) -> bool:
        """Forgets the request and frees its pages at once; False if it isn't live (finished, or never there).

        Steps in flight may still write those pages. That is harmless: the device runs steps in order, so a new
        owner's writes come later.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._remove(sequence)
        return True

    def finish(self, request_id: str) -> None:
        """As `cancel`, for a request that is complete, which must be live."""
        if not self.cancel(request_id):
            raise KeyError(f"{request_id!r} can't finish, it isn't live; finish each request once")

    def schedule(self) -> StepPlan | None:
        """The next step's work, or None when there is none to do now. Every plan is to be committed, in order."""
        plan = StepPlan(self._next_plan)
        prefilling = self._schedule_decodes(plan)
        budget = self.config.chunk_tokens
        for sequence in prefilling:
            budget -= self._schedule_chunk(plan, sequence, budget)
        if not plan.preempted:
            self._admit(plan, budget)
        plan.chunk_tokens = sum(entry.length for entry in plan.chunks)
        if not plan.decodes and not plan.chunks:
            return None
        self._next_plan += 1
        return plan

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Sequence]:
        """Records that `plan` has run. `sampled` has a token for each live entry with `is_last_chunk`.

        Returns the sequences that got a token, in the plan's order. Entries of sequences that were finished or
        cancelled meanwhile are passed over; one that was preempted keeps its token.
        """
        if plan.number != self._next_commit:
            raise ValueError(f"plans are committed in order: expected number {self._next_commit}, got {plan.number}")
        live = [entry for entry in plan.entries if not entry.sequence.finished]
        missing = [entry.sequence.id for entry in live if entry.is_last_chunk and entry.sequence.id not in sampled]
        if missing:
            raise ValueError(f"every request at its last chunk gets a token: none was given for {missing}")
        self._next_commit += 1
        grown = []
        for entry in live:
            sequence = entry.sequence
            if entry.preemptions == sequence.preemptions:
                sequence.num_computed += entry.length
                self._keep(sequence)
            if entry.is_last_chunk:
                sequence.in_flight -= 1
                sequence.output_ids.append(sampled[sequence.request.id])
                grown.append(sequence)
        return grown

    def _schedule_decodes(self, plan: StepPlan) -> list[Sequence]:
        """Gives decode rows; returns the running sequences with more than one token left, oldest first."""
        page_size = self.config.page_size
        prefilling = []
        position = 0
        # Preemption pops from the end of `running`, behind `position`, so never a sequence that has its entry.
        while position < len(self.running):
            sequence = self.running[position]
            position += 1
            left = sequence.num_tokens - sequence.num_scheduled
            if left > 1:
                prefilling.append(sequence)
            elif len(sequence.output_ids) + sequence.in_flight < sequence.max_output:
                if sequence.num_scheduled == len(sequence.pages) * page_size and not self._grow(plan, sequence):
                    break
                plan.decodes.append(self._entry(sequence, 1, True))
        return [sequence for sequence in prefilling if sequence.slot >= 0] if plan.preempted else prefilling

    def _grow(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Adds a page, preempting the youngest until one is free; False if `sequence` is the youngest."""
        while not self.free_pages:
            youngest = self.running[-1]
            if youngest is sequence:
                return False
            self._preempt(plan, youngest)
        sequence.pages += self._allocate(1, sequence)
        return True

    def _allocate(self, count: int, sequence: Sequence) -> list[int]:
        if self.cache is not None and (short := count - self.allocator.free_pages) > 0:
            self.cache.evict(short)
        return self.allocator.allocate(count, sequence.request.id)

    def _keep(self, sequence: Sequence) -> None:
        """Gives the cache the pages that are full by now."""
        size = self.config.page_size
        if self.cache is None or (len(sequence.nodes) + 1) * size > sequence.num_computed:
            return
        known = sequence.prompt_ids + sequence.output_ids
        while (end := (len(sequence.nodes) + 1) * size) <= sequence.num_computed:
            at = len(sequence.nodes)
            before = sequence.nodes[-1] if sequence.nodes else None
            request, tokens = sequence.request, tuple(known[end - size : end])
            node = self.cache.put(before, tokens, sequence.pages[at], request.id, request.cache_salt)
            sequence.nodes.append(node)
            sequence.pages[at] = node.page

    def _schedule_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Plans what fits of `sequence`'s remaining tokens; returns the budget used. A single last token is a decode
        row and uses none; a single token that isn't the last waits, so that every decode row samples."""
        left = sequence.num_tokens - sequence.num_scheduled
        if left == 1:
            plan.decodes.append(self._entry(sequence, 1, True))
            return 0
        length = min(left, budget)
        if length < 2:
            return 0
        plan.chunks.append(self._entry(sequence, length, length == left))
        return length

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            # One that was preempted in flight waits for its token, whose value the recomputation needs.
            if sequence.in_flight or (sequence.num_tokens > 1 and budget < 2):
                return
            growing = sum(len(other.pages) < other.max_pages for other in self.running)
            if growing >= self.free_pages:  # it needs one at least; the cache need not be asked
                return
            nodes = self._found(sequence)
            pages = min(self.allocator.pages_for(sequence.num_tokens + 1), sequence.max_pages) - len(nodes)
            if pages + growing > self.free_pages - sum(node.users == 0 for node in nodes):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.slot = heapq.heappop(self._free_slots)
            if self.cache is not None:
                self.cache.take(nodes)
            sequence.nodes = nodes
            sequence.pages = [node.page for node in nodes] + self._allocate(pages, sequence)
            sequence.num_cached = len(nodes) * self.config.page_size
            sequence.num_computed = sequence.num_scheduled = sequence.num_cached
            self.queried_tokens += sequence.num_tokens
            self.cached_tokens += sequence.num_cached
            plan.admitted.append(sequence)
            budget -= self._schedule_chunk(plan, sequence, budget)

    def _found(self, sequence: Sequence) -> list[Node]:
        """What the cache has of its tokens but the last, which is computed to sample the next one."""
        if self.cache is None or not sequence.request.finds_prefixes:
            return []
        known = sequence.prompt_ids + sequence.output_ids
        return self.cache.match(known[:-1], sequence.request.cache_salt)

    def _entry(self, sequence: Sequence, length: int, is_last_chunk: bool) -> Entry:
        entry = Entry(sequence, sequence.slot, sequence.num_scheduled, length, is_last_chunk, sequence.preemptions)
        sequence.num_scheduled += length
        sequence.in_flight += is_last_chunk
        return entry

    def _preempt(self, plan: StepPlan, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        plan.preempted.append(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.finished = True
        del self._sequences[sequence.request.id]

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if self.cache is not None:
            self.cache.leave(sequence.nodes)
        self.allocator.free(sequence.pages[len(sequence.nodes) :], sequence.request.id)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.pages, sequence.nodes = [], []
        sequence.slot = -1
        sequence.num_computed = sequence.num_scheduled = 0
