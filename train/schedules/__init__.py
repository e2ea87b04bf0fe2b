"""Learning-rate schedules: one file each, whose name is the schedule's name in a recipe (`schedule.name`).

A schedule is a module with `make(config, peak, steps)`, which gives a function from the step (a traced int32, from 0)
to the learning rate of that step's update (float32). It raises ValueError for settings that it would ignore.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, cast

from .. import fields

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over a run.

    Attributes:
        name: "cosine" (warm-up, then half a cosine) or "wsd" (warm-up, stable, decay).
        warmup_steps: steps of linear warm-up; by default a twentieth of all steps.
        decay_steps: steps of the decay that ends a "wsd" run; by default a fifth of all steps.
        final_ratio: the learning rate at the end, as a share of its peak.
    """

    name: str = "cosine"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        fields.check_types(self, "schedule.")
        steps = "a number of steps from 0 up"
        rules = {
            "name": (self.name in names(), f"one of {', '.join(names())}{fields.nearest(self.name, names())}"),
            "warmup_steps": (self.warmup_steps is None or self.warmup_steps >= 0, steps),
            "decay_steps": (self.decay_steps is None or self.decay_steps >= 0, steps),
            "final_ratio": (0 <= self.final_ratio <= 1, "a share of the peak, from 0 to 1"),
        }
        fields.check_rules(self, "schedule.", rules)

    def warmup(self, steps: int) -> int:
        """The steps of warm-up in a run of `steps`."""
        return steps // 20 if self.warmup_steps is None else self.warmup_steps

    def decay(self, steps: int) -> int:
        """The steps of the last decay in a run of `steps`."""
        return steps // 5 if self.decay_steps is None else self.decay_steps


class ScheduleModule(Protocol):
    """What a file of this folder offers."""

    def make(self, config: ScheduleConfig, peak: float, steps: int) -> Schedule: ...


def names() -> tuple[str, ...]:
    """The schedules there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> ScheduleModule:
    """The schedule called `name`; ValueError lists the choices."""
    if name not in names():
        raise ValueError(f"There is no schedule {name!r}; Twinax has {', '.join(names())}.")
    return cast(ScheduleModule, importlib.import_module(f".{name}", __name__))


def make(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    """The schedule of a run of `steps` whose highest learning rate is `peak`; ValueError when it does not fit."""
    if config.warmup(steps) > steps:
        raise ValueError(
            f"schedule.warmup_steps={config.warmup_steps} does not fit into steps={steps}; lower it or train longer."
        )
    return load(config.name).make(config, peak, steps)
