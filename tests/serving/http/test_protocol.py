"""Connections that are slow or send too much before there is a request, with a server of one line behind them."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router

from twinax.serving.http import protocol
from twinax.serving.http.app import Gate
from twinax.serving.http.body import InTime, read_json
from twinax.serving.http.errors import ApiError
from twinax.serving.http.keys import ApiKeys
from twinax.serving.http.protocol import MOST_HEAD_BYTES, Protocol
from twinax.serving.http.uploads import read_form

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GOOD = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def _app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def serve(client: Callable[[Callable[[], Awaitable[Streams]]], Awaitable[None]], app: Any = _app) -> None:
    """Runs `client`, which is given a function that connects."""

    async def both() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_level="error"))
        running = asyncio.create_task(server._serve([listener]))
        try:
            await asyncio.wait_for(client(lambda: asyncio.open_connection(*listener.getsockname())), 60)
        finally:
            server.should_exit = True
            await running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the server's
        runner.run(both())


async def answer(streams: Streams, data: bytes) -> bytes:
    """All that comes until the server closes."""
    streams[1].write(data)
    found = await streams[0].read()
    streams[1].close()
    return found


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\nx: y\r\nx"])
def test_a_head_without_an_end_is_refused(begin):
    async def client(connect):
        for size in (1, 20):  # a client that goes on sending hears of it too
            data = begin + b"a" * MOST_HEAD_BYTES * size
            assert (await answer(await connect(), data)).startswith(b"HTTP/1.1 431 ")

    serve(client)


def test_headers_without_number_are_refused():
    async def client(connect):
        lines = b"".join(b"x%d: y\r\n" % i for i in range(MOST_HEAD_BYTES // 8))
        assert (await answer(await connect(), GOOD[:-2] + lines)).startswith(b"HTTP/1.1 431 ")

    serve(client)


def test_what_is_not_http_is_answered_with_an_error_of_the_api():
    async def client(connect):
        found = await answer(await connect(), b"hello\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid_http"' in found

    serve(client)


def test_heads_one_after_another_are_counted_each_for_itself():
    async def client(connect):
        reader, writer = await connect()
        for _ in range(3 * MOST_HEAD_BYTES // 40_000):
            writer.write(GOOD[:-2] + b"x: " + b"a" * 40_000 + b"\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
        writer.close()

    serve(client)


def test_slow_heads_are_ended_and_hold_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    begun, expect = [], Protocol._expect_head
    monkeypatch.setattr(Protocol, "_expect_head", lambda self: (begun.append(self), expect(self)))

    async def client(connect):
        silent, slow = [await connect() for _ in range(50)], [await connect() for _ in range(50)]
        for _, writer in slow:
            writer.write(GOOD[:10])
        while len(begun) < 150:  # each connection, and each head that has begun
            await asyncio.sleep(0)
        monkeypatch.setattr(protocol, "HEAD_SECONDS", 60.0)  # what comes now is in time, however busy the machine is
        for _ in range(20):
            reader, writer = await connect()
            writer.write(GOOD)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            writer.close()
        for reader, writer in silent + slow:
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
            writer.close()

    serve(client)


class _Reads:
    """A route that reads its body, and says what was in it."""

    def __init__(self, read: Callable[..., Awaitable[dict[str, Any]]]) -> None:
        self._read = read

    async def __call__(self, scope, receive, send):
        found = await self._read(scope, receive, 100_000)
        await PlainTextResponse(f"read {len(found)}")(scope, receive, send)


def _reads_json() -> Gate:
    return Gate(Router([Route("/json", _Reads(read_json), methods=["POST"])]), ApiKeys({}), stall_seconds=60.0)


# The head of a request whose body is larger than is read; more headers go in the middle.
_TOO_LARGE = b"POST /json HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%bcontent-length: 5000000\r\n\r\n"


def _request(path: str, kind: str, size: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {size}\r\n"
    return f"{head}connection: close\r\n\r\n".encode()


FORM = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [("/json", "application/json", b'{"a": "'), ("/form", "multipart/form-data; boundary=b", FORM)],
)
@pytest.mark.parametrize("pause", [None, 0.03])
def test_a_body_that_stalls_or_drips_is_refused_and_holds_nobody(path, kind, body, pause):
    """A byte now and then is no pause, but less than a body must come at."""
    routes = [Route("/json", _Reads(read_json), methods=["POST"]), Route("/form", _Reads(read_form), methods=["POST"])]
    gate = Gate(Router(routes), ApiKeys({}), stall_seconds=0.3)

    async def drip(connect) -> bytes:
        reader, writer = await connect()
        writer.write(_request(path, kind, 50_000) + body)
        dripping = asyncio.create_task(_drip(writer, pause)) if pause else None
        try:
            return await reader.read()
        finally:
            if dripping is not None:
                dripping.cancel()
            writer.close()

    async def client(connect):
        slow = [asyncio.create_task(drip(connect)) for _ in range(20)]
        good = b'{"a": 1, "b": 2}'
        assert (await answer(await connect(), _request("/json", "application/json", len(good)) + good)).endswith(
            b"read 2"
        )
        for found in await asyncio.gather(*slow):
            assert found.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in found
        assert (await answer(await connect(), _request("/json", "application/json", len(good)) + good)).endswith(
            b"read 2"
        )

    serve(client, gate)


async def _drip(writer: asyncio.StreamWriter, pause: float) -> None:
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(pause)


@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"])
def test_an_answer_in_the_midst_of_a_body_arrives(monkeypatch, close):
    """Whoever sends more than is wanted hears why."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 60.0)

    async def client(connect):
        reader, writer = await connect()
        writer.write(_TOO_LARGE % close)
        for _ in range(50):  # without a wait for the answer, as clients do; more than is kept on the way
            writer.write(b"x" * 90_000)
            await writer.drain()
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413 ")
        assert b"body_too_large" in await reader.readuntil(b"}}")
        writer.close()

    serve(client, _reads_json())


@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"])
def test_what_follows_an_answer_ends_some_time(monkeypatch, close):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)

    async def client(connect):
        _, writer = await connect()
        writer.write(_TOO_LARGE % close)
        while not writer.is_closing():  # what is sent to a connection that has ended is answered with a reset
            writer.write(b"a")
            await asyncio.sleep(0.01)

    serve(client, _reads_json())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wish_for_another_protocol_is_answered_once_and_ends_the_connection(method):
    """What follows it would be taken for the next request."""

    async def client(connect):
        reader, writer = await connect()
        upgrade = f"{method} / HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 8\r\n\r\n"
        writer.write(upgrade.encode())
        assert b"connection: close\r\n" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b'{"a": 1}' + GOOD)
        assert await reader.read() == b"ok"
        writer.close()

    serve(client)


def test_after_a_refused_body_the_connection_serves_on():
    head = "POST /json HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"

    async def client(connect):
        reader, writer = await connect()
        for _ in range(3):
            writer.write(head.format(200_000).encode() + b"x" * 1000)
            assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 413 ")
            writer.write(b"x" * 199_000 + head.format(8).encode() + b'{"a": 1}')
            assert (await reader.readuntil(b"read 1")).startswith(b"HTTP/1.1 200 ")
        writer.close()

    serve(client, _reads_json())


def in_pieces(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> asyncio.Event:
    """The first connection's protocol gets what comes in pieces of these sizes, then as it comes; set once it has."""
    left, kept, receive, done = list(sizes), bytearray(), Protocol.data_received, asyncio.Event()

    def data_received(self: Protocol, data: bytes) -> None:
        kept.extend(data)
        while left and len(kept) >= left[0]:
            receive(self, bytes(kept[: left[0]]))
            del kept[: left.pop(0)]
        if not left:
            done.set()
            if kept:
                receive(self, bytes(kept))
                kept.clear()

    monkeypatch.setattr(Protocol, "data_received", data_received)
    return done


def test_the_rest_of_a_refused_body_is_not_counted_as_the_next_head(monkeypatch):
    head = "POST /json HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    first, second = head.format(200_000).encode(), head.format(8).encode() + b'{"a": 1}'

    async def client(connect):
        received = in_pieces(monkeypatch, len(first), 200_000)
        reader, writer = await connect()
        writer.write(first)
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 413 ")
        writer.write(b"x" * 200_000)
        await received.wait()
        writer.write(second)
        assert (await reader.readuntil(b"\r\n")) == b"HTTP/1.1 200 OK\r\n"
        writer.close()

    serve(client, _reads_json())


def test_of_a_piece_only_the_head_that_began_before_it_is_counted(monkeypatch):
    """Requests one behind the other, cut where the head of another begins; which is refused all the same in the end."""
    body = b'{"a": "' + b"x" * 90_000 + b'"}'
    head = b"POST /json HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    request = head % len(body) + body
    cut = request[:30]

    async def client(connect):
        many = 2 * request + cut
        in_pieces(monkeypatch, len(many), len(request))
        reader, writer = await connect()
        writer.write(many + request[30:] + cut)
        for _ in range(3):
            assert b"HTTP/1.1 200 OK\r\n" in await reader.readuntil(b"read 1")
        writer.write(b"a" * MOST_HEAD_BYTES * 2)
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()

    serve(client, _reads_json())


def a_refusal(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a connection has refused something."""
    refused, refuse = asyncio.Event(), Protocol._refuse
    monkeypatch.setattr(Protocol, "_refuse", lambda self, error: (refuse(self, error), refused.set()))
    return refused


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("more", "status", "seconds"),
    [
        (b"hello\r\n\r\n", 400, 60.0),
        (GOOD[:-2] + b"x: " + b"a" * MOST_HEAD_BYTES + b"\r\n\r\n", 431, 60.0),
        (GOOD[:10], 408, 0.1),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno size\r\n", 400, 60.0),
    ],
    ids=["no HTTP", "a long head", "a slow head", "a wrong body"],
)
def test_a_refusal_follows_the_answers_to_what_came_before(monkeypatch, begun, count, more, status, seconds):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", seconds)
    refused, errors = a_refusal(monkeypatch), []

    async def app(scope, receive, send):
        try:
            if not begun:
                await refused.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"o", "more_body": True})
            await refused.wait()
            await send({"type": "http.response.body", "body": b"k"})
        except BaseException as error:
            errors.append(error)
            raise

    async def client(connect):
        data = count * GOOD + more
        in_pieces(monkeypatch, len(data))
        reader, writer = await connect()
        writer.write(data)
        for _ in range(count):
            assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
            assert (await reader.readuntil(b"\r\n\r\nok")).count(b"HTTP") == 0
        rest = await reader.read()
        assert rest.startswith(b"HTTP/1.1 %d " % status) and rest.count(b"HTTP/1.1 ") == 1
        writer.close()

    serve(client, app)
    assert not errors


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_a_wrong_body_is_answered_once(monkeypatch, begun):
    """Whose answer has begun goes on; else it is refused, and what was to answer it writes nothing."""
    refused, errors, words = a_refusal(monkeypatch), [], asyncio.Event()

    async def app(scope, receive, send):
        try:
            if not begun:
                await refused.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await refused.wait()
            await send({"type": "http.response.body", "body": b"ok"})
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            words.set()

    async def client(connect):
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        found = await reader.readuntil(b"\r\n") if begun else b""
        writer.write(b"no size\r\n")
        found += await reader.read()
        await words.wait()
        assert found.startswith(b"HTTP/1.1 200 " if begun else b"HTTP/1.1 400 ")
        assert found.count(b"HTTP/1.1 ") == 1 and found.endswith(b"ok" if begun else b"}}")
        writer.close()

    serve(client, app)
    assert not errors


def test_a_body_in_many_pieces_is_read():
    async def client(connect):
        reader, writer = await connect()
        parts = [b'{"a": "', *[b"x" * 2000] * 30, b'"}']
        writer.write(_request("/json", "application/json", sum(map(len, parts))))
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.001)
        assert (await reader.read()).endswith(b"read 1")
        writer.close()

    serve(client, _reads_json())


def test_a_body_that_comes_fast_enough_may_take_longer_than_a_pause(monkeypatch):
    """By a clock that moves while a piece is waited for: 2 s a piece, of 2,000 bytes or of fewer."""

    async def read(size: int) -> tuple[int, int]:
        """A status, and how many bytes came before it."""
        loop, now, came = asyncio.get_running_loop(), 0.0, 0
        monkeypatch.setattr(loop, "time", lambda: now)

        async def receive():
            nonlocal now
            now += 2.0
            for _ in range(3):  # a timer that is due comes before the piece
                await asyncio.sleep(0)
            return {"type": "http.request", "body": b"x" * size, "more_body": now < 20.0}

        in_time, more = InTime(receive, 5.0), True
        while more:
            try:
                message = await in_time()
            except ApiError as error:
                return error.status, came
            came, more = came + len(message["body"]), message["more_body"]
        return 200, came

    assert asyncio.run(read(2000)) == (200, 20_000)
    assert asyncio.run(read(1900)) == (200, 19_000), "it has 5 s to begin with"
    assert asyncio.run(read(1000)) == (408, 3000)  # after 8 s
