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
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def unfinished(final: Path) -> Path:
    """Where the folder `final` is while it is written."""
    return final.with_name(f"{TMP_PREFIX}{final.name}")


class NewFolder:
    """A folder under a hidden name beside `final`, which becomes `final` when it is complete.

    Raises `SaveError` when it cannot be made, or another process is making it.
    """

    def __init__(self, final: Path):
        self.final = final
        self.tmp = unfinished(final)
        try:
            if self.tmp.exists() and is_abandoned(self.tmp):
                shutil.rmtree(self.tmp)
            self._lock = make_locked(self.tmp)
        except FileExistsError:
            raise SaveError(
                f"{self.tmp} is being written by another process; wait for it, or use another name"
            ) from None
        except OSError as error:
            raise SaveError(f"{self.tmp} cannot be made: {error.strerror}; choose a folder you can write to") from error

    def commit(self) -> None:
        """Force everything to the disk and give the folder its name, replacing what has it."""
        fsync_tree(self.tmp)
        commit(self.tmp, self.final)
        os.close(self._lock)

    def abandon(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.close(self._lock)


def is_abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of `make_locked` on `folder`: its writer was killed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def commit(tmp: Path, final: Path) -> None:
    """Give the fsynced folder `tmp` its `final` name in one atomic step; what was there steps aside until that is done.

    A process killed in between leaves `.replaced_<name>`, which `recover` puts back.
    """
    aside = final.with_name(f".replaced_{final.name}")
    if final.exists():
        os.rename(final, aside)
    os.rename(tmp, final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def recover(directory: Path) -> list[str]:
    """Undo what killed writers left: unfinished folders go, replaced ones return. Gives what was done."""
    done = []
    for path in sorted(directory.glob(".replaced_step_*")):
        final = path.with_name(path.name.removeprefix(".replaced_"))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)
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
