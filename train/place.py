"""Batches from this process to the devices of all. Shapes: K micro-batches, B rows of one, T tokens, N rows here."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ..sharding.rules import activation_sharding
from .data.dataset import Batch, Part


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays [K, B, T] live: the rows of each micro-batch cut over the devices."""
    rows = activation_sharding(("batch",), mesh).spec
    return NamedSharding(mesh, PartitionSpec(None, *rows))


@functools.lru_cache(maxsize=8)
def part_here(mesh: Mesh, batch_size: int, accumulation: int) -> Part | None:
    """The rows of a batch that this process's devices hold; None, for all of them, when there is one process."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return None
    numbers_KB = np.arange(batch_size).reshape(accumulation, -1)
    holder = np.full(batch_size, jax.process_count())  # the first process that has a row counts it
    here: set[int] = set()
    for device, (k, b, *_) in sharding.devices_indices_map((*numbers_KB.shape, 1)).items():
        rows = numbers_KB[k, b].ravel()
        holder[rows] = np.minimum(holder[rows], device.process_index)
        if device.process_index == jax.process_index():
            here.update(rows.tolist())
    numbers = np.array(sorted(here))
    return Part(numbers, batch_size, holder[numbers] == jax.process_index())


def put(value: Any, sharding: Sharding) -> jax.Array:
    """An array that every process has whole, on devices of all of them; each puts its share."""
    value = np.asarray(value)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_rows(batch: Batch, accumulation: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of a batch as [K, B, T]. Of a part of one, all processes put theirs; nothing is gathered anywhere."""
    sharding, part = batch_sharding(mesh), batch.part
    if part is None:
        return {name: put(a.reshape(accumulation, -1, a.shape[-1]), sharding) for name, a in batch.arrays().items()}
    numbers_KB = np.arange(part.size).reshape(accumulation, -1)

    def share(array_NT: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        rows_KB = numbers_KB[index[:2]]
        return array_NT[np.searchsorted(part.numbers, rows_KB), index[2]]

    return {
        name: jax.make_array_from_callback((*numbers_KB.shape, a.shape[-1]), sharding, functools.partial(share, a))
        for name, a in batch.arrays().items()
    }
