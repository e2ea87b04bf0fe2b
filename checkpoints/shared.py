"""One folder, written and verified by several processes. With one process nothing is said and nothing is waited for.

Orbax has every process write the parts of arrays that its devices hold. Here is what comes around that: process 0 makes
the folder and gives it its name when all have written; each process computes its share of the checksums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from ..sharding import agreement
from . import files, manifest
from .arrays import open_array
from .errors import DamagedCheckpoint, SaveError
from .manifest import Manifest

T = TypeVar("T")
_SUMS = ".checksums_"
_LAG = 60.0  # seconds that a network disk may take to show what another machine made


def make_directory(directory: Path, make: Callable[[], None]) -> None:
    """Calls `make` in process 0; SaveError where another process does not see the directory that it made."""
    if agreement.count() == 1:
        make()
        return
    mark = directory / f"{files.TMP_PREFIX}shared"
    if agreement.index() == 0:
        make()
        mark.write_text(str(os.getpid()))
    said = agreement.from_first("store/mark", lambda: mark.read_text())
    end = time.monotonic() + _LAG
    while not (seen := _read(mark) == said) and time.monotonic() < end:
        time.sleep(0.1)
    blind = list(agreement.problems("store/seen", "" if seen else "unseen"))
    if agreement.index() == 0:
        mark.unlink()
    if blind:
        raise SaveError(
            f"checkpoints cannot be kept in {directory}: of {agreement.count()} processes, {blind} do not see what "
            "process 0 writes there. Choose a folder (--output) on a disk that all machines share, at the same path."
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def begin(make: Callable[[], files.NewFolder]) -> files.NewFolder | None:
    """The folder that `make` begins, in process 0; None in the others. SaveError in all when it cannot be made."""
    made: list[files.NewFolder] = []

    def said() -> str:
        try:
            made.append(make())
        except SaveError as error:
            if agreement.count() == 1:
                raise
            return str(error)
        return ""

    problem = agreement.from_first("save/begin", said)
    if problem:
        raise SaveError(problem)
    return made[0] if made else None


class Barriers:
    """Orbax's barriers of one save. A process that fails comes to the next one too, and says so: then all fail at once.

    By itself Orbax would have the others wait there for ten minutes, and count its barriers differently ever after.
    """

    STAGES = 2  # "all have written" and "process 0 has finished"

    def __init__(self) -> None:
        self.name = agreement.unique("save/barriers")
        self._stage, self._failed = 0, False

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax calls. Raises RuntimeError when another process has failed."""
        self._meet("", timeout_ms)

    def fail(self, error: Exception, timeout_ms: int = 600_000) -> None:
        """Tells the others, if they are yet to come to a barrier, and nobody has told this process."""
        if not self._failed and self._stage < self.STAGES:
            with contextlib.suppress(RuntimeError):  # that is what this call is about
                self._meet(f"{type(error).__name__}: {error}", timeout_ms)

    def _meet(self, problem: str, timeout_ms: int) -> None:
        self._stage, self._failed = self._stage + 1, True
        found = agreement.problems(f"{self.name}/{self._stage}", problem, timeout_ms)
        if found:
            process, text = min(found.items())
            raise RuntimeError(f"process {process}: {text}")
        self._failed = False


def settle(
    folder: files.NewFolder | None,
    tmp: Path,
    error: Exception | None,
    complete: Callable[[dict[str, tuple[int, str]]], None],
) -> None:
    """After the arrays: completes and names the folder if all processes have written theirs, else abandons it.

    Args:
        folder: what `begin` gave.
        tmp: where it is for now.
        error: why this process could not write its arrays, None if it could.
        complete: called in process 0 with the checksums that are known; it names the folder.

    Raises what went wrong in this process, or RuntimeError with what another process said: in all, or in none.
    """
    if error is None and agreement.count() > 1:
        try:
            _write_sums(tmp)
        except OSError as trouble:
            error = trouble
    problems = agreement.problems("save/written", "" if error is None else f"{type(error).__name__}: {error}")
    if problems:
        if folder is not None:
            folder.abandon()
        process, text = min(problems.items())
        raise error or RuntimeError(f"process {process}: {text}")
    failures: list[Exception] = []

    def said() -> str:
        assert folder is not None
        try:
            complete(_collect_sums(tmp) if agreement.count() > 1 else {})
        except Exception as trouble:
            folder.abandon()
            failures.append(trouble)
            return f"process 0: {type(trouble).__name__}: {trouble}"
        return ""

    problem = agreement.from_first("save/committed", said)
    if problem:
        raise failures[0] if failures else RuntimeError(problem)


def _mine(names: list[str]) -> list[str]:
    return sorted(names)[agreement.index() :: agreement.count()]


def _write_sums(tmp: Path) -> None:
    """This process's share of the checksums. Where a disk shows it less than is there, process 0 does the rest."""
    names = [name for name in files.list_files(tmp) if not name.startswith(_SUMS)]
    sums = files.checksum_files(tmp, _mine(names))
    files.write_file(tmp / f"{_SUMS}{agreement.index()}", json.dumps(sums).encode())


def _collect_sums(tmp: Path) -> dict[str, tuple[int, str]]:
    known: dict[str, tuple[int, str]] = {}
    for path in sorted(tmp.glob(f"{_SUMS}*")):
        known |= {name: (size, checksum) for name, (size, checksum) in json.loads(path.read_bytes()).items()}
        path.unlink()
    for described in sorted((tmp / manifest.ARRAYS).glob("*/.zarray")):
        absent = [name for name in open_array(described.parent).file_names() if not (described.parent / name).is_file()]
        if absent:
            raise OSError(f"{described.parent} lacks {len(absent)} of its files, the first {absent[0]}")
    return known


def verify(found: Manifest) -> None:
    """`Manifest.verify` of all files, each process its share; DamagedCheckpoint in all processes or in none."""
    share = dataclasses.replace(found, files={name: found.files[name] for name in _mine(list(found.files))})
    agree_on_damage(share.verify)


def agree_on_damage(check: Callable[[], T]) -> T:
    """What `check` gives. If it finds damage in one process, DamagedCheckpoint is raised in all."""
    try:
        found, problem = check(), None
    except DamagedCheckpoint as error:
        found, problem = None, error
    said = agreement.problems("restore/damage", "" if problem is None else str(problem))
    if said:
        raise problem or DamagedCheckpoint(next(iter(said.values())))
    return cast(T, found)


def agreed_steps(steps: list[int]) -> list[int]:
    """The steps that process 0 sees: another machine's view of a disk may be a moment older."""
    return json.loads(agreement.from_first("restore/steps", lambda: json.dumps(steps)))
