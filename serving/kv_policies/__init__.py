"""Which page of the prefix cache goes first when room is needed. A file each, whose name is the one to ask for.

A policy is a module with `class Policy`, made once for a cache of `num_pages`. Pages that nobody uses wait in queues,
each in the order of their last use; a page never goes before those that continue it. The policy says which queue a page
waits in, and which of the queues' first pages goes. There are few queues: each is looked at for every page that goes.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any, Protocol, cast


class CachedPage(Protocol):
    """What a policy sees of a page: how many pages come before it, a hash of its tokens and all before them, and a
    place for notes of its own, None at first."""

    depth: int
    path: int
    note: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """A request's use of its pages, as it ends. `prompt_pages`: pages of its prompt alone, which come first.
    `output_tokens`: that it had generated. `preempted`: it will be back."""

    prompt_pages: int
    output_tokens: int
    preempted: bool = False


class EvictionPolicy(Protocol):
    """See the module. Each call but `worth`, which changes nothing, is made once for each page and event."""

    def put(self, page: CachedPage) -> None:
        """It was not there, was computed, and is in use."""
        ...

    def taken(self, page: CachedPage) -> None:
        """It was there, and one more request uses it."""
        ...

    def left(self, page: CachedPage, use: Use) -> int:
        """`use` was the last: nobody uses it now. Which queue it waits in, as soon as nothing continues it."""
        ...

    def worth(self, page: CachedPage) -> float:
        """Of the pages that are first in their queues the one with the least goes, and among equals the one that was
        used least recently."""
        ...

    def evicted(self, page: CachedPage) -> None:
        """It went."""
        ...


def names() -> tuple[str, ...]:
    """The policies there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str, num_pages: int) -> EvictionPolicy:
    """A new policy of that name; ValueError lists the choices."""
    if name not in names():
        raise ValueError(f"There is no eviction policy {name!r}; choose one of {', '.join(names())}.")
    return cast(EvictionPolicy, importlib.import_module(f".{name}", __name__).Policy(num_pages))
