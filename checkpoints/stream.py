"""Tensors copied from mapped files into files: in blocks, by several threads, going on from what is there already.

- A piece is a tensor, or what one tensor holds of a parameter. Each of its regions lies in a file without gaps.
- Memory: some blocks a thread, and what pieces hold at once: no more than the largest of them, or HELD_BYTES.
- A block that stands in the file already is not written again: so a copy that was killed goes on.
- At the end all is forced to the disk, dropped from the system's cache, read back and compared with the source.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..models.config import DecoderConfig
from . import files
from .errors import CheckpointError, DamagedCheckpoint

BLOCK_BYTES = 8 << 20
HELD_BYTES = 64 << 20
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Region:
    """A box of a piece, whose numbers stand row by row in `file` (below the target's folder) from byte `start` on."""

    file: str
    start: int
    box: Box

    def blocks(self, itemsize: int) -> Iterator[Box]:
        """The box in blocks, in order."""
        for block in blocks([one.stop - one.start for one in self.box], itemsize):
            inside = (slice(a.start + b.start, a.start + b.stop) for a, b in zip(self.box, block, strict=False))
            yield (*inside, *self.box[len(block) :])


@dataclass(frozen=True)
class Piece:
    """What is copied as one.

    Attributes:
        name: for people.
        dtype: of the target.
        regions: where it goes.
        source: prepares to read, and gives what reads a box, best as a view of a mapped file.
        written: the numbers of a box, as readers of the target will get them.
    """

    name: str
    dtype: np.dtype
    regions: tuple[Region, ...]
    source: Callable[[], Callable[[Box], np.ndarray]]
    written: Callable[[Box], np.ndarray]

    @property
    def nbytes(self) -> int:
        sizes = (math.prod(one.stop - one.start for one in region.box) for region in self.regions)
        return sum(sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Cast:
    """Gives numbers the dtype asked for; None: as they are. A finite one that would become infinite is an error."""

    dtype: np.dtype | None = None

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        if self.dtype is None or array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):  # looked for below
            cast = array.astype(self.dtype)
        if np.isfinite(array).all() and not np.isfinite(cast).all():
            raise CheckpointError(f"{name} has numbers too large for {self.dtype}; use bfloat16 or float32")
        return cast

    def of(self, dtype: np.dtype) -> np.dtype:
        return self.dtype or dtype

    def check(self, config: DecoderConfig) -> None:
        """Raises CheckpointError where numbers are parts of quantised weights, and have no other dtype."""
        if self.dtype is not None and config.quantization is not None:
            raise CheckpointError(
                f"the weights are kept in {config.quantization.format}, which has no version in {self.dtype}; "
                "leave out --dtype"
            )


def blocks(shape: Sequence[int], itemsize: int, limit: int = BLOCK_BYTES) -> Iterator[Box]:
    """Boxes of at most `limit` bytes (or one number) that, one after the other, are an array in C order."""
    depth, rest = 0, math.prod(shape) * itemsize
    while depth < len(shape) and rest > limit:
        rest //= shape[depth]
        depth += 1
    if depth == 0:
        yield ()
        return
    *outer, last = shape[:depth]
    step = max(1, limit // rest)
    for place in itertools.product(*map(range, outer)):
        for start in range(0, last, step):
            yield (*(slice(i, i + 1) for i in place), slice(start, min(start + step, last)))


@dataclass
class Copy:
    """Copies pieces into the files of a folder, then compares.

    Attributes:
        folder: where the files are made.
        sizes: of each file, in bytes.
        heads: how some files begin, before their first region.
        release: called after each piece, to let go of mapped memory.
        tell: is told of the progress, of `2 * sum(piece.nbytes)` bytes.
    """

    folder: Path
    sizes: Mapping[str, int]
    pieces: Sequence[Piece]
    cast: Cast
    tell: Progress | None
    heads: Mapping[str, bytes] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None
    _done: int = field(default=0, init=False)
    _begun: set[str] = field(default_factory=set, init=False)  # files that were there

    def write(self) -> None:
        """Writes what is not there yet, and forces it to the disk."""
        for name, size in self.sizes.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size == size:
                self._begun.add(name)
            else:
                with open(path, "wb") as file:
                    file.write(self.heads.get(name, b""))
                    file.truncate(size)
        self._each("write", self._write)
        for name in self.sizes:
            files.settle(self.folder / name)

    def verify(self) -> None:
        """Compares what the disk has with the source. DamagedCheckpoint names a tensor that differs."""
        self._each("verify", self._verify)

    def _each(self, what: str, do: Callable[[Piece], None]) -> None:
        held = _Budget(max([HELD_BYTES, *(piece.nbytes for piece in self.pieces)]))
        total = 2 * sum(piece.nbytes for piece in self.pieces)

        def one(piece: Piece) -> Piece:
            with held.hold(piece.nbytes):
                do(piece)
                self.release()
            return piece

        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            for piece in pool.map(one, self.pieces):
                self._done += piece.nbytes
                if self.tell is not None:
                    self.tell(f"{what} {piece.name}", self._done, total)
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, piece: Piece) -> None:
        read = piece.source()
        for region in piece.regions:
            at = region.start
            with open(self.folder / region.file, "r+b", buffering=0) as file:
                for box in region.blocks(piece.dtype.itemsize):
                    data = bytes_of(self.cast(piece.name, read(box)))
                    if region.file not in self._begun or not _stands_there(file.fileno(), data, at):
                        _write_all(file.fileno(), data.data, at)
                    at += data.size

    def _verify(self, piece: Piece) -> None:
        read = piece.source()
        for region in piece.regions:
            for box in region.blocks(piece.dtype.itemsize):
                wanted, found = self.cast(piece.name, read(box)), piece.written(box)
                same = (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
                if not same or not np.array_equal(bytes_of(found), bytes_of(wanted)):
                    raise DamagedCheckpoint(f"{piece.name} was not written as it is; is the disk failing?")


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order; a view where it can be."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _stands_there(file: int, data: np.ndarray, start: int) -> bool:
    return np.array_equal(np.frombuffer(os.pread(file, data.size, start), np.uint8), data)


def _write_all(file: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(file, data, start)
        data, start = data[count:], start + count


class _Budget:
    """Bytes that threads may hold at once."""

    def __init__(self, limit: int):
        self._left, self._changed = limit, threading.Condition()

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Waits until so many bytes, at most the limit, are left."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()
