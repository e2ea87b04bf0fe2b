"""The API keys and whose they are. A tenant's requests share what is cached with those of the same tenant alone."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from .errors import ApiError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_key(name: str, key: str) -> None:
    """Raises ValueError, which does not show the key, unless it can be sent in a header as it is."""
    if not (key and key.isascii() and key.isprintable() and key.strip() == key):
        raise ValueError(f"{name} must be printable ASCII without spaces around it, and not empty; choose another")


def read_keys(path: str | Path) -> dict[str, str]:
    """Keys by tenant, from a file with a line `NAME KEY` for each; empty lines and those that begin with # say nothing.

    Raises ValueError, with the line's number and never with a key.
    """
    keys: dict[str, str] = {}
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"api_keys can't be read from {path}: {error.strerror}; name the file of the keys") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, and is not at byte {error.start}; write it anew") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"line {number} of {path}"
        if len(words) != 2:
            raise ValueError(f"{where} must be a name and a key with a space between, got {len(words)} words")
        name, key = words
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: a name has at most 64 letters, digits, '.', '_' and '-', got {name!r}")
        check_key(f"the key in {where}", key)
        if name in keys:
            raise ValueError(f"{where}: the name {name!r} is there twice; give each tenant a line")
        if key in keys.values():
            raise ValueError(f"{where}: the key of {name!r} is another tenant's too; give each one of its own")
        keys[name] = key
    if not keys:
        raise ValueError(f"{path} must have a line `NAME KEY` for each API key, got none; write one")
    return keys


class ApiKeys:
    """Whose key a request carries. With no keys at all, every request is the tenant ""."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        # Digests have one length, so that the time of a comparison says nothing of a key's.
        self._digests = [(name, _digest(key.encode())) for name, key in keys.items()]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, authorization: bytes) -> str:
        """Of the header's value (empty: none was sent). Raises 401."""
        if not self._digests:
            return ""
        kind, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # All are compared, so that the time does not say which one was near either.
        found = [name for name, digest in self._digests if hmac.compare_digest(given, digest)]
        if kind.lower() != b"bearer" or not found:
            message = "Send the API key in the header 'Authorization: Bearer <key>'."
            message = ("The API key is wrong. " if authorization else "There is no API key. ") + message
            raise ApiError(401, message, code="invalid_api_key")
        return found[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
