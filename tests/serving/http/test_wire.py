"""Frames between the two processes, and what the HTTP process may not import."""

import asyncio
import socket
import subprocess
import sys

import pytest

from twinax.serving import wire
from twinax.serving.engine_process import Inbox
from twinax.serving.request import Output, Request, SamplingParams, TokenLogprob

REQUEST = Request("a-0", [1, 2, 3], SamplingParams(seed=-5, logit_bias={7: -1.5}, stop=["é"], logprobs=2), 12.5)
OUTPUT = Output(
    "a-0",
    token_ids=[5],
    text="é",
    logprobs=[TokenLogprob(5, -0.5, [(5, -0.5), (9, float("-inf"))])],
    prompt_logprobs=[None, TokenLogprob(2, -1.0)],
    finish_reason="stop",
    stop_reason="é",
    prompt_tokens=3,
    completion_tokens=1,
)
TO_ENGINE = [
    wire.Start(wire.EngineSettings(model="m", max_running=3)),
    wire.Add(4, [REQUEST]),
    wire.Cancel(["a-0"]),
    wire.Shutdown(),
    wire.Hold(True),
    wire.Reload(5, "/m"),
    wire.Profile(6, "/p", 2.5),
]
FROM_ENGINE = [
    wire.Progress("compiling", 1, 5),
    wire.Failed("no such folder", user_error=True),
    wire.Admitted(4),
    wire.Rejected(4, "full", None, True),
    wire.Done(5, "there", None),
    wire.Step([OUTPUT], wire.Stats(running=1, pages_used=2, pages_total=8, host_seconds=0.25)),
]


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = wire.BlockingChannel(theirs)
    yield ours, channel
    ours.close()
    channel.close()


def test_the_engine_process_receives_what_was_sent(pair):
    ours, channel = pair
    for message in TO_ENGINE:
        data = wire.frame(message)
        ours.sendall(data[:3])
        ours.sendall(data[3:])
        assert channel.receive() == message
    ours.close()
    assert channel.receive() is None


def test_the_http_process_receives_what_was_sent(pair):
    ours, channel = pair

    async def read() -> list[object]:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        messages = [await wire.receive(reader) for _ in range(len(FROM_ENGINE) + 1)]
        writer.close()
        return messages

    for message in FROM_ENGINE:
        channel.send(message)
    channel._sock.shutdown(socket.SHUT_WR)
    assert asyncio.run(read()) == [*FROM_ENGINE, None]


@pytest.mark.parametrize(
    "data",
    [
        wire.frame(wire.Shutdown())[:-1],
        b"\x00\x00",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc0",
        wire.frame(wire.Admitted(1)),  # of the other direction
        b"\x00\x00\x00\x05hello",
    ],
    ids=["cut", "cut header", "huge", "null", "wrong way", "not msgpack"],
)
def test_anything_else_is_an_error(pair, data):
    ours, channel = pair
    ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(wire.WireError):
        channel.receive()


def test_a_field_of_another_type_is_an_error(pair):
    import msgspec

    ours, channel = pair
    body = msgspec.msgpack.encode({"type": "cancel", "ids": [1]})
    ours.sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises(wire.WireError, match=r"[Ee]xpected `str`"):
        channel.receive()


def test_the_inbox_wakes_its_reader():
    inbox = Inbox()
    inbox.put(wire.Shutdown())
    assert inbox.take(wait=True) == [wire.Shutdown()]
    assert inbox.take(wait=False) == []
    inbox.close()
    assert inbox.take(wait=True) == []


def test_the_http_process_does_not_import_jax():
    code = "import sys; import twinax.serving.http.running; print('jax' in sys.modules, 'flax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_settings_are_shown_without_the_server():
    """What the command line imports for its help, and to start the engine process before anything slow."""
    code = "import sys; import twinax.serving.http.server; print([m for m in ('uvicorn', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
