"""/v1/chat/completions through the real client."""

import httpx
import openai
import pytest

from .conftest import CONTEXT, MODEL, Server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
RENDERED = "system: Be brief.\nuser: hello\nassistant: "


def chat(client, messages=MESSAGES, **options):
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_answer_has_the_shape_of_the_api(client):
    answer = chat(client, max_completion_tokens=5, seed=1)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.service_tier is None
    [choice] = answer.choices
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.completion_tokens <= 5


def test_the_template_makes_the_prompt(server: Server, client):
    answer = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert bytes(answer["tokens"]).decode() == RENDERED
    completion = client.completions.create(model=MODEL, prompt=RENDERED, seed=1, max_tokens=9)
    assert chat(client, max_tokens=9, seed=1).choices[0].message.content == completion.choices[0].text


def test_parts_and_developer_messages(client):
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    expected = chat(client, seed=1, max_tokens=5).choices[0].message.content
    assert chat(client, parts + MESSAGES[1:], seed=1, max_tokens=5).choices[0].message.content == expected


def test_without_a_limit_it_goes_on_to_the_end_of_the_context(client):
    messages = [{"role": "user", "content": "x" * (CONTEXT - 60)}]
    answer = chat(client, messages, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_stream_has_role_content_reason_and_usage_in_that_order(server: Server, client):
    options = {"seed": 3, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    chunks = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in middle)
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    whole = chat(client, **options)
    assert usage.usage == whole.usage
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content


def test_stream_as_it_is_on_the_wire(server: Server):
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 2, "ignore_eos": True}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in response.text


def test_choices_of_a_stream_are_told_apart(client):
    whole = chat(client, n=3, seed=5, max_tokens=8)
    texts = ["", "", ""]
    for chunk in chat(client, n=3, seed=5, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3


def test_logprobs(client):
    options = {"seed": 1, "max_tokens": 30, "logprobs": True, "extra_body": {"ignore_eos": True}}
    [choice] = chat(client, **options, top_logprobs=2).choices
    content = choice.logprobs.content
    assert len(content) == 30
    assert bytes(b for token in content for b in token.bytes).decode(errors="replace") == choice.message.content
    for token in content:
        first, second = token.top_logprobs
        assert first.logprob >= second.logprob
        assert token.logprob <= first.logprob <= 0
        assert token.logprob == first.logprob or token.bytes != first.bytes
    [plain] = chat(client, **options).choices
    assert [token.logprob for token in plain.logprobs.content] == [token.logprob for token in content]
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)
    streamed = []
    for chunk in chat(client, **options, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += [token.logprob for token in logprobs.content] if logprobs else []
    assert streamed == [token.logprob for token in content]


def test_token_ids(server: Server, client):
    options = {"seed": 1, "max_tokens": 12, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    whole = chat(client, **options)
    assert bytes(whole.prompt_token_ids).decode() == RENDERED
    text = server.post("/detokenize", {"tokens": whole.choices[0].token_ids}).json()["prompt"]
    assert text == whole.choices[0].message.content
    chunks = list(chat(client, **options, stream=True))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    ids = [token for chunk in chunks for token in chunk.choices[0].token_ids or []]
    assert ids == whole.choices[0].token_ids and len(ids) == 12


def test_fields_without_effect_are_taken(client):
    answer = chat(
        client,
        max_tokens=2,
        n=1,
        modalities=["text"],
        response_format={"type": "text"},
        service_tier="auto",
        store=False,
        tools=[],
        user="me",
        verbosity="medium",
    )
    assert answer.service_tier == "default"


def test_a_conversation_that_the_template_refuses(client):
    with pytest.raises(openai.BadRequestError, match="not that word") as caught:
        chat(client, [{"role": "user", "content": "forbidden"}])
    assert caught.value.param == "messages"


def test_both_names_of_the_limit(server: Server):
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3}
    url = "/v1/chat/completions"
    assert server.post(url, body | {"max_completion_tokens": 3, "ignore_eos": True}).status_code == httpx.codes.OK
    assert server.post(url, body | {"max_completion_tokens": 4}).status_code == httpx.codes.BAD_REQUEST
