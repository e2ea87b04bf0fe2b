"""Files that clients upload and batches write, in one folder.

A file is `ID.data` and, written last, `ID.json`, which says whose it is. An id is made here, and looked up among those
that are there; what a client calls its file is kept in the record, so that no name of a client's becomes a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

from . import records
from .errors import ApiError, show

_PREFIX = "file-"


class StoredFile(records.Record):
    """One file. `created_at` and `expires_at` (None: kept until deleted) in seconds since 1970."""

    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float | None = None

    def shown(self) -> dict[str, Any]:
        """As the API shows it."""
        found: dict[str, Any] = {"id": self.id, "object": "file", "bytes": self.bytes, "filename": self.filename}
        found |= {"created_at": int(self.created_at), "purpose": self.purpose, "status": "processed"}
        return found | ({} if self.expires_at is None else {"expires_at": int(self.expires_at)})


class FileStore:
    """The files of all tenants. Each sees its own alone.

    Args:
      folder: where they are kept, with the rights of this user only; made if it is not there.
      max_bytes: of one file. max_files: that a tenant may have uploaded.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_files: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self.max_bytes, self._max_files = folder, max_bytes, max_files
        self._files = dict(records.read_all(folder, _PREFIX, StoredFile))
        for path in folder.glob("*.data"):  # of uploads that a crash cut short
            if path.stem not in self._files:
                path.unlink()

    def check_room(self, tenant: str) -> None:
        """Raises 400 when the tenant has as many files as it may."""
        count = sum(file.tenant == tenant and file.purpose != "batch_output" for file in self._files.values())
        if count >= self._max_files:
            message = f"There are {count} uploaded files, the most that this server keeps. Delete some."
            raise ApiError(400, message, code="too_many_files")

    async def add(
        self, tenant: str, filename: str, purpose: str, source: BinaryIO, expires_after: int | None = None
    ) -> StoredFile:
        """Keeps what `source` holds."""
        name = records.new_name(_PREFIX)
        path = self._folder / f"{name}.data"
        try:
            await asyncio.to_thread(_copy, source, path)
            self.check_room(tenant)  # again: others may have come meanwhile
            return self._record(name, tenant, filename, purpose, expires_after)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def adopt(self, name: str, path: Path, tenant: str, filename: str, expires_after: int | None) -> StoredFile:
        """Keeps the file at `path` under an id that was made for it. Doing it again changes nothing."""
        if name in self._files:
            return self._files[name]
        with contextlib.suppress(FileExistsError):
            os.link(path, self._folder / f"{name}.data")
        return self._record(name, tenant, filename, "batch_output", expires_after)

    def _record(self, name: str, tenant: str, filename: str, purpose: str, expires_after: int | None) -> StoredFile:
        now, size = time.time(), (self._folder / f"{name}.data").stat().st_size
        expires_at = None if expires_after is None else now + expires_after
        file = StoredFile(name, tenant, filename, purpose, size, now, expires_at)
        records.write(self._folder / f"{name}.json", file)
        self._files[name] = file
        return file

    def list(self, tenant: str) -> list[StoredFile]:
        """Of a tenant, the oldest first."""
        self._expire()
        mine = [file for file in self._files.values() if file.tenant == tenant]
        return sorted(mine, key=lambda file: (file.created_at, file.id))

    def get(self, tenant: str, name: str, param: str | None = None, status: int = 404) -> StoredFile:
        """Raises `status` where the tenant has no such file."""
        self._expire()
        file = self._files.get(name)
        if file is None or file.tenant != tenant:
            message = f"There is no file {show(name)}."
            raise ApiError(status, message, param=param, code="file_not_found")
        return file

    def path(self, file: StoredFile) -> Path:
        """Where its content is."""
        return self._folder / f"{file.id}.data"

    def remove(self, file: StoredFile) -> None:
        """Forgets it. Who reads it at the moment may go on."""
        del self._files[file.id]
        (self._folder / f"{file.id}.json").unlink(missing_ok=True)
        (self._folder / f"{file.id}.data").unlink(missing_ok=True)

    def _expire(self) -> None:
        now = time.time()
        for file in [file for file in self._files.values() if file.expires_at is not None and file.expires_at <= now]:
            self.remove(file)


def _copy(source: BinaryIO, path: Path) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
