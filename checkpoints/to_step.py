"""A Hugging Face folder becomes a Twinax step: arrays are written as `layout` says, and plain Orbax reads them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..models.decoder import param_shapes
from ..sharding.plan import Plan
from . import hf, layout, manifest
from .arrays import open_array
from .files import NewFolder
from .manifest import ArraySpec, Description
from .pieces import Parameter
from .safetensors import TensorSpec
from .step import StepWriter
from .stream import Box, Cast, Copy, Piece, Progress
from .tokenizer import check_vocabulary


class ToStep:
    """The conversion of the Hugging Face folder `source`. A context manager, as its files are mapped.

    Attributes:
        specs: the tensors that are used, in the dtype they get.
        size: bytes that the arrays will take.
        notes: what is left behind, and why that is harmless.
    """

    direction = "to_twinax"

    def __init__(self, source: Path, cast: Cast, plan: Plan | None):
        self.source, self._cast = source, cast
        self._opened = hf.open_folder(source)
        self._tokenizer = self._opened.tokenizer()
        config = self._opened.config
        cast.check(config)
        if self._tokenizer is not None:
            check_vocabulary(self._tokenizer, config.vocab_size)
        self._tensors = self._opened.open_tensors()
        shapes = {name: shape.shape for name, shape in param_shapes(config).items()}
        self._device_shapes = layout.device_shapes(config, plan)
        self._parameters = hf.match_tensors(self._tensors, config, shapes)
        self._tensors.release()
        stored = self._tensors.specs()
        used = dict.fromkeys(entry.hf_name for one in self._parameters.values() for entry in one.entries)
        self.specs = [TensorSpec(name, cast.of(stored[name].dtype), stored[name].shape) for name in used]
        self.size = sum(math.prod(one.shape) * cast.of(one.dtype).itemsize for one in self._parameters.values())
        self.notes = [f"{name} changes nothing and was left out" for name in sorted(stored.keys() - used.keys())]
        if self._tokenizer is None:
            self.notes.append("the folder has no tokenizer.json, so the checkpoint has no tokenizer")

    def __enter__(self) -> ToStep:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._tensors.close()

    def begin(self, final: Path, content: str) -> StepWriter:
        """The folder to write to."""
        return StepWriter(final, content)

    def copy(self, folder: NewFolder, tell: Progress | None) -> Copy:
        """What is to be copied; writes all that is small."""
        arrays, sizes, pieces = folder.tmp / manifest.ARRAYS, {}, []
        layout.write_tree(arrays, (f"params.{name}" for name in self._parameters))
        for name, parameter in self._parameters.items():
            dtype = self._cast.of(parameter.dtype)
            chunk = layout.chunk_shape(self._device_shapes[name], dtype.itemsize)
            layout.describe(arrays / f"params.{name}", parameter.shape, chunk, dtype)
            where = f"{manifest.ARRAYS}/params.{name}"
            count = math.prod(chunk) * dtype.itemsize
            sizes |= {f"{where}/{file}": count for file in layout.chunk_files(parameter.shape, chunk)}
            pieces += self._pieces(folder.tmp, where, parameter, chunk, dtype)
        return Copy(folder.tmp, sizes, pieces, self._cast, tell, release=self._tensors.release)

    def _pieces(
        self, folder: Path, where: str, parameter: Parameter, chunk: tuple[int, ...], dtype: np.dtype
    ) -> list[Piece]:
        depth = len(parameter.entries[0].index)
        names = {entry.index: entry.hf_name for entry in parameter.entries}
        found = []
        for place in itertools.product(*map(range, parameter.shape[:depth])):
            at = layout.regions(where, place, parameter.shape, chunk, dtype.itemsize)
            source, written = partial(_source, parameter, place), partial(_written, folder / where, place)
            found.append(Piece(names[place], dtype, at, source, written))
        return found

    def finish(self, folder: NewFolder) -> None:
        """Writes what the arrays mean, and gives the folder its name."""
        assert isinstance(folder, StepWriter)
        description = Description(
            family=self._opened.config.family,
            model=self._opened.config.to_dict(),
            tokenizer_files={} if self._tokenizer is None else self._tokenizer.files(),
            generation=self._opened.generation,
        )
        specs = {name: (one.shape, self._cast.of(one.dtype).name) for name, one in self._parameters.items()}
        arrays = {f"params.{name}": ArraySpec(tuple(shape), dtype) for name, (shape, dtype) in specs.items()}
        folder.finish(manifest.step_of(folder.final.name) or 0, description, arrays)


def _source(parameter: Parameter, place: tuple[int, ...]) -> Callable[[Box], np.ndarray]:
    return parameter.part(place).__getitem__


def _written(folder: Path, place: tuple[int, ...], box: Box) -> np.ndarray:
    one = tuple(slice(i, i + 1) for i in place)
    return open_array(folder).read((*one, *box))[(0,) * len(one)]
