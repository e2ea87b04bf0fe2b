"""Folders that appear whole or not at all, checksums, and names that are nearly right."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import SaveError

_CHUNK = 1 << 20
TMP_PREFIX = ".tmp_"
CONTENT = ".content"  # in an unfinished folder: what it is to hold


def checksum_bytes(data: bytes) -> str:
    """BLAKE2b of `data`, 16 bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def checksum_file(path: Path) -> tuple[int, str]:
    """(size in bytes, checksum) of what is stored at `path`, read in pieces."""
    digest, size, buffer = hashlib.blake2b(digest_size=16), 0, bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def checksum_files(root: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """`checksum_file` of each `root / name`, in a few threads (hashing releases the GIL)."""
    ordered = list(names)
    if sum((root / name).stat().st_size for name in ordered) < _CHUNK:  # not worth a thread
        return {name: checksum_file(root / name) for name in ordered}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(lambda name: checksum_file(root / name), ordered), strict=True))


def list_files(root: Path) -> list[str]:
    """Every file under `root`, as sorted relative POSIX paths."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def size_on_disk(root: Path) -> int:
    """Bytes of all files under `root`."""
    return sum((root / name).stat().st_size for name in list_files(root))


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """`fsync` everything under `root`, and `root` itself, the leaves first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))


def settle(path: Path) -> None:
    """Force a file to the disk and, where the system can, out of its cache: what is read next is what the disk has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write and fsync a small file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def discard(folder: Path) -> None:
    """Remove a folder so that, killed halfway, no half of it is left under its own name."""
    doomed = folder
    if not folder.name.startswith("."):
        doomed = folder.with_name(f"{TMP_PREFIX}gone_{folder.name}_{os.getpid()}")
        os.rename(folder, doomed)
    shutil.rmtree(doomed)


def make_locked(folder: Path) -> int:
    """Make `folder` and lock it: its writer is alive. The lock goes when the descriptor returned is closed."""
    folder.mkdir()
    return _lock(folder)


def _lock(folder: Path) -> int:
    """OSError when somebody has the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def unfinished(final: Path) -> Path:
    """Where the folder `final` is while it is written."""
    return final.with_name(f"{TMP_PREFIX}{final.name}")


class NewFolder:
    """A folder under a hidden name beside `final`, which becomes `final` when it is complete.

    What a killed writer left is removed, unless it was to hold the same `content` (in any words): that is taken over.
    Raises `SaveError` when it cannot be made, or another process is making it.
    """

    def __init__(self, final: Path, content: str | None = None):
        self.final = final
        self.tmp = unfinished(final)
        try:
            if self.tmp.exists() and is_abandoned(self.tmp):
                if content is not None and _read(self.tmp / CONTENT) == content:
                    self._lock = _lock(self.tmp)
                    return
                shutil.rmtree(self.tmp)
            self._lock = make_locked(self.tmp)
            if content is not None:
                (self.tmp / CONTENT).write_text(content)
        except FileExistsError:
            raise SaveError(
                f"{self.tmp} is being written by another process; wait for it, or use another name"
            ) from None
        except OSError as error:
            raise SaveError(f"{self.tmp} cannot be made: {error.strerror}; choose a folder you can write to") from error

    def commit(self) -> None:
        """Force everything to the disk and give the folder its name, replacing what has it."""
        fsync_tree(self.tmp)
        (self.tmp / CONTENT).unlink(missing_ok=True)
        fsync(self.tmp)
        commit(self.tmp, self.final)
        os.close(self._lock)

    def abandon(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.close(self._lock)

    def leave(self) -> None:
        """Keep what has been written, for a `NewFolder` of the same content."""
        os.close(self._lock)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def is_abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of `make_locked` on `folder`: its writer was killed."""
    try:
        os.close(_lock(folder))
    except OSError:
        return False
    return True


def _aside(final: Path) -> Path:
    return final.with_name(f".replaced_{final.name}")


def commit(tmp: Path, final: Path) -> None:
    """Give the fsynced folder `tmp` its `final` name in one atomic step; what was there steps aside until that is done.

    A process killed in between leaves `.replaced_<name>`, which `put_back` puts back.
    """
    aside = _aside(final)
    if final.exists():
        os.rename(final, aside)
    os.rename(tmp, final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def put_back(final: Path) -> bool:
    """Undo what a writer that was killed in `commit` did to the folder `final` that was there. Whether it was away."""
    aside = _aside(final)
    if not aside.exists():
        return False
    if final.exists():
        shutil.rmtree(aside)
        return False
    os.rename(aside, final)
    return True


def recover(directory: Path) -> list[str]:
    """Undo what killed writers left: unfinished folders go, replaced ones return. Gives what was done."""
    done = []
    for path in sorted(directory.glob(".replaced_step_*")):
        final = path.with_name(path.name.removeprefix(".replaced_"))
        if put_back(final):
            done.append(f"put back {final.name}")
    for path in sorted([*directory.glob(f"{TMP_PREFIX}step_*"), *directory.glob(f"{TMP_PREFIX}gone_step_*")]):
        if path.is_dir() and is_abandoned(path):
            shutil.rmtree(path)
            done.append(f"removed the unfinished {path.name}")
    return done


def nearest_existing(path: Path) -> str:
    """A sentence that helps with a path that does not exist: the nearest name in the deepest folder that does."""
    folder, missing = path.absolute(), ""
    while not folder.exists():
        folder, missing = folder.parent, folder.name
    if not folder.is_dir():
        return f"{folder} is a file, not a folder."
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder} exists but cannot be listed ({error.strerror})."
    near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    if near:
        return f"{folder} exists; the nearest name in it is {near[0]!r}."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{folder} exists and holds {shown or 'nothing'}."
