"""Which mesh axes a collective crosses, from the devices that its HLO text lists."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from .hlo import Instruction

# `mesh['a'=4,'b'=2] {'b'}`: the sizes of a mesh, and the axes along which a group lies. The devices may come in another
# order, `device_ids=([2,4]T(1,0))`, and a part of an axis is `'a':(2)2`: split as [2, 2, rest], the middle.
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
UNKNOWN = "?"


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that exchange data: how many, and along which mesh axes; `share` of all devices send."""

    size: int
    axes: tuple[str, ...]
    share: float = 1.0


def group_of(i: Instruction, sizes: Mapping[str, int]) -> Group:
    """The group of a collective on a mesh of `sizes` (its devices in order)."""
    devices = math.prod(sizes.values())
    pairs = i.braces("source_target_pairs")
    if pairs is not None:
        ends = np.array(re.findall(r"(\d+),(\d+)", pairs), int).reshape(-1, 2)
        return _permutation(ends[ends[:, 0] != ends[:, 1]], sizes, devices)
    members = first_group(i.attributes, devices)
    if members is None:
        return Group(devices, (UNKNOWN,))
    return Group(len(members), _varying(np.unravel_index(members, tuple(sizes.values())), sizes))


def first_group(attributes: str, devices: int) -> np.ndarray | None:
    """The first of the replica groups, as device numbers; None when the text is not understood."""
    at = attributes.find("replica_groups=")
    if at < 0:
        return np.arange(devices)
    text = attributes[at + len("replica_groups=") :]
    if text.startswith("mesh["):
        return _mesh_group(text)
    if iota := _IOTA.match(text):
        shape, dims = ([int(n) for n in iota[k].split(",")] for k in (1, 2))
        order = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            order = order.transpose([int(n) for n in iota[3].split(",")])
        return order.reshape(shape)[0]
    if listed := re.match(r"\{\{([\d,]*)\}", text):
        return np.array([int(n) for n in listed[1].split(",") if n])
    return np.arange(devices) if text.startswith("{}") else None


def _mesh_group(text: str) -> np.ndarray | None:
    match = _MESH.match(text)
    if match is None:
        return None
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    order = np.arange(math.prod(mesh.values()))
    if match[2]:
        order = order.reshape([int(n) for n in match[2].split(",")])
        order = order.transpose([int(n) for n in match[3].split(",")] if match[3] else None)
    parts = {name: (1, size) for name, size in mesh.items()}
    along = set()
    for name, before, size in _AXIS.findall(match[4]):
        along.add(name)
        parts[name] = (int(before), int(size)) if size else parts[name]
    dims, take = [], []
    for name, size in mesh.items():
        before, middle = parts[name]
        dims += [before, middle, size // (before * middle)]
        take += [0, slice(None) if name in along else 0, 0]
    return order.reshape(dims)[tuple(take)].reshape(-1)


def _permutation(ends: np.ndarray, sizes: Mapping[str, int], devices: int) -> Group:
    if not len(ends):
        return Group(1, ())
    places = np.stack(np.unravel_index(ends, tuple(sizes.values())), axis=-1)  # [pairs, 2, axes]
    moved = (places[:, 0] != places[:, 1]).any(axis=0)
    axes = tuple(name for name, did in zip(sizes, moved, strict=True) if did)
    return Group(math.prod(sizes[name] for name in axes), axes, len(ends) / devices)


def _varying(places: tuple[np.ndarray, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(name for name, place in zip(sizes, places, strict=True) if len(np.unique(place)) > 1)
