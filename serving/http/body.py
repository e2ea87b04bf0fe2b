"""Request bodies: bounded in size and time, strict JSON objects, read from a raw ASGI `receive`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import Message, Receive, Scope

from .errors import ApiError, show

_SLOWEST = 1000  # bytes a second
_LONG_BODY = 1 << 17  # bytes; ten megabytes of objects take a second to read, in which others' tokens are to be sent
# From one brace to the next nothing else runs in this process while Python reads: 0.1 s for so many.
MAX_VALUES, MAX_KEYS = 1_000_000, 100_000
# Others run between objects, but a quarter of a million takes nearly a second of a core. Empty ones, which have no
# colon and cost little, are only counted where there are many values.
MAX_OBJECTS = 100_000
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_TO_BRACE = re.compile(rb'(?:%s|[^"{}]++)*+[{}"]?' % _TEXT, re.DOTALL)
_TEXTS = re.compile(_TEXT, re.DOTALL)
_PIECE = re.compile(rb'(?:%s|[^"]++){1,20000}+' % _TEXT, re.DOTALL)  # so much takes some milliseconds


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class InTime:
    """An ASGI `receive` whose body must come without a pause of `seconds`, and with so many to begin with at
    `_SLOWEST` bytes a second: a byte now and then holds no connection for ever. Raises ApiError (408)."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive, self._seconds = receive, seconds
        self._begin: float | None = None
        self._size = 0
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._begin = now if self._begin is None else self._begin
        end = min(now, self._begin + self._size / _SLOWEST) + self._seconds
        try:
            async with asyncio.timeout_at(end):
                message = await self._receive()
        except TimeoutError:
            text = f"Of the body {self._size} bytes came, and nothing more in time: it may pause for less than "
            text += f"{self._seconds:g} s, and must come at {_SLOWEST} bytes a second or more. Send it again."
            raise ApiError(408, text, code="request_timeout") from None
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        return message


async def read_json(scope: Scope, receive: Receive, limit: int) -> dict[str, Any]:
    """Read the body as one JSON object. Raises ApiError (400, 413, 415) or ClientGone."""
    headers = {name: value for name, value in scope["headers"]}
    kind = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also keeps web pages of other origins from posting here without the browser asking first.
        message = f"The body must be sent with the header 'Content-Type: application/json', got {show(kind)}."
        raise ApiError(415, message, code="unsupported_media_type")
    if b"upgrade" in headers:  # after which the parser reads no body
        raise ApiError(400, "This server speaks HTTP/1.1 only; send no header 'Upgrade'.", code="upgrade_unsupported")
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if coding != "identity":
        message = f"The body must be sent as it is, not with 'Content-Encoding: {coding[:40]}'."
        raise ApiError(415, message, code="unsupported_media_type")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    data = b"".join([piece async for piece in pieces(receive, limit, _too_large(limit))])
    return parse_json(data) if len(data) < _LONG_BODY else await asyncio.to_thread(_parse_long, data)


def _parse_long(data: bytes) -> dict[str, Any]:
    _check_values(data)
    return parse_json(data)


def _check_values(data: bytes) -> None:
    """Raises ApiError where there are too many, before a parser that cannot be interrupted is given them."""
    if data.count(b",") < MAX_VALUES and data.count(b":") <= MAX_KEYS:
        return
    objects = 0
    for part in _TO_BRACE.finditer(data):
        objects += part[0].endswith(b"{")
        if objects > MAX_OBJECTS:
            raise _too_many(f"more than {MAX_OBJECTS:,} objects")
        if part.end() - part.start() < 4 * MAX_KEYS:  # bytes of the shortest keys and their values
            continue
        values, keys = 1, 0
        for piece in _PIECE.finditer(part[0]):
            signs = _TEXTS.sub(b"", piece[0])  # those within texts do not count
            values += signs.count(b",")
            keys += signs.count(b":")
        if values > MAX_VALUES or keys > MAX_KEYS:
            raise _too_many(f"a list of more than {MAX_VALUES:,} values or an object of more than {MAX_KEYS:,} keys")


def _too_many(what: str) -> ApiError:
    return ApiError(400, f"The body has {what}. Send it in parts.", code="too_many_values")


def parse_json(data: bytes) -> dict[str, Any]:
    """Decode strictly: UTF-8, no repeated keys, an object on the outside.

    NaN and Infinity, which Python's own encoder writes, are let through as floats so that the check of the field they
    sit in can name it; every number field demands a finite value.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {data[error.start]:#04x}"
        raise ApiError(400, f"The body is not valid UTF-8: {where}.", code="invalid_utf8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ApiError(400, "The body is not acceptable JSON: it is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, or an integer with thousands of digits
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body must be a JSON object, got {show(value)}.", code="invalid_json")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ApiError(400, f"The field {show(twice)} is given twice.", param=twice, code="invalid_json")
    return out


async def pieces(receive: Receive, limit: int, too_large: ApiError) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises `too_large` after more than `limit` bytes, or ClientGone."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise too_large
        yield piece
        if not message.get("more_body", False):
            return


def _too_large(limit: int) -> ApiError:
    message = f"The body is larger than {limit} bytes, the most this server reads (max_body_bytes)."
    return ApiError(413, message, code="body_too_large")
