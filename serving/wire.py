"""What the HTTP process and the engine process say to each other: msgpack messages over a Unix socket.

A frame is a 4-byte big-endian length and that many bytes of one tagged message. Both ends decode against the declared
types, so nothing but these structures can arrive: there is no pickle. This module must stay importable without JAX.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import msgspec

from .request import Output, Request

MAX_FRAME_BYTES = 1 << 30


class WireError(OSError):
    """The other end sent something that is not one of the messages, or stopped in the middle of one."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs to build its engine; None means the engine's own default."""

    model: str
    dtype: str | None = None
    cache_dtype: str | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    max_model_len: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    cache_bytes: int | None = None
    chunk_tokens: int | None = None
    prefix_cache: str | None = None
    scheduler: str | None = None
    max_token_ms: float | None = None
    host_cache_bytes: int | None = None
    plan: str | None = None
    compile_cache: str | None = None


# -- HTTP process -> engine process -----------------------------------------------------------------------------------


class Start(msgspec.Struct, tag="start"):
    """First message, sent once."""

    settings: EngineSettings


class Add(msgspec.Struct, tag="add"):
    """Admit all these requests or none; answered by Admitted or Rejected with the same group."""

    group: int
    requests: list[Request]


class Cancel(msgspec.Struct, tag="cancel"):
    """Stop these requests and free their pages; unknown ids (already finished) are ignored.

    `complete`: a stop string has ended them, which only the text shows.
    """

    ids: list[str]
    complete: bool = False


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Leave after the current step."""


class Hold(msgspec.Struct, tag="hold"):
    """Take no steps from now on, whatever there is to do; or go on."""

    held: bool


class Reload(msgspec.Struct, tag="reload"):
    """Serve the weights at `path`, of the same model; answered by Done.

    Requests that were added before these are loaded finish on the old ones.
    """

    call: int
    path: str


class Profile(msgspec.Struct, tag="profile"):
    """Write a profile of the next seconds into `folder`; answered by Done when it is there."""

    call: int
    folder: str
    seconds: float


ToEngine = Start | Add | Cancel | Shutdown | Hold | Reload | Profile

# -- engine process -> HTTP process -----------------------------------------------------------------------------------


class Progress(msgspec.Struct, tag="progress"):
    """Where a start is. Said again every second, to show that the process lives."""

    stage: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, tag="ready"):
    """The engine is compiled and takes requests."""

    model: str
    family: str
    tokenizer_files: dict[str, bytes]
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_running: int
    max_waiting: int
    cache_tokens: int
    fingerprint: str
    load_seconds: float
    warmup_seconds: float
    honours: tuple[str, ...] = ()  # of the fields that not every scheduler knows


class Failed(msgspec.Struct, tag="failed"):
    """The engine can't go on; the process exits after this. `user_error`: the message says it all, no traceback."""

    message: str
    user_error: bool = False


class Admitted(msgspec.Struct, tag="admitted"):
    group: int


class Rejected(msgspec.Struct, tag="rejected"):
    group: int
    message: str
    param: str | None = None
    queue_full: bool = False


class Stats(msgspec.Struct, kw_only=True):
    """Counts since the start (`*_total`-like) and the present state of queues and cache."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    host_pages_used: int = 0
    host_pages_total: int = 0
    pages_copied_out: int = 0
    pages_copied_back: int = 0
    compiles_after_warmup: int = 0
    host_seconds: float = 0.0


class Step(msgspec.Struct, tag="step"):
    """What one engine step produced (possibly nothing, when only the state changed)."""

    outputs: list[Output]
    stats: Stats


class Done(msgspec.Struct, tag="done"):
    """What came of a call; with an `error` nothing has changed."""

    call: int
    text: str = ""
    error: str | None = None


FromEngine = Progress | Ready | Failed | Admitted | Rejected | Step | Done

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def _length(header: bytes) -> int:
    size = int.from_bytes(header, "big")
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame announces {size} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return size


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(f"not a message of this protocol: {error}") from error


class BlockingChannel:
    """The engine process's end. One thread calls `receive`, any may call `send`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._reader = sock.makefile("rb")

    @classmethod
    def connect(cls, path: str) -> BlockingChannel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        return cls(sock)

    def receive(self) -> ToEngine | None:
        """The next message, or None at the end of the stream."""
        header = self._reader.read(4)
        if not header:
            return None
        body = self._reader.read(_length(header)) if len(header) == 4 else b""
        if len(header) < 4 or len(body) < _length(header):
            raise WireError("the stream ended inside a frame")
        return _decode(to_engine_decoder, body)

    def send(self, message: FromEngine) -> None:
        data = frame(message)
        with self._sending:
            self._sock.sendall(data)

    def close(self) -> None:
        self._reader.close()
        self._sock.close()


async def receive(reader: asyncio.StreamReader) -> FromEngine | None:
    """The HTTP process's end: the next message, or None at the end of the stream."""
    try:
        header = await reader.readexactly(4)
        body = await reader.readexactly(_length(header))
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise WireError("the stream ended inside a frame") from None
    except ConnectionError:
        return None
    return _decode(from_engine_decoder, body)
