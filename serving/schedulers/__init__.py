"""Who goes first. A file each, whose name is the one to ask for (`--scheduler NAME`).

A policy is a module with `class Policy`, made once for a scheduler: it keeps the requests that wait, ranks those that
run, and says how many prompt tokens a step computes. Slots, pages and the prefix cache are the scheduler's. A policy
that gives each request a key for good is a few lines on top of `waiting.Waiting`.

What every policy must keep, beside its own idea:
- nobody starves: only finitely many requests are ever let in before a given one, and each docstring says how many;
- a call costs at most the logarithm of the number of requests; `planned` may look at each entry of the step;
- it is deterministic: the same calls give the same answers. It sees no token's value.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Protocol, cast

from ..step_plan import Sequence, StepPlan
from ..step_times import StepTimes


class Policy(Protocol):
    """See the module. Its length is the number of requests that wait; iterating gives them in their order (and may take
    its time: the scheduler never does).

    `moves`: whether the ranks of those that run change from step to step. `honours`: fields of requests that mean
    nothing to other policies; there they are refused.
    """

    moves: bool
    honours: tuple[str, ...]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sequence]: ...

    def add(self, sequence: Sequence) -> None:
        """It waits from now on: it is new, or was preempted."""
        ...

    def first(self, budget: int) -> Sequence | None:
        """The next to be let in, by a step with room for `budget` prompt tokens. None: nobody waits."""
        ...

    def let_in(self, sequence: Sequence) -> None:
        """The one that `first` named last no longer waits."""
        ...

    def ended(self, sequence: Sequence, complete: bool) -> None:
        """It is gone from where it was (it waits where its slot is -1), with all it was to generate or without."""
        ...

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        """Of those that run the least computes first, and the greatest gives back its pages when they run out."""
        ...

    def gives_way(self, runs: Sequence, waits: Sequence) -> bool:
        """Whether the one that ranks last of those that run is preempted for the first that waits, which has no room.

        Where it says yes, that one must rank before.
        """
        ...

    def budget(self, plan: StepPlan, before: int, most: int) -> int:
        """Prompt tokens that the step computes beside the decodes of `plan`, from 2 to `most`. `before` the first of
        these come so many tokens of their prompt."""
        ...

    def planned(self, plan: StepPlan) -> None:
        """The step's work is decided."""
        ...


def names() -> tuple[str, ...]:
    """The policies there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str, times: StepTimes, max_token_ms: float | None = None) -> Policy:
    """A new policy of that name; ValueError lists the choices.

    `times`: what is known of the time that steps take. `max_token_ms`: while requests generate, prompts are cut so that
    a step stays within so many milliseconds.
    """
    if name not in names():
        raise ValueError(f"There is no scheduler {name!r}; choose one of {', '.join(names())}.")
    return cast(Policy, _module(name).Policy(times, max_token_ms))


def honouring(field: str) -> list[str]:
    """The policies to which a field of requests means something."""
    return [name for name in names() if field in _module(name).Policy.honours]


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)
