"""Conversion between Twinax step folders and Hugging Face folders, tensor by tensor, without torch or transformers.

- Every number of the source is one number of the target, with the same bits (unless a `dtype` is asked for): tensors
  are parameters, or parts of them, as the family's table says.
- Memory stays bounded, whatever the size of the model: tensors are copied in blocks (see `stream`).
- At the end the target is read again and compared with the source. Only then it gets its name.
- Killed, and called again with the same arguments, it goes on: what stands in the target as it should is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from ..sharding.plan import Plan
from . import files, hf, manifest
from .errors import CheckpointError, SaveError
from .stream import Cast, Progress

if TYPE_CHECKING:
    from .to_hugging_face import ToHuggingFace
    from .to_step import ToStep

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Report:
    """What a conversion did. `notes` says what was left behind, and why that is harmless."""

    source: Path
    target: Path
    direction: str  # "to_hugging_face" or "to_twinax"
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dtype: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    plan: Plan | str | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Convert a Twinax step or run (its newest good step) to a Hugging Face folder, or a Hugging Face folder to a step.

    Args:
        source: what to convert; its kind decides the direction.
        target: the folder to make. It appears complete or not at all.
        overwrite: replace `target` when it is a model folder. Any other existing folder is refused.
        dtype: "float32", "bfloat16" or "float16"; None keeps the bits.
        max_shard_bytes: how much of a model goes into one safetensors file.
        plan: "fsdp=8": cut the files of a step as that plan cuts the parameters, so that each device's part has files
            of its own. Any plan can still read them.
        progress: a callback, or True for a progress bar on standard error.

    Raises `CheckpointError`s, the family's `ValueError` for a config that is not understood, `TokenizerError`. Every
    tensor that is missing, unknown or wrongly shaped is listed in one error. The source is never changed.
    """
    from .load import locate  # needs JAX

    kind, folder = locate(source)
    final = Path(target).expanduser().absolute()
    cast = Cast(_parse_dtype(dtype))
    files.put_back(final)
    _check_target(Path(source).expanduser().absolute(), folder.absolute(), kind, final, overwrite)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{final.parent} cannot be made: {error.strerror}; choose another target") from error
    with _bar(progress) as tell, _open(kind, folder, cast, plan, max_shard_bytes) as job:
        given = {"dtype": str(cast.dtype), "plan": str(plan), "max_shard_bytes": max_shard_bytes}
        to_do = job.begin(final, json.dumps({**given, "source": _state_of(job.source)}))
        with _making(to_do):
            _check_space(to_do.tmp, job.size)
            copy = job.copy(to_do, tell)
            copy.write()
            copy.verify()
            job.finish(to_do)
    return Report(
        source=job.source,
        target=final,
        direction=job.direction,
        tensors=len(job.specs),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in job.specs),
        bytes=job.size,
        dtypes=tuple(sorted({spec.dtype.name for spec in job.specs})),
        files=tuple(files.list_files(final)),
        notes=tuple(job.notes),
    )


def _open(
    kind: str, folder: Path, cast: Cast, plan: Plan | str | None, max_shard_bytes: int
) -> ToStep | ToHuggingFace:
    if kind == "hugging_face":
        from .to_step import ToStep

        return ToStep(folder, cast, Plan.parse(plan) if isinstance(plan, str) else plan)
    from .to_hugging_face import ToHuggingFace

    if plan is not None:
        raise CheckpointError(
            f"plan={str(plan)!r} (--plan) cuts the files of a Twinax step, and {folder} becomes a Hugging Face folder; "
            "leave it out"
        )
    return ToHuggingFace(folder, kind, cast, max_shard_bytes)


def _state_of(folder: Path) -> list[Any]:
    """What changes when the source does."""
    seen = {name: (folder / name).stat() for name in files.list_files(folder)}
    return [str(folder.resolve()), [[name, one.st_size, one.st_mtime_ns] for name, one in seen.items()]]


def _parse_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    known = ("float32", "bfloat16", "float16")
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise CheckpointError(f"a model is converted to {', '.join(known)}, not to {dtype!r}")
    return found


def _check_target(source: Path, folder: Path, kind: str, target: Path, overwrite: bool) -> None:
    resolved = target.resolve()
    for origin in (source.resolve(), folder.resolve()):
        if origin == resolved or resolved in origin.parents:
            raise CheckpointError(f"the target {target} holds the source {source}; choose a folder outside of it")
    if kind == "step" and folder.resolve() in resolved.parents:
        raise CheckpointError(f"the target {target} lies in the step folder {folder}; choose a folder outside of it")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists; overwrite=True (--overwrite) replaces it, or choose another target")
    is_model = target.is_dir() and any((target / name).exists() for name in (manifest.NAME, hf.CONFIG))
    if not is_model and not (target.is_dir() and not os.listdir(target)):
        raise CheckpointError(
            f"{target} exists and is not a model folder, so it is not overwritten; choose another target"
        )


@contextlib.contextmanager
def _bar(progress: Progress | bool | None) -> Iterator[Progress | None]:
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("convert")

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def _check_space(folder: Path, needed: int) -> None:
    there = sum((folder / name).stat().st_blocks * 512 for name in files.list_files(folder))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise SaveError(
            f"{folder.parent} has {free:,} bytes free and the conversion takes {needed - there:,}; make room first"
        )


@contextlib.contextmanager
def _making(folder: files.NewFolder) -> Iterator[None]:
    """Removes the unfinished folder when anything fails, but leaves it for the next call when it is interrupted.

    A failing disk becomes a `SaveError`.
    """
    try:
        yield
    except KeyboardInterrupt:
        folder.leave()
        raise
    except OSError as error:
        folder.abandon()
        raise SaveError(f"{folder.final} was not written: {error}; nothing was changed") from error
    except BaseException:
        folder.abandon()
        raise
