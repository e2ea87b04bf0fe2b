"""What nobody sends by mistake: each gets its 4xx for less than a second of the server's time, and it goes on serving.

The bodies follow the kinds of JSONTestSuite (n_: not JSON, i_: left to the implementation). Schemas and patterns that
are costly to compile are in test_structured_outputs.py.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CONTEXT, MODEL, Server

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/tokenize")
_TICKS = os.sysconf("SC_CLK_TCK")


def _seconds(pid: int) -> float:
    """Of processor time, of all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cheap(server: Server) -> Iterator[None]:
    """A loop of one turn, which costs both processes of the server less than a second of processor time.

    A virtual machine that is stopped counts what it missed as the time of whoever ran, so there may be three turns, of
    which one must do.
    """
    pids = (server.process.pid, server.engine_pid())
    spent = []
    for _ in range(3):
        before = sum(map(_seconds, pids))
        yield
        spent.append(sum(map(_seconds, pids)) - before)
        if spent[-1] < 1.0:
            return
    raise AssertionError(f"it costs {spent} s")


@pytest.fixture(autouse=True)
def _goes_on(server: Server) -> Iterator[None]:
    engine = server.engine_pid()
    yield
    assert server.post("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1}).status_code == 200
    assert server.engine_pid() == engine


# In the place of a value.
NOT_JSON = [
    b"", b"[", b"]", b"[1", b"[1,", b"[1,]", b"[,1]", b"[1,,2]", b"[1 2]", b"[1]]", b"{", b"}", b'{"a"', b'{"a":',
    b'{"a":}', b'{"a":1,}', b'{"a" 1}', b"{1:1}", b"{a:1}", b"{'a':1}", b'{"a":1,,"b":2}', b'{"a":1/**/}', b'"', b'"a',
    b'"\\"', b'"\\x41"', b'"\\u12"', b'"\\uZZZZ"', b'"\\ud800\\u"', b"'a'", b'"a\nb"', b'"a\tb"', b'"\x00"', b'"\x1f"',
    b"tru", b"True", b"nul", b"None", b"undefined", b"nan", b"inf", b"+1", b"01", b"-01", b".5", b"5.", b"1e", b"1e+",
    b"1e1.5", b"0x10", b"1_000", b"--1", b"-", b"1a", b"\xef\xbb\xbf1", b"\xff", b'"\xc0\xaf"', b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"', b"1 # comment", b"1 // comment", b"<html>", b"\xe2\x81\xa01",
]  # fmt: skip
# JSON, or what some readers take for it: never a text.
IMPLEMENTATION = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"1" * 4000, b"-" + b"9" * 4000,
    b"0." + b"1" * 9000, b"1" * 100_000, b"1E400", b"-0", b'{"a":1,"a":2}', b'{"":0}', b"[[]]", b"[" * 900 + b"]" * 900,
    b'{"a":' * 900 + b"1" + b"}" * 900, b'"\\ud800"', b'"\\udfff"', b'"\\ud800\\ud800"',
    b'"\\udc00\\ud800"', b'["\\ud800"]',
]  # fmt: skip


def body_with(path: str, value: bytes) -> bytes:
    """A body that would be good with another value in the one field."""
    field = {"/v1/chat/completions": "messages", "/tokenize": "prompt", "/v1/completions": "prompt"}.get(path, "input")
    more = {"/v1/score": b'"text_2": "a", "text_1"'}.get(path, f'"{field}"'.encode())
    return b'{"model": "' + MODEL.encode() + b'", ' + more + b": " + value + b"}"


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_json_and_what_only_some_take_for_it(server: Server, path):
    for _ in cheap(server):
        for value in NOT_JSON:
            response = server.post_bytes(path, body_with(path, value))
            assert (response.status_code, response.json()["error"]["code"][:7]) == (400, "invalid"), value[:50]
        for value in IMPLEMENTATION:
            response = server.post_bytes(path, body_with(path, value))
            assert 400 <= response.status_code < 500, (value[:50], response.text[:300])
            assert len(response.text) < 2500  # however large the value was


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "value",
    [
        b"[" * 5_000_000 + b"]" * 5_000_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'"' + b"a" * 10_000_000 + b'"',
        b'"' + b"\\u0000" * 1_500_000 + b'"',
        b'"' + "𝄞".encode() * 2_500_000 + b'"',
        b'{"a": "' + b"a" * 10_000_000 + b'"}',
        b"[" + b"1," * 999_999 + b"1]",
        b'["' + b'","' * 999_999 + b'"]',
    ],
    ids=["lists", "objects", "text", "escapes", "wide", "field", "numbers", "texts"],
)
def test_ten_megabytes(server: Server, path, value):
    for _ in cheap(server):
        response = server.post_bytes(path, body_with(path, value))
    assert response.status_code == 400, response.text[:300]
    assert len(response.text) < 2500


def test_ten_megabytes_of_messages(server: Server):
    long = "a" * 10_000_000
    for _ in cheap(server):
        response = server.post(
            "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": long}]}
        )
    assert response.json()["error"]["code"] == "context_length_exceeded"
    for _ in cheap(server):
        response = server.post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": long, "content": "a"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].role")


_MESSAGE = {"role": "user", "content": "a"}
_PART = {"type": "text", "text": "a"}
_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("path", "field", "given"),
    [
        ("/v1/chat/completions", "messages", [_MESSAGE] * 10_001),
        ("/v1/chat/completions", "messages", [_MESSAGE] * 99_000),
        ("/v1/chat/completions", "messages", [_MESSAGE | {"content": [_PART] * 30}] * 3000),
        ("/v1/chat/completions", "messages", [_MESSAGE | {"role": "assistant", "tool_calls": [_CALL] * 49_000}]),
        ("/v1/responses", "input", [_MESSAGE] * 99_000),
        ("/v1/responses", "input", [_MESSAGE | {"content": [{"type": "input_text", "text": "a"}] * 99_000}]),
        ("/tokenize", "messages", [_MESSAGE] * 99_000),
    ],
    ids=range(7),
)
def test_a_conversation_of_very_many_pieces(server: Server, path, field, given):
    """Nobody's tokens wait while each is looked at."""
    for _ in cheap(server):
        response = server.post(path, {"model": MODEL, field: given})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert "in all; it may have 10000 at most" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "given"),
    [
        ("/v1/chat/completions", "messages", [_MESSAGE] * 250_000),
        ("/v1/chat/completions", "messages", [_MESSAGE | {"content": [_PART] * 30}] * 8000),
        ("/v1/chat/completions", "messages", [_MESSAGE | {"role": "assistant", "tool_calls": [_CALL] * 100_000}]),
        ("/v1/responses", "input", [_MESSAGE] * 250_000),
        ("/v1/responses", "input", [_MESSAGE | {"content": [{"type": "input_text", "text": "a"}] * 200_000}]),
        ("/tokenize", "messages", [_MESSAGE] * 250_000),
    ],
    ids=range(6),
)
def test_a_conversation_of_more_pieces_than_are_read(server: Server, path, field, given):
    body = json.dumps({"model": MODEL, field: given}).encode()
    for _ in cheap(server):
        response = server.post_bytes(path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_values")


def test_a_conversation_may_have_many_messages(server: Server):
    given = [_MESSAGE | {"content": [_PART]}] * 5000
    for path, body in (
        ("/v1/chat/completions", {"messages": given}),
        ("/v1/responses", {"input": [_MESSAGE] * 10_000}),
    ):
        error = server.post(path, {"model": MODEL} | body).json()["error"]
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 * 7 }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% endfor %}{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_looks_like_a_template_is_text(server: Server, text):
    """The model reads the braces."""

    def read(content: str) -> str:
        ids = server.post("/tokenize", {"messages": [{"role": "user", "content": content}]}).json()["tokens"]
        return server.post("/detokenize", {"tokens": ids}).json()["prompt"]

    for _ in cheap(server):
        assert read(text) == read("plain").replace("plain", text)
    for name in ("{{ 7 }}", "user{{", "__class__"):
        assert server.post("/tokenize", {"messages": [{"role": name, "content": "a"}]}).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data"}, 415),
        ({"content-type": "application/jsonp"}, 415),
        ({"content-type": "a" * 10_000}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity, br"}, 415),
        ({"authorization": "Bearer " + "a" * 10_000}, 200),
        ({"x": "\u00ff" * 10_000}, 200),
        ({f"x{i}": "y" for i in range(1000)}, 200),
        ({"x": "a" * 70_000}, 431),
        ({"upgrade": "h2c", "connection": "upgrade", "http2-settings": "a"}, 400),
    ],
    ids=range(13),
)
def test_headers(server: Server, headers, status):
    data = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    raw = {name: value.encode("latin-1") for name, value in ({"content-type": "application/json"} | headers).items()}
    for _ in cheap(server):
        response = server.http.post(server.url + "/v1/completions", content=data, headers=raw)
    assert response.status_code == status, response.text


def exchange(server: Server, data: bytes) -> bytes:
    """What comes back of raw bytes, up to the end of the connection; nothing, if it is cut."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while chunk := sock.recv(1 << 16):
            found += chunk
        return found


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
GOOD_BODY = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    "data",
    [
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-1\r\n\r\n",
        CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\na",
        CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"5\nabcde\n0\n\n",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
        POST + b"content-length: -5\r\n\r\n",
        POST + b"content-length: 99999999999999999999999\r\n\r\n",
        POST + b"transfer-encoding: gzip, identity\r\n\r\n",
        POST + b"no colon\r\n\r\n",
        POST + b" folded: value\r\n\r\n",
        POST + b"nul: \x00\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_broken_http(server: Server, data):
    for _ in cheap(server):
        assert exchange(server, data).startswith(b"HTTP/1.1 400 "), data


def test_bodies_that_are_cut_short_are_forgotten(server: Server):
    for _ in cheap(server):
        for data in (
            POST + b"content-length: 1000\r\n\r\n" + GOOD_BODY,
            CHUNKED + b"5\r\n" + GOOD_BODY[:3],
            CHUNKED + f"{len(GOOD_BODY):x}".encode() + b"\r\n" + GOOD_BODY + b"\r\n",
            POST[:40],
        ):
            assert not exchange(server, data).startswith(b"HTTP/1.1 200")
    server.wait_idle()


def test_a_body_byte_by_byte_holds_nobody(server: Server):
    """Twenty of them, and between their bytes everybody else is served."""
    host, port = server.url.removeprefix("http://").split(":")
    data = POST + f"content-length: {len(GOOD_BODY)}\r\n\r\n".encode() + GOOD_BODY
    for _ in cheap(server):
        slow = [socket.create_connection((host, int(port)), timeout=60) for _ in range(20)]
        for i in range(0, len(data), 8):
            for sock in slow:
                sock.sendall(data[i : i + 8])
            assert server.get("/health").status_code == 200
        for sock in slow:
            answer = b""
            while chunk := sock.recv(1 << 16):
                answer += chunk
            assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 429 "))
            sock.close()


def test_texts_of_a_context_each_are_counted_before_they_are_read(server: Server):
    for _ in cheap(server):
        response = server.post("/v1/completions", {"model": MODEL, "prompt": ["a" * CONTEXT * 8] * 1000})
    assert response.json()["error"]["param"] == "prompt"
