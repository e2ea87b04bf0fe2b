"""Parameters and Hugging Face tensors, put together from each other's parts as a family's table says. Bits only move.

A tensor may be a parameter, one layer or one expert of a stacked one, or several parameters, one below the other or in
turns; it may have its last two dimensions the other way round, or one more. All of that is slices and views.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..models.families import TensorEntry

Read = Callable[[str], np.ndarray]


def tensor_shape(entries: Sequence[TensorEntry], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the tensor that these entries are all parts of."""
    first = entries[0]
    own = list(shapes[first.name][len(first.index) :])
    if first.rows is not None:
        steps = [entry.rows for entry in entries if entry.rows is not None]
        own[first.axis] = max(stop - (stop - start - 1) % step for start, stop, step in steps)
    if first.transposed:
        own[-2:] = own[-1], own[-2]
    if first.groups is not None:
        own[-1:] = own[-1] // first.groups, first.groups
    return tuple(own)


def part_of(tensor: np.ndarray, entry: TensorEntry) -> np.ndarray:
    """A view: the entry's part of the tensor, laid out as the parameter is."""
    if entry.groups is not None:
        tensor = tensor.reshape(*tensor.shape[:-2], -1)
    if entry.transposed:
        tensor = np.swapaxes(tensor, -1, -2)
    return tensor if entry.rows is None else tensor[(slice(None),) * entry.axis + (slice(*entry.rows),)]


class Parameter:
    """A parameter whose parts are in tensors: what `step.to_device` reads like a `StoredArray`.

    Args:
        entries: its own, in order of their index. read: gives a tensor, best a mapped one.
    """

    def __init__(self, entries: Sequence[TensorEntry], shape: tuple[int, ...], dtype: np.dtype, read: Read):
        self.entries = tuple(entries)
        self._entries = {entry.index: entry for entry in entries}
        self._depth, self._read = len(entries[0].index), read
        self.shape, self.dtype = shape, dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The numbers at these slices, one for each of the first dimensions; a view of the tensor where it can be."""
        if not self._depth:
            return part_of(self._read(self._entries[()].hf_name), self._entries[()])[index]
        slices = [*index[: self._depth], *[slice(None)] * (self._depth - len(index))]
        ranges = [range(*one.indices(size)) for one, size in zip(slices, self.shape, strict=False)]
        rest = index[self._depth :]
        found = [self.part(place)[rest] for place in itertools.product(*ranges)]
        if len(found) == 1:
            return found[0][(np.newaxis,) * self._depth]
        stacked = np.stack(found) if found else np.empty((0, *self.shape[self._depth :]), self.dtype)
        return stacked.reshape(*map(len, ranges), *stacked.shape[1:])

    def part(self, place: tuple[int, ...]) -> np.ndarray:
        """The numbers of the entry with this index; a view of the tensor where it can be."""
        entry = self._entries[place]
        return part_of(self._read(entry.hf_name), entry)


def tensor_from(
    entries: Sequence[TensorEntry], shape: tuple[int, ...], dtype: Any, read: Callable[[TensorEntry], np.ndarray]
) -> np.ndarray:
    """A tensor from the parameters that it holds; `read` gives the numbers of an entry, `params[name][index]`."""
    first = entries[0]
    if len(entries) == 1 and first.rows is None and not first.transposed:
        return read(first).reshape(shape)
    tensor = np.empty(shape, dtype)
    for entry in entries:
        part_of(tensor, entry)[...] = read(entry)
    return tensor
