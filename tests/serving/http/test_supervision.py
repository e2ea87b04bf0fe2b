"""Engines that die, hang or babble: every request ends with its whole answer or a typed error, and nothing is left.

The engine processes are `pretend_engine`s: what starts, watches, replaces and feeds them is the real thing.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import uvloop

from twinax.serving import wire
from twinax.serving.http import engine_life, generation
from twinax.serving.http.engine_client import EngineClient, EngineError
from twinax.serving.http.errors import ApiError
from twinax.serving.http.launch import LaunchedEngine
from twinax.serving.http.metrics import Metrics
from twinax.serving.http.restarts import WINDOW_SECONDS, RestartPolicy
from twinax.serving.request import Request, SamplingParams

from . import pretend_engine
from .pretend_engine import BABBLES, DIES_AT_START, EXITS, HANGS, HANGS_AT_START, KILLS, NO_MODEL, WAITS, WAITS_AT


def request(name: str, count: int = 20, first: int = 7, seed: int | None = 1) -> Request:
    return Request(name, [first, len(name)], SamplingParams(max_tokens=count, seed=seed))


def expected(given: Request) -> list[int]:
    return [pretend_engine.token(given, position) for position in range(given.params.max_tokens)]


class Server:
    """A client of an engine that is supervised, and what it said."""

    def __init__(self, client: EngineClient, supervision: asyncio.Task[None], said: list[str]):
        self.client, self.supervision, self.said = client, supervision, said

    async def ask(self, given: Request, got: list[int] | None = None) -> list[int]:
        """The tokens; `got` grows with them."""
        if got is None:
            got = []
        async with self.client.generate([given]) as outputs:
            async for output in outputs:
                got += output.token_ids
        return got

    def begin(self, given: Request) -> tuple["asyncio.Task[list[int]]", list[int]]:
        got: list[int] = []
        return asyncio.create_task(self.ask(given, got)), got

    async def begin_waiting(self, given: Request) -> tuple["asyncio.Task[list[int]]", list[int]]:
        """One whose engine stands still in its midst, until there is the file `go`."""
        assert given.prompt_ids[0] == WAITS
        task, got = self.begin(given)
        await self.until(lambda: len(got) == WAITS_AT)
        return task, got

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.client.pid is not None
        os.kill(self.client.pid, number)

    async def until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline and not self.supervision.done(), self.said
            await asyncio.sleep(0.002)

    async def check_idle(self) -> None:
        """Nothing is left of any request, here or in the engine."""
        client = self.client
        assert (client.in_flight, client._groups, client._owners, client._calls) == (0, {}, {}, {})
        await self.until(lambda: client.is_up)
        last = request("last", 3)
        assert await self.ask(last) == expected(last)
        await self.until(lambda: (client.metrics.stats.running, client.metrics.stats.pages_used) == (0, 0))


@contextlib.asynccontextmanager
async def serving(*, model: str = "m", wait: bool = True, **options) -> AsyncIterator[Server]:
    launch = partial(LaunchedEngine, "tests.serving.http.pretend_engine")
    said: list[str] = []
    options = {"max_restarts": 100, "hang_seconds": 60.0, **options}
    settings = wire.EngineSettings(model=model)
    client = EngineClient(launch(), settings, Metrics(), launch=launch, say=said.append, **options)
    server = Server(client, asyncio.create_task(client.run()), said)
    try:
        if wait:
            await server.until(client.started.is_set)
        yield server
    finally:
        await client.stop()
        with contextlib.suppress(EngineError):
            await server.supervision
        assert client.in_flight == 0
        assert client.pid is None


@pytest.fixture(autouse=True)
def go(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that an engine waits for which was asked a prompt that WAITS."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv(pretend_engine.GO_FILE, str(tmp_path / "go"))
    return tmp_path / "go"


def test_what_was_in_flight_goes_on_where_it_was(go: Path):
    async def main():
        async with serving() as server:
            for number in (signal.SIGKILL, signal.SIGSEGV):
                # Two of them wait for a slot.
                given = [request(f"a{number}{i}", 60, WAITS if i == 0 else 7, seed=i) for i in range(6)]
                tasks = [server.begin(one) for one in given]
                await server.until(lambda got=tasks[0][1]: len(got) == WAITS_AT)
                server.kill(number)
                early = server.begin(request("early"))
                await server.until(lambda: not server.client.is_up)
                go.touch()
                assert server.client.state[0] == "restarting"
                late = server.begin(request("late"))
                for one, (task, _) in zip(given, tasks, strict=True):
                    assert await task == expected(one)
                assert await early[0] == expected(request("early"))
                assert await late[0] == expected(request("late"))
                go.unlink()
            assert server.client.metrics.restarts == 2
            assert server.client.metrics.replays in range(12, 15)
            assert "was killed by SIGKILL" in server.said[0]
            assert "ready again" in server.said[1]
            await server.check_idle()

    uvloop.run(main())


def test_a_request_without_a_seed_gets_one_that_outlives_the_engine():
    async def main():
        async with serving() as server:
            task, got = server.begin(request("a", 50, seed=None))
            await server.until(lambda: len(got) >= 5)
            before = got[:5]
            server.kill()
            tokens = await task
            assert tokens[:5] == before
            assert len(tokens) == 50

    uvloop.run(main())


@pytest.mark.parametrize("how", [KILLS, EXITS, HANGS, BABBLES])
def test_what_is_no_good_for_engines_is_not_tried_a_third_time(how):
    async def main():
        async with serving(hang_seconds=1.0 if how == HANGS else 60.0) as server:
            with pytest.raises(ApiError, match="died 2 times while it worked on this request") as caught:
                await server.ask(request("bad", first=how))
            assert (caught.value.status, caught.value.code) == (503, "engine_restarted")
            assert server.client.metrics.restarts == 2
            words = {KILLS: "SIGSEGV", EXITS: "exited with status 3", HANGS: "hung", BABBLES: "may not"}[how]
            assert words in server.said[0]
            await server.check_idle()

    uvloop.run(main())


def test_an_engine_that_is_stopped_is_replaced(go: Path):
    async def main():
        async with serving(hang_seconds=1.0) as server:
            given = request("a", 100, WAITS)
            task, _ = await server.begin_waiting(given)
            server.kill(signal.SIGSTOP)
            go.touch()  # nothing else keeps it from going on
            assert await task == expected(given)
            assert "hung (nothing from it for 1 s)" in server.said[0]

    uvloop.run(main())


def test_a_held_engine_is_not_taken_for_hung(go: Path):
    async def main():
        async with serving(hang_seconds=2.0) as server:
            given = request("a", 1000, WAITS)
            task, got = await server.begin_waiting(given)
            server.client.pause(hold=True)
            go.touch()
            waiting, nothing = server.begin(request("b"))
            await asyncio.sleep(3.0)
            count = len(got)
            assert (nothing, server.client.state[0], server.client.metrics.restarts) == ([], "paused", 0)
            server.kill()  # the next one is held too
            await server.until(lambda: server.client.metrics.restarts == 1 and server.client.is_up)
            await asyncio.sleep(0.1)
            assert len(got) == count < 1000
            assert nothing == []
            server.client.resume()
            assert await task == expected(given)
            assert await waiting == expected(request("b"))

    uvloop.run(main())


def test_a_paused_server_lets_what_runs_go_on():
    async def main():
        async with serving() as server:
            task, got = server.begin(request("a", 50))
            await server.until(lambda: len(got) >= 5)
            server.client.pause(hold=False)
            waiting, nothing = server.begin(request("b"))
            assert await task == expected(request("a", 50))
            assert nothing == []
            waiting.cancel()  # its client goes away
            await asyncio.gather(waiting, return_exceptions=True)
            server.client.resume()
            await server.check_idle()

    uvloop.run(main())


def test_it_gives_up_with_the_last_words():
    async def main():
        async with serving(max_restarts=1) as server:
            tasks = [server.begin(request(f"bad{i}", first=EXITS))[0] for i in range(2)]
            with pytest.raises(EngineError, match=r"died 2 times within 10 minutes.*max_restarts=1") as caught:
                await server.supervision
            assert "these are my last words" in str(caught.value)
            for task in tasks:
                with pytest.raises(ApiError, match="going down") as error:
                    await task
                assert (error.value.status, error.value.code) == (503, "engine_dead")
            with pytest.raises(ApiError, match="going down"):
                await server.ask(request("a"))
            assert server.client.state == ("dead", None)

    uvloop.run(main())


@pytest.mark.parametrize(("model", "says"), [(NO_MODEL, "there is no model"), (DIES_AT_START, "killed by SIGKILL")])
def test_the_first_start_is_not_tried_again(model, says):
    async def main():
        async with serving(model=model, wait=False) as server:
            with pytest.raises(EngineError, match=says):
                await server.supervision
            assert server.client.metrics.restarts == 0

    uvloop.run(main())


def test_a_start_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(engine_life, "START_SECONDS", 1.0)

    async def main():
        async with serving(model=HANGS_AT_START, wait=False, hang_seconds=1.0) as server:
            with pytest.raises(EngineError, match="hung"):
                await server.supervision

    uvloop.run(main())


def test_a_kill_while_it_starts_again(go: Path):
    async def main():
        async with serving() as server:
            given = request("a", 50, WAITS)
            task, _ = await server.begin_waiting(given)
            first = server.client.pid
            server.kill()
            await server.until(lambda: server.client.pid not in (None, first))
            assert not server.client.is_up
            server.kill()
            go.touch()
            assert await task == expected(given), "it was not at work on it the second time"
            assert server.client.metrics.restarts == 2
            await server.check_idle()

    uvloop.run(main())


def test_to_stop_while_it_starts_again():
    async def main():
        async with serving() as server:
            task, _ = await server.begin_waiting(request("a", 50, WAITS))
            server.kill()
            await server.until(lambda: not server.client.is_up)
            await server.client.stop()
            with pytest.raises(ApiError, match="shutting down"):
                await task
            await server.supervision

    uvloop.run(main())


def test_an_engine_that_dies_while_it_is_told_to_leave():
    async def main():
        async with serving() as server:
            server.kill(signal.SIGSTOP)
            stop = asyncio.create_task(server.client.stop())
            await asyncio.sleep(0.05)
            server.kill()
            await stop
            await server.supervision
            assert server.client.metrics.restarts == 0

    uvloop.run(main())


def test_a_reader_that_reads_nothing_does_not_hold_the_others(monkeypatch):
    monkeypatch.setattr(generation, "MOST_UNREAD", 200)

    async def main():
        async with serving() as server:
            async with server.client.generate([request("stuck", 9000)]) as outputs:
                others = [request(f"o{i}", 40) for i in range(3)]
                for one in others:
                    assert await server.ask(one) == expected(one)
                await server.until(lambda: server.client.in_flight == 0)
                with pytest.raises(ApiError) as caught:
                    _ = [output async for output in outputs]
                assert caught.value.code == "client_too_slow"
            await server.check_idle()

    uvloop.run(main())


@pytest.mark.parametrize("seed", range(2))
def test_random_kills_and_disconnects(seed, monkeypatch):
    """Whatever happens when: all end, with all their tokens or a typed error, and leave nothing behind."""

    async def client(server: Server, rng: random.Random, name: str) -> str:
        given = [request(f"{name}-{i}", rng.randint(1, 60), seed=rng.randint(0, 99)) for i in range(rng.randint(1, 3))]
        got: dict[str, list[int]] = {one.id: [] for one in given}
        patience = rng.choice([None, None, rng.randint(1, 40)])  # outputs that it waits for
        await asyncio.sleep(rng.random() * 0.8)
        try:
            async with server.client.generate(given) as outputs:
                count = 0
                async for output in outputs:
                    got[output.request_id] += output.token_ids
                    count += 1
                    if count == patience:
                        return "went away"
        except ApiError as error:
            return error.code or "an error without a code"
        assert got == {one.id: expected(one) for one in given}
        return "answered"

    async def main():
        rng = random.Random(seed)
        async with serving(hang_seconds=1.0) as server:
            monkeypatch.setattr(engine_life, "START_SECONDS", 5.0)  # one may be stopped while it starts
            tasks = [asyncio.create_task(client(server, random.Random(1000 * seed + i), f"c{i}")) for i in range(40)]
            for number in (signal.SIGKILL, signal.SIGSTOP):
                await asyncio.sleep(rng.random() * 0.2)
                await server.until(lambda: server.client.pid is not None)
                server.kill(number)
            ends = await asyncio.gather(*tasks)
            assert set(ends) <= {"answered", "went away", "engine_restarted", "queue_full"}
            assert ends.count("answered") > 5, ends
            await server.check_idle()

    uvloop.run(main())


def test_waits_grow_while_nothing_comes_of_the_restarts():
    policy = RestartPolicy(8)
    assert [policy.delay(float(i)) for i in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert policy.delay(9.0) is None
    assert policy.delay(WINDOW_SECONDS) == 30, "the first one no longer counts"
    policy.useful()
    assert policy.delay(WINDOW_SECONDS + 1) == 0
    assert policy.total == 10
    assert RestartPolicy(0).delay(0.0) is None
