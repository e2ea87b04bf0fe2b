"""Five times the load that a server can sustain: is everybody answered, who is refused at once, and does memory stay?

First `max_running` clients ask in turn: the rate at which their requests complete is what can be sustained, and their
time between tokens is what the overloaded server's is compared with. Then requests arrive at random (Poisson) at five
times that rate. A request that is refused should know within 50 ms.
"""

import asyncio
import contextlib
import dataclasses
import gc
import http.client
import json
import math
import random
import tempfile
import time
from pathlib import Path

import uvloop

from . import report
from .live_server import LiveServer, Reply, ask, request_bytes, resident_mb, running
from .model import write

FACTOR = 5
POINTS = 10  # of memory over time that are reported


@dataclasses.dataclass
class Load:
    """What came of requests. `late`: seconds by which the client sent them too late."""

    replies: list[Reply] = dataclasses.field(default_factory=list)
    late: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    memory: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)  # time, HTTP process, engine

    def with_status(self, status: int) -> list[Reply]:
        """Whole answers (streams that did not end in an error), or refusals."""
        return [one for one in self.replies if one.status == status and (status != 200 or one.error is None)]

    @property
    def gaps(self) -> list[float]:
        """Seconds between the tokens of all streams."""
        streams = self.with_status(200)
        return [after - before for one in streams for before, after in zip(one.times, one.times[1:], strict=False)]


def percentile(values: list[float], part: float) -> float:
    """Of at least one value; the largest for part 1."""
    ranked = sorted(values)
    return ranked[min(int(part * len(ranked)), len(ranked) - 1)] if ranked else math.nan


def body(rng: random.Random, prompt_tokens: int, tokens: int) -> bytes:
    """The model's tokens are bytes."""
    prompt = "".join(rng.choices("abcdefgh ", k=prompt_tokens))
    given = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": rng.getrandbits(30)}
    return request_bytes(given)


async def see_all_tokens(server: LiveServer) -> None:
    """The tokenizer keeps the bytes of each token that it has seen; they are not what is watched."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/live")
        count = json.loads(connection.getresponse().read())["model"]["vocab_size"]
    reply = await ask(server.host, server.port, request_bytes({"tokens": list(range(count))}, "/detokenize"))
    if reply.status != 200:
        raise RuntimeError(f"/detokenize answered {reply.status}: {bytes(reply.body)[:300]!r}")


async def sustained(server: LiveServer, clients: int, seconds: float, sizes: tuple[int, int]) -> Load:
    """So many clients in turn."""
    load, end = Load(), time.perf_counter() + seconds
    rng = random.Random(0)

    async def client() -> None:
        while time.perf_counter() < end:
            load.replies.append(await ask(server.host, server.port, body(rng, *sizes)))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - start
    return load


async def overloaded(server: LiveServer, rate: float, seconds: float, sizes: tuple[int, int]) -> Load:
    """Arrivals at random, whatever the server does."""
    load, rng = Load(), random.Random(1)
    tasks = []
    start = time.perf_counter()
    engine = server.status()["engine_pid"]

    async def one(due: float) -> None:
        load.late.append(time.perf_counter() - due)
        load.replies.append(await ask(server.host, server.port, body(rng, *sizes)))

    async def watch() -> None:
        while True:
            now = time.perf_counter() - start
            load.memory.append((now, resident_mb(server.process.pid), resident_mb(engine)))
            await asyncio.sleep(seconds / 100)

    watcher = asyncio.create_task(watch())
    gc.collect()
    gc.disable()  # all replies are kept: late in the run the client would stop for 0.1 s, and call it the server's
    due = start
    while (due := due + rng.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(due)))
        if len(tasks) > 1000:
            tasks = [task for task in tasks if not task.done()]
    load.seconds = time.perf_counter() - start
    await asyncio.gather(*tasks)
    watcher.cancel()
    gc.enable()
    return load


def rows_of(before: Load, load: Load) -> list[report.Row]:
    """The table."""
    done, refused = load.with_status(200), load.with_status(429)
    rest = len(load.replies) - len(done) - len(refused)
    rows: list[report.Row] = []

    def add(case: str, ours: float, unit: str, goal: float | None = None) -> None:
        rows.append(report.Row("overload", case, ours, None, "", unit, goal, higher_is_better=False))

    add("sustained", len(before.with_status(200)) / before.seconds, "requests/s")
    add("offered", len(load.replies) / load.seconds, "requests/s")
    add("completed", len(done), "requests")
    add("refused (429)", len(refused), "requests")
    add("neither", rest, "requests", 0)
    waits = [1000 * one.ended for one in refused]
    for name, part, goal in (("p50", 0.5, None), ("p99", 0.99, 50.0), ("longest", 1.0, 50.0)):
        add(f"refusal, {name}", percentile(waits, part), "ms", goal)
    add("refusals over 50 ms", sum(wait > 50 for wait in waits), "requests", 0)
    for name, part in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0)):
        usual, now = (1000 * percentile(one.gaps, part) for one in (before, load))
        goal = 0.5 if name == "p99" else None
        case = f"between tokens, {name}"
        rows.append(report.Row("overload", case, now, usual, "sustained load", "ms", goal, higher_is_better=False))
    add("first token, p50", percentile([one.times[0] for one in done], 0.5), "s")
    # As late is what the machine itself stops for; it shares the cores with both sides.
    for name, part in (("p99", 0.99), ("longest", 1.0)):
        add(f"client late, {name}", 1000 * percentile(load.late, part), "ms")
    settled = load.memory[len(load.memory) // 5]
    for nth, name in ((1, "HTTP process"), (2, "engine")):
        for at in range(0, len(load.memory), max(len(load.memory) // POINTS, 1)):
            now = load.memory[at]
            add(f"memory of the {name} at {now[0]:.0f} s", now[nth], "MB")
        last = max(one[nth] for one in load.memory[-5:])
        add(f"memory of the {name}, end over first fifth", last / settled[nth], "x", 1.05)
    return rows


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--model", type=Path, help="whose tokens are bytes; default: 60M parameters, random")
    parser.add_argument("--seconds", type=float, default=600.0, help="of overload")
    parser.add_argument("--running", type=int, default=8, help="requests decoded together")
    parser.add_argument("--waiting", type=int, default=32, help="requests in the queue, at most")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="to generate for each request")
    parser.add_argument("--compile-cache", help="folder")
    options = parser.parse_args()
    sizes = (options.prompt_tokens, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write(Path(folder) / "model")
        flags = ["--max-running", str(options.running), "--max-waiting", str(options.waiting)]
        flags += ["--max-model-len", "512", "--prefix-cache", ""]
        flags += ["--compile-cache", options.compile_cache] if options.compile_cache else []
        with running(model, *flags) as server:
            usual = max(10.0, options.seconds / 20)
            uvloop.run(see_all_tokens(server))
            before = uvloop.run(sustained(server, options.running, usual, sizes))
            rate = len(before.with_status(200)) / before.seconds
            load = uvloop.run(overloaded(server, FACTOR * rate, options.seconds, sizes))
            left = server.wait_idle()
        print(json.dumps({"left": left["in_flight"], "pages used": left["stats"]["pages_used"]}))
        report.finish(rows_of(before, load), options.json)


if __name__ == "__main__":
    main()
