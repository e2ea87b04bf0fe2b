"""Grammars followed at random: whatever a model samples is a text of the grammar, by an independent judge."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving import grammar as grammar_module
from twinax.serving.grammar import GrammarError, Grammars, fill_masks, leave_out
from twinax.serving.request import Grammar

BYTES = Tokenizer.bytes()


def words() -> Tokenizer:
    """A vocabulary of longer tokens, which cut texts of JSON in many ways."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = ['{"name": "value", "number": -12.5e3, "list": [true, false, null, {}]}', "\n  ", "naïve été 😀"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return Tokenizer.from_backend(backend)


def with_grammars(tokenizer: Tokenizer, more: int) -> tuple[Tokenizer, int, Grammars]:
    """For a model that has `more` rows than the tokenizer has tokens."""
    rows = tokenizer.vocab_size + more
    return tokenizer, rows, Grammars(tokenizer, rows, tokenizer.eos_ids)


GRAMMARS = [with_grammars(BYTES, 0), with_grammars(words(), 37)]


def follow(tokenizer: Tokenizer, rows: int, grammars: Grammars, grammar: Grammar, seed: int) -> str | None:
    """A text sampled with the masks, ending early where it may; None for one that is not complete in time.

    Brackets, quotes and commas are liked less or more as it grows, so that it comes to an end.
    """
    matcher, rng, ids = grammars.matcher(grammar), random.Random(seed), []
    vocab_size = tokenizer.vocab_size
    mask_RW = np.zeros((1, -(-rows // 32)), np.int32)
    for step in range(300):
        assert fill_masks([(matcher, 0)], mask_RW) == {}
        allowed = np.flatnonzero(np.unpackbits(mask_RW.view(np.uint8), bitorder="little")).tolist()
        assert allowed, "a dead end"
        assert max(allowed) < vocab_size
        if tokenizer.eos_id in allowed:
            assert matcher.may_end
            if len(allowed) == 1 or rng.random() < 0.5:
                break
            allowed.remove(tokenizer.eos_id)
        closing = [token for token in allowed if tokenizer.token_bytes(token).strip()[:1] in (b"}", b"]", b'"')]
        token = rng.choice(closing if closing and rng.random() < step / 60 else allowed)
        ids.append(token)
        if matcher.push(token):
            assert matcher.may_end
            break
    else:
        return None
    return tokenizer.decode(ids)


names = st.sampled_from(["a", "b", "name", 'q"', "é"])
values = st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(codec="utf-8"), max_size=4)


def _object(properties: dict, data: tuple[bool, bool]) -> dict:
    required, closed = data
    schema = {"type": "object", "properties": properties, "required": sorted(properties) if required else []}
    return schema | ({"additionalProperties": False} if closed else {"additionalProperties": {"type": "integer"}})


def _bounded(kind: str) -> st.SearchStrategy[dict]:
    pairs = st.tuples(st.integers(-50, 50), st.integers(0, 60))
    return pairs.map(lambda pair: {"type": kind, "minimum": pair[0], "maximum": pair[0] + pair[1]})


simple = st.one_of(
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {}]),
    _bounded("integer"),
    _bounded("number"),
    st.integers(1, 9).map(lambda n: {"type": "integer", "multipleOf": n}),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda n: {"type": "string", "minLength": n[0], "maxLength": n[0] + n[1]}
    ),
    st.sampled_from(["^[a-c]{2,4}$", "x", "^(ab|cd)*$", "[0-9]+\\.$"]).map(
        lambda text: {"type": "string", "pattern": text}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(values, min_size=1, max_size=4, unique_by=repr).map(lambda items: {"enum": items}),
    values.map(lambda value: {"const": value}),
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        ),
        st.tuples(st.dictionaries(names, inner, max_size=3), st.tuples(st.booleans(), st.booleans())).map(
            lambda t: _object(*t)
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
        st.tuples(st.lists(inner, min_size=1, max_size=2)).map(
            lambda t: {"type": "array", "prefixItems": t[0], "items": False, "minItems": len(t[0])}
        ),
    ),
    max_leaves=5,
)


referring = schemas.map(lambda one: {"$defs": {"one": one}, "type": "array", "items": {"$ref": "#/$defs/one"}})


@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "words"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=schemas | referring, seed=st.integers(0, 2**31))
def test_texts_of_any_schema_are_valid(kind, schema, seed):
    text = follow(*GRAMMARS[kind], Grammar("json_schema", json.dumps(schema)), seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


REGEXES = [
    r"[a-z]{2,5}@[a-z]+\.(com|org)", r"(0|[1-9][0-9]*)(\.[0-9]{2})?", r"(yes|no|maybe)( (yes|no))*", r"[^a-z]{3}",
    r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}", r"(a|ab)(c|bcd)(d*)", r"é+|ü{2}|😀", r"#[0-9a-fA-F]{6}", r"a.c", r"(?s:a.c)",
    r"(?i:true|false)", r"\x41{2}[\t\n]", r"[\[\]{}^$|\\/-]{4}", r"(x+x+)+y", r"^anchored$", r'"q"/"s"',
]  # fmt: skip


@pytest.mark.parametrize("kind", [0, 1], ids=["bytes", "words"])
@pytest.mark.parametrize("regex", REGEXES)
def test_texts_of_a_regular_expression_match_it(kind, regex):
    found = {follow(*GRAMMARS[kind], Grammar("regex", regex), seed) for seed in range(5)}
    assert all(text is None or re.fullmatch(regex, text) for text in found), found
    assert found != {None}


def test_a_choice_gives_each_of_its_texts_and_no_other():
    texts = ["yes", "no", "", 'a "b"\n\\c', "(x|y)*[z]{2}.^$#&-~/", "\x00\x1f\x7f", "été😀", "  "]
    grammar = Grammar("choice", json.dumps(texts))
    for known in GRAMMARS:
        assert {follow(*known, grammar, seed) for seed in range(150)} == set(texts)


def test_requests_share_what_is_compiled_and_not_where_they_are():
    grammars = GRAMMARS[0][2]
    grammar = Grammar("regex", "[ab]{3}")
    one, other = grammars.matcher(grammar), grammars.matcher(grammar)
    assert one.push(97) is one.push(98) is False
    assert one.push(97) is True
    assert not other.may_end
    assert other.following() == [97, 98]


def test_what_is_kept_has_limits_on_number_and_size(monkeypatch):
    grammars = with_grammars(BYTES, 0)[2]
    monkeypatch.setattr(grammar_module, "KEPT_GRAMMARS", 3)
    monkeypatch.setattr(grammar_module, "KEPT_BYTES", 40)
    all_of_them = [Grammar("regex", letter * 8) for letter in "abcde"]
    for grammar in all_of_them[:3]:
        grammars.compile(grammar)
    grammars.matcher(all_of_them[0])  # used last
    grammars.compile(all_of_them[3])
    assert [grammar in grammars for grammar in all_of_them] == [True, False, True, True, False]
    grammars.compile(Grammar("regex", "x" * 30))
    assert [grammar in grammars for grammar in all_of_them] == [False, False, False, True, False]


def test_left_out_tokens_are_cleared_in_their_row_alone():
    masks = np.full((2, 3), -1, np.int32)
    assert leave_out(masks[0], [0, 31, 32, 95])
    bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")
    assert np.flatnonzero(bits[0] == 0).tolist() == [0, 31, 32, 95]
    assert bits[1].all()
    assert not leave_out(masks[0], range(96))


def test_a_vocabulary_that_can_have_no_grammar_says_so():
    with pytest.raises(GrammarError, match="needs an end-of-sequence token"):
        Grammars(BYTES, BYTES.vocab_size, []).matcher(Grammar("regex", "a"))
