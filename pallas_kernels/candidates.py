"""Ordered candidates for an operation: one module each, in the operation's folder.

The folder is the registry. An operation's package holds up to four modules: `reference.py` (what the operation means),
`xla.py` (any platform), `tpu.py` and `gpu.py` (kernels); each defines a function named after the operation. A file that
exists is a candidate, one that does not is not.

- `implementation="tpu"` runs that module and nothing else: whatever it raises is the caller's.
- Without a name, the candidates of the platform that the program is for are tried in order, each until one does not
  raise `NotImplementedError`. When all do, the error holds every reason. That platform is the one of the mesh in use (a
  laptop compiles for a TPU under a mesh of its described devices); without a mesh, the one the program is lowered for.
- `reference` is chosen only by name.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .chips import known_platform

ROSTER = ("tpu", "gpu", "xla", "reference")
ORDER_ELSEWHERE = ("xla",)
ORDER = {"tpu": ("tpu", "xla"), "cuda": ("gpu", "xla"), "rocm": ("gpu", "xla")}


class NoCandidateError(NotImplementedError):
    """Every candidate of an operation refused its arguments; the message holds each one's reason."""


@dataclass(frozen=True)
class Operation:
    """An operation whose candidates are the modules of `package` (its import name)."""

    package: str
    name: str

    def names(self) -> tuple[str, ...]:
        """The names that `implementation=` takes, in order of preference."""
        folder = importlib.import_module(self.package).__path__
        present = {module.name for module in pkgutil.iter_modules(folder)}
        return tuple(name for name in ROSTER if name in present)

    def load(self, name: str) -> Callable[..., Any]:
        """The function of one candidate. Raises ValueError, listing the choices, for a name that is not there."""
        if name not in self.names():
            raise ValueError(
                f"{self.name} has no implementation {name!r}: choose one of {', '.join(self.names())}, "
                "or None for the best one of the platform"
            )
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.name)

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Runs the named candidate, or the first that accepts these arguments on the platform of the lowering."""
        if implementation is not None:
            return self.load(implementation)(*args, **kwargs)
        present = self.names()
        elsewhere = tuple(name for name in ORDER_ELSEWHERE if name in present)
        special = {
            platform: chain
            for platform, order in ORDER.items()
            if (chain := tuple(name for name in order if name in present)) != elsewhere
        }
        known = known_platform()
        if known is not None or not special:
            return self._first(special.get(known or "", elsewhere), args, kwargs)
        # A process with an accelerator may run a program on its CPU, which is known only when it is lowered. So every
        # platform's choice is traced and the compiler keeps one: arrays reach the branches as closures.
        branches = {
            platform: lambda chain=chain: self._first(chain, args, kwargs) for platform, chain in special.items()
        }
        return jax.lax.platform_dependent(default=lambda: self._first(elsewhere, args, kwargs), **branches)

    def _first(self, chain: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reasons = []
        for name in chain:
            try:
                return self.load(name)(*args, **kwargs)
            except NotImplementedError as error:
                reasons.append(f"{name}: {error}")
        raise NoCandidateError(f"no implementation of {self.name} takes these arguments: {'; '.join(reasons)}")
