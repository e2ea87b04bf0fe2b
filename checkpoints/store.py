"""The checkpoints of a training run: written in the background by Orbax, committed whole, verified when they are read.

`<directory>/step_00000010/` holds `twinax.json` (see `manifest`), `tokenizer/` and `arrays/` (an Orbax PyTree).
- `save` returns once the arrays are copied: they may be donated or changed at once. The rest happens in a thread.
- A step is written under a hidden name, checksummed and fsynced, then renamed: it exists whole or not at all, whenever
  the process is killed or the disk fills up.
- `restore` compares every file with its checksum before any array is handed out (Orbax alone restores flipped bits
  silently), and falls back to the newest good step, saying which were bad and why.
- Old steps are deleted only after a newer one is committed.
- Several processes call everything alike, on a disk that they share: each writes and reads what its devices hold, and
  computes its share of the checksums; process 0 commits. What fails in one fails in all (see `shared`).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..sharding import agreement
from . import files, manifest, shared
from .errors import CheckpointError, DamagedCheckpoint, NoCheckpoint, SaveError
from .manifest import Description
from .step import StepWriter, flatten, read_state, snapshot, spec_of, start_arrays

__all__ = ["CheckpointStore", "Description", "Restored"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A restored step. `skipped` names newer steps that were damaged, with the reason."""

    step: int
    state: Any
    description: Description
    skipped: tuple[tuple[int, str], ...] = ()


class CheckpointStore:
    """The step folders in `directory`, which is made when it does not exist; what killed runs left there is removed.

    `keep_last` newest steps are kept (None keeps all), and every step that `keep_every` divides. One thread may use it.
    A context manager; leaving waits for the save in progress.
    """

    def __init__(self, directory: str | Path, *, keep_last: int | None = 3, keep_every: int | None = None):
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise CheckpointError(f"{name} must be at least 1 or None, not {value}")
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writer: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._bad: set[int] = set()
        _finish_before_exit(self)
        try:
            shared.make_directory(self.directory, self._make_directory)
            if not os.access(self.directory, os.W_OK | os.X_OK):  # said now, and not after the first thousand steps
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.directory))
        except OSError as error:
            raise SaveError(
                f"checkpoints cannot be kept in {self.directory}: {error.strerror or error} ({error.filename}); "
                "choose another folder or allow writing there"
            ) from error

    def _make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for done in files.recover(self.directory):
            _log.warning("%s: %s, left by a run that was killed", self.directory, done)

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return list(manifest.step_folders(self.directory))

    def latest(self) -> int | None:
        """The newest committed step, None when there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Where `step` is, or will be."""
        return self.directory / manifest.step_name(step)

    def save(self, step: int, state: Any, description: Description, *, wait: bool = False) -> None:
        """Save a pytree of arrays as `step`, replacing it when it exists. Waits for the save before it.

        Returns when the arrays have been copied; `wait=True` when the step is committed. Raises `SaveError` when the
        save before this one, or this one, failed: then nothing that was committed is lost, and saving again is allowed.
        """
        self.wait()
        flat = flatten(state)
        specs = {name: spec_of(name, leaf) for name, leaf in flat.items()}
        if not specs:
            raise CheckpointError("the state has no arrays")
        manifest.check_description(description)
        copies = jax.block_until_ready({name: snapshot(leaf) for name, leaf in flat.items()})
        writer, tmp = shared.begin(lambda: StepWriter(self.path(step))), files.unfinished(self.path(step))
        try:
            finish = start_arrays(tmp, copies)
        except Exception as error:
            if writer is not None:
                writer.abandon()
            raise self._explain(step, error) from error

        def complete(known: dict[str, tuple[int, str]]) -> None:
            assert isinstance(writer, StepWriter)
            writer.finish(step, description, specs, known)

        def commit() -> None:
            try:
                shared.settle(writer, tmp, _error_of(finish), complete)
            except Exception as error:
                self._failure = self._explain(step, error)
                self._failure.__cause__ = error
                _log.error("%s", self._failure)
                return
            self._bad.discard(step)
            if writer is not None:
                self._delete_old(step)

        del flat, copies
        self._writer = threading.Thread(target=commit, name=f"twinax-save-{step}")
        self._writer.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress. Raises `SaveError` when it failed, once."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`wait`: a store holds nothing else."""
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            self._writer.join()

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Restore a state with the structure, shapes, dtypes and shardings of `like` (arrays or `ShapeDtypeStruct`s).

        NumPy leaves of `like` come back as NumPy, others as `jax.Array`. Without `step`, the newest good one. Raises
        `NoCheckpoint`, `DamagedCheckpoint` (none is good, or the one asked for is bad), `MismatchedCheckpoint` (another
        model or another optimizer: names the first differing arrays).
        """
        self.wait()
        steps = shared.agreed_steps(self.steps())
        if step is not None and step not in steps:
            raise NoCheckpoint(f"{self.directory} has no step {step}; it has {steps or 'none'}")
        if not steps:
            raise NoCheckpoint(f"{self.directory} has no checkpoints (folders such as {manifest.step_name(10)})")
        skipped: list[tuple[int, str]] = []
        for candidate in [step] if step is not None else sorted(steps, reverse=True):
            try:
                found = shared.agree_on_damage(functools.partial(manifest.read, self.path(candidate)))
                shared.verify(found)
                state = shared.agree_on_damage(functools.partial(read_state, found, like))
            except DamagedCheckpoint as error:
                self._bad.add(candidate)
                skipped.append((candidate, str(error)))
                continue
            if skipped and agreement.index() == 0:
                _report(skipped, candidate)
            return Restored(candidate, state, found.description, tuple(skipped))
        tried, reasons = [bad for bad, _ in skipped], "\n".join(reason for _, reason in skipped)
        raise DamagedCheckpoint(f"no good checkpoint among steps {tried} of {self.directory}:\n{reasons}")

    def _explain(self, step: int, error: Exception) -> SaveError:
        reason = str(error).strip().splitlines()
        shown = " ".join(reason)[:400] if reason else type(error).__name__
        return SaveError(
            f"step {step} was not saved in {self.directory}: {shown} "
            f"({_free_space(self.directory)}); committed steps {self.steps()} are untouched; "
            "make room or repair the cause, and save again"
        )

    def _delete_old(self, newest: int) -> None:
        if self._keep_last is None:
            return
        steps = [step for step in self.steps() if step <= newest]
        kept = [step for step in steps if step not in self._bad][-self._keep_last :]
        for step in steps:
            if step >= kept[0] or (self._keep_every and step % self._keep_every == 0):
                continue
            try:
                files.discard(self.path(step))
            except OSError as error:
                _log.warning("the old checkpoint %s could not be deleted: %s", self.path(step), error)


def _finish_before_exit(store: CheckpointStore) -> None:
    # When the interpreter ends, thread pools stop before threads are joined and before atexit, and Orbax needs them:
    # only this hook lets a save that nobody waited for complete.
    alive = weakref.ref(store)

    def join() -> None:
        found = alive()
        if found is not None and found._writer is not None:
            found._writer.join()

    getattr(threading, "_register_atexit", lambda hook: None)(join)


def _error_of(finish: Callable[[], None]) -> Exception | None:
    try:
        finish()
    except Exception as error:
        return error
    return None


def _free_space(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,} bytes are free there"
    except OSError as error:
        return f"its free space is unknown: {error.strerror}"


def _report(skipped: list[tuple[int, str]], used: int) -> None:
    reasons = "\n".join(reason for _, reason in skipped)
    text = f"damaged checkpoints were passed over; step {used} is used instead:\n{reasons}"
    _log.warning("%s", text)
    warnings.warn(text, stacklevel=3)
