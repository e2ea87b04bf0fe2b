import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.serving.request import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    Grammar,
    InvalidRequest,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
)

VOCAB = 100
CONTEXT = 32

BAD = [
    ("temperature", [math.nan, math.inf, -math.inf, -0.1, 10**400, "1", None, True]),
    ("top_k", [-1, 1.5, 2**40, None, True]),
    ("top_p", [0, 0.0, -0.1, 1.0001, math.nan, math.inf]),
    ("min_p", [-0.01, 1.01, math.nan]),
    ("repetition_penalty", [0, -1.0, math.nan, math.inf, 100.5, 1e39]),
    ("presence_penalty", [-2.01, 2.01, math.nan, math.inf]),
    ("frequency_penalty", [-2.01, 2.01, math.nan, -math.inf]),
    ("logit_bias", [{VOCAB: 1.0}, {-1: 1.0}, {"5": 1.0}, {5: 100.5}, {5: -101}, {5: math.nan}, {True: 1.0}, [1], None]),
    ("seed", [2**63, -(2**63) - 1, 0.5, "0", True]),
    ("max_tokens", [0, -1, CONTEXT + 1, 2**70, 1.0, None, math.nan]),
    ("min_tokens", [-1, 17, 0.5]),
    ("stop", ["text", [""], ["a", 5], ["a"] * (MAX_STOP_STRINGS + 1), ["a" * (MAX_STOP_CHARACTERS + 1)], ["\ud800"]]),
    ("stop_token_ids", [5, [VOCAB], [-1], [1.0], [1] * (MAX_STOP_TOKENS + 1)]),
    ("ignore_eos", [1, 0, None, "yes"]),
    ("skip_special_tokens", [1, None, "yes"]),
    ("grammar", ["a", Grammar("yaml", "a"), Grammar("regex", ""), Grammar("regex", "\ud800"), Grammar("lark", 1)]),
    ("logprobs", [21, -1, 1.5, True]),
    ("prompt_logprobs", [21, -1, 1.5, True]),
]
GOOD = {
    "temperature": [0, 0.0, 1e-9, 2, 1e30],
    "top_k": [0, 1, VOCAB * 10],
    "top_p": [1, 1.0, 1e-9],
    "min_p": [0, 1],
    "repetition_penalty": [1e-63, 1e-9, 1, 50.0, 100],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2.0, 2],
    "logit_bias": [{}, {0: -100, VOCAB - 1: 100.0}],
    "seed": [None, 0, -(2**63), 2**63 - 1],
    "max_tokens": [1, CONTEXT],
    "min_tokens": [0, 16],
    "stop": [[], ["a"] * MAX_STOP_STRINGS, ["é" * MAX_STOP_CHARACTERS]],
    "stop_token_ids": [[], [0, VOCAB - 1]],
    "ignore_eos": [True, False],
    "skip_special_tokens": [True, False],
    "grammar": [None, Grammar("regex", "a"), Grammar("choice", "[]")],  # what is wrong in it is told by the compiler
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
}


def test_every_field_has_bad_and_good_cases():
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert fields == {name for name, _ in BAD} == set(GOOD)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values], ids=repr)
def test_a_bad_value_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value}).validate(VOCAB, CONTEXT)
    assert caught.value.param == name
    message = str(caught.value)
    assert name.split("_")[0] in message
    assert ";" in message, "the message says what to do after the semicolon"
    assert len(message) < 300


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in GOOD for value in GOOD[name]], ids=repr)
def test_the_limits_themselves_are_allowed(name, value):
    SamplingParams(**{name: value}).validate(VOCAB, CONTEXT)


def test_messages_state_rule_value_and_fix():
    with pytest.raises(InvalidRequest, match=r"^temperature must be a finite number of at least 0, got nan; use 0"):
        SamplingParams(temperature=math.nan).validate(VOCAB)
    with pytest.raises(InvalidRequest, match=r"^top_p must be a number in \(0, 1\], got 0; use 1 to turn it off$"):
        SamplingParams(top_p=0).validate(VOCAB)
    with pytest.raises(InvalidRequest, match=r"^max_tokens must be a whole number from 1 to 32, got -5; "):
        SamplingParams(max_tokens=-5).validate(VOCAB, CONTEXT)
    with pytest.raises(InvalidRequest, match=r"^logit_bias must be a whole number from 0 to 99, got 100; token ids"):
        SamplingParams(logit_bias={100: 1}).validate(VOCAB)
    with pytest.raises(InvalidRequest, match=r"^logit_bias must have at most 1024 entries, got 1025; leave some out$"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)).validate(2000)


def test_without_a_context_length_max_tokens_has_a_limit_all_the_same():
    SamplingParams(max_tokens=10**6).validate(VOCAB)
    with pytest.raises(InvalidRequest):
        SamplingParams(max_tokens=2**31).validate(VOCAB)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=2), scalars)


@given(name=st.sampled_from(sorted(GOOD)), value=anything)
def test_whatever_the_value_it_passes_or_is_refused_by_name(name, value):
    params = SamplingParams(**{name: value})
    blamed = None
    try:
        params.validate(VOCAB, CONTEXT)
    except InvalidRequest as error:
        blamed = error.param
    assert blamed in (None, name)
    if blamed is None:  # what passes survives the socket
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "at least one token, got none"),
        ([1] * CONTEXT, "shorter than the model's context of 32 tokens.*got 32 tokens; shorten it by 1"),
        ([1, VOCAB], "from 0 to 99, got 100"),
        ([1, -1], "from 0 to 99, got -1"),
        ([1, True], "from 0 to 99, got True"),
        ([1, 1.0], "from 0 to 99, got 1.0"),
        ("text", "encode the text first"),
    ],
)
def test_a_bad_prompt_is_refused(prompt, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        Request("a", prompt).validate(VOCAB, CONTEXT)
    assert caught.value.param == "prompt"


def test_request_validates_id_arrival_and_params():
    Request("a", [0] * (CONTEXT - 1)).validate(VOCAB, CONTEXT)
    for bad, param in [
        (Request("", [1]), "id"),
        (Request("\udc80", [1]), "id"),
        (Request("a", [1], arrival=math.nan), "arrival"),
        (Request("a", [1], SamplingParams(top_k=-1)), "top_k"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            bad.validate(VOCAB, CONTEXT)
        assert caught.value.param == param


def test_json_numbers_and_keys_become_the_declared_types():
    params = msgspec.json.decode(b'{"temperature": 1, "logit_bias": {"7": -5}, "stop": ["a"]}', type=SamplingParams)
    assert params == SamplingParams(temperature=1.0, logit_bias={7: -5.0}, stop=["a"])
    assert isinstance(params.temperature, float)


@pytest.mark.parametrize("type", [SamplingParams, Request, TokenLogprob, Output])
def test_unknown_fields_are_refused(type):
    needed = {"id": 1, "logprob": -1.0} if type is TokenLogprob else {"id": "a", "prompt_ids": [1], "request_id": "a"}
    known = {field.encode_name for field in msgspec.structs.fields(type)}
    body = {name: value for name, value in needed.items() if name in known}
    msgspec.convert(body, type)
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.convert({**body, "temprature": 1}, type)


def test_all_types_survive_the_socket():
    request = Request("a", [1, 2], SamplingParams(logit_bias={3: 1.5}, stop=["x"], seed=-1, logprobs=2), 12.5)
    token = TokenLogprob(3, -0.5, [(3, -0.5), (4, -1.0)])
    output = Output("a", [3], "x", [token], [None, token], "stop", 3, 2, 1, None)
    for value in (request, output):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value
