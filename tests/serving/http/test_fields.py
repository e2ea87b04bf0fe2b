"""The tables of fields against the installed client's types, and the parsers one by one."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from twinax.serving.http import fields, parsers
from twinax.serving.http.body import parse_json
from twinax.serving.http.errors import ApiError
from twinax.serving.http.messages import check_messages
from twinax.serving.http.service import sampling_params
from twinax.serving.request import MAX_LOGPROBS, MAX_STOP_STRINGS, InvalidRequest, Request, SamplingParams


def _refused(function, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*arguments)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("table", "types"), [(fields.COMPLETIONS, completion_types), (fields.CHAT, chat_types)], ids=["completions", "chat"]
)
def test_every_field_of_the_api_is_known_and_no_other(table, types):
    theirs = set(types.CompletionCreateParamsStreaming.__annotations__)
    assert set(table) == theirs | set(fields.EXTENSIONS)


def test_every_stream_option_is_known():
    for name in ChatCompletionStreamOptionsParam.__annotations__:
        assert name in fields.stream_options("stream_options", {name: False})


def test_extensions_and_limits_are_those_of_the_engine():
    engine = {*SamplingParams.__struct_fields__, *Request.__struct_fields__}
    assert set(fields.EXTENSIONS) - {"return_token_ids", "structured_outputs"} <= engine
    assert (fields.MAX_TOP_LOGPROBS, parsers.MAX_STOPS) == (MAX_LOGPROBS, MAX_STOP_STRINGS)


@pytest.mark.parametrize("name", sorted(fields.CHAT))
def test_null_is_the_default_or_missing(name):
    body = {"model": "m", "messages": [], name: None}
    if fields.CHAT[name].required:
        assert _refused(fields.parse_object, None, body, fields.CHAT).param == name
    else:
        assert fields.parse_object(None, body, fields.CHAT)[name] == fields.CHAT[name].default


def test_what_is_required_may_be_allowed_to_be_null():
    body = {"model": "m", "prompt": None}
    assert fields.parse_object(None, body, fields.COMPLETIONS)["prompt"] is None
    assert _refused(fields.parse_object, None, {"model": "m"}, fields.COMPLETIONS).param == "prompt"


NO_OPS = {
    "function_call": "none",
    "functions": [],
    "metadata": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "in_memory",
    "reasoning_effort": "none",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "user": "u",
    "verbosity": "medium",
}
UNSUPPORTED = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", sorted(NO_OPS))
def test_values_that_ask_for_nothing_are_accepted(name):
    body = {"model": "m", "messages": [], name: NO_OPS[name]}
    assert fields.parse_object(None, body, fields.CHAT)[name] == NO_OPS[name]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_the_server_lacks_is_refused_by_name(name):
    body = {"model": "m", "messages": [], name: UNSUPPORTED[name]}
    error = _refused(fields.parse_object, None, body, fields.CHAT)
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert f"'{name}' is not supported: " in error.message


def test_false_is_not_zero_and_one_is_not_true():
    accept_false, accept_zero = fields.no_op(False, why="x"), fields.no_op(0, why="x")
    assert accept_false("p", False) is False
    assert accept_zero("p", 0) == 0
    _refused(accept_false, "p", 0)
    _refused(accept_zero, "p", False)
    _refused(fields.integer(0), "p", True)
    _refused(fields.number(0, 2), "p", True)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.1, 2.1, "1", [1.0], pytest.param(10**400, id="huge")]
)
def test_temperature_must_be_a_finite_number_in_range(value):
    error = _refused(fields.number(0, 2), "temperature", value)
    assert "temperature" in error.message
    assert len(error.message) < 300


def test_unknown_fields_suggest_the_nearest():
    error = _refused(fields.parse_object, None, {"model": "m", "temprature": 1}, fields.COMPLETIONS)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert 'Did you mean "temperature"?' in error.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_forms(value, expected):
    assert fields.prompts("prompt", value) == expected


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "prompt"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt"),
        ([[1], "a"], "prompt"),
        ([{"a": 1}], "prompt"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([[True]], "prompt[0][0]"),
        (["ok", "\ud800"], "prompt[1]"),
        (7, "prompt"),
        ({"text": "a"}, "prompt"),
        ([[1]] * 10_001, "prompt"),
        (["a"] * 10_001, "prompt"),
    ],
)
def test_bad_prompts(value, param):
    assert _refused(fields.prompts, "prompt", value).param == param


@pytest.mark.parametrize(
    "value",
    [
        *({"-1": 1}, {"x": 1}, {"1.5": 1}, {"5": 101}, {"5": math.nan}, {"5": None}, {"5": 1, "05": 2}, [5], {"²": 1}),
        {str(token): 1 for token in range(1025)},
    ],
)
def test_bad_logit_bias(value):
    error = _refused(fields.logit_bias, "logit_bias", value)
    assert error.param is not None
    assert error.param.startswith("logit_bias")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"a": 1, "a": 2}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a": 1} trailing',
        b"{'a': 1}",
    ],
)
def test_bad_json(data):
    error = _refused(parse_json, data)
    assert error.code in ("invalid_json", "invalid_utf8")


def test_nan_survives_parsing_so_that_its_field_can_be_named():
    body = parse_json(b'{"model": "m", "temperature": NaN}')
    assert _refused(fields.parse_object, None, body, fields.COMPLETIONS).param == "temperature"


def test_names_in_messages_can_be_sent():
    error = _refused(fields.parse_object, None, {"model": "m", "\ud800" * 5000: 1}, fields.COMPLETIONS)
    assert len(error.message.encode()) < 10_000
    assert error.param is not None
    error.param.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def _error(function, *arguments) -> Exception | None:
    try:
        function(*arguments)
    except (ApiError, InvalidRequest) as error:
        return error
    return None


@settings(max_examples=300)
@given(st.data())
@pytest.mark.parametrize("table", [fields.COMPLETIONS, fields.CHAT], ids=["completions", "chat"])
def test_any_value_of_any_field_is_taken_or_refused(table, data):
    """Never another exception than the API's, and what is taken is what the engine's own check takes."""
    given = {"messages": [{"role": "user", "content": "a"}]} if "messages" in table else {"prompt": "a"}
    base = {"model": "m"} | given
    name = data.draw(st.sampled_from(sorted(table)))
    body = base | {name: data.draw(JSON)}

    def check() -> None:
        values = fields.parse_object(None, body, table)
        if "messages" in table:
            check_messages(values["messages"], "")
        sampling_params(values, max_tokens=5, seed_offset=1, logprobs=None).validate(2**31)

    error = _error(check)
    if isinstance(error, ApiError):
        assert error.status == 400
        assert error.param.startswith(name)
        error.message.encode()
    elif error is not None:
        # What depends on the model, or on two fields together, is left to the engine's check.
        assert error.param in ("min_tokens", "stop_token_ids", "logit_bias", "stop")


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_an_object_or_refused(data):
    error = _error(parse_json, data)
    assert error is None or error.status == 400


# -- messages ---------------------------------------------------------------------------------------------------------


def test_messages_as_the_template_gets_them():
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
    ]
    expected = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]
    assert check_messages(messages, "{{ messages }}") == expected
    assert check_messages(messages, "{% if developer %}")[0]["role"] == "developer"


def test_names_go_to_templates_that_use_them():
    messages = [{"role": "user", "content": "a", "name": "Ann"}]
    assert check_messages(messages, "{{ message.name }}")[0]["name"] == "Ann"
    assert _refused(check_messages, messages, "{{ message.content }} {{ filename }}").param == "messages[0].name"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_calls_and_their_results_go_to_the_template():
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    call = CALL | {"function": {"name": "f", "arguments": {"a": 1}}}
    assert check_messages(messages, "{{ tool_calls }}") == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]


BAD_FIELDS = [
    ("response_format", "json", "response_format"),
    ("response_format", {}, "response_format.type"),
    ("response_format", {"type": "jsonl"}, "response_format.type"),
    ("response_format", {"type": "text", "schema": {}}, "response_format.schema"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["\ud800"]}}},
        "response_format.json_schema.schema",
    ),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"minimum": math.nan}}},
        "response_format.json_schema.schema",
    ),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, "structured_outputs"),
    ("structured_outputs", {"choice": []}, "structured_outputs.choice"),
    ("structured_outputs", {"regexp": "a"}, "structured_outputs.regexp"),
    ("tools", {}, "tools"),
    ("tools", [{"type": "custom", "custom": {}}], "tools[0].custom"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2, "tools[1].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 129, "tools"),
    (
        "tools",
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
        "tools[0].function.parameters",
    ),
    ("tool_choice", "always", "tool_choice"),
    ("tool_choice", {"type": "function"}, "tool_choice.function"),
    ("parallel_tool_calls", 1, "parallel_tool_calls"),
]


@pytest.mark.parametrize(("name", "value", "param"), BAD_FIELDS, ids=[str(i) for i in range(len(BAD_FIELDS))])
def test_formats_and_tools_are_checked_by_field(name, value, param):
    assert _refused(fields.parse_object, None, {"model": "m", "messages": [], name: value}, fields.CHAT).param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": "\udfff"}, "messages[0].content"),
        ({"role": "usr", "content": "a"}, "messages[0].role"),
        ({"role": ["user"], "content": "a"}, "messages[0].role"),
        ({"role": "tool", "content": "a", "tool_call_id": "x"}, "messages[0].role"),  # no place for it in the template
        ({"role": "tool", "content": "a"}, "messages[0].tool_call_id"),
        ({"role": "function", "content": "a", "name": "f"}, "messages[0].role"),
        ({"role": "user", "content": "a", "colour": "red"}, "messages[0].colour"),
        ({"role": "user", "content": "a", "tool_calls": []}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[0].tool_calls"),  # as above
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "messages[0].tool_calls[0].type"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages[0].audio"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
    ],
)
def test_bad_messages(message, param):
    assert _refused(check_messages, [message], "{{ messages }}").param == param


@pytest.mark.parametrize("messages", [[], {}, "hi", 3])
def test_messages_must_be_a_list_with_something_in_it(messages):
    assert _refused(check_messages, messages, "").param == "messages"
