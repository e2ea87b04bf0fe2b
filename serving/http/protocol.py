"""HTTP connections with bounds on what comes before a request: the size of its head, and the time it takes.

The parser has no bound of its own: a header without an end would fill the memory, and connections that never send a
request would stay for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

MOST_HEAD_BYTES = 1 << 16
HEAD_SECONDS = 60.0
_TOO_LARGE = ApiError(
    431, f"The request's line and headers have more than {MOST_HEAD_BYTES} bytes.", code="headers_too_large"
)


class Protocol(HttpToolsProtocol):
    _head_bytes = _received = 0  # in whole headers; since the head began
    _in_head = True  # from the beginning: a connection on which nothing comes is as slow as one that never ends
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # it was refused already
        super().data_received(data)
        # The parser keeps what is in the midst of a header for itself, so this counts what came.
        if self._in_head and not self.transport.is_closing():
            self._received += len(data)
            if self._received > MOST_HEAD_BYTES:
                self._refuse(_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        too_large = self._head_bytes > MOST_HEAD_BYTES
        self._refuse(
            _TOO_LARGE if too_large else ApiError(400, "What was sent is not valid HTTP.", code="invalid_http")
        )

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            raise ValueError("ends the parser, which calls send_400_response")

    def _expect_head(self) -> None:
        self._stop_timer()
        self._in_head, self._head_bytes, self._received = True, 0, 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        message = f"The request's line and headers did not come within {HEAD_SECONDS:g} s."
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer before there is a request, and close."""
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[error.status]
        body = msgspec.json.encode(error.body())
        head = f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self._stop_timer()
        cycle = self.cycle
        begun = cycle is not None and cycle.response_started and not cycle.response_complete
        if not begun and not self.pipeline:  # else it would land in the midst of an answer
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
