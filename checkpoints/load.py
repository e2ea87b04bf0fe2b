"""Any folder that holds a model, as parameters on devices: a step, a run (its newest good step), a Hugging Face folder.

Files are memory mapped and go to the devices tensor by tensor: the host never holds a second copy of the model.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..models.config import DecoderConfig, keeps_dtype
from ..models.parameters import param_shapes
from ..sharding.plan import Plan
from . import files, hf, manifest, shared
from .errors import DamagedCheckpoint, MismatchedCheckpoint, NoCheckpoint, first_few
from .manifest import Description, Manifest
from .step import open_stored, to_device
from .tokenizer import Tokenizer, check_vocabulary

CHECKPOINTS = "checkpoints"  # the folder of steps in a run's output folder
MeshOf = Callable[[DecoderConfig], Mesh | None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        config: the decoder's config.
        params: the parameters by dotted name, as `models.decoder` takes them.
        tokenizer: None where the folder has none.
        family: name of the model family.
        generation: contents of generation_config.json ({} when there was none).
        source: the folder that was read (of a run, the step folder).
        kind: "step" or "hugging_face".
        step: the training step, None for a Hugging Face folder.
        description: what a step says of itself, None for a Hugging Face folder.
    """

    config: DecoderConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer | None
    family: str
    generation: dict[str, Any]
    source: Path
    kind: str
    step: int | None = None
    description: Description | None = None


def locate(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """("step", folder), ("run", folder of steps) or ("hugging_face", folder); `NoCheckpoint` says what was missing."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise NoCheckpoint(f"{folder} does not exist. {files.nearest_existing(folder)}")
    if not folder.is_dir():
        raise NoCheckpoint(f"{folder} is a file; give the folder that it is in: {folder.parent}")
    if (folder / manifest.NAME).exists() or manifest.step_of(folder.name) is not None:
        return "step", folder
    if (folder / hf.CONFIG).exists():
        return "hugging_face", folder
    for steps in (folder, folder / CHECKPOINTS):
        if manifest.step_folders(steps):
            return "run", steps
    names = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
    if (folder / CHECKPOINTS).is_dir():
        raise NoCheckpoint(f"{folder} is a run that has not saved a step yet: its {CHECKPOINTS}/ has none")
    raise NoCheckpoint(
        f"{folder} holds no model. Looked for {manifest.NAME} (a Twinax step), {manifest.step_name(10)} or "
        f"{CHECKPOINTS}/{manifest.step_name(10)} (a training run), {hf.CONFIG} (a Hugging Face folder); found {names}."
    )


def open_step(path: Path, kind: str, verify: Callable[[Manifest], None]) -> Manifest:
    """The verified manifest of a step, or of the newest good one of a run (warns about those passed over).

    `verify` raises DamagedCheckpoint where more than the manifest and the tokenizer must be good, and is not.
    """

    def good(folder: Path) -> Manifest:
        found = manifest.read(folder)
        verify(found)
        return found

    if kind == "step":
        return good(path)
    problems = []
    for folder in reversed(manifest.step_folders(path).values()):
        try:
            found = good(folder)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems:
            text = f"damaged checkpoints were passed over; {found.folder.name} is used instead:\n" + "\n".join(problems)
            _log.warning("%s", text)
            warnings.warn(text, stacklevel=3)
        return found
    raise DamagedCheckpoint(f"{path} has no good checkpoint:\n" + "\n".join(problems))


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | MeshOf | None = None,
    plan: Plan | str | None = None,
    verify: bool = True,
    begin: Callable[[DecoderConfig], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LoadedModel:
    """Load a model from a Twinax step folder, a run's output folder (its newest good step) or a Hugging Face folder.

    Args:
        path: the folder.
        dtype: cast the parameters to it, or each to what this function gives for its name; None keeps what is stored.
        mesh, plan: where the parameters live (one of the two); by default on the first device. A function gives the
            mesh (or None) for the model's config, before anything else is read.
        verify: compare a step's files with their checksums first: those that this process reads.
        begin: called with the model's config, before its parameters are looked at.
        progress: called with (parameter name, parameters done, parameters in all).

    Raises `NoCheckpoint`, `DamagedCheckpoint`, `MismatchedCheckpoint`, other `CheckpointError`s, `TokenizerError`: all
    `ValueError`s that say what to do.
    """
    if plan is not None:
        mesh = (Plan.parse(plan) if isinstance(plan, str) else plan).mesh()
    kind, folder = locate(path)
    if kind == "hugging_face":
        return _load_hugging_face(folder, dtype, mesh, begin, progress)
    return _load_step(folder, kind, dtype, mesh, verify, begin, progress)


def _mesh(mesh: Mesh | MeshOf | None, config: DecoderConfig) -> Mesh | None:
    return mesh if mesh is None or isinstance(mesh, Mesh) else mesh(config)


def _verify_here(found: Manifest, given: Mesh | MeshOf | None) -> None:
    """Verifies the files that this process reads: those of all parameters, or of what its devices of the mesh hold."""
    everything = [f"{manifest.ARRAYS}/params."]
    config = DecoderConfig.from_dict(found.description.model)
    mesh = _mesh(given, config)
    if mesh is None:
        found.verify(everything)
        return
    shapes = {f"params.{name}": like.shape for name, like in param_shapes(config).items()}
    if any(name not in found.arrays or found.arrays[name].shape != shape for name, shape in shapes.items()):
        found.verify(everything)  # not of its config; who loads it says so
        return

    def check() -> None:
        from ..models.decoder import param_shardings

        names = []
        for name, sharding in param_shardings(config, mesh).items():
            stored = open_stored(found, f"params.{name}")
            boxes = {str(box): box for box in sharding.addressable_devices_indices_map(stored.shape).values()}
            here = {file for box in boxes.values() for file in stored.file_names(box or ())}
            names += [f"{manifest.ARRAYS}/params.{name}/{file}" for file in (".zarray", *here)]
        found.verify(names)

    shared.agree_on_damage(check)


def _cast(name: str, dtype: Any) -> Any:
    """The dtype of a parameter, None for the stored one; jnp.bfloat16 is a type, and not a function of the name."""
    if keeps_dtype(name):
        return None
    return dtype(name) if callable(dtype) and not isinstance(dtype, type) else dtype


def _shardings(config: DecoderConfig, given: Mesh | MeshOf | None) -> dict[str, Any]:
    mesh = _mesh(given, config)
    if mesh is None:
        return {}
    from ..models.decoder import param_shardings  # Flax, which one device needs for no more than tracing

    return dict(param_shardings(config, mesh))


def _load_step(
    folder: Path, kind: str, dtype: Any, mesh: Mesh | MeshOf | None, verify: bool, begin: Any, progress: Any
) -> LoadedModel:
    found = open_step(folder, kind, lambda found: _verify_here(found, mesh) if verify else None)
    description = found.description
    config = DecoderConfig.from_dict(description.model)
    if begin:
        begin(config)
    stored = {name.removeprefix("params."): spec for name, spec in found.arrays.items() if name.startswith("params.")}
    wanted = {name: shape.shape for name, shape in param_shapes(config).items()}
    problems = [f"{name}: absent, the config makes it {list(s)}" for name, s in wanted.items() if name not in stored]
    problems += [f"{name}: not a parameter of this config" for name in stored if name not in wanted]
    problems += [
        f"{name}: {stored[name]}, the config makes it {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        raise MismatchedCheckpoint(
            f"the parameters in {found.folder} do not fit its config; it may come from another version of Twinax:\n"
            f"{first_few(problems)}"
        )
    _check_token_ids(description.generation, config.vocab_size, f"{found.folder}: its {hf.GENERATION}")
    tokenizer = None
    if description.tokenizer_files:
        tokenizer = Tokenizer.from_files(description.tokenizer_files, str(found.folder / manifest.TOKENIZER))
        check_vocabulary(tokenizer, config.vocab_size)
    shardings = _shardings(config, mesh)
    params = {}
    for name in wanted:
        params[name] = to_device(open_stored(found, f"params.{name}"), shardings.get(name), _cast(name, dtype))
        if progress:
            progress(name, len(params), len(wanted))
    return LoadedModel(
        config=config,
        params=params,
        tokenizer=tokenizer,
        family=config.family,
        generation=description.generation,
        source=found.folder,
        kind="step",
        step=found.step,
        description=description,
    )


def _load_hugging_face(folder: Path, dtype: Any, mesh: Mesh | MeshOf | None, begin: Any, progress: Any) -> LoadedModel:
    opened = hf.open_folder(folder)
    config = opened.config
    if begin:
        begin(config)
    _check_token_ids(opened.generation, config.vocab_size, f"{folder / hf.GENERATION} (or config.json)")
    tokenizer = opened.tokenizer()
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    params = {}
    with opened.open_tensors() as tensors:
        shardings = _shardings(config, mesh)
        shapes = {name: shape.shape for name, shape in param_shapes(config).items()}
        for name, parameter in hf.match_tensors(tensors, config, shapes).items():
            params[name] = to_device(parameter, shardings.get(name), _cast(name, dtype))
            tensors.release()
            if progress:
                progress(name, len(params), len(shapes))
    return LoadedModel(
        config=config,
        params=params,
        tokenizer=tokenizer,
        family=config.family,
        generation=opened.generation,
        source=folder,
        kind="hugging_face",
    )


def _check_token_ids(generation: dict[str, Any], vocab_size: int, where: str) -> None:
    """Raises MismatchedCheckpoint unless the tokens that end a text are some of the model's."""
    given = generation.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < vocab_size for one in ids):
        raise MismatchedCheckpoint(
            f"{where}: eos_token_id is a token of the model, from 0 to {vocab_size - 1}, or a list of such; it has "
            f"{repr(given)[:100]}. Put it right there, or leave the key out: the tokenizer's own ends a text anyway"
        )
