"""A plan: how many devices each kind of parallelism gets. A value, so it can be printed, compared and stored."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from .rules import activation_sharding, parameter_sharding


@dataclasses.dataclass(frozen=True)
class Plan:
    """Devices per mesh axis.

    Attributes:
        data: Replicas of the whole model; each takes its share of the batch.
        fsdp: Devices that share one copy of parameters and optimizer state, and the batch too.
    """

    data: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name, size in self.to_dict().items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"A plan's axis sizes are whole numbers from 1 up; {name}={size!r} is not.")

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads `"fsdp=4,data=2"`; empty text is one device. ValueError names the nearest right axis."""
        names = [field.name for field in dataclasses.fields(cls)]
        sizes: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"A plan has the axes {', '.join(names)}, written fsdp=4,data=2; got {part!r}.{hint}")
            if not equals or not value.isdecimal():
                raise ValueError(f"An axis of a plan needs a whole number, as in {name}=4; got {part!r}.")
            if name in sizes:
                raise ValueError(f"A plan names each axis once; {name!r} is there twice in {text!r}.")
            sizes[name] = int(value)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """How many devices the plan takes."""
        return self.data * self.fsdp

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.to_dict().items() if size > 1) or "one device"

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over the first devices (default: of `jax.devices()`); raises ValueError when there are too few."""
        devices = jax.devices() if devices is None else devices
        if len(devices) < self.devices:
            raise ValueError(
                f"The plan {self} takes {self.devices} devices and there are {len(devices)} ({devices[0].platform}). "
                f"Use a smaller plan; on a CPU, JAX_NUM_CPU_DEVICES={self.devices} simulates more."
            )
        sizes = self.to_dict()
        grid = np.asarray(devices[: self.devices]).reshape(tuple(sizes.values()))
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def param_sharding(
        self, mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None
    ) -> NamedSharding:
        """Where a parameter with logical `axes` lives on this plan's mesh."""
        return parameter_sharding(axes, mesh, shape)

    def batch_sharding(self, mesh: Mesh) -> NamedSharding:
        """Where arrays with rows first (`[B, ...]`) live: the rows cut over data and fsdp."""
        return activation_sharding(("batch",), mesh)
