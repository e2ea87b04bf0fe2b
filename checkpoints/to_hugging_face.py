"""A Twinax step becomes a Hugging Face folder: config.json, safetensors files and the tokenizer's files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..models import families
from ..models.config import DecoderConfig
from ..models.families import TensorEntry
from . import hf, manifest, safetensors
from .errors import CheckpointError, DamagedCheckpoint
from .files import NewFolder
from .load import open_step
from .pieces import tensor_from, tensor_shape
from .safetensors import SafetensorsFolder, TensorSpec
from .step import open_stored
from .stream import Box, Cast, Copy, Piece, Progress, Region
from .tokenizer import Tokenizer


class ToHuggingFace:
    """The conversion of a step, or of a run's newest good one, which is verified first. A context manager.

    Attributes: as of `to_step.ToStep`.
    """

    direction = "to_hugging_face"

    def __init__(self, path: Path, kind: str, cast: Cast, max_shard_bytes: int):
        found = open_step(path, kind, lambda found: found.verify([f"{manifest.ARRAYS}/params."]))
        self.source, self._cast, self._description = found.folder, cast, found.description
        self._config = DecoderConfig.from_dict(found.description.model)
        cast.check(self._config)
        table = families.load(self._config.family).tensor_table(self._config)
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
        self.specs = [TensorSpec(name, cast.of(self._dtype(name)), self._shape(name)) for name in self._entries]
        self.size = sum(spec.nbytes for spec in self.specs)
        self._shards = safetensors.plan_shards(self.specs, max_shard_bytes)
        self._written: SafetensorsFolder | None = None
        self._opening = threading.Lock()
        self.notes = []
        if not found.description.tokenizer_files:
            self.notes.append("the checkpoint has no tokenizer, so the folder has none")
        if left := len(found.arrays) - len(stored):
            what = "arrays of training state (optimizer, step)"
            self.notes.append(f"{left} {what} have no place in a Hugging Face folder")

    def _dtype(self, name: str) -> np.dtype:
        """Of a tensor, as it is stored."""
        entries = self._entries[name]
        dtypes = {self._arrays[entry.name].dtype for entry in entries}
        if len(dtypes) > 1 and self._cast.dtype is None:
            raise CheckpointError(
                f"{name} holds {', '.join(entry.name for entry in entries)}, which differ in dtype; ask for one "
                "with dtype (--dtype)"
            )
        return dtypes.pop()

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = {entry.name: tuple(self._arrays[entry.name].shape) for entry in self._entries[name]}
        return tensor_shape(self._entries[name], shapes)

    def __enter__(self) -> ToHuggingFace:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._written is not None:
            self._written.close()

    def begin(self, final: Path, content: str) -> NewFolder:
        """The folder to write to."""
        return NewFolder(final, content)

    def copy(self, folder: NewFolder, tell: Progress | None) -> Copy:
        """What is to be copied; writes all that is small."""
        self._write_small(folder.tmp)
        sizes, heads, pieces = {}, {}, []
        for file, specs in self._shards.items():
            heads[file], starts = safetensors.lay_out(specs, {"format": "pt"})
            sizes[file] = len(heads[file]) + sum(spec.nbytes for spec in specs)
            for spec in specs:
                at = (Region(file, starts[spec.name], tuple(slice(0, size) for size in spec.shape)),)
                source, written = partial(self._source, spec), partial(self._read_back, folder.tmp, spec.name)
                pieces.append(Piece(spec.name, spec.dtype, at, source, written))
        return Copy(folder.tmp, sizes, pieces, self._cast, tell, heads, self._release)

    def _write_small(self, folder: Path) -> None:
        description = self._description
        safetensors.write_index(folder, self._shards)
        for name, data in description.tokenizer_files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        generation = dict(description.generation)
        if not generation and description.tokenizer_files:
            tokenizer = Tokenizer.from_files(description.tokenizer_files)
            ids = zip(hf.TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True)
            generation = {key: value for key, value in ids if value is not None}
        # Always written, null where there is none: transformers would fill in Llama 2's ids.
        token_ids = {key: generation.get(key) for key in hf.TOKEN_IDS}
        own = families.load(self._config.family).to_hf(self._config)
        content = {**own, "torch_dtype": self.specs[0].dtype.name, **token_ids}
        (folder / hf.CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if generation:
            (folder / hf.GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        self._check_config(content)

    def _check_config(self, content: dict) -> None:
        """The config must come back as it is, before gigabytes are written for nothing."""
        again = hf.parse_config(json.loads(json.dumps(content)))
        read, own = (one.without_training().to_dict() for one in (again, self._config))
        if different := [f"{key}={own[key]!r} (config.json: {read[key]!r})" for key in own if own[key] != read[key]]:
            raise CheckpointError(
                f"The Hugging Face family {self._config.family!r} cannot express this model: {', '.join(different)}. "
                "It stays a Twinax checkpoint: `twinax serve` and `twinax train` take it as it is."
            )

    def _source(self, spec: TensorSpec) -> Callable[[Box], np.ndarray]:
        entries = self._entries[spec.name]
        first, array = entries[0], self._arrays[entries[0].name]
        plain = len(entries) == 1 and first.rows is None and not first.transposed
        if plain and array.shape[len(first.index) :] == spec.shape:
            return partial(self._of, first)
        read = tensor_from(entries, spec.shape, spec.dtype, lambda entry: self._cast(spec.name, self._of(entry)))
        return read.__getitem__

    def _of(self, entry: TensorEntry, box: Box = ()) -> np.ndarray:
        one = tuple(slice(i, i + 1) for i in entry.index)
        return self._arrays[entry.name].read((*one, *box))[(0,) * len(one)]

    def _read_back(self, folder: Path, name: str, box: Box) -> np.ndarray:
        with self._opening:
            if self._written is None:
                self._written = SafetensorsFolder(folder)
                if set(self._written.specs()) != set(self._entries):
                    raise DamagedCheckpoint(f"{folder} does not have the tensors that were written to it")
        return self._written.read(name)[box]

    def _release(self) -> None:
        if self._written is not None:
            self._written.release()

    def finish(self, folder: NewFolder) -> None:
        """Gives the folder its name."""
        folder.commit()
