"""Reading files: first a check of each (`scan`), then its documents as bytes (`read_documents`).

A document is a list of pieces, each at most `PIECE` bytes, so that a file larger than memory can be read. Pieces end
after a newline where they can, and never inside a UTF-8 character.
"""

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from .config import DataError
from .files import SourceFile, cannot_read

PIECE = 1 << 20  # bytes
MAX_INVALID = 0.01  # of a file's bytes may be invalid UTF-8 (say, one name in Latin-1); beyond, it is not text

_UTF8_TAIL = 3  # bytes of a character that may stand at the end of a piece


@dataclass(frozen=True)
class Scan:
    """What a first look at a file says.

    Attributes:
      digest: hash of the (uncompressed) contents.
      size: bytes, uncompressed.
      problem: why this is not text; "" when it is.
    """

    digest: str
    size: int
    problem: str


def scan(source: SourceFile) -> Scan:
    """Reads a file once: hash, size, and whether it is text.

    Raises:
      DataError: unreadable, or corrupt gzip.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = invalid = 0
    nul = first_bad = -1
    for piece in _pieces(source):
        digest.update(piece)
        if nul < 0 and (at := piece.find(b"\0")) >= 0:
            nul = size + at
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            first_bad = size + error.start if first_bad < 0 else first_bad
            invalid += _count_invalid(piece)
        size += len(piece)
    problem = ""
    if size == 0:
        problem = "it is empty"
    elif nul >= 0:
        problem = f"it is binary: a zero byte at offset {nul} (text in UTF-16? convert it to UTF-8)"
    elif invalid > MAX_INVALID * size:
        problem = (
            f"it is not UTF-8 text: {invalid} of {size} bytes are invalid (at most {MAX_INVALID:.0%} may be), "
            f"the first at offset {first_bad}; convert it to UTF-8"
        )
    return Scan(digest.hexdigest(), size, problem)


def read_documents(source: SourceFile, text_key: str) -> Iterator[Iterator[bytes]]:
    """The documents of a file that passed `scan`, none empty; each must be consumed before the next.

    Raises:
      DataError: a bad JSON line, with the file and the line's number.
    """
    if not source.is_jsonl:
        yield _pieces(source)
        return
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            text = _text_of(line, f"{source.path}, line {number}", text_key)
            if text:
                yield split_pieces(text)


def split_pieces(data: bytes) -> Iterator[bytes]:
    """`data` in pieces of at most `PIECE` bytes."""
    while len(data) > PIECE:
        cut = _cut(data[:PIECE])
        yield data[:cut]
        data = data[cut:]
    if data:
        yield data


def _cut(data: bytes) -> int:
    """Where to end a piece: after the last newline, or else before an unfinished UTF-8 character."""
    newline = data.rfind(b"\n") + 1
    if newline:
        return newline
    for back in range(1, _UTF8_TAIL + 1):
        if data[-back] >= 0xC0:  # the first byte of a character of several bytes
            return len(data) - back
    return len(data)


def _count_invalid(piece: bytes) -> int:
    """How many U+FFFD the decoding of a piece needs (one for each longest invalid run, by Unicode's rule)."""
    return piece.decode(errors="replace").count("\ufffd") - piece.count("\ufffd".encode())


def _open(source: SourceFile) -> IO[bytes]:
    return gzip.open(source.path, "rb") if source.is_gzip else open(source.path, "rb")  # type: ignore[return-value]


def _guarded(source: SourceFile, read: Iterator[bytes]) -> Iterator[bytes]:
    """Turns what goes wrong in reading into DataErrors that name the file."""
    done = 0
    try:
        for data in read:
            done += len(data)
            yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{source.path} is not whole gzip data: {error} (after {done} bytes of text); copy or compress it again"
        ) from error
    except OSError as error:
        raise cannot_read(source.path, error) from error


def _pieces(source: SourceFile) -> Iterator[bytes]:
    def read() -> Iterator[bytes]:
        rest = b""
        with _open(source) as file:
            while data := file.read(PIECE - len(rest)):
                rest += data
                if len(rest) == PIECE:
                    cut = _cut(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
        if rest:
            yield rest

    return _guarded(source, read())


def _lines(source: SourceFile) -> Iterator[bytes]:
    def read() -> Iterator[bytes]:
        with _open(source) as file:
            yield from file

    return _guarded(source, read())


def _text_of(line: bytes, where: str, key: str) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode(errors="replace").rstrip()
        raise DataError(
            f"{where}: not a line of JSON ({error}): {shown!r}; each line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: must be a JSON object such as {{"{key}": "..."}}, but is a {type(record).__name__}')
    if key not in record:
        near = difflib.get_close_matches(key, record, n=1, cutoff=0.5)
        hint = f"the nearest is {near[0]!r}" if near else f"it has {sorted(record)[:8]}"
        raise DataError(f"{where}: has no key {key!r}; {hint}; name the key of the text with data.text_key")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} must be text, but is a {type(text).__name__}: {str(text)[:40]!r}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a UTF-16 pair; it becomes U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
