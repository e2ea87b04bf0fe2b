"""The arrays of a step folder, read through memory maps without Orbax or JAX.

Orbax writes them as one Zarr (version 2) array each, uncompressed, so a chunk is a file of plain little-endian numbers
that can be mapped: a slice of a layer-stacked parameter, or the part of one device, costs only the pages it touches.
Plain Orbax reads the same folder.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 (registers bfloat16 and float8 with NumPy)
import numpy as np

from . import limits
from .errors import DamagedCheckpoint


@dataclass(frozen=True)
class StoredArray:
    """An array on disk: its shape and dtype are known, its numbers are read when `read` asks for them."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def count(self) -> int:
        """Of its chunks."""
        return math.prod(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def file_names(self, index: Sequence[slice] = ()) -> list[str]:
        """The files that hold the numbers at `index` (as `read` takes it): one for each chunk."""
        return [_file_name(place) for place in itertools.product(*self._touched(index)[1])]

    def _touched(self, index: Sequence[slice]) -> tuple[list[tuple[int, int]], list[range]]:
        """Of each dimension: first and last number (exclusive), and the chunks that hold them."""
        full = tuple(index) + (slice(None),) * (len(self.shape) - len(index))
        spans = [s.indices(size)[:2] for s, size in zip(full, self.shape, strict=True)]
        return spans, [range(lo // c, -(-hi // c)) for (lo, hi), c in zip(spans, self.chunks, strict=True)]

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        path = self.folder / _file_name(place)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing") from None
        if size != expected:
            raise DamagedCheckpoint(f"{path} is truncated or changed: {size} bytes, expected {expected}")
        return np.memmap(path, self.dtype, "r", shape=self.chunks or (1,)).reshape(self.chunks)

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """The numbers at `index` (slices of step 1; missing ones mean all), as a view where one chunk has them."""
        spans, touched = self._touched(index)
        if all(len(places) == 1 for places in touched):
            chunk = self._chunk(tuple(places[0] for places in touched))
            starts = [places[0] * c for places, c in zip(touched, self.chunks, strict=True)]
            return chunk[tuple(slice(lo - at, hi - at) for (lo, hi), at in zip(spans, starts, strict=True))]
        out = np.empty([hi - lo for lo, hi in spans], self.dtype)
        for place in itertools.product(*touched):
            source, target = [], []
            for p, c, (lo, hi) in zip(place, self.chunks, spans, strict=True):
                begin, end = max(lo, p * c), min(hi, (p + 1) * c)
                source.append(slice(begin - p * c, end - p * c))
                target.append(slice(begin - lo, end - lo))
            out[tuple(target)] = self._chunk(place)[tuple(source)]
        return out


def _file_name(place: tuple[int, ...]) -> str:
    return ".".join(map(str, place)) or "0"


def open_array(folder: Path) -> StoredArray:
    """Open one stored array. `DamagedCheckpoint` for a layout that Twinax does not write."""
    path = folder / ".zarray"
    try:
        meta = json.loads(limits.read_small(path, limits.CONFIG_BYTES))
        plain = meta["zarr_format"] == 2 and meta["compressor"] is None and not meta["filters"] and meta["order"] == "C"
        plain = plain and meta.get("dimension_separator", ".") == "."
        dtype, shape, chunks = np.dtype(meta["dtype"]), tuple(meta["shape"]), tuple(meta["chunks"])
        sizes = all(isinstance(size, int) and 0 < size < limits.SIZE for size in (*shape, *chunks))
        if len(shape) != len(chunks) or len(shape) > limits.DIMENSIONS or not sizes:
            raise ValueError(f"shape {limits.shown(shape)}, chunks {limits.shown(chunks)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} does not describe an array: {error}") from error
    if not plain or dtype.byteorder == ">" or dtype.hasobject or dtype.names:
        raise DamagedCheckpoint(f"{path} is of a layout that Twinax does not write (compressed, filtered, ...)")
    return StoredArray(folder, shape, dtype, chunks)
