"""Decides what each engine step computes: continuous batching with chunked prompts, under a policy (`schedulers`).

A step mixes one token for every request that generates ("decodes") with pieces of prompts ("chunks"). The policy ranks
the requests and says how many prompt tokens a step computes; all else is the same for all policies:
1. If the policy would rather run the first that waits, which has no room, than the last of those that run, that one is
   preempted: it gives back pages and slot, waits again, and is later recomputed from its prompt and the tokens it has
   already produced, which are kept.
2. In the order of their ranks, each running request with one token left to compute gets a decode row. If that needs a
   page and none is free, the last one that runs is preempted. The last one itself waits in its slot for a page: its
   pages go to those before it only when they need them.
3. In the same order, the running requests with more left share the step's prompt tokens.
4. While some remain, the first that waits is let in if a slot is free and so are pages for all its tokens plus one, and
   beside them a page for each running request that may still grow: without that watermark a preempted request comes
   back too early, only to be preempted again (a fifth more tokens computed in a crowded cache). Where it has no room
   nobody else is let in, and nobody where pages ran out in this step.

With a prefix cache, a request begins behind the full pages that it shares with what was computed before; it gives
back pages to the cache, from which they are taken when none is free, or go to the host's memory, if there is room and
that is cheaper than to compute them again. A preempted request finds most of its own again.
Requests added one after another with the same prompt are forks of the first (the choices of `n`): they are held back
until that has computed the prompt, and then share its full pages; the last one, which is not full, is copied, and only
the prompt's last token is computed again, to sample by each one's own seed.

Invariants:
- the running request that ranks first always progresses, so there is room for the first that waits before long; by the
  policies' promise each request is the first one day, so nobody starves;
- pages belong to running requests and to the prefix cache, and cover every position that has been scheduled;
- a request computes its positions in order, each once between two preemptions;
- no decision looks at a token's value: step n + 1 may be scheduled before step n is committed;
- a step's decision costs as much as the requests that run and that it lets in or preempts, times the logarithm of those
  that wait.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping

from . import kv_policies, schedulers
from .allocator import PageAllocator
from .host_pages import HostPages
from .kv_policies import Use
from .prefix_cache import ON_HOST, Node, PrefixCache
from .request import SCHEDULING, InvalidRequest, QueueFull, Request
from .scheduler_config import SchedulerConfig, SchedulerStats
from .step_plan import Entry, Sequence, StepPlan
from .step_sizes import step_sizes
from .step_times import StepTimes


class Scheduler:
    """See the module's docstring. Calls: `add`, `cancel`; then `schedule`, `commit`, `finish` in each step.

    `running` and `waiting` are in the order in which they go first.
    """

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.allocator = PageAllocator(config.num_pages, config.page_size)
        self.times = StepTimes(step_sizes(config.max_running, config.chunk_tokens))
        self.host_pages = HostPages(config.host_pages, config.page_size, self.times)
        self.cache = None
        if config.prefix_cache is not None:
            policy = kv_policies.load(config.prefix_cache, config.num_pages + config.host_pages)
            self.cache = PrefixCache(self.allocator, policy, self.host_pages)
        self.queried_tokens = self.cached_tokens = 0  # those of requests that were let in, and what they found
        self.waiting = schedulers.load(config.policy, self.times, config.max_token_ms)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._preempted: list[Sequence] = []  # since the last plan
        self._held = 0  # forks, which are neither running nor waiting
        self._original: Sequence | None = None  # the last request that is no fork
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_running))
        self._added = 0
        self._next_plan = 0
        self._next_commit = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> SchedulerStats:
        total = self.config.num_pages
        used = total - self.free_pages
        return SchedulerStats(
            self.num_waiting,
            len(self.running),
            self.preemptions,
            used,
            total,
            self.queried_tokens,
            self.cached_tokens,
        )

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.waiting) + self._held

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
        for name, default in SCHEDULING.items():
            if getattr(request, name) != default and name not in self.waiting.honours:
                others = " or ".join(schedulers.honouring(name))
                raise InvalidRequest(
                    name,
                    f"{name} means nothing to the scheduler {config.policy!r}, got {getattr(request, name)!r}; leave "
                    f"it out or serve with scheduler={others}",
                )
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
        if self.num_waiting >= config.max_waiting:
            raise QueueFull(f"{self.num_waiting} requests are waiting, the most allowed; try again later")
        sequence = Sequence(request, request.prompt_ids, max_output, max_pages, self._added)
        self._added += 1
        self._sequences[request.id] = sequence
        original = self._original
        if original is not None and self._is_fork(sequence, original):
            sequence.original = original
            original.forks.append(sequence)
            self._held += 1
        else:
            self._original = sequence
            self.waiting.add(sequence)
        return sequence

    def cancel(self, request_id: str) -> bool:
        """Forgets the request and frees its pages at once; False if it isn't live (finished, or never there).

        Steps in flight may still write those pages. That is harmless: the device runs steps in order, so a new
        owner's writes come later.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._remove(sequence, complete=False)
        return True

    def finish(self, request_id: str) -> None:
        """As `cancel`, for a request that is complete, which must be live."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise KeyError(f"{request_id!r} can't finish, it isn't live; finish each request once")
        self._remove(sequence, complete=True)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """The step of `plan` took the device so long."""
        self.times.observe(plan, seconds)

    def schedule(self) -> StepPlan | None:
        """The next step's work, or None when there is none to do now. Every plan is to be committed, in order."""
        preempted = [sequence for sequence in self._preempted if not sequence.finished]
        plan, policy = StepPlan(self._next_plan, preempted=preempted), self.waiting
        if policy.moves:
            self.running.sort(key=policy.rank)
        self._give_way(plan)
        gave_way = len(plan.preempted)
        prefilling = self._schedule_decodes(plan)
        before = prefilling[0].num_scheduled if prefilling else 0
        budget = policy.budget(plan, before, self.config.chunk_tokens)
        for sequence in prefilling:
            budget -= self._schedule_chunk(plan, sequence, budget)
        if len(plan.preempted) == gave_way:
            self._admit(plan, budget)
        plan.chunk_tokens = sum(entry.length for entry in plan.chunks)
        policy.planned(plan)
        if not plan.decodes and not plan.chunks:
            self._preempted = plan.preempted
            return None
        self._preempted, plan.moves = [], self.host_pages.take_moves()
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
                if sequence.forks and sequence.num_computed >= len(sequence.prompt_ids):
                    self._release_forks(sequence)
            if entry.is_last_chunk:
                sequence.in_flight -= 1
                sequence.output_ids.append(sampled[sequence.request.id])
                grown.append(sequence)
        return grown

    def _is_fork(self, sequence: Sequence, original: Sequence) -> bool:
        """Whether it had better wait for what `original` is going to compute."""
        one, other = sequence.request, original.request
        return (
            self.cache is not None
            and one.finds_prefixes
            and not original.finished
            and original.num_computed < len(original.prompt_ids)
            and sequence.prompt_ids == original.prompt_ids
            and one.cache_scope == other.cache_scope
            and all(getattr(one, name) == getattr(other, name) for name in SCHEDULING)
        )

    def _release_forks(self, original: Sequence) -> None:
        for sequence in original.forks:
            self.waiting.add(sequence)
        self._held -= len(original.forks)
        original.forks = []

    def _copy_last_page(self, plan: StepPlan, sequence: Sequence, nodes: list[Node]) -> int:
        """A fork's positions that need not be computed: those in the full pages `nodes`, and those in its original's
        next page, of which it gets a copy."""
        shared, last = len(nodes) * self.config.page_size, len(sequence.prompt_ids) - 1
        original, sequence.original = sequence.original, None
        if original is None or original.slot < 0 or original.num_computed <= last or sequence.num_tokens > last + 1:
            return shared
        if not shared < last < shared + self.config.page_size:
            return shared
        plan.copies.append((original.pages[len(nodes)], sequence.pages[len(nodes)]))
        return last

    def _give_way(self, plan: StepPlan) -> None:
        """Preempts for the first that waits, if the policy says so and it has no room."""
        policy = self.waiting
        first = policy.first(self.config.chunk_tokens)
        if first is None or first.in_flight:
            return
        while self.running and policy.gives_way(self.running[-1], first):
            if self._free_slots and self._room_for(first, self._growing()) is not None:
                return
            self._preempt(plan, self.running[-1])

    def _schedule_decodes(self, plan: StepPlan) -> list[Sequence]:
        """Gives decode rows; returns the running sequences with more than one token left, in their order."""
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
        """Adds a page, preempting the last one until one is free; False if `sequence` is the last."""
        while not self.free_pages:
            last = self.running[-1]
            if last is sequence:
                return False
            self._preempt(plan, last)
        sequence.pages += self._allocate(1, sequence)
        return True

    def _allocate(self, count: int, sequence: Sequence) -> list[int]:
        if self.cache is not None and (short := count - self.allocator.free_pages) > 0:
            self.cache.evict(short)
        return self.allocator.allocate(count, sequence.request.id)

    def _take(self, sequence: Sequence, nodes: list[Node]) -> list[int]:
        """Takes what the cache has of a request, and pages for the rest, which are returned."""
        away = [node for node in nodes if node.page == ON_HOST]
        if self.cache is not None:
            self.cache.take(nodes)
        pages = self._allocate(self._pages_at_first(sequence) - len(nodes) + len(away), sequence)
        if self.cache is not None:
            self.cache.bring_back(away, pages[: len(away)], sequence.request.id)
        return pages[len(away) :]

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
            node = self.cache.put(before, tokens, sequence.pages[at], request.id, request.cache_scope)
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
        policy, growing = self.waiting, -1
        while self._free_slots and (sequence := policy.first(budget)) is not None:
            # One that was preempted in flight waits for its token, whose value the recomputation needs.
            if sequence.in_flight or sequence in plan.preempted or (sequence.num_tokens > 1 and budget < 2):
                return
            growing = self._growing() if growing < 0 else growing
            nodes = self._room_for(sequence, growing)
            if nodes is None:
                return
            policy.let_in(sequence)
            sequence.slot = heapq.heappop(self._free_slots)
            own = self._take(sequence, nodes)
            sequence.nodes, sequence.found = nodes, []
            sequence.pages = [node.page for node in nodes] + own
            sequence.num_cached = self._copy_last_page(plan, sequence, nodes)
            self.cached_tokens += sequence.num_cached
            sequence.num_computed = sequence.num_scheduled = sequence.num_cached
            bisect.insort(self.running, sequence, key=policy.rank)
            growing += len(sequence.pages) < sequence.max_pages
            self.queried_tokens += sequence.num_tokens
            plan.admitted.append(sequence)
            budget -= self._schedule_chunk(plan, sequence, budget)

    def _growing(self) -> int:
        """Running requests that may still need a page."""
        return sum(len(sequence.pages) < sequence.max_pages for sequence in self.running)

    def _pages_at_first(self, sequence: Sequence) -> int:
        return min(self.allocator.pages_for(sequence.num_tokens + 1), sequence.max_pages)

    def _room_for(self, sequence: Sequence, growing: int) -> list[Node] | None:
        """What the prefix cache has of it if there are pages for the rest, and `growing` more; None if not."""
        if growing >= self.free_pages:  # it needs one at least; the cache need not be asked
            return None
        nodes = self._found(sequence)
        # Who holds a page holds those before it, too.
        held = bisect.bisect_left(nodes, True, key=lambda node: node.users == 0)
        return None if self._pages_at_first(sequence) - held + growing > self.free_pages else nodes

    def _found(self, sequence: Sequence) -> list[Node]:
        """What the cache has of its tokens but the last, which is computed to sample the next one, and but those that
        it has to see computed."""
        request, prompt, output = sequence.request, sequence.prompt_ids, sequence.output_ids
        if self.cache is None or not request.finds_prefixes:
            return []
        most = len(prompt) + len(output) - 1
        if request.counts_output:
            most = min(most, len(prompt))
        # One that waits at the head is asked about in each step, and may be long.
        known = prompt + output if output else prompt
        sequence.found = self.cache.match(known, request.cache_scope, most, sequence.found)
        return sequence.found

    def _entry(self, sequence: Sequence, length: int, is_last_chunk: bool) -> Entry:
        entry = Entry(sequence, sequence.slot, sequence.num_scheduled, length, is_last_chunk, sequence.preemptions)
        sequence.num_scheduled += length
        sequence.in_flight += is_last_chunk
        return entry

    def _preempt(self, plan: StepPlan, sequence: Sequence) -> None:
        self._stop_running(sequence, preempted=True)
        self._release_forks(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.add(sequence)
        plan.preempted.append(sequence)

    def _remove(self, sequence: Sequence, complete: bool) -> None:
        sequence.finished = True
        original = sequence.original
        if original is not None and sequence in original.forks:
            original.forks.remove(sequence)
            self._held -= 1
        else:
            self._release_forks(sequence)
            self.waiting.ended(sequence, complete)
        if sequence.slot >= 0:
            self._stop_running(sequence)
        del self._sequences[sequence.request.id]

    def _stop_running(self, sequence: Sequence, preempted: bool = False) -> None:
        self.running.remove(sequence)
        if self.cache is not None:
            prompt_pages = len(sequence.prompt_ids) // self.config.page_size
            self.cache.leave(sequence.nodes, Use(prompt_pages, len(sequence.output_ids), preempted))
        self.allocator.free(sequence.pages[len(sequence.nodes) :], sequence.request.id)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.pages, sequence.nodes = [], []
        sequence.slot = -1
        sequence.num_computed = sequence.num_scheduled = 0
