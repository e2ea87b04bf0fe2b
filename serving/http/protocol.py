"""HTTP connections with bounds on what comes before a request, and after its answer: sizes and times.

The parser has no bound of its own: a header without an end would fill the memory, and connections that never send a
request, or never end one that was answered, would stay for ever.

A request may be refused while it is still being sent. To close at once would answer what comes with a reset, which
makes clients drop the answer: the sending side is closed, and the rest is read into nothing for a while.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

MOST_HEAD_BYTES = 1 << 16
HEAD_SECONDS = 60.0
LINGER_SECONDS = 5.0  # for the rest of a request that has its answer
_TOO_LARGE = ApiError(
    431, f"The request's line and headers have more than {MOST_HEAD_BYTES} bytes.", code="headers_too_large"
)


class _Transport:
    """The event loop's transport, but for how it is closed: as its protocol says."""

    def __init__(self, transport: Any, protocol: Protocol) -> None:
        self._transport, self._protocol = transport, protocol

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    _head_bytes = _received = 0  # in whole headers; since the head began
    _in_head = True  # from the beginning: a connection on which nothing comes is as slow as one that never ends
    _between = True  # requests: nothing of the next one has come
    _heads = 0  # that began in what comes now
    _in_body = False
    _lingers = False
    _unread = False  # what comes now
    _last_words: bytes | None = None  # for when the answers before them have ended
    _timer: asyncio.TimerHandle | None = None
    _socket: Any  # the transport that is the event loop's

    def connection_made(self, transport: Any) -> None:
        self._socket = transport
        super().connection_made(cast(Any, _Transport(transport, self)))
        self._expect_head()

    @property
    def lingers(self) -> bool:
        """Whether the answer has ended, and what comes is thrown away."""
        return self._lingers

    def close(self) -> None:
        """Close once all is written; in the midst of a body, when the client has closed or after `LINGER_SECONDS`."""
        if self._in_body and not self._lingers:
            self._linger()
        else:
            self._socket.close()

    def _linger(self) -> None:
        if self._socket.is_closing():
            return
        self._lingers = True
        try:
            self._socket.write_eof()
        except OSError:  # the client has closed both ways meanwhile
            self._socket.close()
            return
        self._socket.resume_reading()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._socket.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between = False
        self._heads += 1
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
        self._in_body = True
        assert self.parser is not None
        if self.parser.should_upgrade():  # nobody does; but the parser takes what follows for another protocol
            self._unread = True
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._in_body, self._between = self._unread, True
        super().on_message_complete()
        if self.cycle.response_complete:  # whose timer of idle connections the body has stopped
            self._expect_head()

    def on_response_complete(self) -> None:
        last = not self.pipeline
        super().on_response_complete()
        if self._last_words is not None:
            if last and not self.transport.is_closing():
                self._end(self._last_words)
        elif self._in_body and self.cycle.response_complete and not self.transport.is_closing():
            self._stop_timer()
            self._timer = self.loop.call_later(LINGER_SECONDS, self._socket.close)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._unread:
            return
        between, self._heads = self._between, 0
        super().data_received(data)
        # The parser keeps what is in the midst of a header for itself, so this counts what came. Of a piece in whose
        # midst a head begins it is not known how much is the head's; there is one such piece at most.
        whole = not self._between and self._heads <= int(between)
        if self._in_head and whole and not self.transport.is_closing():
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
        self._unread = True
        words = f"{head}connection: close\r\n\r\n".encode() + body
        cycle, own = self.cycle, self._in_body
        if own and self.pipeline:  # the answer to a request that was not begun
            self.pipeline.popleft()
        elif own and not cycle.response_started:  # to one that was, and would wait for the rest
            cycle.disconnected = True
            cycle.message_event.set()
            self._end(words)
            return
        elif own:  # which has another answer
            words = b""
        if self.pipeline or (cycle is not None and not cycle.response_complete):
            self._last_words = words  # else they would land in the midst of an answer, or before it
        else:
            self._end(words)

    def _end(self, words: bytes) -> None:
        if words:
            self.transport.write(words)
        self._linger()
