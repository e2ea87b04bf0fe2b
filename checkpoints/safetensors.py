"""safetensors files, read strictly through a memory map and written as a stream.

The format: 8 bytes of little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the tensors.
- A reader hands out views of the map: nothing is read until it is used, and nothing is copied.
- Every rule of the format is checked when a file is opened, so that reading a tensor cannot fail later for its header.
- A writer knows all names, shapes and dtypes beforehand; tensors then come one at a time, in any order.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .errors import CheckpointError, DamagedCheckpoint, first_few
from .files import fsync
from .limits import DIMENSIONS, HEADER_BYTES, INDEX_BYTES, SHARDS, SIZE, check_regular, check_values, read_small, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, NumPy dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Placed:
    spec: TensorSpec
    start: int  # bytes from the beginning of the file


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} appears twice")
        found[name] = value
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def parse_json(path: Path, data: bytes, what: str) -> dict:
    """A JSON object without duplicate keys, of not too many values; anything else is `DamagedCheckpoint`."""
    check_values(path, data, what)
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path}: {what} must be a JSON object, not {type(found).__name__}")
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SIZE


def _read_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    tensor = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedCheckpoint(f"{tensor} must have just dtype, shape and data_offsets, not {shown(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{tensor} has dtype {shown(code)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(_is_size(size) for size in shape):
        raise DamagedCheckpoint(f"{tensor} has shape {shown(shape)}, not a list of at most {DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise DamagedCheckpoint(f"{tensor} has data_offsets {shown(offsets)}, not [begin, end]")
    spec = TensorSpec(name, DTYPES[code], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise DamagedCheckpoint(
            f"{tensor} of dtype {code} and shape {shape} takes {spec.nbytes} bytes, "
            f"but its data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    if math.prod(size for size in shape if size) * spec.dtype.itemsize >= SIZE:
        raise DamagedCheckpoint(f"{tensor} has no numbers, and a shape {shape} that no array can have")
    return spec, offsets[0], offsets[1]


class SafetensorsFile:
    """One safetensors file, memory mapped. A context manager; its views stay valid after `close`.

    Raises `DamagedCheckpoint` when the file breaks any rule of the format (a truncated one says how many bytes it
    should have), `CheckpointError` for a dtype that is not understood, `OSError` when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        check_regular(self.path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.metadata, self._placed = self._read_header(file, size)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_header(self, file, size: int) -> tuple[dict[str, str], dict[str, _Placed]]:
        path = self.path
        if size < 8:
            raise DamagedCheckpoint(f"{path} is truncated: a safetensors file begins with 8 bytes, this one has {size}")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_BYTES:
            raise DamagedCheckpoint(
                f"{path} is not a safetensors file, or of no model: it announces a header of {length} bytes, the limit "
                f"is {HEADER_BYTES}"
            )
        if 8 + length > size:
            raise DamagedCheckpoint(
                f"{path} is truncated: its header ends at byte {8 + length}, the file has {size} bytes; copy it again"
            )
        raw = file.read(length)
        if not raw.startswith(b"{"):
            raise DamagedCheckpoint(f"{path}: the header must begin with '{{', not {raw[:1]!r}")
        header = parse_json(path, raw, "the header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise DamagedCheckpoint(f"{path}: __metadata__ must map strings to strings, not {shown(metadata)}")
        entries = sorted((_read_entry(path, name, entry) for name, entry in header.items()), key=lambda e: (e[1], e[2]))
        end = 0
        for spec, begin, stop in entries:
            if begin != end:
                kind = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
                raise DamagedCheckpoint(f"{path}: tensor {shown(spec.name)} begins at {begin}, not at {end}: it {kind}")
            end = stop
        expected = 8 + length + end
        if expected != size:
            kind = "is truncated" if size < expected else "has bytes that belong to no tensor"
            raise DamagedCheckpoint(
                f"{path} {kind}: its header describes {expected} bytes, the file has {size}; copy it again"
            )
        return metadata, {spec.name: _Placed(spec, 8 + length + begin) for spec, begin, _ in entries}

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, in the order of the file."""
        return {name: placed.spec for name, placed in self._placed.items()}

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in the map. `KeyError` when there is no such tensor."""
        placed = self._placed[name]
        count = math.prod(placed.spec.shape)
        if count == 0:
            return np.empty(placed.spec.shape, placed.spec.dtype)
        return np.frombuffer(self._map, placed.spec.dtype, count, placed.start).reshape(placed.spec.shape)

    def release(self) -> None:
        """Let go of the memory of what has been read; views stay valid, and are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let the map go; it is freed with the last view of it."""
        del self._map

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


def lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """How a file with these tensors begins, and the first byte of each."""
    header, placed = _header(specs, metadata)
    return header, {name: one.start for name, one in placed.items()}


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, _Placed]]:
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)  # so that every tensor is aligned to its element
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, begins = 0, {}
    for spec in specs:
        if spec.name in begins or spec.name == "__metadata__":
            raise ValueError(f"the tensor name {spec.name!r} is taken")
        if spec.dtype not in _CODES:
            raise CheckpointError(f"tensor {spec.name!r}: safetensors has no code for dtype {spec.dtype}")
        begins[spec.name] = offset
        span = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of 8 bytes
    placed = {spec.name: _Placed(spec, 8 + len(raw) + begins[spec.name]) for spec in specs}
    return struct.pack("<Q", len(raw)) + raw, placed


class SafetensorsWriter:
    """Writes a safetensors file of known `specs`, tensor by tensor. A context manager.

    The file has its name only when every tensor has been written exactly once and all is on the disk; until then, and
    after an error, there is at most `<name>.tmp`, which is removed.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Sequence[TensorSpec], metadata: Mapping[str, str] = {}):
        self.path = Path(path)
        header, self._placed = _header(specs, metadata)
        self._left = set(self._placed)
        self._tmp = self.path.with_name(self.path.name + ".tmp")
        self._file = open(self._tmp, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(header)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write tensor `name`. `ValueError` when it is not announced, comes again, or differs from its spec."""
        if name not in self._left:
            reason = "was written already" if name in self._placed else "is unknown"
            raise ValueError(f"{self.path}: tensor {name!r} {reason}")
        placed = self._placed[name]
        if array.shape != placed.spec.shape or array.dtype != placed.spec.dtype:
            raise ValueError(
                f"{self.path}: tensor {name!r} was announced as {placed.spec.dtype}{list(placed.spec.shape)}, "
                f"and is {array.dtype}{list(array.shape)}"
            )
        self._file.seek(placed.start)
        if array.nbytes:
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            with self._file:
                if kind is None:
                    if self._left:
                        raise ValueError(f"{self.path}: never written:\n{first_few(sorted(self._left))}")
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._tmp, self.path)
                fsync(self.path.parent)
        finally:
            self._tmp.unlink(missing_ok=True)


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: `model.safetensors`, or the shards that its index names. A context manager.

    Raises `DamagedCheckpoint` for an index that points outside the folder, at shards that are not there, or at tensors
    that are not in their shard.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._shards: dict[str, SafetensorsFile] = {}
        self._home: dict[str, SafetensorsFile] = {}
        index = self.folder / INDEX_NAME
        weight_map = self._read_index(index) if index.exists() else None
        names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        for name in names:
            shard = self._shards[name] = SafetensorsFile(self.folder / name)
            for tensor in shard.specs():
                if tensor in self._home:
                    other = self._home[tensor].path.name
                    raise DamagedCheckpoint(f"{shard.path}: tensor {shown(tensor)} is also in {other}")
                self._home[tensor] = shard
        if weight_map is not None:
            lost = [f"{t} (should be in {s})" for t, s in weight_map.items() if t not in self._shards[s].specs()]
            if lost:
                raise DamagedCheckpoint(f"{index} names tensors that are not where it says:\n{first_few(lost)}")

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = parse_json(index, read_small(index, INDEX_BYTES), "the index").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise DamagedCheckpoint(f"{index}: weight_map must map tensor names to file names")
        names = set(weight_map.values())
        if len(names) > SHARDS:
            raise DamagedCheckpoint(f"{index} names {len(names):,} shards; the limit is {SHARDS:,}")
        shards = sorted(names)
        for shard in shards:
            if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
                name = shown(shard)
                raise DamagedCheckpoint(f"{index}: {name} is not the name of a file in this folder; it is refused")
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise DamagedCheckpoint(f"{self.folder}: the index names shards that are not there:\n{first_few(missing)}")
        return weight_map

    @property
    def files(self) -> list[Path]:
        return [shard.path for shard in self._shards.values()]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of every shard."""
        return {name: spec for shard in self._shards.values() for name, spec in shard.specs().items()}

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in its shard's map. `KeyError` when there is no such tensor."""
        return self._home[name].read(name)

    def release(self) -> None:
        """See `SafetensorsFile.release`."""
        for shard in self._shards.values():
            shard.release()

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards, self._home = {}, {}

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in the order given; a tensor larger than a shard has one of its own."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write the index of `plan_shards`, when there is more than one shard."""
    if len(shards) == 1:
        return
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
