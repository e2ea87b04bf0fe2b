"""Which files a path stands for."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
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
                names, named = sorted(_expand(path, ("**",), config.exclude)), False
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


def _expand(folder: str, pattern: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[str]:
    """The files under a folder that match a pattern, given in parts; "**" stands for any folders.

    Unlike `glob`, a folder that may not be read is an error, and folders that are left out are not looked into. Names
    that the pattern spells out are the user's own choice and never left out.
    """
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        if rest:
            yield from _expand(folder, rest, exclude)
        for entry in _entries(folder):
            if _fits(entry.name, exclude):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _expand(entry.path, pattern, exclude)
            elif not rest and entry.is_file():
                yield entry.path
        return
    for entry in _entries(folder):
        if fnmatch.fnmatchcase(entry.name, head) and not (glob.has_magic(head) and _fits(entry.name, exclude)):
            if rest and entry.is_dir():
                yield from _expand(entry.path, rest, exclude)
            elif not rest and entry.is_file():
                yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return list(found)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _matches(given: str, pattern: str, exclude: tuple[str, ...]) -> list[str]:
    parts = Path(pattern).parts
    fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    root = str(Path(*parts[:fixed]))
    if _mode(root) is None:
        raise DataError(f"no files match {given}: the folder {root} does not exist{_nearest(root)}")
    names = sorted(set(_expand(root, parts[fixed:], exclude)))
    if not names:
        raise DataError(f"no files match {given} ({', '.join(exclude)} are left out; '**' goes into folders)")
    return names


def _nearest(path: str) -> str:
    """'; the nearest is X' for a path that is not there, from the names beside it."""
    import difflib

    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        return f" (nor does the folder {folder} exist)"
    near = difflib.get_close_matches(name, os.listdir(folder), n=1)
    return f"; the nearest name there is {near[0]!r}" if near else ""
