"""How large what a stranger made may be, so that it is refused before it fills the memory.

Far above what models have: the index of a model of a trillion parameters (60 layers of 384 experts, three tensors for
each of their weights) has 24 MB and 420,000 values.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DamagedCheckpoint

HEADER_BYTES = 32 << 20  # of a safetensors file
INDEX_BYTES = 32 << 20
CONFIG_BYTES = 4 << 20
MANIFEST_BYTES = 64 << 20
VALUES = 600_000  # of a JSON text: a value takes up to 100 times the bytes that it is written in
SIZE = 1 << 63  # of a dimension, and of an array in bytes
DIMENSIONS = 32
SHARDS = 10_000
LAYERS = 10_000
LAYER_EXPERTS = 100_000  # layers x experts
_COUNTS = re.compile(r"(?P<layers>(num|n)_(\w+_)?layers?)|(?P<experts>(num|n)_(\w+_)?experts)")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlevel = 3


def shown(value: object) -> str:
    """`repr`, but short, whatever the value."""
    return _short.repr(value)


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; DamagedCheckpoint for a larger one."""
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise DamagedCheckpoint(f"{path} has {size:,} bytes; the limit for such a file is {limit:,}")
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Pipes and devices would be read for ever."""
    if os.path.exists(path) and not path.is_file():
        raise DamagedCheckpoint(f"{path} is not a regular file; it is refused")


def check_values(path: Path, data: bytes, what: str) -> None:
    """DamagedCheckpoint for JSON of too many values, told from their separators before they are made."""
    count = sum(map(data.count, (b",", b":", b"[", b"{")))
    if count > VALUES:
        raise DamagedCheckpoint(f"{path}: {what} holds about {count:,} values; the limit is {VALUES:,}")


def check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """DamagedCheckpoint for a config with more layers or experts than a table of its tensors could name."""
    most = {"layers": 1, "experts": 1}
    flat = dict(config)
    for nested in config.values():
        flat |= nested if isinstance(nested, dict) else {}
    for key, value in flat.items():
        found = _COUNTS.fullmatch(str(key))
        if found and isinstance(value, int):
            kind = found.lastgroup or "layers"
            most[kind] = max(most[kind], value)
    if most["layers"] > LAYERS or most["layers"] * most["experts"] > LAYER_EXPERTS:
        raise DamagedCheckpoint(
            f"{path} describes {shown(most['layers'])} layers with {shown(most['experts'])} experts each; the limits "
            f"are {LAYERS:,} layers, and {LAYER_EXPERTS:,} experts in all"
        )
