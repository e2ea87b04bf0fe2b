"""The API key, a full queue, and leaving: on one server that queues a single request."""

import concurrent.futures
import contextlib
import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from twinax.serving import wire
from twinax.serving.engine_process import EngineServer, Inbox
from twinax.serving.http.errors import ApiError
from twinax.serving.request import Request, SamplingParams

from .conftest import MAX_RUNNING, MODEL, Server

KEY = "sk-test-key"
TENANTS = {"ann": "sk-of-ann", "bob": "sk-of-bob"}


@pytest.fixture(scope="module")
def locked(start_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in TENANTS.items()))
    server = start_server(max_waiting=1, environment={"TWINAX_API_KEY": KEY}, api_keys=str(keys))
    yield server
    server.stop()


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1], "ключ"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
        ("GET", "/metrics"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/nothing/here"),
        ("POST", "/health/"),
    ],
)
def test_every_route_but_health_needs_the_key(locked: Server, method, path, key):
    headers = {} if key is None else {"authorization": f"Bearer {key}".strip().encode()}
    response = locked.http.request(method, locked.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in response.text


def test_other_schemes_are_not_accepted(locked: Server):
    response = locked.get("/v1/models", headers={"authorization": f"Basic {KEY}"})
    assert response.status_code == 401


def test_with_the_key_everything_works(locked: Server):
    assert locked.get("/health").status_code == 200
    with locked.client(api_key=KEY) as client:
        assert client.models.list().data[0].id == MODEL
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.completion_tokens == 1
    with locked.client(api_key="other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_key_is_not_shown(locked: Server):
    assert not any(key in "\n".join(locked.lines) for key in (KEY, *TENANTS.values()))
    # The engine has no use for it.
    with open(f"/proc/{locked.engine_pid()}/environ") as environment:
        assert KEY not in environment.read()


def test_a_tenant_learns_nothing_from_what_is_cached_of_another(locked: Server):
    """Not even with the salt that would fake it."""
    prompt = "What one asks is nobody else's business, and neither is that it was asked before."

    def cached(key: str, **body) -> int:
        with locked.client(api_key=key) as client:
            answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body=body)
        return answer.usage.prompt_tokens_details.cached_tokens

    whole_pages = (len(prompt) - 1) // 16 * 16
    assert cached(TENANTS["ann"]) == 0
    assert cached(TENANTS["ann"]) == whole_pages
    assert cached(TENANTS["bob"]) == cached(KEY) == cached(KEY, cache_salt="ann\n") == 0
    assert cached(TENANTS["ann"], cache_salt="own") == cached(TENANTS["bob"], cache_salt="own") == 0
    assert cached(TENANTS["bob"]) == cached(TENANTS["bob"], cache_salt="own") == whole_pages


def test_a_full_queue_answers_429_at_once(locked: Server):
    """The engine process is stopped meanwhile, so that nothing can end and make room."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    capacity = MAX_RUNNING + 1

    def post() -> httpx.Response:
        return locked.post("/v1/completions", body, headers=headers)

    pid = locked.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(capacity + 3) as pool:
            answers = [pool.submit(post) for _ in range(capacity + 3)]
            # Those beyond the capacity are answered although the engine does nothing.
            refused = []
            for future in concurrent.futures.as_completed(answers, timeout=60):
                refused.append(future.result())
                if len(refused) == 3:
                    early = [_status_by_head(locked, f"/v1/{name}") for name in ("completions", "embeddings", "score")]
                    os.kill(pid, signal.SIGCONT)
                    break
            statuses = sorted(future.result().status_code for future in answers)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert early == [429] * 3
    for response in refused:
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["code"] == "queue_full"
    # All of the others came to the engine at once, which has one place to wait and may refuse more of them.
    assert set(statuses) == {200, 429}
    with locked.client(api_key=KEY) as client:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)


def _status_by_head(server: Server, path: str) -> int:
    """What is answered before any of the body was sent."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.putrequest("POST", path)
        for name, value in (("content-type", "application/json"), ("content-length", "9000000")):
            connection.putheader(name, value)
        connection.putheader("authorization", f"Bearer {KEY}")
        connection.endheaders()
        return connection.getresponse().status


def test_the_client_retries_after_429(locked: Server):
    """What Retry-After is for: a client with retries gets its answer in the end."""
    with locked.client(api_key=KEY, max_retries=10) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(client.completions.create, model=MODEL, prompt="a", max_tokens=20) for _ in range(12)]
        assert all(future.result().usage.prompt_tokens == 1 for future in futures)


def test_the_engine_admits_a_group_or_none_of_it(model_folder):
    from twinax.checkpoints.load import load_model
    from twinax.serving.engine import Engine, EngineConfig

    engine = Engine(load_model(model_folder), EngineConfig(max_waiting=3, page_size=16))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = EngineServer(engine, wire.BlockingChannel(theirs), Inbox())

        def group(*ids: str, prompt: int = 1) -> wire.Add:
            return wire.Add(1, [Request(name, [prompt], SamplingParams(max_tokens=2)) for name in ids])

        rejected = server._add(group("a", "b", "c", "d"))
        assert isinstance(rejected, wire.Rejected)
        assert rejected.queue_full
        assert engine.stats().waiting == 0
        assert isinstance(server._add(group("a", "b")), wire.Admitted)
        assert isinstance(server._add(group("c", "d")), wire.Rejected)
        assert engine.stats().waiting == 2
        invalid = server._add(group("e", prompt=-1))
        assert isinstance(invalid, wire.Rejected)
        assert (invalid.param, invalid.queue_full) == ("prompt", False)
        server._apply(wire.Cancel(["a", "b", "never there"]))
        assert engine.stats().waiting == 0


def test_leaving_lets_requests_finish_and_a_second_signal_cuts_them(locked: Server):
    """The last test of this server. The engine process is stopped where something must not end meanwhile."""
    pid = locked.engine_pid()
    with locked.client(api_key=KEY) as client:
        options = {"model": MODEL, "prompt": "a", "stream": True, "extra_body": {"ignore_eos": True}}
        endless = client.completions.create(**options, max_tokens=2000)
        next(iter(endless))
        short = client.completions.create(**options, max_tokens=200, seed=1)
        text = next(iter(short)).choices[0].text
        os.kill(pid, signal.SIGSTOP)
        locked.process.send_signal(signal.SIGTERM)
        _wait_refused(locked)
        os.kill(pid, signal.SIGCONT)
        *chunks, last = short
        os.kill(pid, signal.SIGSTOP)
        text += "".join(chunk.choices[0].text for chunk in [*chunks, last])
        assert last.choices[0].finish_reason == "length"
        assert text
        locked.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(endless)
        os.kill(pid, signal.SIGCONT)
    assert locked.process.wait(timeout=60) == 0
    assert "twinax: stopped" in locked.output()


def _wait_refused(server: Server) -> None:
    """Until new connections are refused."""
    address = server.url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((address[0], int(address[1])), timeout=60).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_errors_have_headers():
    assert ApiError(429, "later", retry_after=3).headers() == {"retry-after": "3"}
