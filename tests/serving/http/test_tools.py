"""Calls of tools: found in texts, written by grammars, and through the real client."""

import json
import random

import jsonschema
import openai
import pytest

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving.grammar import Grammars
from twinax.serving.http import fields, output_format, tool_formats
from twinax.serving.http.errors import ApiError
from twinax.serving.http.tool_parser import CallPiece
from twinax.serving.http.tools import Named, ToolAnswer, tool_choice, tool_use

from .conftest import MODEL, Server

TEMPLATES = {
    "deepseek_v3": "{{ tools }} <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json",
    "deepseek_v31": "{{ tools }} <｜tool▁call▁begin｜>f<｜tool▁sep｜>",
    "hermes": "{{ tools }} write <tool_call> {}</tool_call>",
    "llama3_json": '{{ tools }} Environment: ipython {"name": name, "parameters": dictionary}',
    "mistral": "{{ tools }} [TOOL_CALLS]",
    "mistral_v11": "{{ tools }} [TOOL_CALLS]f[CALL_ID]0[ARGS]",
    "mistral_v13": "{{ tools }} [TOOL_CALLS]f[ARGS]",
    "qwen3_coder": "{{ tools }} <tool_call><function=f><parameter=x>",
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "required": ["city"]}
DAYS = {
    "type": "object",
    "properties": {"days": {"$ref": "#/$defs/days"}, "note": {"type": "string", "maxLength": 3}},
    "required": ["days", "note"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "maxItems": 2}},
}
CLOSED = {"additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": CITY | CLOSED}},
    {"type": "function", "function": {"name": "forecast", "parameters": DAYS}},
    {"type": "function", "function": {"name": "now"}},
]
VALUES = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "flag": {"$ref": "#/$defs/flag"},
        "list": {"type": "array"},
        "some": {"type": ["string", "null", "number"]},
        "any": {},
    },
    "$defs": {"flag": {"type": "boolean"}},
}
SCHEMAS = {"weather": CITY | CLOSED, "forecast": DAYS, "now": {"type": "object", "maxProperties": 0}}
PARSED = SCHEMAS | {"f": VALUES}


# -- in texts ---------------------------------------------------------------------------------------------------------


def parse(name: str, text: str, cuts: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls; fed at once, or in pieces of random sizes."""
    parser, rng, pieces = tool_formats.load(name).parser(PARSED), random.Random(cuts), []
    while text:
        size = len(text) if cuts is None else rng.randint(1, 5)
        pieces += parser.feed(text[:size])
        text = text[size:]
    pieces += parser.finish()
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    assert parser.count == len(calls)
    return "".join(piece for piece in pieces if isinstance(piece, str)), [(call[0], call[1]) for call in calls]


ARGUMENTS = '{"a": "}<\\"", "b": [1, {}]}'
HERMES = f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>'
LLAMA = f'{{"name": "f", "parameters": {ARGUMENTS}}}'
ALL, CALL, SEP, END, END_ALL = tool_formats.load("deepseek_v3").MARKS
V3 = f"{CALL}function{SEP}f\n```json\n{ARGUMENTS}\n```{END}"
V31 = f"{CALL}f{SEP}{ARGUMENTS}{END}"
ONE = [("f", ARGUMENTS)]


def qwen(*values: tuple[str, str], name: str = "f", close: str = "</function>\n</tool_call>") -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{inside}{close}"


TEXTS = [
    ("hermes", HERMES, "", ONE),
    ("hermes", f"Let me see.\n\n{HERMES}\n{HERMES}\n", "Let me see.", ONE * 2),
    ("hermes", f"{HERMES} There.", " There.", ONE),
    ("hermes", '<tool_call>{"arguments": {"x": [1]}, "name": "g"}</tool_call>', "", [("g", '{"x": [1]}')]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [1, "', "", [("f", '{"x": [1, "')]),
    ("hermes", HERMES[:-4], "", ONE),
    ("hermes", "a < b, <tool_calls>, </tool_call> ", "a < b, <tool_calls>, </tool_call> ", []),
    ("hermes", " x  <tool_call> no JSON", " x  <tool_call> no JSON", []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "\\x", "arguments": {}}', '<tool_call>{"name": "\\x", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [', '<tool_call>{"name": "f", "arguments": [', []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}}}, {{"name": "g", "arguments": {{}}}}]', "",
     [*ONE, ("g", "{}")]),
    ("mistral", 'So: [TOOL_CALLS][{"name":"g","arguments":{}}]', "So:", [("g", "{}")]),
    ("mistral", "[TOOL_CALLS] no list", "[TOOL_CALLS] no list", []),
    ("llama3_json", LLAMA, "", ONE),
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", ONE * 2),
    ("llama3_json", '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    ("llama3_json", f"As in {LLAMA}", f"As in {LLAMA}", []),
    ("mistral_v13", f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g{{}}", "", [*ONE, ("g", "{}")]),
    ("mistral_v13", f"So: [TOOL_CALLS] f [ARGS] {ARGUMENTS} .", "So: .", ONE),
    ("mistral_v13", "[TOOL_CALLS] no call, {}", "[TOOL_CALLS] no call, {}", []),
    ("mistral_v13", '[TOOL_CALLS]x y[TOOL_CALLS]f[ARGS]{"a": [', "[TOOL_CALLS]x y", [("f", '{"a": [')]),
    ("mistral_v13", "[TOOL_CALLS]" + "f" * 600 + "{}", "[TOOL_CALLS]" + "f" * 600 + "{}", []),
    ("mistral_v11", f"[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{ARGUMENTS}", "", ONE),
    ("deepseek_v3", f"{ALL}{V3}\n{V3}{END_ALL}", "", ONE * 2),
    ("deepseek_v3", f"Let me see. {ALL}{V3}", "Let me see.", ONE),
    ("deepseek_v3", f"{ALL}{V31}", f"{ALL}{V31}", []),
    ("deepseek_v31", f"{ALL}{V31}{V31}{END_ALL}", "", ONE * 2),
    ("deepseek_v31", f"{ALL} {V31} {V31} {END_ALL} There", " There", ONE * 2),
    ("deepseek_v31", f"{ALL}{V31}{END_ALL[:3]}", "", ONE),
    ("deepseek_v31", f"{V31} {ALL} and {END_ALL}", f"{V31} {ALL} and {END_ALL}", []),
    ("deepseek_v31", f"{ALL}{V31}{CALL}no", f"{CALL}no", ONE),
    ("qwen3_coder", qwen(("text", "a\n\"b\" </x>\n"), ("count", "3")), "",
     [("f", '{"text": "a\\n\\"b\\" </x>\\n", "count": 3}')]),
    ("qwen3_coder", "I see.\n" + qwen() + "\n" + qwen(name="g") + "\n", "I see.", [("f", "{}"), ("g", "{}")]),
    ("qwen3_coder", qwen(("flag", "True"), ("some", "None"), ("any", "[1]")), "",
     [("f", '{"flag": true, "some": null, "any": [1]}')]),
    ("qwen3_coder", qwen(("some", "nothing"), ("count", "few"), ("new", "-1.5"), ("other", '"x"')), "",
     [("f", '{"some": "nothing", "count": "few", "new": -1.5, "other": "\\"x\\""}')]),
    ("qwen3_coder", qwen(("list", '["</parameter>"]'), ("text", "1")), "",
     [("f", '{"list": ["</parameter>"], "text": "1"}')]),
    ("qwen3_coder", qwen(("list", "[1, {"), ("text", "1")), "", [("f", '{"list": "[1, {", "text": "1"}')]),
    ("qwen3_coder", qwen(("any", '{"a": NaN}'), ("some", "")), "", [("f", '{"any": "{\\"a\\": NaN}", "some": ""}')]),
    ("qwen3_coder", qwen(("text", "x"))[len("<tool_call>\n") :], "", [("f", '{"text": "x"}')]),
    ("qwen3_coder", qwen(("text", "x"), close="</tool_call> Done"), " Done", [("f", '{"text": "x"}')]),
    ("qwen3_coder", qwen(("text", "cut of"), close="")[:-4], "", [("f", '{"text": "cut of')]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=count>\n12", "", [("f", '{"count": ')]),
    ("qwen3_coder", "<tool_call>\n<function=f>junk<b></function>", "", [("f", "{}")]),
    ("qwen3_coder", f"{HERMES} <function= >", f"{HERMES} <function= >", []),
    ("qwen3_coder", "<tool_call> <function=a\nb>", "<tool_call> <function=a\nb>", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), TEXTS, ids=[str(i) for i in range(len(TEXTS))])
def test_calls_are_found_however_a_text_is_cut(name, text, content, calls):
    assert parse(name, text) == (content, calls)
    for cuts in range(30):
        assert parse(name, text, cuts) == (content, calls)


@pytest.mark.parametrize("name", tool_formats.names())
def test_no_text_breaks_a_parser_and_no_cut_changes_what_it_finds(name):
    """Of pieces of all formats, and of halves of such pieces, in any order."""
    pieces = sorted({mark for one in tool_formats.names() for mark in tool_formats.load(one).MARKS})
    pieces += ["<function=f>", "<parameter=text>\n", "<parameter=any>", "</parameter>", "</function>", "```json\n"]
    pieces += [mark[: len(mark) // 2] for mark in pieces]
    pieces += [HERMES, LLAMA, V3, V31, ARGUMENTS, qwen(("any", "1")), "f", "function", "x" * 300, "\ud7ffé", "1e999"]
    pieces += [" ", "\n", *'{}[]"\\,<>']
    rng = random.Random(name)
    for _ in range(150):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 14)))
        content, calls = parse(name, text)
        assert all(called for called, _ in calls)
        if not calls:
            assert content == text or content.strip() == text.strip()
        for cuts in range(2):
            assert parse(name, text, cuts) == (content, calls), text


def test_a_call_keeps_the_id_that_the_model_gave_it_once():
    answer = ToolAnswer(use_of(TEMPLATES["mistral_v11"]))
    for _ in answer.feed("[TOOL_CALLS]now[CALL_ID]abcdefgh1[ARGS]{}" * 2 + "[TOOL_CALLS]now[ARGS]{}", True):
        continue
    first, second, third = [call["id"] for call in answer.calls]
    assert (first, len({first, second, third}), {len(second), len(third)}) == ("abcdefgh1", 3, {9})


def test_every_format_knows_its_own_template_and_no_other():
    assert sorted(TEMPLATES) == tool_formats.names()
    for name, template in TEMPLATES.items():
        assert [one for one in tool_formats.names() if tool_formats.load(one).detect(template)] == [name]
    assert tool_formats.of_template("{{ tools }} <tool_call><function=f>") is None
    with pytest.raises(ValueError, match=r"no tool format 'xml'; choose from deepseek_v3, deepseek_v31, hermes"):
        tool_formats.load("xml")


# -- by grammars ------------------------------------------------------------------------------------------------------


class Speaker:
    """A byte tokenizer with a chat template."""

    def __init__(self, template: str, special: tuple[str, ...] = ()) -> None:
        self._bytes, self._template = Tokenizer.bytes(), template
        self.special_ids = self._bytes.special_ids
        self._special = dict(zip(special, sorted(self.special_ids - set(self._bytes.eos_ids)), strict=False))

    def template_for(self, tools: bool) -> str:
        return self._template

    def token_to_id(self, text: str) -> int | None:
        return self._special.get(text)


def use_of(template: str, *, special: tuple[str, ...] = (), **body):
    values = fields.parse_object(None, {"model": "m", "messages": [], "tools": TOOLS} | body, fields.CHAT)
    return tool_use(values, Speaker(template, special), output_format.chosen(values)[0])  # type: ignore


def written(grammar, seed: int, first: str = "", ends: bytes = b"") -> tuple[list[int], bool]:
    """Ids of what a model that likes to end writes after `first`; `ends`: what ends a value."""
    tokenizer, rng = Tokenizer.bytes(), random.Random(seed)
    matcher, ids = Grammars(tokenizer, 259, tokenizer.eos_ids).matcher(grammar), []
    for byte in first.encode():
        assert byte in matcher.following(), first
        ids.append(byte)
        matcher.push(byte)
    while len(ids) < 900:
        allowed = matcher.following()
        if tokenizer.eos_id in allowed:
            return ids, True
        ending = [token for token in allowed if token > 255 or chr(token) in '"}]']
        going = next((n for n in range(len(ends) - 1, 0, -1) if bytes(ids[-n:]) == ends[:n]), 0)
        if ends and ends[going] in allowed and (going or rng.random() < 0.3):
            ids.append(ends[going])
        else:
            ids.append(rng.choice(ending if ending and rng.random() < 0.3 else allowed))
        if matcher.push(ids[-1]):
            return ids, True
    return ids, False


def check_calls(name: str, text: str, expected: set[str]) -> int:
    content, calls = parse(name, text)
    assert content == ""
    for called, arguments in calls:
        assert called in expected
        jsonschema.validate(json.loads(arguments), SCHEMAS[called])
    return len(calls)


@pytest.mark.parametrize("name", tool_formats.names())
def test_what_a_grammar_writes_the_parser_finds_and_the_schemas_take(name):
    required = use_of(TEMPLATES[name], tool_choice="required")
    named = use_of(TEMPLATES[name], tool_choice={"type": "function", "function": {"name": "forecast"}})
    single = use_of(TEMPLATES[name], tool_choice="required", parallel_tool_calls=False)
    assert required.forced and named.forced
    for use, expected in ((required, set(SCHEMAS)), (named, {"forecast"}), (single, set(SCHEMAS))):
        for seed in range(4):
            ids, ended = written(use.grammar, seed)
            assert ended
            count = check_calls(name, bytes(ids).decode(), expected)
            assert count >= 1
            assert count == 1 or use is required


@pytest.mark.parametrize("name", tool_formats.names())
def test_marks_that_are_special_tokens_are_written_as_such(name):
    marks = tool_formats.load(name).MARKS
    for choice in ("required", "auto"):
        tools = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
        use = use_of(TEMPLATES[name], special=marks, tool_choice=choice, tools=tools)
        assert use.shows_special
        speaker = Speaker("", marks)
        texts = {token: mark.encode() for mark, token in speaker._special.items()}
        ids, ended = written(use.grammar, 1)
        assert ended
        text = b"".join(texts.get(token) or bytes([token]) for token in ids).decode()
        if choice == "required":
            assert check_calls(name, text, set(SCHEMAS)) >= 1


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("hermes", 'I see. <tool_call>\n{"name": "weather", "arguments": {"city": "'),
        ("mistral", 'Well, [TOOL_CALLS][{"name": "weather", "arguments": {"city": "'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "'),
        ("mistral_v11", 'So[TOOL_CALLS]weather[CALL_ID]abcdefgh1[ARGS]{"city": "'),
        ("mistral_v13", 'Well, [TOOL_CALLS]weather[ARGS]{"city": "'),
        ("deepseek_v3", f'So {ALL}{CALL}function{SEP}weather\n```json\n{{"city": "'),
        ("deepseek_v31", f'So {ALL}{CALL}weather{SEP}{{"city": "'),
        ("qwen3_coder", "I see.\n<tool_call>\n<function=weather>\n<parameter=city>\n"),
        ("qwen3_coder", "<function=weather>\n<parameter=city>\n"),
    ],
)
def test_strict_functions_are_called_right_wherever_a_call_begins(name, first):
    tools = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, *TOOLS[1:]]
    assert use_of(TEMPLATES[name]).grammar is None
    use = use_of(TEMPLATES[name], tools=tools)
    assert not use.forced
    ids, _ = written(use.grammar, 0, first)
    _, calls = parse(name, bytes(ids).decode())
    assert calls[0][0] == "weather"
    assert json.loads(calls[0][1])["city"] in ("Bern", "Rom")
    assert written(use.grammar, 0, "Just text, {no call}.")[1]  # may end here


@pytest.mark.parametrize("name", [name for name in tool_formats.names() if name != "llama3_json"])
def test_an_answer_in_json_or_a_call(name):
    schema = {"type": "object", "properties": {"answer": {"const": 42}}, "required": ["answer"]} | CLOSED
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    use = use_of(TEMPLATES[name], response_format=response_format)
    begin = tool_formats.load(name).MARKS[0]
    assert json.loads(bytes(written(use.grammar, 0, '{"answer"')[0]).decode()) == {"answer": 42}
    assert len(parse(name, bytes(written(use.grammar, 0, begin)[0]).decode())[1]) >= 1


def test_plain_values_keep_to_their_schemas():
    """As Qwen3-Coder writes them: what stands there as a text is of its type when it is JSON."""
    kinds = {
        "text": {"type": "string"}, "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "one": {"enum": ["a", "b\nc", 'q"/', 1, None]}, "path": {"type": "string", "pattern": "^[a-c]/\\d{2}$"},
        "count": {"type": "integer", "minimum": 3}, "either": {"anyOf": [{"type": "string"}, {"type": "number"}]},
        "some": {"type": ["string", "null"]}, "any": {}, "flag": {"$ref": "#/$defs/flag"}, "same": {"const": "</x>"},
        "place": CITY | CLOSED, "days": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
    }  # fmt: skip
    schema = {"type": "object", "properties": kinds, "required": list(kinds), "$defs": {"flag": {"type": "boolean"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    grammar = use_of(TEMPLATES["qwen3_coder"], tools=[tool], tool_choice="required").grammar
    assert grammar is not None
    for seed in range(4):
        ids, ended = written(grammar, seed, ends=b"\n</parameter>\n")
        assert ended
        pieces = tool_formats.load("qwen3_coder").parser({"f": schema}).feed(bytes(ids).decode())
        arguments = "".join(piece.arguments for piece in pieces if isinstance(piece, CallPiece))
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"anyOf": [{}]}, "can't be held to anyOf"),
        ({"required": ["x"]}, "required, but not described: 'x'"),
        ({"properties": {"a>": {}}}, "can't be called 'a>'"),
        ({"properties": {"a": {"type": "string", "not": {}}}}, "what 'a' has: not, of a text"),
        ({"properties": {"a": {"$ref": "#"}}}, "the reference '#'"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "round in a circle"),
        ({"properties": {"a": {"anyOf": 3}}}, "anyOf without a list"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b"}}}, "an anchor and a choice"),
        ({"additionalProperties": {"type": "integer"}}, "additionalProperties of a kind"),
    ],
)
def test_schemas_that_plain_values_cannot_be_held_to_are_refused(schema, says):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(ApiError) as caught:
        use_of(TEMPLATES["qwen3_coder"], tools=tools, tool_choice="required")
    assert (caught.value.status, caught.value.param) == (400, "tools") and says in caught.value.message
    assert use_of(TEMPLATES["qwen3_coder"], tools=tools).grammar is None  # where nothing is promised


@pytest.mark.parametrize(
    ("template", "body", "param"),
    [
        ("{{ messages }}", {}, "tools"),
        ("{{ tools }} in a way of its own", {}, "tools"),
        (TEMPLATES["hermes"], {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (TEMPLATES["hermes"], {"tool_choice": "required", "tools": []}, "tool_choice"),
        (TEMPLATES["hermes"], {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (TEMPLATES["llama3_json"], {"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(template, body, param):
    with pytest.raises(ApiError) as caught:
        use_of(template, **body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_no_tool_is_offered_where_none_may_be_called():
    assert use_of("no place for tools", tool_choice="none") is None
    assert use_of("no place for tools", tools=[]) is None
    assert tool_choice("tool_choice", {"type": "function", "function": {"name": "f"}}) == Named("f")


# -- through the client -----------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "How is it in Bern?"}]


def chat(client, **options):
    return client.chat.completions.create(
        model=MODEL, **({"messages": QUESTION, "tools": TOOLS, "max_tokens": 600} | options)
    )


def check_message(message, expected: set[str]) -> None:
    assert message.tool_calls
    for call in message.tool_calls:
        assert (call.type, call.id[:5]) == ("function", "call_")
        assert call.function.name in expected
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)


def test_a_call_is_made_where_one_is_asked_for(client):
    named = {"type": "function", "function": {"name": "forecast"}}
    for options, expected in (
        ({"tool_choice": "required", "parallel_tool_calls": False}, set(SCHEMAS)),
        ({"tool_choice": named}, {"forecast"}),
    ):
        answer = chat(client, **options, n=2, seed=3, temperature=1.2)
        for choice in answer.choices:
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            check_message(choice.message, expected)
            assert len(choice.message.tool_calls) == 1


def test_several_calls_at_once_and_their_stream_cut_by_a_limit(client):
    line_break = {"10": 100}  # another call, where there may be one
    options = {"tool_choice": "required", "seed": 5, "logprobs": True, "logit_bias": line_break, "max_tokens": 330}
    whole = chat(client, **options).choices[0]
    *finished, last = whole.message.tool_calls
    for call in finished:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len(finished) > 1
    calls: list[dict] = []
    reasons, content, logprobs = [], "", 0
    for chunk in chat(client, **options, stream=True):
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        content += choice.delta.content or ""
        logprobs += len(choice.logprobs.content) if choice.logprobs else 0
        for part in choice.delta.tool_calls or []:
            if part.index == len(calls):
                assert part.type == "function" and part.id and part.function.arguments == ""
                calls.append({"name": part.function.name, "arguments": ""})
            else:
                assert part.index == len(calls) - 1 and part.id is None and part.function.name is None
                calls[-1]["arguments"] += part.function.arguments
    assert calls == [call.function.model_dump() for call in [*finished, last]]
    assert (content, reasons[-1], set(reasons[:-1])) == ("", whole.finish_reason, {None})
    assert whole.finish_reason == "length"
    assert logprobs == len(whole.logprobs.content)


def test_the_clients_own_stream_helper_puts_a_call_together(client):
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=named, max_tokens=200, seed=1
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    check_message(final.choices[0].message, {"weather"})


def test_calls_and_results_go_back_through_the_template(server: Server, client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = bytes(tokens).decode()
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>' in text
    assert "tool: rain" in text
    joined = [messages[0], messages[1] | {"content": "as text"}, messages[2]]  # by a template that wants no objects
    tokens_joined = server.post("/tokenize", {"messages": joined}).json()["tokens"]
    assert '<tool_call>{"city": "Bern"}</tool_call>' in bytes(tokens_joined).decode()
    without, offered = (chat(client, messages=messages, max_tokens=5, **more) for more in ({"tools": []}, {}))
    assert without.usage.prompt_tokens == len(tokens)
    assert offered.usage.prompt_tokens > len(tokens)  # the tools
    assert chat(client, messages=messages, max_tokens=5, tool_choice="none").usage.prompt_tokens == len(tokens)


def test_text_is_text_where_tools_may_be_called(client):
    options = {"seed": 2, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    whole = chat(client, **options).choices[0]
    assert (whole.finish_reason, whole.message.tool_calls) == ("length", None)
    chunks = chat(client, **options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


def test_schemas_that_cannot_be_kept_to_name_the_tools(client):
    odd = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[odd], tool_choice="required")
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")
