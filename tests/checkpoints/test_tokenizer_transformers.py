"""The files that we write, in transformers; and its chat templates, in ours."""

import json
from pathlib import Path

import pytest

from twinax.checkpoints.chat_template import ChatTemplateError, render
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.train.data.bpe import bpe_from_texts

transformers = pytest.importorskip("transformers")

SAMPLES = ["", "hello", "héllo  世界\n\t\x00 👍🏽 e\u0301 <|eos|>x <|nope|> ﷽ \r\n  end ", " don't , . !"]
CORPUS = ["the cat sat on the mat, 世界 世界 naïve café\n" * 20]

CHATML = """{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_TOOLS = """{{- bos_token }}
{% if not date_string is defined %}
    {% set date_string = "26 Jul 2024" %}
{% endif %}
{% set ns = namespace(seen=false, last='') %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
[{{ message.role }}] {{ message.content }}
    {% endgeneration %}
    {% set ns.seen = true %}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if tools is not none %}
{{ tools | tojson(indent=2) }}
{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}
{% endif %}
{{ date_string }} {{ ns.seen }} {{ dict(a=1).items() | list }} {{ messages[0].content[:3] | upper }}
{% if documents %}{{ documents }}{% endif %}
{%- if add_generation_prompt %}GO{% endif %}
"""

CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "be <b>brief</b> & 'kind' 世"},
        {"role": "user", "content": "  line one\n\nline two  "},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": ["<x>", "é"], "n": None}}}]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else bpe_from_texts(iter(CORPUS), 300)


@pytest.mark.parametrize("inside_a_model_folder", [False, True])
def test_our_files_load_and_tokenise_identically(tmp_path: Path, tokenizer: Tokenizer, inside_a_model_folder: bool):
    tokenizer.save(tmp_path)
    if inside_a_model_folder:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512}))
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        peer = loader.from_pretrained(str(tmp_path))
        assert len(peer) == tokenizer.vocab_size
        found = (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id)
        assert found == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        for text in SAMPLES:
            ids = tokenizer.encode(text)
            assert peer.encode(text) == ids
            assert peer.decode(ids) == tokenizer.decode(ids, skip_special=False)
            assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        broken = list(b"\xe4\xb8A\xff\xf0\x9f\x98") if tokenizer.is_bytes else []
        assert peer.decode(broken) == tokenizer.decode(broken)


def test_what_transformers_saves_loads_here(tmp_path: Path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path / "ours")
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    peer.chat_template = CHATML
    peer.save_pretrained(str(tmp_path / "theirs"))
    loaded = Tokenizer.load(tmp_path / "theirs")
    assert loaded.chat_template == CHATML
    assert (loaded.bos_id, loaded.eos_id, loaded.is_bytes) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.is_bytes)
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in SAMPLES)


def with_template(template: object, jinja: str | None = None) -> Tokenizer:
    files = Tokenizer.bytes().files()
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    return Tokenizer.from_files(files | ({"chat_template.jinja": jinja.encode()} if jinja else {}))


@pytest.mark.parametrize("template", [CHATML, LLAMA_TOOLS])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_templates_render_as_in_transformers(tmp_path: Path, template: str, messages: list, tools, prompt: bool):
    tokenizer = with_template(template)
    tokenizer.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = tokenizer.apply_chat_template(messages, tools, prompt)
    assert ours == peer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    ours = tokenizer.apply_chat_template(messages, date_string="today", documents=[{"text": "d"}])
    variables = {"date_string": "today", "documents": [{"text": "d"}]}
    assert ours == peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)


def test_templates_by_name_and_by_file():
    named = with_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    assert named.apply_chat_template([]) == "D"
    assert named.apply_chat_template([], tools=TOOLS) == "T"
    assert with_template("old", jinja="new{{ eos_token }}").apply_chat_template([]) == "new<|eos|>"


def test_time_is_given():
    from datetime import datetime

    assert render("{{ strftime_now('%Y') }}", []) in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_no_template_says_what_to_do():
    assert Tokenizer.bytes().chat_template is None
    with pytest.raises(ChatTemplateError, match=r"no chat template.*chat_template.jinja"):
        Tokenizer.bytes().apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, "refused this conversation: unknown role robot"),
        ("{% for m in messages %}", "not valid Jinja at line 1"),
        ("{{ messages[0].content + 1 }}", "failed on this conversation .TypeError"),
        ("{{ messages.append(1) }}", "refused this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refused this conversation"),
        ("{{ raise_exception.__globals__.os }}", "refused this conversation"),
        ("{{ dict.__init__.__globals__ }}", "refused this conversation"),
        ("{% set ns = namespace(__class__=1) %}", "may not begin with '_'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "may not begin with '_'"),
        ("{% for i in range(10**9) %}{% endfor %}", "failed on this conversation"),
        ("{{ lipsum.__globals__['os'].popen('id').read() }}", "refused this conversation"),
    ],
)
def test_bad_templates_are_refused(template: str, message: str):
    with pytest.raises(ChatTemplateError, match=message):
        render(template, [{"role": "robot", "content": "hi"}])


def test_objects_do_not_reach_a_template():
    with pytest.raises(ChatTemplateError, match=r"messages\[0\].content is a PosixPath"):
        render("{{ messages[0].content.unlink() }}", [{"role": "user", "content": Path("x")}])
