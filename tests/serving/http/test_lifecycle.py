"""Starts that can't succeed, and processes that die."""

import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.jobs import free_port
from twinax.serving.http.server import PortInUse, ServeConfig, listen, serve
from twinax.serving.http.unix import listen_unix

from .conftest import MODEL


def _gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not _gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_port_in_use_is_noticed_before_the_model_is_loaded(model_folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127.0.0.1 is in use by another program.*--port 0"):
            serve(ServeConfig(model=str(model_folder), port=port))


def test_a_model_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"there is no model at /nothing/here; give a checkpoint"):
        serve(ServeConfig(model="/nothing/here", port=0))


def test_a_port_can_be_used_again_at_once():
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    first.close()
    listen("127.0.0.1", port).close()


def test_a_socket_that_a_dead_server_left_is_replaced_and_another_is_not(tmp_path: Path):
    left, file = tmp_path / "left", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with listen_unix(str(left)), pytest.raises(OSError, match="another server listens on"), listen_unix(str(left)):
        pass
    assert not left.exists()
    file.write_text("precious")
    with pytest.raises(OSError, match="is not a socket"), listen_unix(str(file)):
        pass
    assert file.read_text() == "precious"
    with pytest.raises(OSError, match="can't listen on"), listen_unix(str(tmp_path / "no" / "folder")):
        pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here(host):
    with pytest.raises(OSError, match="can't listen on"):
        listen(host, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("log_level", "loud"),
        ("max_body_bytes", 0),
        ("drain_seconds", -1),
        ("drain_seconds", float("nan")),
        ("max_restarts", -1),
        ("hang_seconds", 0),
        ("stall_seconds", float("nan")),
        ("api_key", ""),
        ("api_key", " key"),
        ("api_key", "ключ"),
        ("host", ""),
        ("served_model_name", ""),
        ("served_model_name", "a\udced"),
        ("api_keys", "/proc/nowhere"),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=field):
        ServeConfig(model="m", **{field: value})


def test_a_folder_for_files_that_is_a_file(start_server, tmp_path):
    (tmp_path / "file").touch()
    server = start_server(ready=False, files=str(tmp_path / "file"))
    assert server.process.wait(timeout=60) == 1
    assert "twinax: error: files can't be kept in" in server.output()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("host", "a\udced", "can't listen on host"), ("compile_cache", "/dev/null", "compile_cache can't be kept in")],
)
def test_what_the_machine_refuses_is_one_message(start_server, field, value, says):
    server = start_server(ready=False, **{field: value})
    assert server.process.wait(timeout=60) == 1
    assert f"twinax: error: {says}" in server.output() and "Traceback" not in server.output()


def test_a_scheduler_between_keys_that_are_not_there(start_server):
    server = start_server(ready=False, scheduler="fair")
    deadline = time.monotonic() + 60
    while not any("give --api-keys" in line for line in server.lines):
        assert time.monotonic() < deadline, server.lines
        time.sleep(0.02)
    server.stop()


def test_the_key_is_not_in_the_repr():
    assert "secret" not in repr(ServeConfig(model="m", api_key="secret"))


def test_model_names(tmp_path):
    assert ServeConfig(model=str(tmp_path / "runs" / "demo")).model_id == "demo"
    assert ServeConfig(model=str(tmp_path / "demo" / "step_00000010")).model_id == "demo-step_00000010"
    assert ServeConfig(model="x", served_model_name="org/name").model_id == "org/name"
    assert ServeConfig(model=str(tmp_path / "d\udced")).model_id == "d?"


def test_an_engine_that_can_not_start_is_one_message(start_server):
    server = start_server(ready=False, max_model_len=10**6)
    assert server.process.wait(timeout=120) == 1
    *_, last = server.output().splitlines()
    assert last.startswith("twinax: error: ")
    assert "max_model_len" in last
    assert "Traceback" not in server.output()


def test_the_engine_leaves_when_its_parent_is_killed_while_loading(start_server):
    server = start_server(ready=False)
    deadline = time.monotonic() + 60
    while "twinax: importing JAX" not in server.lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = server.engine_pid()
    server.process.kill()
    _wait_gone(pid)


def test_health_tells_loading_from_ready_and_a_signal_ends_the_start(start_server):
    port = free_port()
    server = start_server(ready=False, port=port)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            health = httpx.get(f"{url}/health", timeout=60)
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    answer = httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "a"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert answer.headers["retry-after"]
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_the_engine_leaves_when_its_parent_is_killed_while_serving(start_server):
    server = start_server()
    pid = server.engine_pid()
    server.process.kill()
    _wait_gone(pid)
