"""Named plans: one file each, whose name can stand for a plan (`--plan fully_sharded`).

A preset is a module with `plan(devices)`: how it would divide that many devices. What the model or the batch cannot be
cut by is put right by `resolve`, which takes the nearest plan that fits.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol, cast

from ..plan import Plan, PlanError


class Preset(Protocol):
    """What a file of this folder offers."""

    def plan(self, devices: int) -> Plan: ...


def names() -> tuple[str, ...]:
    """The presets there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Preset:
    """The preset called `name`; PlanError lists the choices."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PlanError(
            f"A plan is written as in fsdp=4,tensor=2, or is one of {', '.join(names())}; got {name!r}.{hint}"
        )
    return cast(Preset, importlib.import_module(f".{name}", __name__))


def resolve(text: str, devices: int, dimensions: Mapping[str, int] | None = None) -> Plan:
    """The plan that `text` writes or names.

    Args:
        text: "fsdp=4,tensor=2", a preset's name, or nothing for one device.
        devices: how many a preset may take.
        dimensions: what it must be able to cut, as for `Plan.problems`. PlanError when no plan can.
    """
    if not text.strip() or "=" in text:
        return Plan.parse(text)
    wanted = load(text.strip()).plan(devices)
    fitting = wanted.nearest(dimensions or {})
    if fitting is None:
        wanted.check(dimensions or {})
        raise PlanError(f"No plan like {text} divides {devices} devices.")
    return fitting
