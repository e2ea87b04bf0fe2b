"""The page at `/` in a headless Chromium, with a real server behind it: what a person sees and can do there.

The model is a table from one character to the next that was made by hand: it says MARKUP over and over, which would
run a script if ever a browser took it for HTML.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy

from . import browser as browsers
from .conftest import MODEL, Server

pytestmark = pytest.mark.slow

MARKUP = "<svg/OnloAd=p()>"  # no character is there twice, so each has one that follows
KEY = "sk-page"
ANSWER = ".turn.answered:last-of-type"


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from twinax.checkpoints.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("page") / MODEL
    shutil.copytree(model_folder, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensors[name])  # no layer adds anything
    shape = tensors["lm_head.weight"].shape
    directions, noise = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = directions, noise / math.sqrt(shape[1])
    tokenizer = Tokenizer.load(folder)
    ids, space = tokenizer.encode(MARKUP), tokenizer.encode(" ")[0]
    ids.append(ids[0])
    for before, after in [(space, ids[0]), *itertools.pairwise(ids)]:  # a space ends the chat template
        tensors["lm_head.weight"][after] += directions[before] * 9 / math.sqrt(shape[1])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], folder: Path) -> Iterator[Server]:
    server = start_server(model=str(folder), environment={"TWINAX_API_KEY": KEY}, host_cache_bytes=1 << 20)
    server.http.headers["authorization"] = f"Bearer {KEY}"
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    """The page, with the key given. At the end: nothing was asked of elsewhere, and nobody complained."""
    executable = browsers.find()
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(browsers.NAMES)} is installed (apt install {browsers.NAMES[0]})")
    page = browsers.Browser(executable, tmp_path_factory.mktemp("profile"))
    try:
        page.open(server.url + "/")
        yield page
        addresses = [url for url in page.requests() if not url.startswith("data:")]
        assert {httpx.URL(url).host for url in addresses} == {"127.0.0.1"}
        assert all(url.startswith(server.url + "/") for url in addresses)
        assert page.take_complaints() == []
    finally:
        page.close()


@pytest.fixture
def ready(page: browsers.Browser, server: Server) -> browsers.Browser:
    """The page with the key given, nothing running, and an empty conversation."""
    if page.evaluate("!document.querySelector('#key-form').hidden"):
        page.type("#key", KEY)
        page.press("Enter")
    page.wait("document.querySelector('#state').dataset.state === 'ok'")
    server.wait_idle()
    page.wait("document.querySelector('#running b').textContent === '0 of 4'")
    assert page.text("#host b").startswith("0 of ") and page.evaluate("!document.querySelector('#host').hidden")
    page.click("#clear")
    setting(page, "max_tokens", "40")
    setting(page, "temperature", "0")
    setting(page, "seed", "")
    return page


def setting(page: browsers.Browser, name: str, value: str) -> None:
    page.evaluate(f"void (document.querySelector('[data-number={name}]').value = '{value}')")


def choose(page: browsers.Browser, mode: str) -> None:
    page.evaluate(f"void document.querySelector('[name=mode][value={mode}]').click()")


def ask(page: browsers.Browser, text: str) -> None:
    page.type("#prompt", text)
    page.press("Enter")


def finished(page: browsers.Browser) -> str:
    """The text of the answer, once it is complete."""
    page.wait(f"document.querySelector('{ANSWER}:not(.busy) footer')?.textContent")
    return page.evaluate(f"document.querySelector('{ANSWER} .text').textContent")


def test_it_asks_for_the_key_and_says_when_it_is_wrong(page: browsers.Browser):
    """The first test: nothing was told to the page before."""
    page.wait("!document.querySelector('#key-form').hidden")
    assert page.text("#state-text") == "needs an API key"
    page.type("#key", "sk-wrong")
    page.press("Enter")
    page.wait("document.querySelector('#key-error').textContent.startsWith('The API key is wrong.')")
    page.type("#key", KEY)
    page.press("Enter")
    page.wait("document.querySelector('#state').dataset.state === 'ok'")
    assert page.evaluate("document.querySelector('#key-form').hidden")
    refused = [text for text in page.take_complaints() if "401" in text]
    assert len(refused) == 2, "the two answers of 401 themselves"
    assert page.evaluate("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie])") == '[0,0,""]'


def test_an_answer_comes_token_by_token_with_probabilities(ready: browsers.Browser, server: Server):
    ask(ready, "hello")
    text = finished(ready)
    with server.client(api_key=KEY) as client:
        messages = [{"role": "user", "content": "hello"}]
        wanted = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=40, temperature=0, logprobs=True, top_logprobs=5
        ).choices[0]
    assert text == wanted.message.content
    content = wanted.logprobs.content
    shades = ready.evaluate(f"[...document.querySelectorAll('{ANSWER} .token')].map((one) => one.classList[1])")
    bounds = (0.05, 0.2, 0.5, 0.9)
    assert shades == [f"p{sum(math.exp(one.logprob) >= bound for bound in bounds)}" for one in content]
    # What is pointed at tells its probability, and what else was likely.
    ready.point(f"{ANSWER} .token", 3)
    ready.wait("!document.querySelector('#inspector').hidden")
    shown = ready.evaluate("[...document.querySelectorAll('#inspector li')].map((one) => one.innerText.split(/\\s+/))")
    assert [name for name, _ in shown] == [one.token.replace(" ", "␣") for one in content[3].top_logprobs]
    for (_, percent), one in zip(shown, content[3].top_logprobs, strict=True):
        assert float(percent.rstrip("%")) == pytest.approx(100 * math.exp(one.logprob), rel=0.06)  # two digits
    assert ready.text("#inspector h3").splitlines() == [content[3].token, "the likeliest"]
    footer = ready.text(f"{ANSWER} footer")
    assert "40 tokens" in footer
    assert "cut at its longest" in footer


def test_the_keyboard_moves_from_token_to_token(ready: browsers.Browser):
    ask(ready, "hello")
    text = finished(ready)
    ready.evaluate(f"void document.querySelector('{ANSWER} .token[tabindex=\"0\"]').focus()")
    for expected in (text[1], text[2]):
        ready.press("ArrowRight")
        assert ready.evaluate("document.activeElement.textContent") == expected
        assert ready.text("#inspector h3").startswith(expected)
    ready.press("ArrowLeft")
    assert ready.evaluate("document.activeElement.textContent") == text[1]
    ready.press("Escape")
    assert ready.evaluate("document.querySelector('#inspector').hidden")


def test_what_the_model_says_is_never_html(ready: browsers.Browser):
    ready.evaluate("void (window.p = () => { window.ran = true; })")
    before = ready.evaluate("document.querySelectorAll('svg').length")
    ask(ready, MARKUP)
    assert MARKUP * 2 in finished(ready)
    ready.point(f"{ANSWER} .token", 0)
    assert ready.evaluate("[document.querySelectorAll('svg').length, window.ran ?? false]") == [before, False]
    # Nor would it be by accident: the browser refuses strings as HTML, inline scripts and other origins.
    refused = "try { document.body.innerHTML = '<b>'; 'taken' } catch (error) { error.name }"
    assert ready.evaluate(refused) == "TypeError"
    elsewhere = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert ready.evaluate(elsewhere) == "refused"
    complaints = ready.take_complaints()
    assert complaints, "the browser said nothing of what was refused"
    assert all("Content Security Policy" in one or "Trusted" in one for one in complaints), complaints


def test_stop_stops_it_and_the_numbers_move_meanwhile(ready: browsers.Browser, server: Server):
    """The engine process is held still in the middle of the answer, so that it does not end too early."""
    aborted = server.finished("abort")
    ready.evaluate(
        "void (window.rates = [], new MutationObserver(() => window.rates.push(Number(document.querySelector('#rate')"
        ".textContent))).observe(document.querySelector('#rate'), { childList: true }))"
    )
    setting(ready, "max_tokens", "2000")
    choose(ready, "completion")
    ask(ready, "a")
    ready.wait(f"document.querySelector('{ANSWER} .token') !== null")
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        ready.wait("document.querySelector('#running b').textContent === '1 of 4'")
        ready.wait("document.querySelectorAll('#requests tbody tr').length === 1")
        ready.wait("!document.querySelector('#pages b').textContent.startsWith('0 ')")
        ready.wait("window.rates.some((rate) => rate > 0)")
        ready.click("#stop")
        text = finished(ready)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert text.startswith("a")
    assert "stopped by you" in ready.text(f"{ANSWER} footer")
    server.wait_idle()
    assert server.finished("abort") == aborted + 1
    ready.wait("document.querySelector('#running b').textContent === '0 of 4'")
    assert ready.text("#first td").endswith("ms")
    choose(ready, "chat")


def test_errors_are_shown_in_the_servers_words(ready: browsers.Browser, server: Server):
    setting(ready, "temperature", "9")
    ask(ready, "hello")
    ready.wait(f"!document.querySelector('{ANSWER} .error').hidden")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "temperature": 9}
    error = server.post("/v1/chat/completions", body).json()["error"]
    assert ready.text(f"{ANSWER} .error p") == error["message"]
    assert "temperature" in ready.text(f"{ANSWER} .error .hint")
    setting(ready, "temperature", "0")
    ready.click(f"{ANSWER} .error button")
    assert MARKUP in finished(ready)
    assert ready.evaluate("document.querySelectorAll('.turn').length") == 2  # the failed try is gone
    assert [text for text in ready.take_complaints() if "400" not in text] == []


def test_it_finds_the_server_again(
    page: browsers.Browser, server: Server, start_server: Callable[..., Server], folder: Path
):
    """The last test of this server."""
    port = int(server.url.rsplit(":", 1)[1])
    server.stop()
    page.wait("document.querySelector('#state').dataset.state === 'away'")
    assert page.text("#state-text").startswith("can't reach the server; trying again")
    another = start_server(model=str(folder), environment={"TWINAX_API_KEY": KEY}, port=port)
    try:
        page.wait("document.querySelector('#state').dataset.state === 'ok'")
        page.click("#clear")
        ask(page, "hello again")
        assert MARKUP in finished(page)
    finally:
        another.stop()
    assert [text for text in page.take_complaints() if "ERR_CONNECTION" not in text] == []
