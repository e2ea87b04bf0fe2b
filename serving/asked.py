"""What requests ask of a step beside its sampled tokens: log-probabilities of their prompts, and states to be pooled.

Shapes: N token rows, D the model's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .request import TokenLogprob
from .step_plan import Entry

if TYPE_CHECKING:
    from .live import Live
    from .runner import Runner, SentStep


@dataclasses.dataclass(slots=True)
class Asked:
    """Of a step's token rows, still on the device. `of` makes it.

    Attributes:
        scored: whose prompt tokens have their log-probabilities in `logprobs`, in turn: (entry, position of the token).
        pooled: whose states are in `hidden`, in turn: (entry, first position, number of positions).
    """

    scored: list[tuple[Entry, int]] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    pooled: list[tuple[Entry, int, int]] = dataclasses.field(default_factory=list)
    hidden: list[Any] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls, sent: SentStep, rows: Sequence[tuple[Entry, int, int]], live: Mapping[str, Live], runner: Runner
    ) -> Asked:
        """Has the device compute it. `rows`: the step's entries, the request row and the first token row of each."""
        asked, scored_rows, next_ids, pooled_rows = cls(), list[int](), list[int](), list[int]()
        for entry, _, token_row in rows:
            own, prompt, end = live[entry.sequence.id], entry.sequence.prompt_ids, entry.start + entry.length
            if own.prompt_logprobs is not None and not own.prompt_sent:
                # A preempted request computes its prompt again; what it has is not asked for twice.
                first = max(entry.start + 1, len(own.prompt_logprobs))
                positions = range(first, max(first, min(end + 1, len(prompt))))
                asked.scored += [(entry, position) for position in positions]
                scored_rows += (token_row + position - entry.start - 1 for position in positions)
                next_ids += prompt[positions.start : positions.stop]
            if own.pooled is not None:
                first = own.pooled.first_of(entry.start, end, entry.is_last_chunk)
                asked.pooled.append((entry, first, end - first))
                pooled_rows += (token_row + position - entry.start for position in range(first, end))
        if scored_rows:
            asked.logprobs = runner.logprobs_of(sent, scored_rows, next_ids)
        if pooled_rows:
            asked.hidden = runner.hidden_of(sent, pooled_rows)
        return asked

    def collect(self, live: Mapping[str, Live], runner: Runner) -> None:
        """Waits for it, and gives it to the requests that are still there."""
        if self.logprobs:
            arrays = runner.joined(self.logprobs)
            for row, (entry, position) in enumerate(self.scored):
                own = _still(entry, live)
                if own is not None and own.prompt_logprobs is not None and position == len(own.prompt_logprobs):
                    count = own.request.params.prompt_logprobs or 0
                    token = entry.sequence.prompt_ids[position]
                    own.prompt_logprobs.append(token_logprob(token, arrays, row, count))
        if self.hidden:
            hidden_ND, row = runner.joined(self.hidden), 0
            for entry, first, count in self.pooled:
                own = _still(entry, live)
                if own is not None and own.pooled is not None:
                    own.pooled.add(first, hidden_ND[row : row + count])
                row += count


def _still(entry: Entry, live: Mapping[str, Live]) -> Live | None:
    # The id of one that is finished may belong to another request by now.
    return None if entry.sequence.finished else live.get(entry.sequence.id)


def token_logprob(token: int, arrays: Sequence[np.ndarray], row: int, count: int) -> TokenLogprob:
    """Of one row of what `sampling.top_logprobs` returned: the token's, and those of the `count` likeliest."""
    own, ids, top = arrays
    return TokenLogprob(
        token, float(own[row]), list(zip(ids[row, :count].tolist(), top[row, :count].tolist(), strict=True))
    )
