"""Two hundred engine kills under load: does every client get its answer or a typed error, and none hang?

Signals at random moments, also while the engine is starting again. The answers of greedy requests are known from the
beginning: one that comes through a kill must be the same.
"""

import asyncio
import collections
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path

from . import report
from .disconnects import TINY
from .live_server import LiveServer, Reply, ask, request_bytes, running
from .model import write

SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
CODES = ("engine_restarted", "queue_full")  # the typed errors that a client may get
CLIENTS = 8
HANG_SECONDS = 600  # what is longer is taken for ever; the waits between restarts that served nobody add up to minutes


def bodies(stream: bool) -> list[bytes]:
    """Requests of all lengths."""
    lengths = (5, 60, 200, 600)
    more = {"temperature": 0, "ignore_eos": True, "stream": stream}
    return [request_bytes({"prompt": f"Number {n}.", "max_tokens": count, **more}) for n, count in enumerate(lengths)]


def text(reply: Reply, stream: bool) -> str:
    if stream:
        return "".join(event["choices"][0]["text"] for event in reply.events)
    return reply.json["choices"][0]["text"]


async def patiently(asked: Coroutine[None, None, Reply]) -> Reply | None:
    """The reply, or None after HANG_SECONDS. Time in which this process was stopped, as the server was, counts once."""
    task = asyncio.ensure_future(asked)
    for _ in range(HANG_SECONDS):
        done, _pending = await asyncio.wait({task}, timeout=1)
        if done:
            return task.result()
    task.cancel()
    return None


class Storm:
    """Clients that ask one thing after another, and somebody who kills."""

    def __init__(self, server: LiveServer, seed: int):
        self.server, self.rng = server, random.Random(seed)
        self.ends: collections.Counter[str] = collections.Counter()
        self.kills: collections.Counter[str] = collections.Counter()
        self.longest = 0.0
        self.over = False

    async def run(self, kills: int) -> None:
        server = self.server
        kinds = [(stream, nth, data) for stream in (False, True) for nth, data in enumerate(bodies(stream))]
        known = {(s, n): text(await ask(server.host, server.port, data), s) for s, n, data in kinds}
        assert all(known[False, nth] == known[True, nth] for nth in range(len(kinds) // 2))

        async def client(rng: random.Random) -> None:
            while not self.over:
                stream, nth, data = rng.choice(kinds)
                start = time.perf_counter()
                reply = await patiently(ask(server.host, server.port, data))
                if reply is None:
                    self.ends["hung"] += 1
                    continue
                self.longest = max(self.longest, time.perf_counter() - start)
                self.ends[self._end(reply, stream, known[stream, nth])] += 1

        clients = [asyncio.create_task(client(random.Random(n))) for n in range(CLIENTS)]
        while (done := sum(self.kills.values())) < kills:
            print(f"\r{done} of {kills} kills, {sum(self.ends.values())} answers", end="", file=sys.stderr, flush=True)
            await self._kill()
        print(file=sys.stderr)
        self.over = True
        await asyncio.gather(*clients)

    def _end(self, reply: Reply, stream: bool, known: str) -> str:
        if not reply.status:
            return "cut off"
        if reply.error is not None:
            code = reply.error["code"]
            return f"error {code}" if code in CODES else f"another error: {code}"
        whole = not stream or b"data: [DONE]" in reply.body
        return "answered" if whole and text(reply, stream) == known else "wrong answer"

    async def _kill(self) -> None:
        """An engine at a random moment of its work; one of ten times while it starts."""
        early = self.rng.random() < 0.1
        status = await asyncio.to_thread(self.server.status)
        while status["engine_pid"] is None or (status["status"] != "ok" and not early):
            await asyncio.sleep(0.02)
            status = await asyncio.to_thread(self.server.status)
        await asyncio.sleep(self.rng.choice([0.03, 0.3, 2.0]) * self.rng.random())
        status = await asyncio.to_thread(self.server.status)
        pid, state = status["engine_pid"], status["status"]
        if pid is None:
            return
        number = self.rng.choice(SIGNALS)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        self.kills[f"{number.name}, {'at work' if state == 'ok' else 'while starting'}"] += 1
        while (await asyncio.to_thread(self.server.status))["engine_pid"] == pid:
            await asyncio.sleep(0.05)


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "model", TINY)
        flags = ["--max-running", "4", "--max-waiting", "32", "--page-size", "16", "--hang-seconds", "3"]
        flags += ["--max-restarts", "10000", "--compile-cache", f"{folder}/cache"]
        with running(model, *flags) as server:
            storm, start = Storm(server, options.seed), time.perf_counter()
            asyncio.run(storm.run(options.count))
            seconds = time.perf_counter() - start
            left = server.wait_idle()
        status = server.process.returncode
    rows = []

    def add(case: str, ours: float, unit: str, goal: float | None = None) -> None:
        rows.append(report.Row("kills", case, ours, None, "", unit, goal, higher_is_better=False))

    for name, count in sorted(storm.kills.items()):
        add(name, count, "kills")
    for name, count in sorted(storm.ends.items()):
        add(name, count, "requests", None if name == "answered" or name.startswith("error ") else 0)
    for name in ("hung", "cut off", "wrong answer"):
        if name not in storm.ends:
            add(name, 0, "requests", 0)
    add("longest wait of a client", storm.longest, "s")
    add("restarts", left["restarts"], "restarts")
    add("requests given to a new engine", left["replays"], "requests")
    add("requests left", left["in_flight"] + left["stats"]["running"] + left["stats"]["waiting"], "requests", 0)
    add("pages in use", left["stats"]["pages_used"], "pages", 0)
    add("exit status", status, "", 0)
    add("all", seconds, "s")
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
