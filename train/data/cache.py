"""Tokens of all documents, made once and kept in a folder of memory-mapped arrays.

    <cache>/<key>/tokens.bin      all documents one after the other: uint16, or uint32 for a vocabulary over 65,536
    <cache>/<key>/documents.npy   int64 [documents + 1]: where each begins, and the end
    <cache>/<key>/hashes.npy      uint64 [documents]: a hash of each document's text
    <cache>/<key>/meta.json       sizes, and where it came from
    <cache>/known/<hash>          the key for a list of unchanged files (path, size, time), so that they need no reading

- The key is a hash of the contents of the files and of the tokenizer: other names or folders give the same key.
- A folder appears by one rename when it is whole; several processes may make the same one, and the first stays.
- A document is [BOS if the tokenizer has one] + its tokens + [EOS if it has one].
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ...checkpoints.tokenizer import Tokenizer
from .config import DataConfig, DataError
from .documents import read_documents, scan
from .files import SourceFile, find_files

_FORMAT = 1
_BATCH = 4 << 20  # bytes of text tokenised at once
_QUIET = 8 << 20  # bytes of text below which no progress bar is shown
_ABANDONED = 86_400  # seconds without a write, after which nobody is still making a folder
_SETTLED_NS = 2_000_000_000  # a file changed more recently than this may change again within one tick of its clock


@dataclass(frozen=True)
class TokenCache:
    """Tokens of documents.

    Attributes:
      tokens: [tokens] uint16 or uint32, memory-mapped.
      starts: [documents + 1] int64.
      hashes: [documents] uint64.
      key: names the contents.
      meta: what meta.json says: "files", "skipped", "text_bytes", ...
    """

    tokens: np.ndarray
    starts: np.ndarray
    hashes: np.ndarray
    key: str
    meta: dict[str, Any]


class _Progress(Protocol):
    def __call__(self, done: int) -> None: ...


def open_cache(config: DataConfig, tokenizer: Tokenizer, progress: bool = True) -> TokenCache:
    """The tokens of the config's text, from the cache or made now.

    Raises:
      DataError: no usable text, a fault in a file, or a cache folder that cannot be written.
    """
    sources = find_files(config)
    root = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _open(root, sources, config, tokenizer, progress)
    except OSError as error:
        raise DataError(
            f"cannot keep tokens in {root}: {error.strerror or error}; name another folder with data.cache_dir, "
            "or make room in this one"
        ) from error


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinax" / "data"


def _open(
    root: Path, sources: list[SourceFile], config: DataConfig, tokenizer: Tokenizer, progress: bool
) -> TokenCache:
    how = [_FORMAT, tokenizer.fingerprint, config.text_key]
    known = root / "known" / _hash([how, [[s.path, s.named, s.size, s.mtime_ns] for s in sources]])
    if known.exists():
        cache = _read(root, known.read_text())
        if cache is not None:
            return cache
    began = time.time_ns()
    good, skipped, digests, text_bytes = scan_all(sources)
    key = _hash([how, [[digest, source.is_jsonl] for source, digest in zip(good, digests, strict=True)]])
    cache = _read(root, key)
    if cache is None:
        meta = {"files": len(good), "skipped": skipped, "text_bytes": text_bytes, "tokenizer": tokenizer.fingerprint}
        _write(root, key, good, text_bytes, config, tokenizer, meta, progress)
        cache = _read(root, key)
        if cache is None:
            raise DataError(f"the tokens in {root / key} vanished or changed while they were made; run again")
    # As git does: a time stamp too close to now cannot tell a later change in the same tick.
    if all(began - source.mtime_ns > _SETTLED_NS for source in sources):
        with suppress(OSError):  # it only saves time; the cache may be shared and read-only
            known.parent.mkdir(exist_ok=True)
            _write_atomically(known, key.encode())
    return cache


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def scan_all(sources: list[SourceFile]) -> tuple[list[SourceFile], dict[str, int], list[str], int]:
    """The files that are text, how many were skipped for what, the digests of the good ones, and their size in bytes.

    A fault in a file that the user named is an error; faults in files of a folder are counted in a warning, unless
    no file is left.
    """
    good, digests, text_bytes = [], [], 0
    empty, binary = [], []
    for source in sources:
        result = scan(source)
        if not result.problem:
            good.append(source)
            digests.append(result.digest)
            text_bytes += result.size
        elif source.named:
            raise DataError(f"{source.path} cannot be trained on: {result.problem}")
        else:
            (binary if result.size else empty).append(f"{source.path}: {result.problem}")
    if not good:
        first = (binary or empty)[0]
        raise DataError(f"none of the {len(sources)} files is text with anything in it; the first, {first}")
    if binary:
        warnings.warn(
            f"skipped {len(binary)} of {len(sources)} files that are not UTF-8 text, the first: {binary[0]}",
            stacklevel=2,
        )
    return good, {"empty": len(empty), "binary": len(binary)}, digests, text_bytes


def _read(root: Path, key: str) -> TokenCache | None:
    """The cache named `key`, or None when it is not there or not whole."""
    folder = root / key
    try:
        meta = json.loads((folder / "meta.json").read_text())
        starts, hashes = np.load(folder / "documents.npy"), np.load(folder / "hashes.npy")
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError):
        tokens, starts, hashes, meta = np.empty(0), np.zeros(1), np.empty(0), {}
    if len(tokens) != meta.get("tokens") or int(starts[-1]) != len(tokens) or len(hashes) != len(starts) - 1:
        warnings.warn(f"the cached tokens in {folder} are damaged; making them again", stacklevel=2)
        shutil.rmtree(folder)
        return None
    return TokenCache(tokens, starts, hashes, key, meta)


def _write(
    root: Path,
    key: str,
    sources: list[SourceFile],
    text_bytes: int,
    config: DataConfig,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    progress: bool,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    _remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    try:
        with (
            open(folder / "tokens.bin", "wb") as file,
            _progress_bar(progress and text_bytes > _QUIET, text_bytes) as bar,
        ):
            lengths, hashes = _tokenise(sources, config, tokenizer, file, dtype, bar)
            _flush(file)
        for source in sources:
            status = os.stat(source.path)
            if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
                raise DataError(f"{source.path} changed while it was being read; run again when it is finished")
        if not lengths:
            raise DataError(f"the {len(sources)} files hold no document with any text under {config.text_key!r}")
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for name, array in (("documents.npy", starts), ("hashes.npy", np.array(hashes, dtype=np.uint64))):
            with open(folder / name, "wb") as file:
                np.save(file, array)
                _flush(file)
        with open(folder / "meta.json", "wb") as file:
            file.write(json.dumps(meta | {"tokens": int(starts[-1]), "dtype": dtype.name}, indent=2).encode())
            _flush(file)
        folder.chmod(0o755)
        try:
            os.rename(folder, root / key)
        except OSError:
            if not (root / key / "meta.json").exists():  # else another process was first, with the same contents
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Removes what processes that were killed left behind."""
    for folder in root.glob(".*-*"):
        with suppress(FileNotFoundError):  # another process removed it
            if time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()]) > _ABANDONED:
                shutil.rmtree(folder)


def _tokenise(
    sources: list[SourceFile],
    config: DataConfig,
    tokenizer: Tokenizer,
    file: IO[bytes],
    dtype: np.dtype,
    bar: _Progress,
) -> tuple[list[int], list[int]]:
    """Writes the tokens of all documents; gives their lengths in tokens and their hashes."""
    nothing = np.empty(0, dtype=np.int32)
    first = nothing if tokenizer.bos_id is None else np.array([tokenizer.bos_id], dtype=np.int32)
    last = nothing if tokenizer.eos_id is None else np.array([tokenizer.eos_id], dtype=np.int32)
    lengths: list[int] = []
    hashes: list[int] = []
    for batch in _batches(_marked_pieces(sources, config)):
        tokens = tokenizer.encode_bytes_batch([piece for piece, _, _ in batch])
        for (piece, opens, digest), ids in zip(batch, tokens, strict=True):
            if opens:
                lengths.append(0)
            whole = np.concatenate([first if opens else nothing, ids, last if digest is not None else nothing])
            lengths[-1] += len(whole)
            file.write(whole.astype(dtype).tobytes())
            if digest is not None:
                hashes.append(digest)
            bar(len(piece))
    return lengths, hashes


def _marked_pieces(sources: list[SourceFile], config: DataConfig) -> Iterator[tuple[bytes, bool, int | None]]:
    """(piece, whether it opens a document, the document's hash if it closes it)."""
    for source in sources:
        for document in read_documents(source, config.text_key):
            digest = hashlib.blake2b(digest_size=8)
            held, opens = None, True
            for piece in document:
                digest.update(piece)
                if held is not None:
                    yield held, opens, None
                    opens = False
                held = piece
            if held is not None:
                yield held, opens, int.from_bytes(digest.digest(), "little")


def _batches(pieces: Iterable[tuple[bytes, bool, int | None]]) -> Iterator[list[tuple[bytes, bool, int | None]]]:
    batch, size = [], 0
    for item in pieces:
        batch.append(item)
        size += len(item[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[_Progress]:
    """A bar on the terminal's stderr, for work that takes a while."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Tokenising", total=total)
        yield lambda done: bar.advance(task, done)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
