"""A thousand clients that go away at random moments, in every way: what is left of them in the server afterwards?"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import random
import tempfile
import time
from pathlib import Path

from . import report
from .live_server import MODEL, ask, request_bytes, resident_mb, running
from .model import CONFIG, write

TINY = dataclasses.replace(
    CONFIG, vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
MANNERS = ("in the head", "in the body", "before the first byte", "in the middle", "half closed", "deaf", "stays")
_PATIENCE = 60.0


async def disconnect(host: str, port: int, rng: random.Random, model: str) -> str:
    """One client; how it left. Only the one that stays asks for an answer that ends soon."""
    how = rng.choice(MANNERS)
    stream = rng.random() < 0.6
    many = {"n": rng.randint(1, 3), "max_tokens": 900}
    given = {"model": model, "prompt": "abc", "stream": stream, "ignore_eos": True, **many}
    if how == "stays":
        reply = await ask(host, port, request_bytes({**given, "n": 1, "max_tokens": 5}))
        return f"stays: {reply.status}"
    data = request_bytes(given)
    body = data.index(b"\r\n\r\n") + 4
    reader, writer = await asyncio.open_connection(host, port)
    try:
        if how == "in the head":
            writer.write(data[: rng.randrange(1, body)])
            await asyncio.sleep(rng.random() * 0.05)
        elif how == "in the body":
            writer.write(data[: rng.randrange(body, len(data))])
            await asyncio.sleep(rng.random() * 0.05)
        else:
            writer.write(data)
            if how == "before the first byte":
                await asyncio.sleep(rng.choice([0, 0.001, rng.random() * 0.1, rng.random()]))
            elif how == "in the middle":
                for _ in range(rng.randint(1, 5)):
                    await asyncio.wait_for(reader.read(rng.randint(1, 4000)), 1.0 if not stream else _PATIENCE)
            elif how == "half closed":
                writer.write_eof()
                await asyncio.wait_for(reader.read(), _PATIENCE)  # the server ends it, with an answer or without
            else:
                await asyncio.sleep(rng.random())  # it is there and reads nothing
    except (ConnectionError, TimeoutError):
        pass  # the server was first, or there was nothing to read yet
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # a reset, where something is left unread
        else:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
    return how


async def storm(
    host: str, port: int, count: int, together: int, seed: int, model: str = MODEL
) -> collections.Counter[str]:
    """`count` of them, so many at a time; how many left in which way."""
    numbers = iter(range(count))
    found: collections.Counter[str] = collections.Counter()

    async def client() -> None:
        for number in numbers:
            found[await disconnect(host, port, random.Random(seed * 1_000_003 + number), model)] += 1

    await asyncio.gather(*(client() for _ in range(together)))
    return found


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--count", type=int, default=1000, help="clients")
    parser.add_argument("--together", type=int, default=16, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "model", TINY)
        flags = ["--max-running", "8", "--max-waiting", "64", "--page-size", "16", "--stall-seconds", "5"]
        with running(model, *flags, "--compile-cache", f"{folder}/cache") as server:
            asyncio.run(storm(server.host, server.port, 20, 4, options.seed + 1))  # what is kept for good is there
            server.wait_idle()
            sockets, memory = server.sockets(), resident_mb(server.process.pid)
            start = time.perf_counter()
            found = asyncio.run(storm(server.host, server.port, options.count, options.together, options.seed))
            seconds = time.perf_counter() - start
            left = server.wait_idle()
            grown = resident_mb(server.process.pid) - memory
            deadline = time.monotonic() + 60
            while server.sockets() > sockets and time.monotonic() < deadline:
                time.sleep(0.1)
            more_sockets = server.sockets() - sockets
            tracebacks = sum("Traceback" in line for line in server.lines)
    rows = []

    def add(case: str, ours: float, unit: str, goal: float | None = None) -> None:
        rows.append(report.Row("disconnects", case, ours, None, "", unit, goal, higher_is_better=False))

    for how, count in sorted(found.items()):
        add(how, count, "clients")
    add("all", seconds, "s")
    add("requests left in the server", left["in_flight"], "requests", 0)
    add("requests left in the engine", left["stats"]["running"] + left["stats"]["waiting"], "requests", 0)
    add("pages in use", left["stats"]["pages_used"], "pages", 0)
    add("sockets more than before", more_sockets, "sockets", 0)
    add("engine restarts", left["restarts"], "restarts", 0)
    add("tracebacks in the log", tracebacks, "tracebacks", 0)
    add("memory of the HTTP process, more than before", grown, "MB")
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
