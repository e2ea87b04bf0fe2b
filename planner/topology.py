"""A machine: a chip, how many of them and how they are joined; and what a mesh axis can send over it.

`v5p:4x4x8` is a slice of a torus, `h100:64` so many GPUs in nodes of eight.

How fast an axis is depends on where JAX's device order puts its devices (`coordinates`). The devices of an axis that
lie along a dimension of the torus share its links with the groups between them: `stride` groups, so a stride of 2
halves the speed. A dimension that closes to a ring sends both ways, an open one only one way when it matters (its last
chip has one neighbour). An axis over several dimensions uses all of their links at once, as XLA's collectives do.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from .chips import HALVES, Chip, find_chip
from .errors import PlannerError

CUBE_SIDE = 4  # optical switches close dimensions of whole cubes of this side
HOST = 2  # chips along x and y on one host


@dataclasses.dataclass(frozen=True)
class Topology:
    """`chip` in the given `shape`; for GPUs the shape is their number."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads `v5p:4x4x8` or `h100:64`; PlannerError says what is wrong and what would be right."""
        name, colon, size = text.partition(":")
        chip = find_chip(name)
        example = "64" if chip.platform == "cuda" else "x".join("4" * chip.dimensions)
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
            raise PlannerError(f"A topology is a chip and its shape or count, as {chip.name}:{example}; got {text!r}.")
        shape = tuple(int(part) for part in size.split("x"))
        if chip.platform == "cuda":
            _check_gpus(chip, shape, text)
        else:
            shape = _torus_shape(chip, shape, text, example)
        return cls(chip, shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices, which is what a plan counts."""
        return self.chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring."""
        if self.chip.dimensions == 3:  # optical switches, on whole cubes only
            return (all(size % CUBE_SIDE == 0 for size in self.shape),) * 3
        return tuple(size == largest for size, largest in zip(self.shape, self.chip.largest, strict=False))

    def coordinates(self) -> np.ndarray:
        """Where each JAX device is: int [devices, dimensions + 1], the last its half of the chip; for GPUs [.., 2].

        JAX goes through a host's chips (2x2x1) first, then through the hosts, x before y before z.
        """
        if self.chip.platform == "cuda":
            return np.stack(np.divmod(np.arange(self.devices), self.chip.node), axis=1)
        x, y, *z = self.shape
        host_x, host_y = min(HOST, x), min(HOST, y)
        loops = (*map(range, reversed(z)), range(y // host_y), range(x // host_x), range(host_y), range(host_x))
        places = []
        for *depth, block_y, block_x, in_y, in_x in itertools.product(*loops):
            chip = (block_x * host_x + in_x, block_y * host_y + in_y, *reversed(depth))
            places += [(*chip, half) for half in range(self.chip.devices_per_chip)]
        return np.array(places)

    def bandwidth(self, sizes: Mapping[str, int], axes: tuple[str, ...]) -> float:
        """Bytes/s that a device takes in when the devices along `axes` of a mesh of `sizes` exchange data.

        The mesh is `Plan.mesh`'s: the devices in order, reshaped.
        """
        return _bandwidth(self, tuple(sizes.values()), tuple(name in axes for name in sizes))

    def node_bandwidth(self, group: np.ndarray) -> float:
        """Of GPUs at the coordinates `group`."""
        nodes, members = np.unique(group[:, 0], return_counts=True)
        # A node takes in what the others hold once, through all the cards of its members.
        return self.chip.link if len(nodes) == 1 else min(self.chip.link, float(members.min()) * self.chip.network)

    def torus_bandwidth(self, group: np.ndarray) -> float:
        """Of TPUs at the coordinates `group`."""
        chip = self.chip
        halves = len(np.unique(group[:, -1]))
        total = 0.0
        for dimension, (size, wrap) in enumerate(zip(self.shape, self.wraps, strict=True)):
            places = np.unique(group[:, dimension])
            if len(places) > 1:
                stride = int(np.diff(places).min())
                closed = wrap and len(places) * stride == size and size > 2
                total += chip.link * (2 if closed else 1) / stride
        if total == 0:
            return chip.link * HALVES
        # Both halves of a chip in one group: what comes in serves both. In two groups, they share the links.
        return total * halves / chip.devices_per_chip


@functools.lru_cache(maxsize=64)
def _coordinates(topology: Topology) -> np.ndarray:
    return topology.coordinates()


@functools.lru_cache(maxsize=1 << 16)
def _bandwidth(topology: Topology, sizes: tuple[int, ...], along: tuple[bool, ...]) -> float:
    grid = _coordinates(topology)[: math.prod(sizes)].reshape(*sizes, -1)
    group = grid[tuple(slice(None) if is_along else 0 for is_along in along)].reshape(-1, grid.shape[-1])
    if len(group) == 1:
        return math.inf
    return topology.node_bandwidth(group) if topology.chip.platform == "cuda" else topology.torus_bandwidth(group)


def _check_gpus(chip: Chip, shape: tuple[int, ...], text: str) -> None:
    if len(shape) != 1:
        raise PlannerError(f"GPUs are counted, not arranged: write {chip.name}:{math.prod(shape)}, not {text!r}.")
    if shape[0] > chip.node and shape[0] % chip.node:
        raise PlannerError(
            f"{chip.name} comes in nodes of {chip.node}, so more than {chip.node} are a multiple of it; got {text!r}. "
            f"The nearest is {chip.name}:{round(shape[0] / chip.node) * chip.node}."
        )


def _torus_shape(chip: Chip, shape: tuple[int, ...], text: str, example: str) -> tuple[int, ...]:
    """The shape with all its dimensions."""
    if len(shape) == 3 and chip.dimensions == 2 and shape[2] == 1:
        shape = shape[:2]
    if len(shape) != chip.dimensions:
        raise PlannerError(
            f"{chip.name} is a torus of {chip.dimensions} dimensions, as in {chip.name}:{example}; got {text!r}."
        )
    largest = tuple(sorted(chip.largest))
    if any(size > most for size, most in zip(sorted(shape), largest, strict=True)):
        most = "x".join(map(str, largest))
        raise PlannerError(f"The largest slice of {chip.name} is {most}; got {text!r}. Take a smaller one.")
    alone = math.prod(shape) == 1 and chip.dimensions == 2
    if not alone and (shape[0] % HOST or shape[1] % HOST):
        fixed = (*(size + size % HOST for size in shape[:2]), *shape[2:])
        raise PlannerError(
            f"A host holds {HOST}x{HOST} chips, so the first two sizes are even; got {text!r}. The nearest is "
            f"{chip.name}:{'x'.join(map(str, fixed))}."
        )
    return shape
