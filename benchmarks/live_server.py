"""A server in processes of its own, and the plainest client: for benchmarks that watch it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from twinax.serving.bench.local import process

MODEL = "model"  # its name, whatever is served


@dataclasses.dataclass
class LiveServer:
    """A running `twinax serve`. `lines`: what it printed."""

    process: subprocess.Popen[str]
    host: str
    port: int
    admin_socket: str
    lines: list[str]

    def status(self) -> dict[str, Any]:
        """What its admin socket says of it."""
        connection = http.client.HTTPConnection("admin", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(connection):
            connection.sock.connect(self.admin_socket)
            connection.request("GET", "/status")
            return json.loads(connection.getresponse().read())

    def wait_idle(self, seconds: float = 120.0) -> dict[str, Any]:
        """Until no request is left and no page is in use; the status then, or when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            stats = status["stats"]
            left = status["in_flight"] + stats["running"] + stats["waiting"] + stats["pages_used"]
            if (status["status"] == "ok" and left == 0) or time.monotonic() > deadline:
                return status
            time.sleep(0.05)

    def sockets(self) -> int:
        """Open sockets of the HTTP process."""
        folder = f"/proc/{self.process.pid}/fd"
        count = 0
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(f"{folder}/{name}").startswith("socket:")
        return count


def resident_mb(pid: int | None) -> float:
    """Memory of a process that is in RAM; NaN when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def running(model: Path, *flags: str) -> Iterator[LiveServer]:
    """Starts `twinax serve MODEL FLAGS` on a free port, and stops it at the end. Prints its last words if it ends."""
    with tempfile.TemporaryDirectory(prefix="tx-") as folder:
        admin = f"{folder}/admin"
        with process(str(model), "--admin-socket", admin, "--served-model-name", MODEL, *flags) as server:
            host, _, port = server.url.removeprefix("http://").rpartition(":")
            try:
                yield LiveServer(server.process, host, int(port), admin, server.lines)
                server.process.terminate()
                server.process.wait(60)
            except BaseException:
                said = "\n".join(server.lines[-40:])
                print(f"the server (status {server.process.poll()}) said last:\n{said}", file=sys.stderr)
                raise


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A whole HTTP request, after which the server closes the connection."""
    data = json.dumps({"model": MODEL, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


@dataclasses.dataclass
class Reply:
    """An answer as it came. `status` 0: the connection ended without one.

    Attributes:
        begun, ended: seconds since the request was sent, to the first byte and to the last.
        times: of each event of a stream.
        body: all bytes of the body, the frames of chunks included.
    """

    status: int = 0
    begun: float = 0.0
    ended: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    body: bytearray = dataclasses.field(default_factory=bytearray)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream."""
        lines = bytes(self.body).split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    @property
    def json(self) -> dict[str, Any]:
        """The body of an answer in one piece."""
        return json.loads(bytes(self.body)[self.body.index(b"{") : self.body.rindex(b"}") + 1])

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that it is, or that its stream ended with."""
        if self.status == 0:
            return None
        if b"data: " in self.body:
            return next((event["error"] for event in self.events if "error" in event), None)
        return self.json.get("error")


async def ask(host: str, port: int, data: bytes) -> Reply:
    """Sends `data` on a connection of its own and reads until the server closes it."""
    start = time.perf_counter()
    reply = Reply()
    async for chunk in exchange(host, port, data):
        now = time.perf_counter() - start
        if not reply.status:
            head, _, chunk = chunk.partition(b"\r\n\r\n")
            reply.status, reply.begun = int(head.split(b" ", 2)[1]), now
        reply.times += [now] * chunk.count(b"data: {")
        reply.body += chunk
    reply.ended = time.perf_counter() - start
    return reply


async def exchange(host: str, port: int, data: bytes) -> AsyncIterator[bytes]:
    """What comes back; the first piece holds the whole head."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        first = b""
        while chunk := await reader.read(1 << 16):
            if first is not None:
                first += chunk
                if b"\r\n\r\n" not in first:
                    continue
                chunk, first = first, None
            yield chunk
    except ConnectionError:
        return
    finally:
        writer.close()
