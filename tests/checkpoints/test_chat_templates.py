"""A table of conversations through templates of many models, as transformers renders them.

The templates are ours, in the style of those that the models come with: the same statements, filters and tricks.
"""

import json
import re
from pathlib import Path

import pytest

from twinax.checkpoints.chat_template import ChatTemplateError, render
from twinax.checkpoints.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


def call(name: str, arguments: object, key: str = "abcdefghi") -> dict:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be <b>brief</b> & 'kind' \"世界\" {{ 7 * 7 }}\n"}
HELLO = {"role": "user", "content": "  héllo 👍🏽 e\u0301 ﷽\n\n\ttabs {% raw %} <|im_end|> [INST] <end_of_turn>  "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok, \u2028 sure "}
AGAIN = {"role": "user", "content": "and again?"}
ASKS = {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Zürich", "days": [1, 2.5, None]})]}
TOLD = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"rain": true, "°C": 7}'}
TWICE = {"role": "assistant", "content": "both", "tool_calls": [call("f", {}), call("g", {"a": "\n"}, "123456789")]}
PARTS = {"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}
CONVERSATIONS = {
    "one question": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [SYSTEM, HELLO, ANSWER, AGAIN],
    "ends with an answer": [HELLO, ANSWER],
    "long": [SYSTEM, *[HELLO, ANSWER] * 12, AGAIN],
    "a tool's answer": [HELLO, ASKS, TOLD],
    "tools in several turns": [SYSTEM, HELLO, ASKS, TOLD, ANSWER, AGAIN, ASKS, TOLD, ANSWER],
    "two calls at once": [HELLO, TWICE, TOLD, TOLD, ANSWER],
    "arguments as text": [HELLO, {**ASKS, "tool_calls": [call("f", '{"a": 1}')]}, TOLD],
    "thinking": [HELLO, {**ASKS, "thinking": "which city?"}, TOLD, ANSWER],
    "content in parts": [PARTS],
    "no user": [SYSTEM],
    "two users": [HELLO, AGAIN],
    "an unknown role": [{"role": "robot", "content": "beep"}],
    "a tool without a call": [HELLO, TOLD],
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "wo? <&>"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells «it»", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}},
]
VARIANTS = {
    "plain": {},
    "open": {"add_generation_prompt": True},
    "tools": {"tools": TOOLS, "add_generation_prompt": True},
    "switches": {"enable_thinking": False, "reasoning_effort": "high", "date_string": "1 Jan 2025"},
}


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """Our tokenizer and theirs of one folder with this template."""
    folder = tmp_path_factory.mktemp(request.param)
    Tokenizer.bytes().save(folder)
    (folder / "chat_template.jinja").write_text((FOLDER / f"{request.param}.jinja").read_text())
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


def rendered_by_peer(tokenizer, messages: list, options: dict) -> tuple[str | None, str]:
    """What transformers renders, or None and the reason."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options), ""
    except Exception as error:  # whatever Jinja raises out of a template
        return None, str(error).partition("\n")[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_renders_as_in_transformers(pair, variant):
    """The same text, or neither renders it."""
    ours, theirs = pair
    options = {"add_generation_prompt": False, **VARIANTS[variant]}
    rendered = 0
    for title, messages in CONVERSATIONS.items():
        before = json.dumps(messages)
        expected, said = rendered_by_peer(theirs, messages, options)
        if expected is None:
            with pytest.raises(ChatTemplateError, match=re.escape(said)):
                ours.apply_chat_template(messages, **options)
            continue
        assert ours.apply_chat_template(messages, **options) == expected, title
        assert json.dumps(messages) == before
        rendered += 1
    assert rendered >= 3


def test_every_template_marks_or_uses_what_it_should():
    """The table has what the issue asks for."""
    sources = {name: (FOLDER / f"{name}.jinja").read_text() for name in NAMES}
    assert {"llama31", "qwen3", "mistral", "gemma", "chatml", "phi3", "gpt_oss"} <= set(NAMES)
    for mark, least in {"endgeneration": 3, "tool": 4, "namespace": 3, "raise_exception": 5, "macro": 1}.items():
        assert sum(mark in source for source in sources.values()) >= least, mark


def test_what_we_do_not_do_is_refused():
    with pytest.raises(ChatTemplateError, match="continue_final_message is not supported"):
        render("{{ messages }}", [HELLO, ANSWER], continue_final_message=True)
