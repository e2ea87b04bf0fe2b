"""Uploaded files: multipart/form-data with one file and a few fields, bounded while it is read."""

from __future__ import annotations

import re
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Receive, Scope

from .body import pieces
from .errors import ApiError, bad, show

_MOST_FIELDS = 8
_MOST_FIELD_BYTES = 4096
_MOST_OVERHEAD = 1 << 16  # bytes of boundaries, headers and fields around a file


async def read_form(scope: Scope, receive: Receive, limit: int) -> dict[str, Any]:
    """The form's fields: texts, those in `name[key]` as objects, and the one file. Whoever calls closes the file.

    Raises ApiError (400, 413 when the file has more than `limit` bytes, 415) or ClientGone.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "")
    if kind.split(";")[0].strip().lower() != "multipart/form-data":
        message = f"A file must be sent as 'Content-Type: multipart/form-data', got {show(kind)}."
        raise ApiError(415, message, code="unsupported_media_type")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit + _MOST_OVERHEAD:
        raise _too_large(limit)
    body = pieces(receive, limit + _MOST_OVERHEAD, _too_large(limit))
    limits = {"max_files": 1, "max_fields": _MOST_FIELDS, "max_part_size": _MOST_FIELD_BYTES}
    try:
        form = await MultiPartParser(headers, body, **limits).parse()
    except MultiPartException as error:
        raise ApiError(400, f"The form is not valid: {error.message}", code="invalid_form") from None
    found: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            _put(found, name, value)
    except ApiError:
        await form.close()
        raise
    return found


def _put(found: dict[str, Any], name: str, value: UploadFile | str) -> None:
    """`expires_after[seconds]` is how a form says {"expires_after": {"seconds": ...}}."""
    inner = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", name)
    place, key = found, name
    if inner is not None:
        place, key = found.setdefault(inner[1], {}), inner[2]
    if not isinstance(place, dict) or key in place:
        raise bad(name, f"The field {show(name)} is given twice.", "invalid_form")
    place[key] = value


def _too_large(limit: int) -> ApiError:
    message = f"The file is larger than {limit} bytes, the most this server keeps (max_file_bytes)."
    return ApiError(413, message, code="body_too_large")
