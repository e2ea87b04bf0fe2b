"""What a folder holds: `inspect` gives a dict of plain values, `render` the same for people. Nothing is changed."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..models import families
from ..models.config import DecoderConfig, keeps_dtype
from . import files, hf, manifest, safetensors
from .arrays import open_array
from .errors import CheckpointError, DamagedCheckpoint
from .manifest import Manifest
from .stream import blocks
from .tokenizer import Tokenizer, check_vocabulary

_UNREAD = "no numbers were read: --verify looks for NaN and infinities"
_NOT_VERIFIED = "not verified (--verify compares every file)"


def inspect(path: str | os.PathLike[str], verify: bool = False) -> dict[str, Any]:
    """Describe a step folder, a run (its steps, and the newest) or a Hugging Face folder.

    `verify` reads every file: steps are compared with their checksums, and parameters are searched for NaN and
    infinities. What is wrong with a folder is in the result's "odd", what is only unusual in its "notes": neither
    raises. `NoCheckpoint` when there is nothing to describe.
    """
    from .load import locate

    kind, folder = locate(path)
    if kind == "hugging_face":
        return _inspect_hugging_face(folder, verify)
    if kind == "step":
        return _inspect_step(folder, verify)
    return _inspect_run(folder, verify)


def _inspect_run(folder: Path, verify: bool) -> dict[str, Any]:
    steps = {step: _inspect_step(path, verify) for step, path in manifest.step_folders(folder).items()}
    good = [step for step, found in steps.items() if "damaged" not in found["checksums"]]
    newest = steps[good[-1]] if good else {}
    odd = [f"step {step}: {text}" for step, found in steps.items() for text in found["odd"]]
    notes = list(newest["notes"]) if newest else []
    odd += [f"{p.name}: left by a save that was killed" for p in sorted(folder.glob(f"{files.TMP_PREFIX}*"))]
    return {
        **newest,
        "kind": "Twinax training run",
        "path": str(folder),
        "steps": list(steps),
        "newest_good_step": good[-1] if good else None,
        "bytes": sum(found["bytes"] for found in steps.values()),
        "odd": odd,
        "notes": notes,
    }


def _inspect_step(folder: Path, verify: bool) -> dict[str, Any]:
    from .step import open_stored

    odd: list[str] = []
    notes = [] if verify else [_UNREAD]
    result: dict[str, Any] = {"kind": "Twinax step", "path": str(folder), "bytes": files.size_on_disk(folder)}
    try:
        found = manifest.read(folder)
        if verify:
            found.verify()
        missing = sorted(name for name in found.files if not (folder / name).is_file())
        if missing:
            raise DamagedCheckpoint(f"{folder} lacks files: {', '.join(missing[:5])}")
        for name in found.arrays:
            open_stored(found, name)
        config = DecoderConfig.from_dict(found.description.model)
    except ValueError as error:
        return {**result, "checksums": "damaged", "odd": [str(error)], "notes": []}
    description = found.description
    params = {n.removeprefix("params."): s for n, s in found.arrays.items() if n.startswith("params.")}
    extra = sorted(set(files.list_files(folder)) - set(found.files) - {manifest.NAME})
    if extra:
        odd.append(f"files that are not part of the checkpoint: {', '.join(extra[:5])}")
    if verify:
        for name in params:
            odd += _not_finite(name, open_array(folder / manifest.ARRAYS / f"params.{name}").read())
    result |= {
        "holds": "parameters and training state" if found.kind == "training" else "parameters",
        "step": found.step,
        "created": found.created,
        **_model(config, odd),
        "parameters": _count({name: spec.shape for name, spec in params.items()}, config),
        "dtypes": dict(Counter(spec.dtype for spec in params.values())),
        "state_arrays": len(found.arrays) - len(params),
        **_tokenizer(_load_tokenizer(found, description.tokenizer_files, odd), config.vocab_size, odd, notes),
        "data": description.data,
        "seed": description.seed,
        "plan": description.plan,
        "recipe": description.recipe,
        "versions": found.versions,
        "files": len(found.files) + 1,
        "checksums": "verified" if verify else _NOT_VERIFIED,
    }
    return {**result, "odd": odd, "notes": notes}


def _load_tokenizer(found: Manifest, tokenizer_files: dict[str, bytes], odd: list[str]) -> Tokenizer | None:
    if not tokenizer_files:
        return None
    try:
        return Tokenizer.from_files(tokenizer_files, str(found.folder / manifest.TOKENIZER))
    except ValueError as error:
        odd.append(str(error))
        return None


def _inspect_hugging_face(folder: Path, verify: bool) -> dict[str, Any]:
    odd: list[str] = []
    notes = [] if verify else [_UNREAD]
    result: dict[str, Any] = {"kind": "Hugging Face folder", "path": str(folder), "bytes": files.size_on_disk(folder)}
    tokenizer = None
    try:
        opened = hf.open_folder(folder)
        tokenizer = opened.tokenizer()
    except ValueError as error:
        return {**result, "checksums": "none", "odd": [str(error)], "notes": []}
    model = _model(opened.config, odd)
    try:
        with opened.open_tensors() as tensors:
            specs = tensors.specs()
            shards = [path.name for path in tensors.files]
            shapes = _match(tensors, opened.config, odd, notes)
            if verify:
                for name in specs:
                    odd += _not_finite(name, tensors.read(name))
                    tensors.release()
    except (CheckpointError, OSError) as error:
        return {**result, **model, "checksums": "damaged", "odd": [*odd, str(error)], "notes": []}
    notes += [
        f"{path.name}: a pickle, which is never opened"
        for pattern in ("*.bin", "*.pt")
        for path in folder.glob(pattern)
    ]
    result |= {
        "holds": "parameters",
        "step": None,
        **model,
        "parameters": _count(shapes, opened.config),
        "dtypes": dict(Counter(spec.dtype.name for spec in specs.values())),
        **_tokenizer(tokenizer, opened.config.vocab_size, odd, notes),
        "generation": opened.generation,
        "files": len(shards),
        "checksums": "headers and sizes agree; safetensors files carry no checksums",
    }
    return {**result, "odd": odd, "notes": notes}


def _match(
    tensors: safetensors.SafetensorsFolder, config: DecoderConfig, odd: list[str], notes: list[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters; of the tensors, where they are not those of the config."""
    from ..models.decoder import param_shapes

    shapes = {name: tuple(like.shape) for name, like in param_shapes(config).items()}
    specs = tensors.specs()
    try:
        parts = hf.match_tensors(tensors, config, shapes)
    except CheckpointError as error:
        odd.append(str(error))
        return {name: spec.shape for name, spec in specs.items()}
    used = {entry.hf_name for parameter in parts.values() for entry in parameter.entries}
    for name in specs:
        if name not in used and config.tie_embeddings and name == hf.HEAD:
            notes.append(f"{name}: a second copy of the embedding, to which it is tied ({specs[name].nbytes:,} bytes)")
        elif name not in used:
            notes.append(f"{name}: not used, and provably without effect")
    return shapes


def _model(config: DecoderConfig, odd: list[str]) -> dict[str, Any]:
    if config.family not in families.names():
        odd.append(f"this version knows no family {config.family!r}")
    return {
        "family": config.family,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "model": config.to_dict(),
    }


def _tokenizer(tokenizer: Tokenizer | None, vocab_size: int, odd: list[str], notes: list[str]) -> dict[str, Any]:
    if tokenizer is None:
        odd.append("there is no tokenizer")
        return {"tokenizer": None}
    try:
        check_vocabulary(tokenizer, vocab_size)
    except ValueError as error:
        odd.append(str(error))
    if (padding := vocab_size - tokenizer.vocab_size) > 0:
        notes.append(f"the vocabulary is padded: {padding:,} of its {vocab_size:,} rows belong to no token")
    return {
        "tokenizer": {
            "vocabulary": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "chat_template": tokenizer.chat_template is not None,
        }
    }


def _count(shapes: dict[str, tuple[int, ...]], config: DecoderConfig) -> dict[str, int]:
    """Parameters by part of the model; scales of quantised weights are none, and mxfp4 has two in a byte."""
    parts: Counter[str] = Counter()
    packed = config.quantization is not None and config.quantization.format == "mxfp4"
    for name, shape in shapes.items():
        if not (keeps_dtype(name) and name.endswith(".scales")):
            parts[_part(name)] += math.prod(shape) * (2 if packed and keeps_dtype(name) else 1)
    return {"total": sum(parts.values()), **dict(parts.most_common())}


def _part(name: str) -> str:
    first = name.removeprefix("blocks.").partition(".")[0]
    if "norm" in first:
        return "norms"
    known = {"embed": "embedding", "unembed": "output", "moe": "experts"}
    return known.get(first, first.replace("_", " "))


def _not_finite(name: str, array: np.ndarray) -> list[str]:
    if array.dtype.kind in "iub":
        return []
    bad = sum(array[box].size - np.count_nonzero(np.isfinite(array[box])) for box in blocks(array.shape, 1))
    return [f"{name}: {bad:,} of {array.size:,} numbers are NaN or infinite"] if bad else []


def render(found: dict[str, Any]) -> str:
    """The result of `inspect` as lines of text."""
    lines = [f"{found['kind']}: {found['path']}"]

    def line(label: str, value: Any) -> None:
        if value not in (None, {}, ""):
            lines.append(f"  {label:<14}{value}")

    if "steps" in found:
        line("steps", ", ".join(map(str, found["steps"])) or "none")
        line("newest good", found["newest_good_step"])
    line("holds", found.get("holds"))
    line("family", found.get("family"))
    if model := found.get("model"):
        heads = f"{model['num_heads']} heads ({model['num_kv_heads']} for keys and values) of {model['head_dim']}"
        mixers = Counter(kind.mixer for kind in DecoderConfig.from_dict(model).kinds)
        widths = f"width {model['hidden_size']}"
        widths += f", mlp {model['intermediate_size']}" if model["intermediate_size"] else ""
        if moe := model.get("moe"):
            experts = f"{moe['num_experts']} experts of {moe['expert_size']}, {moe['experts_per_token']} a token"
            shared = f" and {moe['shared_experts']} shared" if moe["shared_experts"] else ""
            widths = f"width {model['hidden_size']}, {experts}{shared}"
        line("shape", f"{model['num_layers']} layers, {widths}" + (f", {heads}" if model["num_heads"] else ""))
        if set(mixers) != {"attention"}:
            line("mixers", ", ".join(f"{mixer.replace('_', ' ')} in {count}" for mixer, count in mixers.items()))
        if kept := model.get("quantization"):
            line("weights", f"quantised, {kept['format']}")
    if parameters := found.get("parameters"):
        total = parameters["total"]
        line("parameters", f"{total:,}")
        for part, count in parameters.items():
            if part != "total":
                line("", f"{count:>15,}  {count / total:6.1%}  {part}")
    if dtypes := found.get("dtypes"):
        line("dtypes", ", ".join(f"{dtype} ({count} arrays)" for dtype, count in dtypes.items()))
    line("context", f"{found['context']:,} tokens" if "context" in found else None)
    line("vocabulary", f"{found['vocabulary']:,}" if "vocabulary" in found else None)
    if tokenizer := found.get("tokenizer"):
        template = "with" if tokenizer["chat_template"] else "without"
        ids = f"{tokenizer['vocabulary']:,} ids, bos {tokenizer['bos_id']}, eos {tokenizer['eos_id']}"
        line("tokenizer", f"{ids}, {template} a chat template")
    for key in ("step", "created", "data", "seed", "plan"):
        line(key, found.get(key))
    line("on disk", f"{found['bytes']:,} bytes" + (f" in {found['files']} files" if "files" in found else ""))
    line("checksums", found.get("checksums"))
    lines += [f"  note: {text}" for text in found["notes"]]
    lines += [f"  odd: {text}" for text in found["odd"]]
    if not found["odd"]:
        lines.append("  nothing odd")
    return "\n".join(lines)
