"""Which files a path stands for."""

import fnmatch
import glob
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .config import DataConfig, DataError


@dataclass(frozen=True)
class SourceFile:
    """A file of text.

    Attributes:
      path: absolute.
      named: whether the user named this very file; then any fault in it is an error, where one of many may be skipped.
      size, mtime_ns: from its status; with the path they recognise a file that has not changed.
    """

    path: str
    named: bool
    size: int
    mtime_ns: int

    @property
    def is_gzip(self) -> bool:
        return self.path.lower().endswith(".gz")

    @property
    def is_jsonl(self) -> bool:
        return self.path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def find_files(config: DataConfig) -> list[SourceFile]:
    """The files of `config.path`, each once, sorted within each path.

    Raises:
      DataError: a path that is not there, a pattern that matches nothing, a folder that may not be read.
    """
    found: dict[str, SourceFile] = {}
    for given in config.paths:
        path = os.path.abspath(os.path.expanduser(given))
        try:
            mode = _mode(path)
            if mode is None and glob.has_magic(path):
                names, named = _matches(given, path, config.exclude), False
            elif mode is None:
                raise DataError(f"no such file or folder: {given}{_nearest(path)}")
            elif stat.S_ISDIR(mode):
                names, named = _walk(path, config.exclude), False
                if not names:
                    raise DataError(
                        f"the folder {given} holds no files (hidden ones and {config.exclude} are left out)"
                    )
            else:
                names, named = [path], True
            for name in names:
                status = os.stat(name)
                if stat.S_ISREG(status.st_mode):
                    source = SourceFile(name, named, status.st_size, status.st_mtime_ns)
                    found.setdefault(os.path.realpath(name), source)
                elif named:
                    raise DataError(f"{given} is not a regular file; copy its contents into one")
        except OSError as error:
            raise cannot_read(error.filename or path, error) from error
    if not found:
        raise DataError(f"data.path = {config.path!r} stands for no regular file")
    return list(found.values())


def cannot_read(path: str, error: OSError) -> DataError:
    """A DataError for an OSError, with the next step where it is known."""
    advice = "; let this user read it (chmod), or leave it out" if isinstance(error, PermissionError) else ""
    return DataError(f"cannot read {path}: {error.strerror or error}{advice}")


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _excluded(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _walk(folder: str, exclude: tuple[str, ...]) -> list[str]:
    """All files under a folder. Unlike `os.walk` by default, a folder that may not be read is an error."""

    def fail(error: OSError) -> None:
        raise error

    names: list[str] = []
    for where, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not _excluded(name, exclude))
        paths = (os.path.join(where, name) for name in sorted(files) if not _excluded(name, exclude))
        names += [path for path in paths if os.path.exists(path)]  # a link to nothing is no file
    return sorted(names)


def _matches(given: str, pattern: str, exclude: tuple[str, ...]) -> list[str]:
    # Names in the fixed part of the pattern are the user's own choice: only what the wildcards matched is excluded.
    parts = Path(pattern).parts
    fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    root = str(Path(*parts[:fixed]))
    if _mode(root) is None:
        raise DataError(f"no files match {given}: the folder {root} does not exist{_nearest(root)}")
    os.scandir(root).close()  # glob takes a folder that it may not read for an empty one
    hits = (path for path in glob.glob(pattern, recursive=True, include_hidden=True) if os.path.isfile(path))
    names = sorted(p for p in hits if not any(_excluded(part, exclude) for part in Path(p).parts[fixed:]))
    if not names:
        raise DataError(
            f"no files match {given} (names like {', '.join(exclude)} are left out; '**' goes into folders)"
        )
    return names


def _nearest(path: str) -> str:
    """'; the nearest is X' for a path that is not there, from the names beside it."""
    import difflib

    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        return f" (nor does the folder {folder} exist)"
    near = difflib.get_close_matches(name, os.listdir(folder), n=1)
    return f"; the nearest name there is {near[0]!r}" if near else ""
