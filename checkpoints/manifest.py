"""`twinax.json`: what a step folder holds and means, and a checksum for every file in it, its own included.

A step folder is complete or absent. Its `twinax.json` is written last and ends with a `digest` of all that stands
before it in the file, so a changed bit anywhere in the folder is noticed: here by the digest, elsewhere by `files`.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import limits
from .errors import CheckpointError, DamagedCheckpoint, first_few
from .files import CONTENT, checksum_bytes, checksum_files, list_files, write_file

NAME = "twinax.json"
FORMAT = 1
ARRAYS = "arrays"
TOKENIZER = "tokenizer"
_STEP = re.compile(r"step_(\d{8,})")
_TAIL = re.compile(rb',\n "digest": "([0-9a-f]{32})"\n}\n\Z')
_TAIL_LENGTH = len(',\n "digest": ""\n}\n') + 32


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself. Dicts hold JSON values only.

    `family` and `model` (the decoder's config) are enough to rebuild the model; `data` is the position in the data,
    `recipe` and `plan` how it was trained, `generation` a Hugging Face generation_config.json, kept as it is.
    """

    family: str
    model: dict[str, Any]
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype (by NumPy name) of a stored array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """A parsed and digest-checked `twinax.json`."""

    folder: Path
    step: int
    kind: str  # "training" or "params"
    description: Description
    arrays: dict[str, ArraySpec]
    files: dict[str, tuple[int, str]]  # relative path -> (bytes, checksum)
    versions: dict[str, str]
    created: str

    def verify(self, under: Iterable[str] | None = None) -> None:
        """Compare every file, or those of `under`, with its size and checksum.

        `under` has names; one that ends with "/" or "." stands for all that begin with it. Raises `DamagedCheckpoint`
        that names each bad file and how it differs.
        """
        names = set(self.files if under is None else under)
        prefixes = tuple(name for name in names if name.endswith(("/", ".")))
        wanted = {name: seen for name, seen in self.files.items() if name in names or name.startswith(prefixes)}
        problems = [f"{name}: missing" for name in wanted if not (self.folder / name).is_file()]
        present = [name for name in wanted if (self.folder / name).is_file()]
        for name, (size, checksum) in checksum_files(self.folder, present).items():
            if size != wanted[name][0]:
                problems.append(f"{name}: {size} bytes, written as {wanted[name][0]}")
            elif checksum != wanted[name][1]:
                problems.append(f"{name}: its bytes have changed since they were written ({size} bytes)")
        if problems:
            raise DamagedCheckpoint(f"{self.folder} is damaged:\n{first_few(problems)}")


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder name, None when it is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def step_folders(directory: Path) -> dict[int, Path]:
    """Step -> folder, ascending, of the step folders in `directory` (empty when it does not exist)."""
    if not directory.is_dir():
        return {}
    found = {step: path for path in directory.iterdir() if path.is_dir() and (step := step_of(path.name)) is not None}
    return dict(sorted(found.items()))


def is_inside(name: str) -> bool:
    """Whether a relative POSIX path stays in the folder that it is relative to."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\0" not in name and "\\" not in name


def check_json(value: Any, where: str) -> None:
    """Raise `CheckpointError` naming the place in `value` that JSON would lose or change."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON keys are strings")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise CheckpointError(f"{where} is a {type(value).__name__}; a description holds JSON values only")


def check_description(description: Description) -> None:
    """Raise `CheckpointError` for what could not be stored, before anything is written."""
    for name in ("model", "data", "recipe", "plan", "generation"):
        check_json(getattr(description, name), f"description.{name}")
    for name in description.tokenizer_files:
        if not is_inside(name):
            raise CheckpointError(f"description.tokenizer_files: {name!r} must be a path inside the tokenizer's folder")


def write(
    folder: Path,
    step: int,
    description: Description,
    arrays: Mapping[str, ArraySpec],
    known: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Checksum all files in `folder`, but those whose size and checksum are `known`, and write its `twinax.json`."""
    sums = {name: seen for name, seen in (known or {}).items() if (folder / name).is_file()}
    sums |= checksum_files(folder, [name for name in list_files(folder) if name not in sums and name != CONTENT])
    described = dataclasses.asdict(description)
    del described["tokenizer_files"]  # they are files of the folder
    content = {
        "format": FORMAT,
        "step": step,
        "kind": "params" if all(name.startswith("params.") for name in arrays) else "training",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **described,
        "versions": _versions(),
        "arrays": {name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in arrays.items()},
        "files": {name: {"bytes": size, "blake2b": checksum} for name, (size, checksum) in sorted(sums.items())},
    }
    body = json.dumps(content, indent=1, ensure_ascii=True).encode().removesuffix(b"\n}")
    write_file(folder / NAME, body + f',\n "digest": "{checksum_bytes(body)}"\n}}\n'.encode())


def _versions() -> dict[str, str]:
    found = {}
    for name in ("twinax", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def read(folder: Path) -> Manifest:
    """The manifest of a step folder, with the tokenizer's files, which are verified already.

    `DamagedCheckpoint` when it, or the tokenizer, is missing or changed, or of a newer format.
    """
    path = folder / NAME
    try:
        raw = limits.read_small(path, limits.MANIFEST_BYTES)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} is not a complete checkpoint: it has no {NAME}") from None
    found = parse(folder, raw)
    prefix = f"{TOKENIZER}/"
    found.verify((prefix,))
    tokenizer = {n.removeprefix(prefix): (folder / n).read_bytes() for n in found.files if n.startswith(prefix)}
    return dataclasses.replace(found, description=dataclasses.replace(found.description, tokenizer_files=tokenizer))


def parse(folder: Path, raw: bytes) -> Manifest:
    """The manifest from the bytes of its file, without the tokenizer's files."""
    path = folder / NAME
    tail = _TAIL.search(raw[-_TAIL_LENGTH:])
    if tail is None:
        raise DamagedCheckpoint(f"{path} is truncated or changed: it does not end with its digest")
    body = raw[:-_TAIL_LENGTH]
    if checksum_bytes(body) != tail[1].decode():
        raise DamagedCheckpoint(f"{path} has changed since it was written: its digest does not match")
    try:
        return _parse(folder, json.loads(body + b"}"))
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} was not written by Twinax: {type(error).__name__} {error}") from error


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    path = folder / NAME
    if content["format"] != FORMAT:
        format = limits.shown(content["format"])
        raise DamagedCheckpoint(f"{path} has format {format}; this version reads {FORMAT}: upgrade twinax")
    if folder.name != step_name(content["step"]) and step_of(folder.name) is not None:
        raise DamagedCheckpoint(f"{folder} holds step {content['step']}: it was renamed; give it its own name back")
    outside = [name for name in (*content["files"], *content["arrays"]) if not is_inside(name)]
    if outside:
        raise DamagedCheckpoint(f"{path} names files outside of its folder: {outside[:3]}; it is refused")
    for name in ("model", "data", "recipe", "plan", "generation"):
        if not isinstance(content[name], dict):
            got = limits.shown(content[name])
            raise DamagedCheckpoint(f"{path}: {name} is an object of keys and values; got {got}")
    limits.check_counts(path, content["model"])
    names = {f.name for f in dataclasses.fields(Description)} - {"tokenizer_files"}
    return Manifest(
        folder=folder,
        step=content["step"],
        kind=content["kind"],
        description=Description(**{name: content[name] for name in names}),
        arrays={name: ArraySpec(tuple(a["shape"]), a["dtype"]) for name, a in content["arrays"].items()},
        files={name: (f["bytes"], f["blake2b"]) for name, f in content["files"].items()},
        versions=content["versions"],
        created=content["created"],
    )
