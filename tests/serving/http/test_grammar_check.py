"""Grammars tried out in a process of their own: what they die of is said, and the process lives."""

import asyncio
import json
import os
import signal
from types import SimpleNamespace

import pytest

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving.http import grammar_check
from twinax.serving.http.errors import ApiError
from twinax.serving.http.grammar_check import GrammarCheck
from twinax.serving.request import Grammar

READY = SimpleNamespace(tokenizer_files=Tokenizer.bytes().files(), vocab_size=Tokenizer.bytes().vocab_size)
GOOD = Grammar("regex", "[a-z]+")


@pytest.fixture
def check():
    checker = GrammarCheck()
    yield checker
    checker.close()


def said(checker: GrammarCheck, *grammars: Grammar) -> list[str]:
    """What is wrong with each, asked for all at once."""

    async def one(grammar: Grammar) -> str:
        try:
            await checker.check(grammar, "response_format", READY)  # type: ignore
        except ApiError as error:
            return f"{error.status} {error.message}"
        return ""

    async def every() -> list[str]:
        return await asyncio.gather(*map(one, grammars))

    return asyncio.run(every())


def test_each_gets_its_own_answer_and_those_that_kill_hurt_no_other(check):
    deep = {"$defs": {f"d{n}": {"properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(3000)}}
    deep |= {"$ref": "#/$defs/d0"}
    deep["$defs"]["d3000"] = {"type": "null"}
    slow = Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 999983}))
    wrong = Grammar("lark", "start: x")
    answers = said(check, GOOD, slow, wrong, Grammar("json_schema", json.dumps(deep)), Grammar("regex", "b"))
    assert [answer[:3] for answer in answers] == ["", "400", "400", "400", ""]
    assert "more than 0.6 seconds to compile" in answers[1]
    assert 'unknown name: "x"' in answers[2]
    assert "nested too deeply" in answers[3]
    os.kill(check._process.pid, signal.SIGKILL)
    # What was said is kept; what was not is asked of a new process.
    assert said(check, slow, GOOD) == [answers[1], ""]
    assert said(check, Grammar("regex", "c")) == [""]


def test_a_process_that_hangs_is_replaced(check, monkeypatch):
    assert said(check, GOOD) == [""]
    first, start = check._process.pid, check._start

    def restart(ready):
        monkeypatch.setattr(grammar_check, "PATIENCE_SECONDS", 60.0)
        return start(ready)

    monkeypatch.setattr(grammar_check, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(check, "_start", restart)
    os.kill(first, signal.SIGSTOP)
    assert said(check, Grammar("regex", "d")) == [""]
    assert check._process.pid != first


def test_no_more_wait_than_a_limit(check, monkeypatch):
    monkeypatch.setattr(grammar_check, "MOST_WAITING", 2)
    answers = said(check, *[Grammar("regex", letter) for letter in "abcd"])
    assert [answer[:3] for answer in answers] == ["", "", "429", "429"]
    assert said(check, Grammar("regex", "d")) == [""]


def test_what_is_kept_has_a_limit(check, monkeypatch):
    monkeypatch.setattr(grammar_check, "_KEPT_VERDICTS", 2)
    assert said(check, *[Grammar("regex", letter) for letter in "abc"]) == ["", "", ""]
    assert list(check._verdicts) == [Grammar("regex", "b"), Grammar("regex", "c")]
