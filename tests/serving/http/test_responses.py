"""/v1/responses through the real client: the chat's answers, as items and events."""

import json
import shutil

import openai
import pytest
from openai.types.responses import response_create_params

from twinax.serving.http import response_input
from twinax.serving.http.errors import ApiError

from .conftest import CONTEXT, MODEL, Server

ORDER = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done",
]  # fmt: skip


def respond(client, given="hello", **options):
    return client.responses.create(model=MODEL, input=given, **options)


def same_chat(client, messages, **options) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=messages, **options)
    return answer.choices[0].message.content


def test_every_field_of_the_api_is_known_and_no_other():
    theirs = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert set(response_input.RESPONSES) == theirs | set(response_input.EXTENSIONS)


def test_answer_has_the_shape_of_the_api(client):
    answer = respond(client, instructions="Be brief.", max_output_tokens=6, metadata={"a": "b"}, extra_body={"seed": 1})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert answer.output_text == same_chat(client, messages, max_tokens=6, seed=1)
    assert (answer.object, answer.model, answer.store, answer.instructions) == ("response", MODEL, False, "Be brief.")
    assert answer.id.startswith("resp_")
    assert (answer.metadata, answer.error, answer.previous_response_id) == ({"a": "b"}, None, None)
    [message] = answer.output
    assert (message.type, message.role, message.content[0].type) == ("message", "assistant", "output_text")
    used = answer.usage
    assert used.input_tokens == len("system: Be brief.\nuser: hello\nassistant: ")
    assert used.total_tokens == used.input_tokens + used.output_tokens


def test_what_a_response_says_of_its_request_may_be_asked_again(client):
    first = respond(client, max_output_tokens=5, extra_body={"seed": 1})
    names = set(response_input.RESPONSES) - {"input", "max_output_tokens"}
    said = {name: value for name, value in first.to_dict().items() if name in names}
    assert said["tool_choice"] == "auto" and said["tools"] == []
    again = client.responses.create(input="hello", max_output_tokens=5, extra_body={"seed": 1} | said)
    assert again.output_text == first.output_text


def test_what_ends_for_want_of_tokens_is_incomplete(client):
    answer = respond(client, temperature=0, max_output_tokens=3, extra_body={"ignore_eos": True})
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output[0].status, answer.usage.output_tokens) == ("incomplete", 3)
    stopped = respond(client, temperature=0, extra_body={"stop": [answer.output_text[:1] or "a"], "ignore_eos": True})
    assert (stopped.status, stopped.incomplete_details, stopped.output[0].status) == ("completed", None, "completed")


@pytest.mark.parametrize("more", [{}, {"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
def test_streamed_and_whole_answers_are_the_same(client, more):
    options = {"max_output_tokens": 12, "extra_body": {"seed": 3}, **more}
    whole = respond(client, **options)
    events = list(respond(client, **options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, f"response.{whole.status}"]
    assert [kind for kind in kinds if kind != ORDER[4]] == [*ORDER[:4], *ORDER[5:], f"response.{whole.status}"]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    text = "".join(event.delta for event in deltas)
    done = next(event for event in events if event.type == "response.output_text.done")
    last = events[-1].response
    assert text == done.text == last.output_text == whole.output_text
    assert events[0].response.output == [] and events[0].response.status == "in_progress"
    item = next(event.item for event in events if event.type == "response.output_item.added")
    assert (item.content, item.status, item.id) == ([], "in_progress", last.output[0].id)
    logprobs = [one for event in deltas for one in event.logprobs]
    assert [one.logprob for one in logprobs] == [one.logprob for one in whole.output[0].content[0].logprobs]
    assert len(logprobs) == (whole.usage.output_tokens if more else 0)
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_the_clients_own_stream_helper(client):
    whole = respond(client, max_output_tokens=30, extra_body={"seed": 3, "ignore_eos": True}).output_text
    body = {"seed": 3, "ignore_eos": True, "stop": [whole[-2:]]}  # the helper knows no answers that are incomplete
    with client.responses.stream(model=MODEL, input="hello", extra_body=body) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == whole[: whole.index(whole[-2:])]


def test_a_stream_on_the_wire(server: Server):
    body = {"model": MODEL, "input": "hello", "stream": True, "max_output_tokens": 2}
    response = server.post("/v1/responses", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.strip().split("\n\n")
    assert blocks[0].startswith('event: response.created\ndata: {"type":"response.created","sequence_number":0,')
    assert "[DONE]" not in response.text


def test_a_conversation_of_items(client):
    first = respond(client, max_output_tokens=8, extra_body={"seed": 5})
    turn = {"role": "user", "content": [{"type": "input_text", "text": "go "}, {"type": "input_text", "text": "on"}]}
    again = respond(
        client,
        [{"role": "user", "content": "hello"}, *(item.to_dict() for item in first.output), turn],
        max_output_tokens=8,
        extra_body={"seed": 6},
    )
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "go on"},
    ]
    assert again.output_text == same_chat(client, messages, max_tokens=8, seed=6)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("store", True, "store"),
        ("background", True, "background"),
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", "conv_1", "conversation"),
        ("prompt", {"id": "p"}, "prompt"),
        ("truncation", "auto", "truncation"),
        ("reasoning", {"effort": "high"}, "reasoning.effort"),
        ("include", ["reasoning.encrypted_content"], "include[0]"),
        ("input", [], "input"),
        ("input", 5, "input"),
        ("input", [{"type": "item_reference", "id": "x"}], "input[0].type"),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0].type"),
        ("input", [{"role": "tool", "content": "x"}], "input[0].role"),
        ("input", "a" * CONTEXT, "input"),
        ("input", "forbidden", "input"),
        ("max_output_tokens", 10**9, "max_output_tokens"),
        ("max_output_tokens", 0, "max_output_tokens"),
        ("text", {"format": {"type": "yaml"}}, "text.format.type"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("tool_choice", "required", "tool_choice"),
        ("messages", [], "messages"),
    ],
)
def test_bad_fields(server: Server, field, value, param):
    response = server.post("/v1/responses", {"model": MODEL, "input": "a", "max_output_tokens": 1} | {field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert not any(word in error["message"] for word in ("response_format", "max_completion", "messages["))
    if field in ("store", "background", "previous_response_id"):
        assert "keeps nothing" in error["message"]


def test_messages_with_calls():
    items = [
        {"role": "user", "content": "weather?"},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "at",
            "arguments": "{}",
            "id": "fc_1",
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "at", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    calls = [
        {"id": name, "type": "function", "function": {"name": "at", "arguments": text}}
        for name, text in (("c1", "{}"), ("c2", '{"a": 1}'))
    ]
    assert response_input.conversation("input", items) == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
    ]


def test_errors_are_called_by_the_names_that_were_sent():
    def names(param: str, message: str) -> tuple:
        error = response_input.renamed(ApiError(400, message, param=param, code="c"))
        return error.param, error.message, error.code

    assert names("messages[2].content", "'messages[2].content' is bad.") == ("input", "'input' is bad.", "c")
    assert names("max_completion_tokens", "'max_completion_tokens' 3") == (
        "max_output_tokens",
        "'max_output_tokens' 3",
        "c",
    )
    before, after = "response_format.json_schema.name", "text.format.name"
    assert names(before, f"'{before}' x") == (after, f"'{after}' x", "c")
    before, after = "tools[0].function.name", "tools[0].name"
    assert names(before, f"'{before}' x") == (after, f"'{after}' x", "c")


def test_a_format_holds(client):
    """The client's own parser reads what a random model was made to write."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    answer = respond(client, text={"format": named}, max_output_tokens=200, extra_body={"seed": 1})
    found = json.loads(answer.output_text)
    assert isinstance(found["ok"], bool) and found["n"] in (1, 22)
    assert answer.text.format.name == "answer"
    with pytest.raises(openai.BadRequestError) as caught:
        respond(
            client, text={"format": named | {"schema": {"type": "object", "properties": {"a": {"type": "nothing"}}}}}
        )
    assert caught.value.param.startswith("text.format")


@pytest.mark.slow
def test_calls_of_functions_and_what_they_return(start_server, model_folder, tmp_path):
    """A random model, made to call."""
    folder = tmp_path / MODEL
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for message in messages %}{{ message.role }}: "
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function.name }}"
        "{% endfor %}|{% endfor %}"
    )
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "name": "at", "parameters": schema, "strict": True}
    options = {"tools": [tool], "max_output_tokens": 300, "extra_body": {"seed": 2}}
    server = start_server(model=str(folder))
    with server.client() as client:
        whole = respond(client, **options, tool_choice={"type": "function", "name": "at"})
        [call] = whole.output
        assert (call.type, call.name, call.status) == ("function_call", "at", "completed")
        assert json.loads(call.arguments)["a"] in (1, 2)
        events = list(respond(client, **options, tool_choice={"type": "function", "name": "at"}, stream=True))
        assert list(dict.fromkeys(event.type for event in events)) == [
            *ORDER[:3], "response.function_call_arguments.delta", "response.function_call_arguments.done", ORDER[-1],
            "response.completed",
        ]  # fmt: skip
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == events[-1].response.output[0].arguments == call.arguments
        assert events[-1].response.output[0].call_id == events[2].item.call_id
        returned = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
        items = [{"role": "user", "content": "hello"}, call.to_dict(), returned]
        answer = respond(client, items, max_output_tokens=4)
        assert answer.usage.input_tokens == len("user: hello|assistant: at|tool: 7|")
        many = respond(client, **options, tool_choice="required")
        assert {item.type for item in many.output} == {"function_call"}
    assert server.stop() == 0
