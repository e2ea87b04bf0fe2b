"""The files of a tokenizer, as Hugging Face lays them out, and what is read from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAIN = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
# Files that belong to a tokenizer and travel with it; only the first is needed.
_FILES = (MAIN, CONFIG, SPECIAL_MAP, TEMPLATE, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
# What a special token is for, guessed by name only where there is no tokenizer_config.json.
_KNOWN_NAMES = {
    "bos_token": ("<|bos|>", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("<|eos|>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]"),
}


class TokenizerError(ValueError):
    """A tokenizer's files are missing or wrong, or a text cannot be encoded."""


def read_files(path: Path) -> tuple[dict[str, bytes], str]:
    """The contents by name of the files of a tokenizer, and where they are; for a folder or a tokenizer.json."""
    try:
        if path.is_dir() or path.name == MAIN:
            folder = path if path.is_dir() else path.parent
            names = [name for name in _FILES if (folder / name).is_file()]
            names += [f"{_MORE_TEMPLATES}/{p.name}" for p in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))]
            if MAIN not in names:
                raise TokenizerError(_missing(folder))
            return {name: (folder / name).read_bytes() for name in names}, str(folder)
        if not path.exists():
            raise TokenizerError(
                f"no tokenizer at {path}: give a folder that holds {MAIN}, such a file, or the word 'bytes' "
                "for the byte-level tokenizer"
            )
        return {MAIN: path.read_bytes()}, str(path)
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer at {path}: {error.strerror or error}") from error


def parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{where} is not JSON ({error}); it may be truncated or not the file it should be"
        ) from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{where} must hold a JSON object, but holds a {type(parsed).__name__}")
    return parsed


def check_spec(spec: dict[str, Any], where: str) -> None:
    """Raises TokenizerError for a tokenizer.json that the library takes, and should not."""
    if not isinstance(spec.get("model"), dict):
        raise TokenizerError(f'{where}: not a tokenizer (it has no "model"); its keys are {sorted(spec)[:8]}')
    _check_merges(spec["model"], where)
    steps = {part: [spec[part]] for part in ("normalizer", "pre_tokenizer", "decoder") if spec.get(part) is not None}
    for part, todo in steps.items():
        while todo:
            step = todo.pop()
            inner = step.get("decoders", []) if isinstance(step, dict) and isinstance(step.get("type"), str) else None
            if not isinstance(inner, list):
                raise TokenizerError(f"{where}: {part} is an object with a type, or null; it has {repr(step)[:80]}")
            todo += inner


def _check_merges(model: dict[str, Any], where: str) -> None:
    """The library would end the process: it takes the prefix off what comes second in each merge without looking."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        second = pair[1] if isinstance(pair, list) and len(pair) == 2 else None
        if not isinstance(second, str) or not second.startswith(prefix):
            raise TokenizerError(
                f"{where}: what comes second in a merge begins with the model's continuing_subword_prefix "
                f"{prefix[:40]!r}; one is {repr(merge)[:80]}. The file is damaged"
            )


def _missing(folder: Path) -> str:
    old = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
    if old:
        return (
            f"{folder} has {old[0]} but no {MAIN}: this is a tokenizer in an older form; convert it once with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder} holds no {MAIN}; give a folder that does, or the word 'bytes' for the byte-level tokenizer"


def default_config(spec: dict[str, Any]) -> bytes:
    special = [token["content"] for token in spec.get("added_tokens", []) if token.get("special")]
    named = {key: next((n for n in names if n in special), None) for key, names in _KNOWN_NAMES.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return (json.dumps(config | {key: text for key, text in named.items() if text}, indent=2) + "\n").encode()


def read_templates(files: Mapping[str, bytes], config: dict[str, Any], where: str) -> dict[str, str]:
    found = given = config.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list) and all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in found):
        found = {str(one["name"]): one["template"] for one in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise TokenizerError(
            f"{where}/{CONFIG}: chat_template is a text, or a list of objects with a name and a template, both texts; "
            f"it has {repr(given)[:100]}"
        )
    templates = dict(found)
    for name, data in files.items():
        key = "default" if name == TEMPLATE else Path(name).stem if name.startswith(_MORE_TEMPLATES + "/") else None
        if key is not None:
            try:
                templates[key] = data.decode()
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{where}/{name} is not UTF-8 text: {error}") from error
    return templates
