"""One real server through its whole life: its engine killed, held, given other weights, drained. Tests are in order."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.live_server import request_bytes

from .conftest import MODEL, Server

pytestmark = pytest.mark.slow
BODY = {"model": MODEL, "prompt": "The same prompt, twenty times.", "max_tokens": 400, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("a") / "admin"


@pytest.fixture(scope="module")
def supervised(start_server, path: Path) -> Iterator[Server]:
    server = start_server(admin_socket=str(path), max_restarts=3, hang_seconds=600, stall_seconds=2)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def admin(supervised: Server, path: Path) -> Iterator[httpx.Client]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://admin", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone(supervised: Server) -> str:
    """The answer to BODY, when nothing happens meanwhile."""
    return answer(supervised)


def answer(server: Server, **changes) -> str:
    response = server.post("/v1/completions", BODY | changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


class Stream(threading.Thread):
    """A stream in a thread of its own. `parts` are its texts so far, `error` the event that ended it."""

    def __init__(self, server: Server):
        super().__init__()
        self.server, self.parts, self.error = server, [], None
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        url, body = self.server.url + "/v1/completions", BODY | {"stream": True}
        with self.server.http.stream("POST", url, json=body) as found:
            for line in found.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.error = event["error"]
                    else:
                        self.parts.append(event["choices"][0]["text"])
                    self.begun.set()

    def text(self) -> str:
        self.join(timeout=120)
        assert not self.is_alive() and self.error is None, self.error
        return "".join(self.parts)


def test_the_socket_is_for_its_user_alone(supervised: Server, path: Path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_public_port_has_none_of_it(supervised: Server, admin: httpx.Client):
    assert admin.get("/status").json()["status"] == "ok"
    for route in ("status", "pause", "resume", "drain", "reload", "profile"):
        assert supervised.post(f"/{route}", {}).status_code == 404
        assert supervised.get(f"/{route}").status_code == 404


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("/pause?hold=maybe", "'hold' must be true or false"),
        ("/pause?held=true", "takes hold in its query, got 'held'"),
        ("/resume?now=1", "takes no arguments"),
        ("/reload", "'path' must be an absolute path"),
        ("/reload?path=here", "'path' must be an absolute path, got 'here'"),
        ("/reload?path=/a&path=/b", "given twice"),
        ("/profile?folder=/tmp&seconds=nan", "'seconds' must be above 0"),
    ],
)
def test_arguments_are_checked(admin: httpx.Client, query: str, says: str):
    response = admin.post(query)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


def test_a_killed_engine_is_replaced_and_nobody_notices(supervised: Server, admin: httpx.Client, alone: str):
    stream = Stream(supervised)
    assert stream.begun.wait(timeout=60)
    os.kill(supervised.engine_pid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while supervised.get("/health").json()["status"] == "ok":
        assert time.monotonic() < deadline
    assert supervised.get("/health").json()["status"] == "restarting"
    assert answer(supervised) == alone, "it waited"
    assert stream.text() == alone, "it went on where it was"
    status = admin.get("/status").json()
    assert (status["status"], status["restarts"], status["replays"]) == ("ok", 1, 1)
    assert "was killed by SIGKILL" in status["last_death"]
    metrics = supervised.metrics()
    assert metrics["twinax_engine_restarts_total"] == 1
    assert metrics["twinax_replayed_requests_total"] == 1
    assert metrics["twinax_compiles_after_warmup_total"] == 0
    assert any("ready again" in line for line in supervised.lines)


def test_hold_and_resume(supervised: Server, admin: httpx.Client, alone: str):
    stream = Stream(supervised)
    assert stream.begun.wait(timeout=60)
    assert admin.post("/pause?hold=true").json()["status"] == "paused"
    assert supervised.get("/health").status_code == 503
    supervised.wait_for(num_requests_running=1)
    second = Stream(supervised)
    assert not second.begun.wait(timeout=0.2)
    assert admin.post("/resume").json()["status"] == "ok"
    assert stream.text() == second.text() == alone


def test_other_weights(supervised: Server, admin: httpx.Client, model_folder: Path, tmp_path: Path, alone: str):
    other, wrong = tmp_path / "other", tmp_path / "wrong"
    for folder in (other, wrong):
        shutil.copytree(model_folder, folder)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors = {name: np.ascontiguousarray(array[::-1]) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.125}))

    for given, says in ((tmp_path / "nothing", "does not exist"), (wrong, "has norm_eps 0.125 for 1e-05")):
        refused = admin.post("/reload", params={"path": str(given)})
        assert refused.status_code == 409
        assert says in refused.json()["error"]["message"]
    assert answer(supervised) == alone, "the old weights are still there"

    stream = Stream(supervised)
    assert stream.begun.wait(timeout=60)
    assert admin.post("/reload", params={"path": str(other)}).status_code == 200
    assert stream.text() == alone, "what came before finishes on the old weights"
    response = supervised.post("/v1/completions", BODY).json()
    assert response["choices"][0]["text"] != alone
    assert response["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "the prefix cache was emptied"
    assert admin.get("/status").json()["model"] == str(other)
    assert admin.post("/reload", params={"path": str(model_folder)}).status_code == 200
    assert answer(supervised) == alone
    assert supervised.metrics()["twinax_compiles_after_warmup_total"] == 0


def test_a_client_that_reads_nothing_is_cut_off(supervised: Server, alone: str):
    supervised.http.close()  # its kept connections would be counted
    supervised.http = httpx.Client(timeout=60, headers={"connection": "close"})
    url, before = urlsplit(supervised.url), sockets_of(supervised.process.pid)
    body = BODY | {"n": 4, "logprobs": 20, "stream": True}  # megabytes, more than buffers hold
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((url.hostname, url.port))
        deaf.sendall(request_bytes(body))
        deadline = time.monotonic() + 60
        while sockets_of(supervised.process.pid) == before:
            assert time.monotonic() < deadline, "it never came"
        assert answer(supervised) == alone, "it holds nobody"
        supervised.wait_idle()
        while sockets_of(supervised.process.pid) > before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not any("Traceback" in line for line in supervised.lines)


def sockets_of(pid: int) -> int:
    """How many sockets a process has."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(entry).startswith("socket:")
    return count


def test_drain_ends_with_status_0_when_all_is_done(supervised: Server, admin: httpx.Client, path: Path, alone: str):
    stream = Stream(supervised)
    assert stream.begun.wait(timeout=60)
    assert admin.post("/drain").json() == {"status": "stopping", "in_flight": 1}
    assert stream.text() == alone
    assert supervised.process.wait(timeout=60) == 0
    assert not path.exists()


def test_an_engine_that_may_not_be_started_again_ends_the_server(start_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    server: Server = start_server(environment={"TMPDIR": str(folder)}, max_restarts=0)
    pid = server.engine_pid()
    stream = Stream(server)
    assert stream.begun.wait(timeout=60)
    os.kill(pid, signal.SIGSTOP)  # so that it is sure to be at work on the request when it is killed
    os.kill(pid, signal.SIGKILL)
    stream.join(timeout=60)
    assert stream.error is not None and stream.error["code"] == "engine_dead"
    assert server.process.wait(timeout=60) == 1
    assert "twinax: error: the engine process was killed by SIGKILL" in server.output()
    assert list(folder.iterdir()) == []


def test_a_profile(start_server, tmp_path):
    path = str(tmp_path / "admin")
    server = start_server(admin_socket=path)
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://admin", timeout=60) as own:
        stream = Stream(server)
        assert stream.begun.wait(timeout=60)
        assert own.post("/profile", params={"folder": str(tmp_path / "p"), "seconds": "0.2"}).status_code == 200
        stream.text()
    assert list((tmp_path / "p").rglob("*.xplane.pb"))
    assert server.stop() == 0
