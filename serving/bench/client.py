"""HTTP/1.1 for measuring: connections kept and reused, each piece of a body handed on with the time it came.

One request costs a future and no task switch for a piece of its body, so that the client's own work stays small beside
the server's (httptools, the parser of uvicorn). Times are `time.perf_counter`'s: a loop's own clock is coarse.
"""

import asyncio
import dataclasses
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

Sink = Callable[[bytes, float], None]


class HttpFailure(Exception):
    """No whole answer came. `kind` is short and of few values, to count by."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Answer:
    """Attributes:
    status: HTTP's. body: empty where a sink took it.
    """

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: Any = None
        self.closed = False
        self.begun = False  # something of the answer has come
        self._answer: asyncio.Future[Answer] | None = None

    def send(self, data: bytes, sink: Sink | None) -> "asyncio.Future[Answer]":
        self._answer = asyncio.get_running_loop().create_future()
        self._sink, self._body, self.begun = sink, bytearray(), False
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(data)
        return self._answer

    # -- asyncio's calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.begun, self._now = True, time.perf_counter()
        if self._answer is None or self._answer.done():  # nothing was asked: nothing should come
            self.transport.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # of the sink
            self._answer.set_exception(error.__context__ or error)
            self.transport.close()
        except httptools.HttpParserError as error:
            self._fail("not HTTP", str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._fail("connection lost", str(exc or ""))

    def _fail(self, kind: str, detail: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(HttpFailure(kind, detail))
        self.transport.close()

    # -- the parser's calls ---------------------------------------------------------------------------------------

    def on_body(self, data: bytes) -> None:
        if self._sink is not None and self._parser.get_status_code() == 200:
            self._sink(data, self._now)
        else:
            self._body += data

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.transport.close()
            self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._parser.get_status_code(), bytes(self._body)))


class Client:
    """Requests to one server. Raises ValueError for a URL that is not http:// or https://."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's URL is http://HOST[:PORT] or https://HOST[:PORT]; got {url!r}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\naccept: */*\r\n"
        if api_key:
            self._head += f"authorization: Bearer {api_key}\r\n"
        self._idle: deque[_Connection] = deque()
        self.connections = 0  # opened, in all

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request, to `send` later."""
        more = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if method == "POST" else ""
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{more}\r\n".encode() + body

    async def send(self, request: bytes, timeout: float, sink: Sink | None = None) -> Answer:
        """Sends what `encode` made. `sink(data, time)` gets the body of a 200 as it comes. Raises HttpFailure.

        A kept connection that the server closed before it answered is no failure: the request goes out anew.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    connection, reused = await self._connection()
                    try:
                        answer = await connection.send(request, sink)
                    except HttpFailure:
                        if reused and not connection.begun:
                            continue
                        raise
                    except asyncio.CancelledError:
                        connection.transport.abort()  # the server sees that nobody waits any more
                        raise
                    if not connection.closed:
                        self._idle.append(connection)
                    return answer
        except TimeoutError:
            raise HttpFailure("timeout", f"no whole answer within {timeout:g} s") from None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().transport.close()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            kept = self._idle.pop()
            if not kept.closed and not kept.transport.is_closing():
                return kept, True
        self.connections += 1
        try:
            loop = asyncio.get_running_loop()
            _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except ConnectionRefusedError as error:
            raise HttpFailure("connection refused", str(error)) from None
        except OSError as error:
            raise HttpFailure("connection failed", str(error)) from None
        return made, False
