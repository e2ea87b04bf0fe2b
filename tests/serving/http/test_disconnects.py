"""A client that goes away takes its requests with it: their pages are free again, and others don't notice."""

import asyncio
import socket
import threading
from urllib.parse import urlsplit

import openai
import pytest

from benchmarks.disconnects import MANNERS, storm
from benchmarks.live_server import request_bytes

from .conftest import MAX_RUNNING, MODEL, Server

# Long enough that it can't end before the client has gone.
ENDLESS = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(autouse=True)
def leaves_the_server_idle(server: Server):
    server.wait_idle()
    yield
    server.wait_idle()


def test_closing_a_stream_cancels_all_its_choices(server: Server, client):
    before = server.finished("abort")
    stream = client.completions.create(model=MODEL, prompt="a", n=MAX_RUNNING + 2, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    server.wait_idle()
    assert server.finished("abort") == before + MAX_RUNNING + 2


def test_closing_a_chat_stream(server: Server, client):
    before = server.finished("abort")
    messages = [{"role": "user", "content": "hello"}]
    with client.chat.completions.create(model=MODEL, messages=messages, stream=True, **ENDLESS) as stream:
        events = iter(stream)
        # The first says who speaks, before the engine's first step; with the second the request is known to run.
        next(events), next(events)
    server.wait_idle()
    assert server.finished("abort") == before + 1


def test_a_client_that_does_not_wait_for_its_whole_answer(server: Server):
    before, url = server.finished("abort"), urlsplit(server.url)
    body = {"model": MODEL, "prompt": ["a", "b", "c", "d"], "n": 3, "max_tokens": 2000, "ignore_eos": True}
    with socket.create_connection((url.hostname, url.port), timeout=60) as impatient:
        impatient.sendall(request_bytes(body))
        server.wait_for(num_requests_running=MAX_RUNNING)
    server.wait_idle()
    assert server.finished("abort") == before + 12


def test_neighbours_go_on(server: Server, client):
    options = {"model": MODEL, "prompt": "neighbour", "seed": 11, "max_tokens": 300}
    alone = client.completions.create(**options).choices[0].text
    found = []
    thread = threading.Thread(target=lambda: found.append(client.completions.create(**options).choices[0].text))
    stream = client.completions.create(model=MODEL, prompt="a", n=3, stream=True, **ENDLESS)
    next(iter(stream))
    thread.start()
    stream.close()
    thread.join(timeout=60)
    assert found == [alone]


def test_cancelling_a_task_of_the_asynchronous_client(server: Server):
    before = server.finished("abort")

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            task = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", **ENDLESS))
            while (await asyncio.to_thread(server.metrics))["vllm:num_requests_running"] == 0:
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    server.wait_idle()
    assert server.finished("abort") == before + 1


def test_going_away_in_the_middle_of_the_body(server: Server):
    def half():
        yield b'{"model": "tiny", '
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        server.post_bytes("/v1/completions", half())
    assert server.get("/health").status_code == 200
    assert not any("Traceback" in line for line in server.lines)


def test_random_disconnects_leave_nothing_behind(server: Server):
    """A small part of `benchmarks.disconnects`: in the head, in the body, before the first byte, half closed, deaf."""
    url = urlsplit(server.url)
    assert url.hostname is not None and url.port is not None
    found = asyncio.run(storm(url.hostname, url.port, 50, 8, 0, MODEL))
    assert found.pop("stays: 200") + found.pop("stays: 429", 0) > 0
    assert len(found) == len(MANNERS) - 1
    server.wait_idle()
    assert not any("Traceback" in line for line in server.lines)
