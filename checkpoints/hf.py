"""A Hugging Face folder as a model: its config, the files around it, and which of its tensors is which parameter.

Everything in the folder is used, or provably changes nothing, or is refused: nothing is dropped silently.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models import families
from ..models.config import DecoderConfig, keeps_dtype
from ..models.families import TensorEntry
from . import limits, safetensors
from .errors import CheckpointError, DamagedCheckpoint, NoCheckpoint, first_few
from .pieces import Parameter, tensor_shape
from .safetensors import SafetensorsFolder
from .stream import blocks, bytes_of
from .tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION = "generation_config.json"
HEAD = "lm_head.weight"  # the output projection, in all families
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The parsed files of a folder; the tensors are still on disk."""

    path: Path
    config: DecoderConfig
    config_json: dict[str, Any]
    generation: dict[str, Any]

    def open_tensors(self) -> SafetensorsFolder:
        """CheckpointError for fewer tensors than layers, before anything is made for each layer."""
        tensors = SafetensorsFolder(self.path)
        if (count := len(tensors.specs())) < self.config.num_layers:
            tensors.close()
            raise CheckpointError(
                f"{self.path / CONFIG} describes {self.config.num_layers} layers, and the files beside it hold {count} "
                "tensors; they are not of one model"
            )
        return tensors

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None when the folder has no tokenizer.json."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; `DamagedCheckpoint` for anything else."""
    return safetensors.parse_json(path, limits.read_small(path, limits.CONFIG_BYTES), "the file")


def has_safetensors(folder: Path) -> bool:
    """Whether the weights are where Hugging Face puts them."""
    return (folder / safetensors.SINGLE_NAME).exists() or (folder / safetensors.INDEX_NAME).exists()


def open_folder(path: Path) -> HuggingFaceFolder:
    """Read config.json and generation_config.json. Raises `CheckpointError` or the family's ValueError."""
    if not has_safetensors(path):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{path} has its weights only as pickles ({', '.join(pickled[:4])}), which can run any code when they "
                "are opened, and are refused. Get the safetensors version of the model, or, if you trust it, make one: "
                f'transformers.AutoModelForCausalLM.from_pretrained("{path}").save_pretrained("NEW_FOLDER")'
            )
        others = sorted(file.name for file in path.glob("*.safetensors"))
        hint = f"; there is {', '.join(others[:4])}, rename it or add the index" if others else ""
        raise NoCheckpoint(
            f"{path} has a {CONFIG} but neither {safetensors.SINGLE_NAME} nor {safetensors.INDEX_NAME}{hint}"
        )
    config_json = read_json(path / CONFIG)
    if not isinstance(config_json.get("model_type"), str):
        raise DamagedCheckpoint(f"{path / CONFIG} has no model_type; it must name one of {', '.join(families.names())}")
    limits.check_counts(path / CONFIG, config_json)
    try:
        config = parse_config(config_json)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    if (path / GENERATION).exists():
        generation = read_json(path / GENERATION)
    else:
        generation = {key: config_json[key] for key in TOKEN_IDS if config_json.get(key) is not None}
    return HuggingFaceFolder(path, config, config_json, generation)


def parse_config(config_json: dict[str, Any]) -> DecoderConfig:
    """What a config.json means. Raises the family's ValueError."""
    return families.load(config_json["model_type"]).from_hf(config_json)


def match_tensors(
    tensors: SafetensorsFolder, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Parameter]:
    """Parameter name -> the parameter, put together from its tensors as it is read.

    `shapes` are the parameters' shapes. Raises one `CheckpointError` that lists every tensor that is missing, unknown,
    wrongly shaped, of a dtype that is no float, or unlike the others of its parameter in dtype.
    """
    family = families.load(config.family)
    specs = tensors.specs()
    by_tensor: dict[str, list[TensorEntry]] = {}
    by_parameter: dict[str, list[TensorEntry]] = {}
    for entry in family.tensor_table(config):
        by_tensor.setdefault(entry.hf_name, []).append(entry)
        by_parameter.setdefault(entry.name, []).append(entry)
    problems = []
    for name, entries in by_tensor.items():
        spec, shape = specs.get(name), tensor_shape(entries, dict(shapes))
        first = by_parameter[entries[0].name][0].hf_name
        if spec is None:
            problems.append(f"missing: {name} {list(shape)}")
        elif spec.shape != shape:
            problems.append(f"wrong shape: {name} is {list(spec.shape)}, the config makes it {list(shape)}")
        elif spec.dtype.name not in (known := _dtypes_of(entries[0].name, config)):
            problems.append(f"wrong dtype: {name} is {spec.dtype}, known are {', '.join(known)}")
        elif first in specs and specs[first].dtype != spec.dtype:
            problems.append(f"mixed dtypes: {name} is {spec.dtype}, {first} is {specs[first].dtype}")
    for name in specs:
        if name not in by_tensor and (reason := _why_not_ignored(tensors, name, config)):
            problems.append(reason)
    if problems:
        raise CheckpointError(
            f"the tensors of {tensors.folder} do not fit its {CONFIG} (family {config.family}); "
            f"{len(problems)} problems:\n{first_few(problems, 20)}"
        )
    return {
        name: Parameter(entries, tuple(shapes[name]), specs[entries[0].hf_name].dtype, tensors.read)
        for name, entries in by_parameter.items()
    }


def _dtypes_of(name: str, config: DecoderConfig) -> tuple[str, ...]:
    """The dtypes that a parameter may have."""
    kept = config.quantization
    if kept is None or not keeps_dtype(name):
        return _FLOATS
    if name.endswith(".values"):
        return ("uint8",) if kept.format == "mxfp4" else ("float8_e4m3fn",)
    return ("uint8",) if kept.format == "mxfp4" else _FLOATS


def _why_not_ignored(tensors: SafetensorsFolder, name: str, config: DecoderConfig) -> str | None:
    """None when a tensor that is no parameter provably changes nothing."""
    patterns = families.load(config.family).ignorable_tensors(config)
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        return f"unknown: {name} {list(tensors.specs()[name].shape)}, which nothing uses"
    if name == HEAD:  # tied: a copy of the embedding
        table = families.load(config.family).tensor_table(config)
        embedding = next(entry.hf_name for entry in table if entry.name == "embed.weight")
        if embedding in tensors.specs() and not same_bits(tensors.read(name), tensors.read(embedding)):
            return f"contradiction: tie_word_embeddings is true, but {name} differs from {embedding}"
        return None
    check = getattr(families.load(config.family), "contradiction", None)
    return check and check(config, name, tensors.read(name))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same shape, dtype and bits (a NaN equals itself); they are compared in blocks."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(np.array_equal(bytes_of(a[box]), bytes_of(b[box])) for box in blocks(a.shape, a.dtype.itemsize))
