"""Whatever is wrong with a request: an error of the API's shape that names the field, and the server goes on."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest

from .conftest import CONTEXT, MAX_WAITING, MODEL, Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "a", "max_tokens": 1},
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
MISSING = object()

# path, field, value, parameter named by the error, its code
FIELDS = [
    (COMPLETIONS, "prompt", MISSING, "prompt", "missing_required_parameter"),
    (COMPLETIONS, "prompt", "", "prompt", "invalid_value"),
    (COMPLETIONS, "prompt", [], "prompt", "invalid_value"),
    (COMPLETIONS, "prompt", [[]], "prompt", "invalid_value"),
    (COMPLETIONS, "prompt", ["a", ""], "prompt[1]", "invalid_value"),
    (COMPLETIONS, "prompt", [99999], "prompt", "invalid_value"),
    (COMPLETIONS, "prompt", [[1], [2**31]], "prompt[1][0]", "invalid_value"),
    (COMPLETIONS, "prompt", {"a": 1}, "prompt", "invalid_type"),
    (COMPLETIONS, "prompt", "\ud800", "prompt", "invalid_value"),
    (COMPLETIONS, "prompt", "a" * CONTEXT, "prompt", "context_length_exceeded"),
    (COMPLETIONS, "prompt", ["a"] * (MAX_WAITING + 1), "prompt", "invalid_value"),
    (CHAT, "messages", MISSING, "messages", "missing_required_parameter"),
    (CHAT, "messages", [], "messages", "invalid_value"),
    (CHAT, "messages", "hi", "messages", "invalid_type"),
    (CHAT, "messages", [{"role": "user", "content": "a" * CONTEXT}], "messages", "context_length_exceeded"),
    (CHAT, "max_completion_tokens", 0, "max_completion_tokens", "invalid_value"),
    (CHAT, "top_logprobs", 2, "top_logprobs", "invalid_value"),
    (CHAT, "logprobs", 2, "logprobs", "invalid_type"),
    (CHAT, "tools", [{"type": "function"}], "tools[0].function", "missing_required_parameter"),
    (CHAT, "tool_choice", "auto", "tool_choice", "invalid_value"),
    (CHAT, "response_format", {"type": "jsonl"}, "response_format.type", "invalid_value"),
    (CHAT, "structured_outputs", {"regex": "(a"}, "structured_outputs", "invalid_grammar"),
    (COMPLETIONS, "structured_outputs", {"json": {"type": "objekt"}}, "structured_outputs", "invalid_grammar"),
    (CHAT, "store", True, "store", "unsupported_parameter"),
    (CHAT, "prompt", "a", "prompt", "unknown_parameter"),
    (COMPLETIONS, "max_tokens", 0, "max_tokens", "invalid_value"),
    (COMPLETIONS, "logprobs", 21, "logprobs", "invalid_value"),
    (COMPLETIONS, "logprobs", True, "logprobs", "invalid_type"),
    (COMPLETIONS, "echo", "yes", "echo", "invalid_type"),
    (COMPLETIONS, "suffix", "end", "suffix", "unsupported_parameter"),
    (COMPLETIONS, "best_of", 0, "best_of", "invalid_value"),
    (COMPLETIONS, "messages", [], "messages", "unknown_parameter"),
    *(
        (path, field, value, param, code)
        for path in (COMPLETIONS, CHAT)
        for field, value, param, code in [
            ("model", MISSING, "model", "missing_required_parameter"),
            ("model", 3, "model", "invalid_type"),
            ("max_tokens", -1, "max_tokens", "invalid_value"),
            ("max_tokens", 10**9, "max_tokens", "context_length_exceeded"),
            ("max_tokens", 10**30, "max_tokens", "context_length_exceeded"),
            ("max_tokens", 1.5, "max_tokens", "invalid_type"),
            ("max_tokens", "5", "max_tokens", "invalid_type"),
            ("temperature", float("nan"), "temperature", "invalid_value"),
            ("temperature", float("inf"), "temperature", "invalid_value"),
            ("temperature", -1, "temperature", "invalid_value"),
            ("temperature", "hot", "temperature", "invalid_type"),
            ("temperature", True, "temperature", "invalid_type"),
            ("top_p", 0, "top_p", "invalid_value"),
            ("top_p", 1.1, "top_p", "invalid_value"),
            ("n", 0, "n", "invalid_value"),
            ("n", 129, "n", "invalid_value"),
            ("n", MAX_WAITING + 1, "n", "invalid_value"),
            ("presence_penalty", 2.5, "presence_penalty", "invalid_value"),
            ("frequency_penalty", -2.5, "frequency_penalty", "invalid_value"),
            ("seed", 2**63, "seed", "invalid_value"),
            ("seed", 1.0, "seed", "invalid_type"),
            ("stop", [""], "stop[0]", "invalid_value"),
            ("stop", ["a"] * 17, "stop", "invalid_value"),
            ("stop", "a" * 1025, "stop", "invalid_value"),
            ("stop", [1], "stop[0]", "invalid_type"),
            ("logit_bias", {"99999": 1}, "logit_bias", "invalid_value"),
            ("logit_bias", {"1": 1000}, "logit_bias.1", "invalid_value"),
            ("logit_bias", [1], "logit_bias", "invalid_type"),
            ("stream", "true", "stream", "invalid_type"),
            ("stream_options", {"include_usage": True}, "stream_options", "invalid_value"),
            ("stream_options", {"include_usge": True}, "stream_options.include_usge", "unknown_parameter"),
            ("top_k", -1, "top_k", "invalid_value"),
            ("min_p", 2, "min_p", "invalid_value"),
            ("min_tokens", 5, "min_tokens", "invalid_value"),
            ("repetition_penalty", 0, "repetition_penalty", "invalid_value"),
            ("stop_token_ids", [99999], "stop_token_ids", "invalid_value"),
            ("ignore_eos", 1, "ignore_eos", "invalid_type"),
            ("temprature", 1, "temprature", "unknown_parameter"),
            ("user", 5, "user", "invalid_type"),
        ]
    ),
]


def check_error(response: httpx.Response, status: int, param: str | None, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert len(error["message"]) < 500
    return error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value", "param", "code"),
    FIELDS,
    ids=[f"{i}-{path.split('/')[2]}-{field}" for i, (path, field, *_) in enumerate(FIELDS)],
)
def test_bad_fields(server: Server, path, field, value, param, code):
    body = {name: item for name, item in (GOOD[path] | {field: value}).items() if item is not MISSING}
    data = json.dumps(body).encode()  # writes NaN and lone surrogates as Python does
    response = server.post_bytes(path, data)
    message = check_error(response, 400, param, code)
    assert param is None or param.split("[")[0].split(".")[0] in message or code == "context_length_exceeded"


def test_best_of_below_n_and_streamed_best_of(server: Server):
    good = GOOD[COMPLETIONS]
    for change in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
        check_error(server.post(COMPLETIONS, good | change), 400, "best_of", "invalid_value")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"[" * 200_000, "invalid_json"),
        (b'{"model": "tiny", "model": "tiny"}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_utf8"),
    ],
    ids=["empty", "cut", "list", "deep", "twice", "not utf8"],
)
def test_bad_bodies(server: Server, path, data, code):
    response = server.post_bytes(path, data)
    check_error(response, 400, "model" if b"twice" in data or data.count(b"model") == 2 else None, code)


def test_the_client_sees_its_own_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError, match=r"'tniy' does not exist.*Did you mean") as missing:
        client.completions.create(model="tniy", prompt="a")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_a_body_must_be_declared_as_json(server: Server):
    response = server.post_bytes(COMPLETIONS, b"{}", "text/plain")
    check_error(response, 415, None, "unsupported_media_type")


def test_a_body_that_is_too_large(server: Server):
    """Declared, and found out while reading."""
    declared = server.post_bytes(COMPLETIONS, b" " * (33 << 20))
    check_error(declared, 413, None, "body_too_large")
    found_out = server.post_bytes(COMPLETIONS, (b" " * (1 << 20) for _ in range(33)))
    check_error(found_out, 413, None, "body_too_large")


def test_unknown_routes_and_methods(server: Server):
    check_error(server.post("/v1/moderations", {}), 404, None, "not_found")
    check_error(server.get("/nothing"), 404, None, "not_found")
    check_error(server.post(COMPLETIONS + "/", GOOD[COMPLETIONS]), 404, None, "not_found")
    response = server.get(COMPLETIONS)
    check_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    check_error(server.post("/health", {}), 405, None, "method_not_allowed")


def test_tokenize_and_detokenize(server: Server):
    check_error(server.post("/tokenize", {}), 400, "prompt", "missing_required_parameter")
    check_error(server.post("/tokenize", {"prompt": 5}), 400, "prompt", "invalid_type")
    check_error(server.post("/tokenize", {"prompt": "a", "model": "x"}), 404, "model", "model_not_found")
    check_error(server.post("/detokenize", {}), 400, "tokens", "missing_required_parameter")
    check_error(server.post("/detokenize", {"tokens": [999]}), 400, "tokens[0]", "invalid_value")
    check_error(server.post("/detokenize", {"tokens": [1] * 300_000}), 400, "tokens", "invalid_value")
    messages = {"messages": [{"role": "user", "content": "a"}]}
    for body, param in (
        (messages | {"prompt": "a"}, "prompt"),
        (messages | {"add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        (messages | {"continue_final_message": True}, "continue_final_message"),
        (messages | {"chat_template": "{{ messages }}"}, "chat_template"),
    ):
        assert server.post("/tokenize", body).json()["error"]["param"] == param


def test_what_is_not_http_is_answered_and_forgotten(server: Server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"\x16\x03\x01 this is not http\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.get("/health").json() == {"status": "ok"}
