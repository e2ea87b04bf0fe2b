"""Answers that keep to a schema, an expression, a choice or a grammar, through the real client; and bad grammars."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pydantic
import pytest

from .conftest import MODEL, Server

QUESTION = [{"role": "user", "content": "Who?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 150}, {"type": "null"}]},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    age: int = pydantic.Field(ge=0, le=150)
    tags: list[bool] = pydantic.Field(max_length=2)


def chat(client, **options):
    return client.chat.completions.create(model=MODEL, **({"messages": QUESTION, "max_tokens": 500} | options))


def test_a_schema_is_kept_to_streamed_or_not(client):
    options = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}
    }
    for seed in range(2):
        [choice] = chat(client, seed=seed, temperature=1.5, **options).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        chunks = chat(client, seed=seed, temperature=1.5, **options, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_the_clients_own_parser_gets_its_model(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Person, max_tokens=300, seed=4, temperature=1.2
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_object(client):
    closing = {str(ord("}")): 30}
    [choice] = chat(client, response_format={"type": "json_object"}, logit_bias=closing, seed=0).choices
    assert json.loads(choice.message.content) == {}


EXTRA = [
    ({"regex": r"[a-z]{3}-[0-9]{2,4}(\.x)?"}, lambda text: re.fullmatch(r"[a-z]{3}-[0-9]{2,4}(\.x)?", text)),
    ({"choice": ["red", "green", "très bien"]}, lambda text: text in ("red", "green", "très bien")),
    ({"grammar": 'start: "<" start ">" | "x"'}, lambda text: re.fullmatch(r"<*x>*", text)),
    ({"json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
    ({"json": json.dumps(PERSON)}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
]


@pytest.mark.parametrize(("asked", "judge"), EXTRA, ids=[str(i) for i in range(len(EXTRA))])
def test_structured_outputs_on_both_endpoints(client, asked, judge):
    extra = {"structured_outputs": asked, "min_p": 0.01}
    completions = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, seed=1, max_tokens=500, temperature=1.2, extra_body=extra
    )
    chats = chat(client, n=2, seed=1, temperature=1.2, extra_body=extra)
    texts = [choice.text for choice in completions.choices] + [one.message.content for one in chats.choices]
    reasons = [choice.finish_reason for choice in [*completions.choices, *chats.choices]]
    assert all(judge(text) or reason == "length" for text, reason in zip(texts, reasons, strict=True)), texts
    assert "stop" in reasons


def test_neighbours_with_and_without_a_grammar_get_what_they_get_alone(client):
    asked = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
        {"extra_body": {"structured_outputs": {"regex": "[ab]{50}"}}},
        {"extra_body": {"ignore_eos": True}, "max_tokens": 60},
        {"max_tokens": 60, "logprobs": True},
    ]
    alone = [chat(client, seed=n, **options).choices[0].message.content for n, options in enumerate(asked)]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(chat, client, seed=n, **options) for n, options in enumerate(asked)]
        assert [one.result().choices[0].message.content for one in running] == alone


def tower(levels: int) -> dict:
    steps = {f"d{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(levels)}
    return {"$defs": {**steps, f"d{levels}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


BOMBS = [
    ({"json": {"type": "integer", "multipleOf": 999983}}, "seconds to compile"),
    ({"regex": "(a{1000}){1000}"}, "too many"),
    ({"json": tower(2000)}, "nested too deeply"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"json": {"type": "string", "pattern": "^(a{1000}){1000}$"}}, "too many"),
    ({"json": tower(5000)}, "bytes|nested too deeply"),
    ({"json": {"anyOf": [{"const": {f"p{n}": n}} for n in range(10_000)]}}, "too big|bytes|seconds"),
    ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "deeply nested"),
    ({"json": {"$ref": "#"}}, "no text"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"regex": "a" * (600 << 10)}, "bytes"),
]


def check_bombs(server: Server, client, bombs, tokens: int) -> None:
    """While a stream runs, which goes on as if nothing were."""
    options = {"seed": 7, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    expected = chat(client, **options).choices[0].message.content
    stream = chat(client, **options, stream=True)
    pieces = [next(stream)]
    for asked, message in bombs:
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            chat(client, extra_body={"structured_outputs": asked})
        assert (caught.value.param, caught.value.code) == ("structured_outputs", "invalid_grammar")
        assert len(caught.value.message) < 1200
    pieces += list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == expected
    assert server.get("/health").json() == {"status": "ok"}


def test_what_is_wrong_or_too_costly_is_said_and_costs_nobody_else(server: Server, client):
    check_bombs(server, client, BOMBS[:4], 100)


@pytest.mark.slow
def test_every_bomb(server: Server, client):
    check_bombs(server, client, BOMBS[4:], 1000)


def test_a_grammar_that_fails_under_way_ends_its_own_request_with_an_error_of_its_own(server: Server):
    costly = {"structured_outputs": {"regex": "[0-9]{70}(a{1000}){1000}"}}
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 200} | costly
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == httpx.codes.BAD_REQUEST
    assert response.json()["error"]["code"] == "grammar_failed"
    events = server.post("/v1/chat/completions", body | {"stream": True}).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "grammar_failed"
    server.wait_idle()


def test_one_who_leaves_while_his_grammar_is_compiled_leaves_nothing_behind(server: Server):
    items = {"enum": [f"number {n}" for n in range(1500)]}
    slow = {"json": {"type": "array", "items": items, "minItems": 1000}}
    body = {"model": MODEL, "messages": QUESTION, "structured_outputs": slow, "max_tokens": 1500}
    for seconds in (0.001, 0.02, 0.1):
        slow["json"]["title"] = str(seconds)  # another grammar each time
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=seconds))
    server.wait_idle()
