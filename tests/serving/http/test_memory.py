"""What requests leave in the HTTP process: nothing, however many there were.

The engine process is a `pretend_engine`. Blocks are counted, not megabytes: one that each request left would show.
"""

import asyncio
import contextlib
import ctypes
import gc
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import tokenizers
import uvicorn
import uvloop
from tokenizers import decoders, models, pre_tokenizers

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving import wire
from twinax.serving.http.app import create_app
from twinax.serving.http.engine_client import EngineClient
from twinax.serving.http.keys import ApiKeys
from twinax.serving.http.launch import LaunchedEngine
from twinax.serving.http.metrics import Metrics
from twinax.serving.http.protocol import Protocol
from twinax.serving.http.server import listen
from twinax.serving.http.service import Service

REQUESTS = 300
WORD = 200  # characters


def words_tokenizer() -> Tokenizer:
    """One that the library runs (ours takes bytes as they are), for which a prompt is a word."""
    pieces = [*pre_tokenizers.ByteLevel.alphabet(), "ab"]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_backend(backend)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[EngineClient, uvicorn.Server, int]]:
    """The port comes last."""
    launched, metrics = LaunchedEngine("tests.serving.http.pretend_engine"), Metrics()
    for latest in (metrics.latest_first, metrics.latest_between):  # they keep so many, here from the start on
        latest.extend(number + 0.5 for number in range(latest.maxlen or 0))
    engine = EngineClient(launched, wire.EngineSettings(model="m"), metrics, max_restarts=0, hang_seconds=60.0)
    app = create_app(Service(engine, metrics, "m", 1 << 20), ApiKeys({}), 60.0, None)
    web = uvicorn.Server(uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_level="warning"))
    listener = listen("127.0.0.1", 0)
    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(web.serve(sockets=[listener]))]
    try:
        await engine.started.wait()
        yield engine, web, listener.getsockname()[1]
    finally:
        web.should_exit = True
        await engine.stop()
        await asyncio.gather(*tasks)


async def ask(port: int, clients: int, rng: random.Random, found: list[int]) -> None:
    """Statuses of REQUESTS streams, each with a prompt of its own, asked by so many clients."""
    numbers = iter(range(REQUESTS))

    async def client() -> None:
        for _ in numbers:
            prompt = "".join(rng.choices("abcd", k=WORD))
            body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 3, "stream": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.read()
            found.append(int(answer.split(b" ", 2)[1]))
            writer.close()
            await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(clients)))


class _Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abc", "hblkhd", *"de", "uordblks", *"fg")]


def allocated() -> int:
    """Bytes that the C library has given out (to this thread, in the main) and not got back."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0  # it does not count
    library.mallinfo2.restype = _Allocated
    return library.mallinfo2().uordblks + library.mallinfo2().hblkhd


def test_requests_leave_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # words are read in this thread, whose memory is counted

    async def main() -> list[tuple[int, int]]:
        rng, counts = random.Random(0), []
        async with serving() as (engine, web, port):
            assert engine.ready is not None
            files = words_tokenizer().files()
            engine.ready = msgspec.structs.replace(engine.ready, tokenizer_files=files, max_waiting=4)
            engine.tokenizer.decode(range(2000))  # what each token stands for is kept
            full = engine.ready.max_running + engine.ready.max_waiting
            for _ in range(4):
                statuses: list[int] = []
                await ask(port, full, rng, statuses)
                assert statuses == [200] * REQUESTS
                engine.pause(hold=True)  # those that fill the queue wait; all others are refused
                statuses.clear()
                refused = asyncio.create_task(ask(port, 2 * full, rng, statuses))
                while len(statuses) < REQUESTS - full:
                    await asyncio.sleep(0.01)
                engine.resume()
                await refused
                assert statuses == [429] * (REQUESTS - full) + [200] * full
                while engine.in_flight or web.server_state.connections or web.server_state.tasks:
                    await asyncio.sleep(0.01)
                gc.collect()
                counts.append((sys.getallocatedblocks(), allocated()))
        return counts

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        counts = runner.run(main())
    blocks, size = (after - before for before, after in zip(*counts[-2:], strict=True))
    assert blocks < REQUESTS / 2, counts
    assert size < REQUESTS * WORD, counts
