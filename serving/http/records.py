"""Small JSON files that are whole or not there at all: one for each thing that the server remembers."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .errors import bad


class Record(msgspec.Struct):
    """A thing that is remembered: whose it is, and how it is called."""

    id: str
    tenant: str


T = TypeVar("T", bound=Record)


def new_name(prefix: str) -> str:
    """An id that nobody else has, and that can name a file."""
    return f"{prefix}{secrets.token_hex(16)}"


def read_all(folder: Path, prefix: str, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Id and record of every `ID.json` in a folder. Raises ValueError, with the file's name, for what is no record."""
    for path in sorted(folder.glob("*.json")):
        if re.fullmatch(re.escape(prefix) + "[0-9a-f]{32}", path.stem):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=kind)
            except (msgspec.DecodeError, RecursionError) as error:
                raise ValueError(f"{path} is not a record of this server ({error}); move it away") from None
            if record.id != path.stem:
                raise ValueError(f"{path} is the record of {record.id[:80]!r}; give it its own name, or move it away")
            yield record.id, record


def write(path: Path, record: msgspec.Struct) -> None:
    """Replaces the file, or makes it. After this returns it survives a crash of the machine."""
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock(folder: Path) -> int:
    """Holds the folder for this process, as long as the number that comes back is open. Raises ValueError."""
    number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise ValueError(f"another server keeps its files in {folder}; give each server a folder of its own") from None
    return number


def one_page(items: list[T], query: dict[str, Any], show: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """A list as the API pages it: `limit` of the `items` behind the one called `after`."""
    names = [item.id for item in items]
    start = 0
    if query["after"] is not None:
        if query["after"] not in names:
            raise bad("after", "'after' must be an id of this list: the last one of the page before.")
        start = names.index(query["after"]) + 1
    found = items[start : start + query["limit"]]
    return {
        "object": "list",
        "data": [show(item) for item in found],
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
        "has_more": start + len(found) < len(items),
    }
