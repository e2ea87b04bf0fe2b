"""The page at `/` for people. Its three files are sent as they lie here; what it shows, it asks of the other routes.

The page itself needs no API key, all its data does. The browser is told to load nothing from elsewhere, to run no
script but `page.js`, and to make HTML of no string: text of a model stays text.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",  # the icon, which is in the page
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time whether it is still the same: a new server may bring a new page
}
FILES = {"/": "page.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}


def routes() -> list[Route]:
    folder = Path(__file__).parent
    return [Route(path, _File(folder / name), methods=["GET"]) for path, name in FILES.items()]


class _File:
    """A file, read once, with a tag by which a browser knows it again."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        tag = hashlib.sha256(self._data).hexdigest()[:32]
        kind = f"{_TYPES[path.suffix[1:]]}; charset=utf-8"
        self._headers = _HEADERS | {"content-type": kind, "etag": f'"{tag}"'}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = Request(scope).headers.get("if-none-match") == self._headers["etag"]
        response = Response(b"" if known else self._data, 304 if known else 200, self._headers)
        await response(scope, receive, send)
