"""The tenant goes first that was served the least (virtual token counter: Sheng et al. 2024, arXiv:2401.00588).

Each tenant has a counter of what it was served: tokens of prompts that were computed, and `GENERATED` for each that was
generated. Its requests go in the order in which they came. One whose counter is ahead by more than `LEAD` gives up
places to one that waits.

A tenant that waits for nothing saves nothing: when it comes back its counter is at least what a tenant got that was
there all the time, which is the tokens served divided by the tenants there were. (The paper has the least of those that
wait, by which ever new tenants would keep an old one waiting for good.)

Nobody starves: newcomers' counters rise with each token served, so a request waits only for tenants whose counters are
behind its own tenant's, and for earlier requests of its own.
"""

import heapq
from collections.abc import Iterator

from ..step_plan import Sequence, StepPlan
from ..step_times import StepTimes
from ..waiting import Heap, Waiting

GENERATED = 2.0
LEAD = 4096.0


class Tenant:
    """`counter`: see the module. `number`: tenants are counted as they come. `live`: its requests, those that run too.
    `listed`: whether it is in the queue of tenants."""

    __slots__ = ("counter", "listed", "live", "name", "number", "waiting")

    def __init__(self, name: str, number: int):
        self.name, self.number = name, number
        self.counter, self.live, self.listed = 0.0, 0, False
        self.waiting = Heap()


class Policy(Waiting):
    """A heap of tenants by counter, and a queue for each. That a counter rose is noticed when its tenant is first."""

    moves = True

    def __init__(self, times: StepTimes, max_token_ms: float | None):
        super().__init__(times, max_token_ms)
        self._tenants: dict[str, Tenant] = {}
        self._order: list[tuple[float, int, Tenant]] = []
        self._level = 0.0
        self._active = 0  # tenants with live requests
        self._count = 0  # requests that wait
        self._came = 0
        self._most_tenants = 1024  # are known before those that are not there are looked through

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        tenants = sorted(self._tenants.values(), key=lambda tenant: (tenant.counter, tenant.number))
        return (sequence for tenant in tenants for sequence in tenant.waiting)

    def add(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence.request.tenant)
        if not sequence.preemptions:
            sequence.rank = (0.0, sequence.number)
            if not tenant.waiting:
                tenant.counter = max(tenant.counter, self._level)
            self._active += not tenant.live
            tenant.live += 1
        tenant.waiting.push(sequence)
        self._count += 1
        if not tenant.listed:
            tenant.listed = True
            heapq.heappush(self._order, (tenant.counter, tenant.number, tenant))

    def first(self, budget: int) -> Sequence | None:
        while self._order:
            counter, number, tenant = self._order[0]
            if not tenant.waiting:
                heapq.heappop(self._order)
                tenant.listed = False
            elif counter != tenant.counter:
                heapq.heapreplace(self._order, (tenant.counter, number, tenant))
            else:
                return tenant.waiting.first()
        return None

    def let_in(self, sequence: Sequence) -> None:
        self._tenant(sequence.request.tenant).waiting.drop(sequence)
        self._count -= 1

    def ended(self, sequence: Sequence, complete: bool) -> None:
        tenant = self._tenant(sequence.request.tenant)
        if sequence.slot < 0:
            tenant.waiting.drop(sequence)
            self._count -= 1
        tenant.live -= 1
        if not tenant.live:
            self._active -= 1
            if len(self._tenants) > self._most_tenants:
                self._forget()

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        return self._tenants[sequence.request.tenant].counter, sequence.number

    def gives_way(self, runs: Sequence, waits: Sequence) -> bool:
        return self.rank(runs)[0] > self.rank(waits)[0] + LEAD

    def planned(self, plan: StepPlan) -> None:
        served = 0.0
        for sequence in plan.admitted:
            if not sequence.preemptions:
                tokens = len(sequence.prompt_ids) - sequence.num_cached
                self._tenants[sequence.request.tenant].counter += tokens
                served += tokens
        for entries in (plan.decodes, plan.chunks):
            for entry in entries:
                if entry.is_last_chunk:
                    self._tenants[entry.sequence.request.tenant].counter += GENERATED
                    served += GENERATED
        self._level += served / max(1, self._active)

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            self._came += 1
            tenant = self._tenants[name] = Tenant(name, self._came)
        return tenant

    def _forget(self) -> None:
        """Drops tenants that are not there and would come back as new ones."""
        for tenant in list(self._tenants.values()):
            if not tenant.live and tenant.counter <= self._level:
                del self._tenants[tenant.name]
            tenant.listed = bool(tenant.waiting)
        self._order = [entry for entry in self._order if entry[-1].waiting]
        heapq.heapify(self._order)
        self._most_tenants = 1024 + 2 * len(self._tenants)
