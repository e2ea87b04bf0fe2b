"""How the arrays of a step folder are cut into files, and what Orbax wants to find beside them.

An array is a Zarr (version 2) array: `.zarray` and one file for each chunk. Chunks divide it evenly. Those of a folder
that was cut by a plan divide what one device of that plan holds, so that nobody reads what another needs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import DecoderConfig
from ..sharding.plan import Plan
from .stream import Box, Region

CHUNK_BYTES = 256 << 20  # of a file at most, so that checksums and reads are parallel
ORBAX = "_METADATA"


def device_shapes(config: DecoderConfig, plan: Plan | None) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter on one device of the plan; None: of the whole. PlanError when it can't be cut so."""
    from jax.sharding import AbstractMesh

    from ..models.decoder import param_shapes, param_shardings

    shapes = {name: tuple(like.shape) for name, like in param_shapes(config).items()}
    if plan is None:
        return shapes
    plan.check(config.dimensions)
    mesh: Any = AbstractMesh(tuple(plan.sizes.values()), tuple(plan.sizes))  # of devices that need not be here
    return {name: where.shard_shape(shapes[name]) for name, where in param_shardings(config, mesh).items()}


def chunk_shape(shape: Sequence[int], itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """A part of an array of `shape` that divides it: of at most `limit` bytes, unless its sizes divide too badly."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        parts = -(-math.prod(chunk) * itemsize // limit)  # that are needed yet
        if parts <= 1:
            break
        divisor = next(d for d in range(min(parts, size), size + 1) if size % d == 0)
        if divisor <= 4 * parts:
            chunk[axis] = size // divisor
    return tuple(chunk)


def chunk_files(shape: Sequence[int], chunk: Sequence[int]) -> list[str]:
    """The names of an array's files."""
    grid = [range(size // part) for size, part in zip(shape, chunk, strict=True)]
    return [".".join(map(str, place)) or "0" for place in itertools.product(*grid)]


def regions(
    folder: str, place: tuple[int, ...], shape: Sequence[int], chunk: Sequence[int], itemsize: int
) -> tuple[Region, ...]:
    """Where `array[place]` stands, for an array of `shape` in files of the shape `chunk` below `folder`."""
    depth = len(place)
    # Its rows stand together in each file, as `place` is of the outermost dimensions.
    rest = math.prod(chunk[depth:]) * itemsize
    start, first = 0, []
    for index, part in zip(place, chunk[:depth], strict=True):
        start = start * part + index % part
        first.append(index // part)
    found = []
    for inner in itertools.product(*(range(n // part) for n, part in zip(shape[depth:], chunk[depth:], strict=True))):
        box: Box = tuple(slice(i * part, (i + 1) * part) for i, part in zip(inner, chunk[depth:], strict=True))
        name = ".".join(map(str, (*first, *inner))) or "0"
        found.append(Region(f"{folder}/{name}", start * rest, box))
    return tuple(found)


def describe(folder: Path, shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype) -> None:
    """Make the folder of an array, with its `.zarray`."""
    folder.mkdir(parents=True, exist_ok=True)
    code = dtype.str if np.dtype(dtype.str) == dtype else dtype.name  # NumPy has no code for bfloat16
    content = {
        "chunks": list(chunk), "compressor": None, "dimension_separator": ".", "dtype": code, "fill_value": None,
        "filters": None, "order": "C", "shape": list(shape), "zarr_format": 2,
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(content, separators=(",", ":")))


def write_tree(folder: Path, names: Iterable[str]) -> None:
    """What Orbax reads of a folder with arrays of these names first: that they are a dict."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    content = {"tree_metadata": tree, **options, "custom_metadata": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORBAX).write_text(json.dumps(content))
