"""First come, first served, but that the room in a step that the first prompt does not fit is packed with prompts that
do, the longest first, to a factor of two (Prepacking: Zhao et al. 2024, arXiv:2404.09529).

A step's prompt tokens are computed together whoever they belong to, and take as long for a few as for all that its size
holds. Whole prompts generate at once; a long one cut into pieces makes all those behind it wait.

Nobody starves: the first that waits is passed by `MOST_PASSED` others at most.
"""

from ..step_plan import Sequence
from ..step_times import StepTimes
from ..waiting import Heap, Waiting

MOST_PASSED = 64


class Policy(Waiting):
    """Beside the queue there is one for prompts of each length, to a factor of two."""

    def __init__(self, times: StepTimes, max_token_ms: float | None):
        super().__init__(times, max_token_ms)
        self._by_length: dict[int, Heap] = {}
        self._passed = 0
        self._lengths: dict[Sequence, int] = {}

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        length = self._lengths[sequence] = sequence.num_tokens.bit_length()
        self._by_length.setdefault(length, Heap()).push(sequence)

    def first(self, budget: int) -> Sequence | None:
        head = super().first(budget)
        if head is None or self._passed >= MOST_PASSED or head.num_tokens <= budget:
            return head
        for length in range(budget.bit_length(), 0, -1):
            alike = self._by_length.get(length)
            found = alike.first() if alike else None
            if found is not None and found.num_tokens <= budget and not found.in_flight:
                return found
        return head

    def let_in(self, sequence: Sequence) -> None:
        self._passed = 0 if sequence is super().first(0) else self._passed + 1
        super().let_in(sequence)
        self._forget(sequence)

    def ended(self, sequence: Sequence, complete: bool) -> None:
        if sequence.slot < 0:
            self._passed = 0 if sequence is super().first(0) else self._passed
            self._forget(sequence)
        super().ended(sequence, complete)

    def _forget(self, sequence: Sequence) -> None:
        self._by_length[self._lengths.pop(sequence)].drop(sequence)
