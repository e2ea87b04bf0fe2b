"""The files of the page and the numbers it shows, without a browser (test_page.py has one)."""

import pytest

from twinax.serving.http.live import percentiles

from .conftest import CONTEXT, MAX_RUNNING, MAX_WAITING, MODEL, Server


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/page/page.css", "css"), ("/page/page.js", "javascript")])
def test_the_page_is_sent_whole_and_once(server: Server, path, kind):
    response = server.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"text/{kind}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    again = server.get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for elsewhere in ("http://", "https://", "//cdn", "eval(", "innerHTML", " style="):
        assert elsewhere not in response.text.replace("http://www.w3.org/2000/svg", "")


def test_live_tells_what_runs(server: Server, client):
    server.wait_idle()
    before = server.get("/live").json()
    assert before["state"] == "ok"
    assert before["requests"] == []
    assert before["model"] == {
        "id": MODEL,
        "family": "llama",
        "chat": True,
        "vocab_size": 259,
        "max_model_len": CONTEXT,
        "max_running": MAX_RUNNING,
        "max_waiting": MAX_WAITING,
        "cache_tokens": before["pages_total"] * 16,
    }
    options = {"model": MODEL, "prompt": "12345", "max_tokens": 1500, "stream": True}
    with client.completions.create(**options, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        while not (during := server.get("/live").json())["requests"]:  # a snapshot is shared for a moment
            continue
        [request] = during["requests"]
        assert request["prompt_tokens"] == 5
        assert request["seconds"] > 0
        assert during["pages_used"] >= 1
    server.wait_idle()
    while (after := server.get("/live").json())["requests"]:
        continue
    assert after["generated_tokens"] > before["generated_tokens"]
    assert after["prompt_tokens"] == before["prompt_tokens"] + 5
    assert after["first_token_seconds"]["p50"] <= after["first_token_seconds"]["p95"]


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0}
    assert percentiles(range(100, 0, -1)) == {"p50": 51, "p95": 96}
