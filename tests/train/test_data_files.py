"""Files: what is found, what is read, what is refused, and the cache of tokens."""

import errno
import gzip
import importlib
import json
import os
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.checkpoints.tokenizer import Tokenizer, TokenizerError
from twinax.train.data import DataConfig, DataError, cache, documents, load_tokenizer, open_dataset, train_bpe
from twinax.train.data.cache import TokenCache, open_cache
from twinax.train.data.documents import split_pieces
from twinax.train.data.files import find_files

TOKENIZER = Tokenizer.bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def tokens_of(path: Path, cache_dir: Path | None = None, **options) -> TokenCache:
    """The tokens of `path`, cached beside the folder of the `data` fixture unless told otherwise."""
    folder = cache_dir or next(place for place in (path, *path.parents) if place.name == "data").parent / "cache"
    return open_cache(DataConfig(path=str(path), cache_dir=str(folder), **options), TOKENIZER)


def texts_of(found: TokenCache) -> list[bytes]:
    spans = zip(found.starts[:-1], found.starts[1:], strict=True)
    return [bytes(found.tokens[low + 1 : high - 1].astype(np.uint8)) for low, high in spans]


def refuse(path: Path, *, cache_dir: Path | None = None, **options) -> str:
    with pytest.raises(DataError) as caught:
        tokens_of(path, cache_dir, **options)
    return str(caught.value)


# Finding


def test_files_folders_and_patterns(data: Path):
    for name in ["b.txt", "a.txt", "deep/c.md", "deep/d.txt", ".hidden/e.txt", "site-packages/f.txt", "deep/.g.txt"]:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(name)
    (data / "link").symlink_to(data / "nowhere")
    (data / "again.txt").symlink_to(data / "a.txt")

    def names(*paths: str, **options) -> list[str]:
        config = DataConfig(path=tuple(str(data / path) for path in paths), **options)
        return [os.path.relpath(file.path, data) for file in find_files(config)]

    assert names("") == ["a.txt", "b.txt", "deep/c.md", "deep/d.txt"]
    assert names("deep", "b.txt", "") == ["deep/c.md", "deep/d.txt", "b.txt", "a.txt"]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "deep/d.txt"]
    assert names("**") == names("**/**") == names("")
    assert names("*/[cd].*") == ["deep/c.md", "deep/d.txt"]
    assert names("deep/../deep/?.md") == ["deep/c.md"]
    # What the user spells out is not left out.
    assert (
        names(".hidden/e.txt")
        == names(".hidden")
        == names(".hidden/*.txt")
        == names("**/.hidden/*")
        == [".hidden/e.txt"]
    )
    assert names("", exclude=("deep", "a*")) == [".hidden/e.txt", "b.txt", "site-packages/f.txt"]


def test_a_home_folder_is_understood(data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(data))
    assert [file.path for file in find_files(DataConfig(path="~/a.txt"))] == [str(data / "a.txt")]
    assert cache.default_cache_dir().is_relative_to(os.environ.get("XDG_CACHE_HOME", data))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("shakespear.txt", "no such file or folder: .*shakespear.txt; the nearest name there is 'shakespeare.txt'"),
        ("none/x.txt", "no such file or folder: .*nor does the folder .*none exist"),
        ("*.pdf", r"no files match .*\*.pdf"),
        ("none/*.txt", "no files match .*: the folder .*none does not exist"),
        ("empty", "the folder .*empty holds no files"),
        ("pipe", "is not a regular file"),
        ("shakespeare.txt/x", "no such file or folder"),
    ],
)
def test_paths_that_lead_nowhere(data: Path, path: str, message: str):
    (data / "shakespeare.txt").write_text("x")
    (data / "empty").mkdir()
    os.mkfifo(data / "pipe")
    with pytest.raises(DataError, match=message):
        find_files(DataConfig(path=str(data / path)))


@pytest.mark.parametrize("path", ["", (), ("",)])
def test_no_path_at_all(path):
    with pytest.raises(DataError, match=r"data.path is not set"):
        find_files(DataConfig(path=path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": 0.6}, "from 0 to 0.5.*not 0.6"),
        ({"eval_fraction": float("nan")}, "not nan"),
        ({"text_key": ""}, "text_key"),
        ({"path": (1,)}, "data.path"),
    ],
)
def test_impossible_configs(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        DataConfig(**options)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder as seen by a user who is not root (root may read anything)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    importlib.import_module("mmap")  # NumPy loads it late, and that user may not be able to read Python's folder
    was = os.geteuid()
    if was == 0:
        shutil.chown(folder, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(was)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_folders_and_files_without_permission(unprivileged: Path):
    locked = unprivileged / "locked"
    locked.mkdir()
    (locked / "a.txt").write_text("hello")
    (unprivileged / "b.txt").write_text("hello")
    (unprivileged / "b.txt").chmod(0)
    locked.chmod(0)
    for path in [locked, locked / "a.txt", unprivileged, locked / "*.txt", unprivileged / "**/*.md"]:
        message = refuse(path, cache_dir=unprivileged / "cache")
        assert f"cannot read {locked}" in message
        assert "Permission denied; let this user read it" in message
    assert f"cannot read {unprivileged / 'b.txt'}: Perm" in refuse(unprivileged / "b.txt", cache_dir=unprivileged / "c")
    (unprivileged / "c.txt").write_text("hello")
    unprivileged.chmod(0o555)
    message = refuse(unprivileged / "c.txt", cache_dir=unprivileged / "cache2")
    assert "cannot keep tokens in" in message
    assert "data.cache_dir" in message


def test_a_cache_that_may_only_be_read_is_enough(unprivileged: Path):
    (unprivileged / "a.txt").write_text("one")
    made = tokens_of(unprivileged / "a.txt", unprivileged / "cache")
    os.utime(unprivileged / "a.txt", (1, 1))
    (unprivileged / "cache").chmod(0o555)
    assert tokens_of(unprivileged / "a.txt", unprivileged / "cache").key == made.key


# Reading


def test_text_json_lines_and_gzip(data: Path):
    records = [{"text": "one"}, {"text": "", "id": 1}, {"id": 2, "text": "zwei ü \ud83d\ude00"}]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (data / "a.txt").write_bytes(b"plain\r\ntext \xff\n" + b"." * 200)
    (data / "b.jsonl").write_text("\ufeff" + lines)
    (data / "c.txt.gz").write_bytes(gzip.compress(b"first ") + gzip.compress(b"second"))
    (data / "d.NDJSON.GZ").write_bytes(gzip.compress(lines.encode()))
    json_texts = [b"one", "zwei ü 😀".encode()]
    want = [b"plain\r\ntext \xff\n" + b"." * 200, *json_texts, b"first second", *json_texts]
    assert texts_of(tokens_of(data)) == want


def test_a_lone_surrogate_in_json_becomes_a_replacement_character(data: Path):
    (data / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert texts_of(tokens_of(data / "a.jsonl")) == ["a\ufffdb".encode()]


def test_another_text_key(data: Path):
    (data / "a.jsonl").write_text('{"body": "b", "text": "t"}')
    assert texts_of(tokens_of(data / "a.jsonl", text_key="body")) == [b"b"]
    assert texts_of(tokens_of(data / "a.jsonl")) == [b"t"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "unfinished', "line 3: not a line of JSON .*unfinished"),
        ("[1, 2]", r'line 3: must be a JSON object such as {"text": "..."}, but is a list'),
        (
            '{"txt": "a"}',
            "line 3: has no key 'text'; the nearest is 'txt'; name the key of the text with data.text_key",
        ),
        ('{"zzz": "a"}', r"line 3: has no key 'text'; it has \['zzz'\]"),
        ('{"text": 5}', "line 3: 'text' must be text, but is a int: '5'"),
        ('{"text": "\xff"}', "line 3: not a line of JSON"),
        ("[" * 100_000, "line 3: not a line of JSON"),
    ],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_bad_json_lines(data: Path, line: str, message: str, whole_folder: bool):
    good = json.dumps({"text": "good " * 50})
    (data / "a.jsonl").write_bytes(f"{good}\n\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(DataError, match=f"a.jsonl, {message}"):
        tokens_of(data if whole_folder else data / "a.jsonl")


BINARY = {
    "empty.txt": (b"", "empty.txt cannot be trained on: it is empty"),
    "nul.bin": (b"abc" * 500_000 + b"\0", "a zero byte at offset 1500000"),
    "latin.txt": (
        "naïve café ".encode("latin-1") * 200_000,
        "400000 of 2200000 bytes are invalid .*the first at offset 2;",
    ),
    "utf16.txt": ("hello".encode("utf-16"), "zero byte at offset 3 .text in UTF-16"),
    "empty.jsonl.gz": (gzip.compress(b""), "it is empty"),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_named_file_that_is_not_text(data: Path, name: str):
    content, message = BINARY[name]
    (data / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokens_of(data / name)


def test_files_in_a_folder_that_are_not_text_are_skipped_and_counted(data: Path):
    for name, (content, _) in BINARY.items():
        (data / name).write_bytes(content)
    assert "none of the 5 files is text" in refuse(data)
    (data / "good.txt").write_text("good")
    with pytest.warns(
        UserWarning, match="skipped 3 of 6 files that are not UTF-8 text, the first: .*latin.txt: it is not"
    ):
        found = tokens_of(data)
    assert texts_of(found) == [b"good"]
    assert found.meta["skipped"] == {"empty": 2, "binary": 3}


@pytest.mark.parametrize("damage", [lambda d: d[:-20], lambda d: b"not gzip", lambda d: d[:40] + b"\xff" * 20 + d[60:]])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_corrupt_gzip(data: Path, damage, whole_folder: bool):
    text = np.random.default_rng(0).integers(32, 127, 5000, dtype=np.uint8).tobytes()
    (data / "a.txt.gz").write_bytes(damage(gzip.compress(text)))
    message = refuse(data if whole_folder else data / "a.txt.gz")
    assert f"{data / 'a.txt.gz'} is not whole gzip data" in message


def test_lines_without_text_are_not_a_dataset(data: Path):
    (data / "a.jsonl").write_text('{"text": ""}\n')
    assert "hold no document with any text under 'text'" in refuse(data / "a.jsonl")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.integers(4, 9))
def test_pieces_join_to_the_whole_and_keep_characters_whole(content: bytes, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(split_pieces(content))
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= size for piece in pieces)
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    assert "".join(piece.decode() for piece in pieces) == content.decode()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_large_documents_go_through_in_pieces(data: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    monkeypatch.setattr(cache, "_BATCH", 250)
    text = "".join(f"line {n} 世界\n" for n in range(200)) + "世" * 200
    content = json.dumps({"text": text}) + '\n{"text": "x"}' if name.endswith("l") else text
    (data / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert texts_of(tokens_of(data / name)) == [text.encode(), b"x"][: 1 + name.endswith("l")]


# The cache


def test_the_key_is_the_contents(data: Path, tmp_path: Path):
    (data / "a.txt").write_text("one")
    (data / "b.txt").write_text("two")
    first = tokens_of(data)
    copy = tmp_path / "elsewhere" / "copy"
    copy.mkdir(parents=True)
    (copy / "x").write_text("one")
    (copy / "y").write_text("two")
    assert tokens_of(copy, tmp_path / "cache").key == first.key
    (data / "b.txt").write_text("owt")  # the same size, perhaps within the same tick of the clock
    second = tokens_of(data)
    assert second.key != first.key
    assert texts_of(second) == [b"one", b"owt"]
    (data / "b.txt").rename(data / "B.txt")
    assert texts_of(tokens_of(data)) == [b"owt", b"one"]


def test_unchanged_files_are_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.txt").write_text("one")
    long_ago = time.time() - 100
    os.utime(data / "a.txt", (long_ago, long_ago))
    first = tokens_of(data)
    monkeypatch.setattr(cache, "scan", lambda source: pytest.fail("read again"))
    assert tokens_of(data).key == first.key


def test_files_without_changes_but_new_times_are_not_tokenised_again(data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.txt").write_text("one")
    first = tokens_of(data)
    os.utime(data / "a.txt", (1, 1))
    monkeypatch.setattr(cache, "_tokenise", lambda *a: pytest.fail("tokenised again"))
    assert tokens_of(data).key == first.key


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "hashes.npy", "meta.json"])
def test_a_damaged_cache_is_made_again(data: Path, tmp_path: Path, name: str):
    (data / "a.txt").write_text("one")
    found = tokens_of(data)
    path = tmp_path / "cache" / found.key / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="are damaged; making them again"):
        assert texts_of(tokens_of(data)) == [b"one"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts_of(tokens_of(data)) == [b"one"]


def test_a_full_disk_leaves_nothing_behind(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.txt").write_text("one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "cannot keep tokens in" in (message := refuse(data))
        assert "No space left on device; name another folder with data.cache_dir, or make room" in message
    assert list((tmp_path / "cache").iterdir()) == []
    assert texts_of(tokens_of(data)) == [b"one"]


def test_a_file_that_changes_while_it_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (data / "a.txt").write_text("one")
    tokenise = cache._tokenise

    def change_then_tokenise(*arguments):
        (data / "a.txt").write_text("one and more")
        return tokenise(*arguments)

    monkeypatch.setattr(cache, "_tokenise", change_then_tokenise)
    assert "a.txt changed while it was being read" in refuse(data)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_killed_processes_left_is_removed(data: Path, tmp_path: Path):
    (data / "a.txt").write_text("one")
    for name, age in [(".old-x", 200_000), (".new-x", 0)]:
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"")
        for path in (folder / "tokens.bin", folder):
            os.utime(path, (time.time() - age,) * 2)
    tokens_of(data)
    assert {path.name for path in (tmp_path / "cache").glob(".*")} == {".new-x"}


def test_the_first_of_two_processes_that_make_the_same_cache_wins(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (data / "a.txt").write_text("one")
    tokenise, made = cache._tokenise, []

    def overtaken(*arguments):
        monkeypatch.setattr(cache, "_tokenise", tokenise)
        made.append((tokens_of(data), (tmp_path / "cache" / tokens_of(data).key).stat().st_ino))
        return tokenise(*arguments)

    monkeypatch.setattr(cache, "_tokenise", overtaken)
    late = tokens_of(data)
    (first, inode) = made[0]
    assert (late.key, (tmp_path / "cache" / late.key).stat().st_ino) == (first.key, inode)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "known"] == [first.key]


def test_long_work_shows_a_bar_on_a_terminal(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cache, "_QUIET", 3)
    monkeypatch.setenv("TERM", "xterm")
    (data / "a.txt").write_text("long")
    tokens_of(data)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    (data / "a.txt").write_text("longer")
    tokens_of(data)
    shown = capsys.readouterr()
    assert "Tokenising" in shown.err
    assert "6/6 bytes" in shown.err
    assert shown.out == ""


# Other tokenizers, real text


def test_a_trained_bpe(data: Path, tmp_path: Path):
    text = "the cat sat on the mat, and thought of nothing that mattered\n" * 200
    (data / "a.txt").write_text(text + "<|eos|>")
    made = train_bpe(str(data / "*.txt"), 280, tmp_path / "bpe")
    assert (made.vocab_size, made.bos_id is not None, made.eos_id is not None) == (280, True, True)
    assert sorted(path.name for path in (tmp_path / "bpe").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert train_bpe((str(data),), 280, tmp_path / "again").files() == made.files()
    config = DataConfig(path=str(data), tokenizer=str(tmp_path / "bpe"), eval_fraction=0, cache_dir=str(tmp_path / "c"))
    dataset = open_dataset(config, load_tokenizer(config), 10**5, 0)
    assert dataset.num_tokens < len(text) / 2
    row = dataset.row(0).tokens_T[: dataset.num_tokens].tolist()
    assert (row[0], row[-1]) == (made.bos_id, made.eos_id)
    assert made.decode(row) == text + "<|eos|>"  # the text of a special token in a document is just text
    assert row.count(made.eos_id) == 1


def test_a_small_text_gives_a_small_bpe(data: Path, tmp_path: Path):
    (data / "a.jsonl").write_text('{"text": "ab ab"}')
    assert train_bpe(str(data / "a.jsonl"), 5000, tmp_path / "bpe").vocab_size < 270


def test_bpe_errors(data: Path, tmp_path: Path):
    (data / "a.txt").write_text("abc")
    with pytest.raises(TokenizerError, match="at least 259, not 258"):
        train_bpe(str(data), 258, tmp_path / "bpe")
    with pytest.raises(DataError, match="no such file"):
        train_bpe(str(data / "b.txt"), 300, tmp_path / "bpe")
    with pytest.raises(TokenizerError, match=r"cannot write the tokenizer to .*a\.txt"):
        train_bpe(str(data), 300, data / "a.txt" / "x")


def test_large_vocabularies_take_four_bytes(data: Path, tmp_path: Path):
    files = TOKENIZER.files()
    spec = json.loads(files["tokenizer.json"])
    vocabulary = spec["model"]["vocab"] | {f"filler{n}": 256 + n for n in range(70_000)}
    spec["model"]["vocab"], spec["added_tokens"] = vocabulary, []
    for n, name in enumerate(("<|bos|>", "<|eos|>")):
        spec["added_tokens"].append({"id": 70_256 + n, "content": name, "special": True, "normalized": False}
                                    | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))  # fmt: skip
    large = Tokenizer.from_files({"tokenizer.json": json.dumps(spec).encode()})
    (data / "a.txt").write_text("abc")
    found = open_cache(DataConfig(path=str(data), cache_dir=str(tmp_path / "cache")), large)
    assert found.tokens.dtype == np.uint32
    assert found.tokens.tolist() == [70_256, *b"abc", 70_257]


def test_the_standard_library(tmp_path: Path):
    """Part of Python's own library, with its test files that are deliberately not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    config = DataConfig(path=f"{root}/[a-f]*/**/*.py", cache_dir=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped depends on how Python was installed
        train, held = (open_dataset(config, TOKENIZER, 128, 0, split) for split in ("train", "eval"))
    assert train.num_documents > 100
    assert train.num_tokens > 10 * held.num_tokens > 0
    assert not any("site-packages" in file.path for file in find_files(config))
