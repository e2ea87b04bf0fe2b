"""Whatever stands in a key of any JSON file of a folder: a model, or an error that says what is wrong; never a crash of
the interpreter, for which the tokenizers library is good."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as backend_decoders

from tests.checkpoints.helpers import make_run, random_params, small_config, write_hugging_face
from twinax.checkpoints.files import checksum_bytes
from twinax.checkpoints.load import load_model
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.checkpoints.tokenizer_files import TokenizerError

GONE = object()
JUNK: tuple[Any, ...] = (
    GONE, None, True, 0, -1, 10**20, 10**400, 1.5, float("nan"), "", "x", "\ud800", "</s>", [], [1], ["a"], [None], {},
    {"a": 1}, {"content": 5}, {"type": "BPE"}, [["a", "b", "c"]],
)  # fmt: skip


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All keys below a value, of long objects and lists the first few."""
    pairs = list(value.items())[:30] if isinstance(value, dict) else list(enumerate(value))[:3]
    for key, inner in pairs:
        yield (*before, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*before, key))


def with_junk(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    at = value = json.loads(json.dumps(value))
    for key in place[:-1]:
        at = at[key]
    if junk is GONE:
        del at[place[-1]]
    else:
        at[place[-1]] = junk
    return value


def word_tokenizer() -> dict[str, bytes]:
    """A BPE with parts of all kinds."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "##b": 3, "a##b": 4, "ab": 5, "\u00e9": 6, "##\u00e9": 7, "a\u00e9": 8}
    backend = Backend(models.BPE(words, [("a", "##b"), ("a", "##\u00e9")], continuing_subword_prefix="##"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex("x+"), "a")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Digits()])
    backend.decoder = backend_decoders.Sequence([backend_decoders.WordPiece(), backend_decoders.ByteFallback()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "{{ messages }}"}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def signed(content: dict[str, Any]) -> bytes:
    """As a stranger would write a twinax.json."""
    body = json.dumps(content, indent=1).encode().removesuffix(b"\n}")
    return body + f',\n "digest": "{checksum_bytes(body)}"\n}}\n'.encode()


def folder_of(kind: str, folder: Path) -> Path:
    config = small_config()
    if kind == "step":
        return make_run(folder, 3, config=config) / "checkpoints" / "step_00000003"
    made = write_hugging_face(folder, config, random_params(config))
    for name, data in word_tokenizer().items():
        (made / name).write_bytes(data)
    generation = {"eos_token_id": [1, 2], "temperature": 0.5, "do_sample": True, "top_k": 3}
    (made / "generation_config.json").write_text(json.dumps(generation))
    shard = "model-00001-of-00001.safetensors"
    (made / "model.safetensors").rename(made / shard)
    weights = dict.fromkeys(names_of(made / shard), shard)
    index = {"metadata": {"total_size": 5}, "weight_map": weights}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def names_of(shard: Path) -> list[str]:
    data = shard.read_bytes()
    return [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if name != "__metadata__"]


FILES = [
    ("hugging face", "tokenizer.json"),
    ("hugging face", "tokenizer_config.json"),
    ("hugging face", "generation_config.json"),
    ("hugging face", "model.safetensors.index.json"),
    ("step", "twinax.json"),
]


@pytest.mark.parametrize(("kind", "name"), FILES, ids=[name for _, name in FILES])
def test_any_value_of_any_key_is_read_or_refused(tmp_path, kind, name):
    source, changed = folder_of(kind, tmp_path / "source"), tmp_path / "changed"
    changed.mkdir()
    for one in source.iterdir():
        if one.name != name:
            os.symlink(one, changed / one.name)
    good = json.loads((source / name).read_text())
    good.pop("digest", None)
    loaded, refused, unknown = 0, [], []
    wanted = [p for p in places(good) if p[0] not in ("arrays", "files") or "embed" in (*p, "embed")[1]]  # all alike
    pairs = list(itertools.product(wanted, JUNK))
    for place, junk in pairs[:: 3 if kind == "step" else 1]:
        content = with_junk(good, place, junk)
        (changed / name).write_bytes(signed(content) if kind == "step" else json.dumps(content).encode())
        try:
            tokenizer = load_model(changed).tokenizer
        except (ValueError, OSError) as error:
            refused.append(str(error))
            continue
        assert tokenizer is not None
        try:
            tokenizer.decode(tokenizer.encode("ab a\u00e9 <s> x1"))
        except TokenizerError as error:
            unknown.append(str(error))
        assert tokenizer.adds_bos in (True, False) and tokenizer.fingerprint
        loaded += 1
    assert loaded > 5 and len(refused) > 20 and min(map(len, refused)) > 10
    assert len(unknown) < 20 and all("has no ids for this text: Unk token" in message for message in unknown)


@pytest.mark.parametrize("merges", [[["a", "b"]], ["a \u00e9"], [["a"]], [5], [["a", None]]])
def test_merges_that_would_end_the_process_are_refused(merges):
    files = word_tokenizer()
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["merges"] = merges
    with pytest.raises(TokenizerError, match="continuing_subword_prefix '##'"):
        Tokenizer.from_files({**files, "tokenizer.json": json.dumps(spec).encode()})


def test_nesting_without_end_is_no_json():
    files = word_tokenizer()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_files({**files, "tokenizer_config.json": b'{"a": ' + b"[" * 100_000})
