"""Conversion between Twinax step folders and Hugging Face folders, tensor by tensor, without torch or transformers.

- Every number of the source is one number of the target, with the same bits (unless a `dtype` is asked for): tensors
  are parameters, or parts of them, as the family's table says.
- Memory stays bounded: files are mapped on both sides, and layers are stacked in a mapped file of the target's folder.
- At the end the target is read again and compared with the source. Only then it gets its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from ..models import families
from ..models.config import DecoderConfig
from ..models.families import TensorEntry
from . import files, hf, manifest, safetensors
from .errors import CheckpointError, DamagedCheckpoint, SaveError
from .manifest import ArraySpec, Description, Manifest
from .pieces import Parameter, tensor_from, tensor_shape
from .tokenizer import check_vocabulary

DEFAULT_SHARD_BYTES = 5_000_000_000
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


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


@dataclass
class _Meter:
    """Counts bytes for a progress callback."""

    total: int
    tell: Progress | None
    done: int = 0

    def add(self, what: str, count: int) -> None:
        self.done += count
        if self.tell is not None:
            self.tell(what, self.done, self.total)


@dataclass
class _Cast:
    """Gives tensors the dtype asked for. A finite number that would become infinite is an error."""

    dtype: np.dtype | None
    seen: set[str] = field(default_factory=set)

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        if self.dtype is None or array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):  # looked for below
            cast = array.astype(self.dtype)
        if np.isfinite(array).all() and not np.isfinite(cast).all():
            raise CheckpointError(f"{name} has numbers too large for {self.dtype}; use bfloat16 or float32")
        return cast

    def of(self, dtype: np.dtype) -> np.dtype:
        return self.dtype or dtype


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dtype: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | bool | None = None,
) -> Report:
    """Convert a Twinax step or run (its newest good step) to a Hugging Face folder, or a Hugging Face folder to a step.

    Args:
        source: what to convert; its kind decides the direction.
        target: the folder to make. It appears complete or not at all.
        overwrite: replace `target` when it is a model folder. Any other existing folder is refused.
        dtype: "float32", "bfloat16" or "float16"; None keeps the bits.
        max_shard_bytes: how much of a model goes into one safetensors file.
        progress: a callback, or True for a progress bar on standard error.

    Raises `CheckpointError`s, the family's `ValueError` for a config that is not understood, `TokenizerError`. Every
    tensor that is missing, unknown or wrongly shaped is listed in one error. The source is never changed.
    """
    from .load import locate  # needs JAX

    kind, folder = locate(source)
    final = Path(target).expanduser().absolute()
    cast = _Cast(_parse_dtype(dtype))
    _check_target(Path(source).expanduser().absolute(), folder.absolute(), kind, final, overwrite)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{final.parent} cannot be made: {error.strerror}; choose another target") from error
    with _bar(progress) as tell:
        if kind == "hugging_face":
            return _to_twinax(folder, final, cast, tell)
        return _to_hugging_face(folder, kind, final, cast, max_shard_bytes, tell)


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
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SaveError(f"{folder} has {free:,} bytes free and the conversion takes {needed:,}; make room first")


@contextlib.contextmanager
def _making(folder: files.NewFolder) -> Iterator[None]:
    """Removes the unfinished folder when anything fails; a failing disk becomes a `SaveError`."""
    try:
        yield
    except OSError as error:
        folder.abandon()
        raise SaveError(f"{folder.final} was not written: {error}; nothing was changed") from error
    except BaseException:
        folder.abandon()
        raise


# Twinax to Hugging Face


def _to_hugging_face(
    source: Path, kind: str, final: Path, cast: _Cast, max_shard_bytes: int, tell: Progress | None
) -> Report:
    from .load import open_step

    found = open_step(source, kind, (f"{manifest.ARRAYS}/params.",))
    description = found.description
    config = DecoderConfig.from_dict(description.model)
    reader = _StepReader(found, config, cast)
    shards = safetensors.plan_shards(reader.specs, max_shard_bytes)
    size = sum(spec.nbytes for spec in reader.specs)
    _check_space(final.parent, size)
    meter = _Meter(2 * size, tell)
    folder = files.NewFolder(final)
    with _making(folder):
        for name, specs in shards.items():
            with safetensors.SafetensorsWriter(folder.tmp / name, specs, {"format": "pt"}) as writer:
                for spec in specs:
                    writer.write(spec.name, reader.read(spec.name))
                    meter.add(f"write {spec.name}", spec.nbytes)
        safetensors.write_index(folder.tmp, shards)
        for name, data in description.tokenizer_files.items():
            path = folder.tmp / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        _write_hf_json(folder.tmp, description, config, reader.specs[0].dtype.name)
        _verify_hugging_face(folder.tmp, config, reader, meter)
        written = tuple(files.list_files(folder.tmp))
        folder.commit()
    notes = []
    if not description.tokenizer_files:
        notes.append("the checkpoint has no tokenizer, so the folder has none")
    left = [name for name in found.arrays if not name.startswith("params.")]
    if left:
        notes.append(f"{len(left)} arrays of training state (optimizer, step) have no place in a Hugging Face folder")
    return _report(found.folder, final, "to_hugging_face", reader.specs, size, written, notes)


class _StepReader:
    """The parameters of a step under their Hugging Face names."""

    def __init__(self, found: Manifest, config: DecoderConfig, cast: _Cast):
        from .step import open_stored

        table = families.load(config.family).tensor_table(config)
        needed = {f"params.{entry.name}" for entry in table}
        stored = {name for name in found.arrays if name.startswith("params.")}
        if needed != stored:
            raise CheckpointError(
                f"{found.folder} does not have the parameters of its config: missing {sorted(needed - stored)}, "
                f"unknown {sorted(stored - needed)}"
            )
        self._arrays = {entry.name: open_stored(found, f"params.{entry.name}") for entry in table}
        self._entries: dict[str, list[TensorEntry]] = {}
        for entry in table:
            self._entries.setdefault(entry.hf_name, []).append(entry)
        shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self._cast = cast
        self.specs = []
        for name, entries in self._entries.items():
            dtypes = {self._arrays[entry.name].dtype for entry in entries}
            if len(dtypes) > 1:
                raise CheckpointError(
                    f"{name} holds {', '.join(entry.name for entry in entries)}, which differ in dtype; ask for one "
                    "with dtype (--dtype)"
                )
            spec = safetensors.TensorSpec(name, cast.of(dtypes.pop()), tensor_shape(entries, shapes))
            self.specs.append(spec)
        self._spec_of = {spec.name: spec for spec in self.specs}

    def read(self, name: str) -> np.ndarray:
        spec = self._spec_of[name]
        return tensor_from(self._entries[name], spec.shape, spec.dtype, lambda entry: self._cast(name, self._of(entry)))

    def _of(self, entry: TensorEntry) -> np.ndarray:
        one = tuple(slice(i, i + 1) for i in entry.index)
        return self._arrays[entry.name].read(one)[(0,) * len(one)]


def _write_hf_json(folder: Path, description: Description, config: DecoderConfig, dtype: str) -> None:
    generation = dict(description.generation)
    if not generation and description.tokenizer_files:
        from .tokenizer import Tokenizer

        tokenizer = Tokenizer.from_files(description.tokenizer_files)
        ids = zip(hf.TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True)
        generation = {key: value for key, value in ids if value is not None}
    # Always written, null where there is none: transformers would fill in Llama 2's ids.
    token_ids = {key: generation.get(key) for key in hf.TOKEN_IDS}
    content = {**families.load(config.family).to_hf(config), "torch_dtype": dtype, **token_ids}
    (folder / hf.CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if generation:
        (folder / hf.GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _verify_hugging_face(folder: Path, config: DecoderConfig, reader: _StepReader, meter: _Meter) -> None:
    read, own = (one.without_training().to_dict() for one in (hf.open_folder(folder).config, config))
    if different := [f"{key}={own[key]!r} (config.json: {read[key]!r})" for key in own if own[key] != read[key]]:
        raise CheckpointError(
            f"The Hugging Face family {config.family!r} cannot express this model: {', '.join(different)}. It stays a "
            "Twinax checkpoint: `twinax serve` and `twinax train` take it as it is."
        )
    with safetensors.SafetensorsFolder(folder) as tensors:
        if set(tensors.specs()) != {spec.name for spec in reader.specs}:
            raise DamagedCheckpoint(f"{folder} does not have the tensors that were written to it")
        for spec in reader.specs:
            if not hf.same_bits(tensors.read(spec.name), reader.read(spec.name)):
                raise DamagedCheckpoint(f"{spec.name} was not written as it is; is the disk failing?")
            meter.add(f"verify {spec.name}", spec.nbytes)


# Hugging Face to Twinax


def _to_twinax(source: Path, final: Path, cast: _Cast, tell: Progress | None) -> Report:
    from ..models.decoder import param_shapes
    from .step import StepWriter

    opened = hf.open_folder(source)
    tokenizer = opened.tokenizer()
    if tokenizer is not None:
        check_vocabulary(tokenizer, opened.config.vocab_size)
    shapes = {name: shape.shape for name, shape in param_shapes(opened.config).items()}
    with opened.open_tensors() as tensors:
        parameters = hf.match_tensors(tensors, opened.config, shapes)
        stored = tensors.specs()
        names = dict.fromkeys(entry.hf_name for parameter in parameters.values() for entry in parameter.entries)
        used = [stored[name] for name in names]
        specs = [safetensors.TensorSpec(spec.name, cast.of(spec.dtype), spec.shape) for spec in used]
        size = sum(spec.nbytes for spec in specs)
        _check_space(final.parent, 2 * size)
        meter = _Meter(2 * size, tell)
        folder = StepWriter(final)
        with _making(folder):
            stage = folder.tmp / "stage"
            stage.mkdir()
            flat = {}
            for number, (name, parameter) in enumerate(parameters.items()):
                flat[f"params.{name}"] = _whole(parameter, cast, stage / str(number), meter)
            try:
                folder.start_arrays(flat, copy_host_arrays=False)()
            except Exception as error:
                raise SaveError(f"{final} was not written: {error}; nothing was changed") from error
            arrays = {name: ArraySpec(tuple(array.shape), array.dtype.name) for name, array in flat.items()}
            del flat
            shutil.rmtree(stage)
            _verify_step(folder.tmp, parameters, cast, meter)
            description = Description(
                family=opened.config.family,
                model=opened.config.to_dict(),
                tokenizer_files={} if tokenizer is None else tokenizer.files(),
                generation=opened.generation,
            )
            folder.finish(manifest.step_of(final.name) or 0, description, arrays)
        harmless = stored.keys() - {spec.name for spec in used}
        notes = [f"{name} changes nothing and was left out" for name in sorted(harmless)]
    if tokenizer is None:
        notes.append("the folder has no tokenizer.json, so the checkpoint has no tokenizer")
    return _report(source, final, "to_twinax", specs, size, tuple(files.list_files(final)), notes)


def _whole(parameter: Parameter, cast: _Cast, path: Path, meter: _Meter) -> np.ndarray:
    """A parameter as a mapped array: the tensor itself, or a file at `path` into which its parts are copied."""
    dtype = cast.of(parameter.dtype)
    (first, *more) = parameter.entries
    if not more and not first.index and first.rows is None and not first.transposed and dtype == parameter.dtype:
        found = parameter.read()
        meter.add(f"read {first.hf_name}", found.nbytes)
        return found
    staged = np.memmap(path, dtype, "w+", shape=parameter.shape)
    for entry, part in parameter.parts():
        staged[entry.index] = cast(entry.hf_name, part)
        meter.add(f"read {entry.hf_name}", part.size * dtype.itemsize)
    staged.flush()
    return np.asarray(staged)


def _verify_step(folder: Path, parameters: dict[str, Parameter], cast: _Cast, meter: _Meter) -> None:
    from .arrays import open_array

    for name, parameter in parameters.items():
        written = open_array(folder / manifest.ARRAYS / f"params.{name}")
        for entry, part in parameter.parts():
            one = tuple(slice(i, i + 1) for i in entry.index)
            array = written.read(one)[(0,) * len(one)]
            if not hf.same_bits(array, cast(entry.hf_name, part)):
                raise DamagedCheckpoint(f"{entry.hf_name} was not written as it is; is the disk failing?")
            meter.add(f"verify {entry.hf_name}", array.nbytes)


def _report(
    source: Path,
    target: Path,
    direction: str,
    specs: list[safetensors.TensorSpec],
    size: int,
    written: tuple[str, ...],
    notes: list[str],
) -> Report:
    return Report(
        source=source,
        target=target,
        direction=direction,
        tensors=len(specs),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs),
        bytes=size,
        dtypes=tuple(sorted({spec.dtype.name for spec in specs})),
        files=written,
        notes=tuple(notes),
    )
