"""What the scheduler keeps of a request, and what it says of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from .host_pages import Moves
from .prefix_cache import Node
from .request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state. The scheduler writes it; the engine reads it to pack a step.

    - `number`: counts the requests as they came. `rank`: its place among others, as the policy keeps it.
    - `output_ids`: sampled tokens, as committed. Kept over preemptions.
    - `max_output`: `params.max_tokens`, capped by the context; `max_pages`: the most pages it ever holds.
    - `slot`: stable while running, -1 while waiting. `pages[i]` holds positions `i * page_size ...`.
    - `num_computed`: positions in the cache, as committed; `num_scheduled`: the same, with steps still in flight.
    - `num_cached`: positions that were in the prefix cache when the request was let in.
    - `nodes`: the cache's, of its first pages. `found`: while it waits, those that were there when it was last asked.
    - `in_flight`: tokens being sampled by steps that aren't committed.
    - `forks`: requests with the same prompt, held back until it is computed. `original`: the one that it is a fork of.
    """

    request: Request
    prompt_ids: list[int]
    max_output: int
    max_pages: int
    number: int = 0
    rank: tuple[float, int] = (0.0, 0)
    output_ids: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    nodes: list[Node] = field(default_factory=list)
    found: list[Node] = field(default_factory=list)
    in_flight: int = 0
    preemptions: int = 0
    finished: bool = False
    forks: list[Sequence] = field(default_factory=list)
    original: Sequence | None = None

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
    - `moves`: pages to be copied to the host and back before all else.
    - `copies`: pages to be copied before the step, (from, to): the last page of a prompt, which its fork goes on in.
    """

    number: int
    decodes: list[Entry] = field(default_factory=list)
    chunks: list[Entry] = field(default_factory=list)
    chunk_tokens: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return self.decodes + self.chunks

    @property
    def rows(self) -> int:
        """Request rows."""
        return len(self.decodes) + len(self.chunks)

    @property
    def pairs(self) -> int:
        """Pairs of a token computed and a token that it attends to."""
        decodes = sum(entry.start for entry in self.decodes) + len(self.decodes)
        return decodes + sum(e.length * e.start + e.length * (e.length + 1) // 2 for e in self.chunks)
