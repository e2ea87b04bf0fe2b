"""Which page of the prefix cache goes first when room is needed. A file each, whose name is the one to ask for.

A policy is a module with `class Policy`, made once for a cache: `used(page)` is called when a request takes a page or
gives it back, `priority(page)` when nobody uses a page any more; of those, the one with the least goes first. A page
never goes before those that continue it.
"""

import importlib
import pkgutil
from typing import Protocol, cast


class CachedPage(Protocol):
    """What a policy sees of a page: how many pages come before it, and a place for notes of its own."""

    depth: int
    note: float


class EvictionPolicy(Protocol):
    """See the module."""

    def used(self, page: CachedPage) -> None: ...
    def priority(self, page: CachedPage) -> float: ...
    def evicted(self, priority: float) -> None: ...


def names() -> tuple[str, ...]:
    """The policies there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> EvictionPolicy:
    """A new policy of that name; ValueError lists the choices."""
    if name not in names():
        raise ValueError(f"There is no eviction policy {name!r}; choose one of {', '.join(names())}.")
    return cast(EvictionPolicy, importlib.import_module(f".{name}", __name__).Policy())
