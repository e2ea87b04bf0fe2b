"""What the endpoints share, without a server."""

import asyncio
import importlib
import json
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from twinax.checkpoints import chat_template
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving.http import body
from twinax.serving.http.chat import chat_prompt
from twinax.serving.http.errors import ApiError
from twinax.serving.http.metrics import Metrics
from twinax.serving.http.service import Service

TEXT = "\n".join(importlib.import_module("pydoc_data.topics").topics.values())
CONTEXT = 20_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False, max_token_length=32)
    backend.train_from_iterator([TEXT[:100_000], *[" " * 32] * 5000], trainer)
    return Tokenizer.from_backend(backend)


def service_of(tokenizer: Any) -> Service:
    info = SimpleNamespace(max_model_len=CONTEXT, cache_tokens=10 * CONTEXT)
    engine: Any = SimpleNamespace(tokenizer=tokenizer, info=info)
    return Service(engine, Metrics(), "m", 1 << 25)


def test_of_a_text_that_is_too_long_little_more_is_tokenized_than_fits(tokenizer):
    sizes = []

    def encode(text: str, add_bos: bool) -> list[int]:
        sizes.append(len(text))
        return tokenizer.encode(text, add_bos)

    service = service_of(SimpleNamespace(encode=encode))
    with pytest.raises(ApiError, match=f"of {10 * len(TEXT)} characters") as caught:
        asyncio.run(service.encode_prompt("prompt", TEXT * 10, add_bos=False))
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert caught.value.code == "context_length_exceeded"
    fits = CONTEXT * len(TEXT) / len(tokenizer.encode(TEXT))
    assert sum(sizes) < 9 / 8 * fits + 2 * (1 << 16), "and a piece more"


def test_a_text_of_many_characters_a_token_that_fits_is_taken_whole(tokenizer):
    """However its pieces are cut."""
    service = service_of(tokenizer)
    for word in (" " * 32, " " * 33 + "x"):
        text = word * int(95 * CONTEXT / len(tokenizer.encode(word * 100)))
        ids = asyncio.run(service.encode_prompt("prompt", text, add_bos=False))
        assert ids == tokenizer.encode(text) and 0.9 * CONTEXT < len(ids) < CONTEXT
        assert len(text) > 5 * CONTEXT + (1 << 16), "it was doubtful"


def test_a_conversation_that_is_slow_to_render_holds_up_nobody():
    """It is rendered once the event loop goes on, and not before."""
    goes_on = threading.Event()

    def render(messages: Any, tools: Any, add_generation_prompt: bool) -> str:
        assert goes_on.wait(timeout=20)
        return messages[0]["content"]

    speaker = SimpleNamespace(
        template_for=lambda tools: "{{ messages }}", apply_chat_template=render, encode=lambda text, add_bos: list(text)
    )

    async def both() -> list[int]:
        asyncio.get_running_loop().call_soon(goes_on.set)
        messages = [{"role": "user", "content": "hello"}]
        return await chat_prompt(service_of(speaker), messages, add_generation_prompt=True)

    assert asyncio.run(both()) == list("hello")


def test_a_process_of_templates_that_hangs_is_an_error_of_the_servers(monkeypatch):
    renderer = chat_template.Renderer(chat_template.CPU_SECONDS, patience=0.2)
    monkeypatch.setattr(chat_template, "_renderer", renderer)
    start = renderer._running

    def stopped():
        process = start()
        process.send_signal(signal.SIGSTOP)
        return process

    def render(messages: Any, tools: Any, add_generation_prompt: bool) -> str:
        return chat_template.render("{{ messages[0].content }}", messages)

    speaker = SimpleNamespace(
        template_for=lambda tools: "{{ messages }}", apply_chat_template=render, encode=lambda text, add_bos: list(text)
    )
    chat = chat_prompt(service_of(speaker), [{"role": "user", "content": "hello"}], add_generation_prompt=True)
    monkeypatch.setattr(renderer, "_running", stopped)
    with pytest.raises(ApiError, match=r"neither did a new one\. Try again\.") as caught:
        asyncio.run(chat)
    assert (caught.value.status, caught.value.code) == (503, "chat_template_timeout")


def test_a_long_body_holds_up_nobody_while_it_is_read(monkeypatch):
    goes_on, parse = threading.Event(), body.parse_json

    def slowly(data: bytes) -> dict[str, Any]:
        assert goes_on.wait(timeout=20)
        return parse(data)

    async def both(value: bytes) -> dict[str, Any]:
        async def receive() -> dict[str, Any]:
            asyncio.get_running_loop().call_soon(goes_on.set)
            return {"type": "http.request", "body": b'{"a": ' + value + b"}"}

        goes_on.clear()
        return await body.read_json({"headers": [(b"content-type", b"application/json")]}, receive, 1 << 20)

    monkeypatch.setattr(body, "parse_json", slowly)
    assert asyncio.run(both(b'"' + b"x" * 500_000 + b'"')) == {"a": "x" * 500_000}
    with pytest.raises(ApiError, match="is given twice"):
        asyncio.run(both(b"[" + b"1," * 200_000 + b'{"b": 1, "b": 2}]'))


def read(data: bytes) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    return asyncio.run(body.read_json({"headers": [(b"content-type", b"application/json")]}, receive, 1 << 24))


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [' + b"1," * body.MAX_VALUES + b"1]}",
        b"{" + b",".join(b'"%d":1' % key for key in range(body.MAX_KEYS + 1)) + b"}",
        b'{"a": "' + b",:" * body.MAX_VALUES + b'", "b": [' + b"1," * body.MAX_VALUES + b"1]}",
    ],
    ids=["numbers", "keys", "numbers after a text"],
)
def test_more_values_than_can_be_read_beside_others_are_refused(data):
    """One list or object is read in one go: the interpreter does nothing else meanwhile."""
    with pytest.raises(ApiError, match="a list of more than 1,000,000 values or an object of more than 100,000 keys"):
        read(data)


def test_more_objects_than_anybody_needs_are_refused():
    assert len(read(json.dumps({"a": [{"b": 1}] * (body.MAX_OBJECTS - 1)}).encode())["a"]) == body.MAX_OBJECTS - 1
    with pytest.raises(ApiError, match="more than 100,000 objects"):
        read(json.dumps({"a": [{"b": '{"'}] * body.MAX_OBJECTS}).encode())


def test_what_looks_like_many_values_within_a_text_is_one():
    text = ',:"\\' * body.MAX_VALUES
    assert read(json.dumps({"a": text, "b": 1}).encode()) == {"a": text, "b": 1}
    many = {"a": [1] * (body.MAX_VALUES - 1), "b": [{"c": 1, "d": 2}] * (body.MAX_OBJECTS - 1)}
    assert read(json.dumps(many).encode()) == many
