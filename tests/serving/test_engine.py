"""The engine against the full forward, against itself alone, and against a client that goes away."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import full_compile
from tests.serving.engines import twin
from twinax.checkpoints.load import LoadedModel
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.contexts import PackedContext
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, init_params
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.grammar import GrammarError
from twinax.serving.request import (
    MAX_GRAMMAR_BYTES,
    Grammar,
    InvalidRequest,
    QueueFull,
    Request,
    SamplingParams,
)

TOKENIZER = Tokenizer.bytes()
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=160,
    tie_embeddings=True,
)
PARAMS = init_params(CONFIG, 0)


def loaded() -> LoadedModel:
    return LoadedModel(CONFIG, PARAMS, TOKENIZER, "llama", {}, pathlib.Path("here"), "hugging_face")


@pytest.fixture(scope="module", autouse=True)
def _as_for_a_user():
    """The same tokens in any company: that is a matter of bits."""
    with full_compile():
        yield


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = EngineConfig(max_running=6, page_size=16, chunk_tokens=64, compile_cache="", max_waiting=9)
    engine = Engine(loaded(), config)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def small_engine(engine) -> Engine:
    """So few pages that requests push each other out."""
    return twin(engine, max_running=4, num_pages=12)


@pytest.fixture(autouse=True)
def _nothing_is_left(engine):
    yield
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(1, longest, count)]


def greedy(tokens: int = 12, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


FORWARD = jax.jit(lambda params, tokens, context: functional(CONFIG).hidden(params, tokens, context)[0])


def full_logits(ids: list[int], params=PARAMS) -> np.ndarray:
    """Logits [T, V] by the training path."""
    total = CONFIG.max_position_embeddings
    tokens = np.zeros((1, total), np.int32)
    tokens[0, : len(ids)] = ids
    positions = np.arange(total, dtype=np.int32)[None]
    context = PackedContext(jnp.asarray(positions < len(ids), jnp.int32), jnp.asarray(positions))
    hidden = FORWARD(params, tokens, context)
    return np.asarray(functional(CONFIG).unembed(params, hidden))[0, : len(ids)]


def test_greedy_tokens_and_logprobs_are_those_of_the_training_forward(engine):
    params = greedy(12, logprobs=5, prompt_logprobs=2)
    for done in engine.generate(prompts(7, longest=100), params):
        ids = done.prompt_ids + done.token_ids
        logprobs = np.asarray(jax.nn.log_softmax(full_logits(ids)))
        predicted = logprobs[len(done.prompt_ids) - 1 : -1]
        assert done.token_ids == np.argmax(predicted, -1).tolist()
        assert done.logprobs is not None
        assert done.prompt_logprobs is not None
        for step, (token, own) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
            assert own.id == token
            assert own.logprob == pytest.approx(predicted[step, token], abs=1e-4)
            assert [t for t, _ in own.top] == np.argsort(-predicted[step])[:5].tolist()
        assert done.prompt_logprobs[0] is None
        assert len(done.prompt_logprobs) == len(done.prompt_ids)
        for position, own in enumerate(done.prompt_logprobs[1:], 1):
            assert own is not None
            assert own.logprob == pytest.approx(logprobs[position - 1, ids[position]], abs=1e-4)


VARIED = [
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.3, "seed": 2, "top_k": 40, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 3, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": -4, "min_p": 0.02, "presence_penalty": -1.0},
    {"temperature": 1.0, "seed": 2**62, "logit_bias": {65: 3.0, 66: 3.0}},
    {"temperature": 0.0, "seed": 0},
    {"temperature": 1.1, "seed": 7, "stop_token_ids": list(range(100, 160)), "min_tokens": 6},
]


def test_a_seed_gives_the_same_tokens_alone_and_among_neighbours(engine):
    every = [SamplingParams(max_tokens=20, ignore_eos=True, **one) for one in VARIED]
    asked = prompts(len(every))
    together = engine.generate(asked, every)
    backwards = engine.generate(asked[::-1], every[::-1])[::-1]
    for index, (prompt, params) in enumerate(zip(asked, every, strict=True)):
        alone = engine.generate([prompt], params)[0]
        assert alone.token_ids == together[index].token_ids == backwards[index].token_ids
    assert all(token not in range(100, 160) for token in together[6].token_ids[:6])
    assert together[4].token_ids.count(65) + together[4].token_ids.count(66) > 0


def test_nothing_compiles_after_warmup(engine):
    seven = jnp.ones(7)
    before = engine.stats().compiles_after_warmup  # other tests compile in this process
    for count in (1, 3, 7):
        every = [SamplingParams(max_tokens=9, logprobs=2, prompt_logprobs=1, **one) for one in VARIED[:count]]
        engine.generate(prompts(count, longest=120, seed=count), every)
    assert engine.stats().compiles_after_warmup == before
    jax.jit(lambda x: x * 3 + count)(seven)
    assert engine.stats().compiles_after_warmup == before + 1  # the count would have told


def test_preempted_requests_give_the_same_tokens(engine, small_engine):
    asked = prompts(6, longest=60, seed=5)
    params = [SamplingParams(max_tokens=60, ignore_eos=True, seed=i, frequency_penalty=0.4) for i in range(6)]
    crowded = small_engine.generate(asked, params)
    assert small_engine.stats().preemptions > 0
    assert small_engine.stats().pages_used == 0
    roomy = engine.generate(asked, params)
    assert [done.token_ids for done in crowded] == [done.token_ids for done in roomy]


def test_prompts_longer_than_a_chunk_are_as_if_in_one(engine):
    prompt = prompts(1, longest=2, seed=3)[0] * 140
    done = engine.generate([prompt], greedy(8))[0]
    for step, token in enumerate(done.token_ids):
        assert token == int(np.argmax(full_logits(prompt + done.token_ids[:step])[-1]))


def outputs_of(engine: Engine, wanted: str, limit: int = 300) -> list:
    got = []
    for _ in range(limit):
        got += [output for output in engine.step() if output.request_id == wanted]
        if got and got[-1].finish_reason:
            return got
    raise AssertionError(f"{wanted} did not finish in {limit} steps")


def test_stop_strings_end_a_request_and_do_not_show(engine):
    prompt = prompts(1, seed=9)[0]
    whole = engine.generate([prompt], greedy(30))[0]
    text = whole.text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    done = engine.generate([prompt], greedy(30, stop=[stop]))[0]
    assert done.finish_reason == "stop"
    assert done.text == text[: text.index(stop)]


def test_streams_of_one_engine_go_on_side_by_side(engine):
    first, second = (Request(f"side-{n}", prompt, greedy(12)) for n, prompt in enumerate(prompts(2, seed=15)))
    alone = [engine.generate([request.prompt_ids], request.params)[0].text for request in (first, second)]
    one, other = engine.stream([first]), engine.stream([second])
    texts = [next(one).text, next(other).text]
    texts[1] += "".join(output.text for output in other)  # with the first one's tokens coming meanwhile
    texts[0] += next(one).text
    assert texts[1] == alone[1] and alone[0].startswith(texts[0])
    one.close()
    assert engine.stats().pages_used == 0


def test_stop_tokens_and_end_of_sequence(engine):
    prompt = prompts(1, seed=10)[0]
    tokens = engine.generate([prompt], greedy(10))[0].token_ids
    third = tokens[2]
    first = tokens.index(third)
    engine.add(Request("stops", prompt, greedy(10, stop_token_ids=[third])))
    last = outputs_of(engine, "stops")[-1]
    assert (last.finish_reason, last.stop_reason, last.completion_tokens) == ("stop", third, first + 1)
    forced = {TOKENIZER.eos_id: 100.0}
    ends = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=5, logit_bias=forced))[0]
    assert (ends.finish_reason, len(ends.token_ids), ends.text) == ("stop", 1, "")
    goes_on = engine.generate([prompt], greedy(5, logit_bias=forced))[0]
    assert (goes_on.finish_reason, len(goes_on.token_ids)) == ("length", 5)
    held = SamplingParams(temperature=0.0, max_tokens=5, min_tokens=3, logit_bias=forced)
    late = engine.generate([prompt], held)[0]
    assert (late.finish_reason, len(late.token_ids)) == ("stop", 4)
    assert TOKENIZER.eos_id not in late.token_ids[:3]


def test_the_context_is_the_limit(engine):
    prompt = list(range(150))
    done = engine.generate([prompt], greedy(100))[0]
    assert (done.finish_reason, len(done.token_ids)) == ("length", 160 - 150)


def test_cancelling_frees_the_pages_at_once(engine):
    for index, prompt in enumerate(prompts(5)):
        engine.add(Request(f"c{index}", prompt, greedy(40)))
    for _ in range(3):
        engine.step()
    assert engine.stats().pages_used > 0
    for index in range(5):
        assert engine.cancel(f"c{index}")
    assert engine.stats().pages_used == 0
    assert not engine.cancel("c0")
    assert engine.step() == []  # what was in flight is passed over


def test_an_id_may_be_used_again_while_its_last_step_is_in_flight(engine):
    first, second = prompts(2, seed=11)
    engine.add(Request("same", first, greedy(20, prompt_logprobs=0)))
    engine.step()
    engine.cancel("same")
    engine.add(Request("same", second, greedy(6, prompt_logprobs=0)))
    outputs = outputs_of(engine, "same")
    assert [t for o in outputs for t in o.token_ids] == engine.generate([second], greedy(6))[0].token_ids
    assert [one.id for one in outputs[0].prompt_logprobs[1:]] == second[1:]


def test_what_cannot_be_served_is_refused_by_field(engine):
    for params, prompt, field in (
        (SamplingParams(temperature=float("nan")), [1], "temperature"),
        (SamplingParams(max_tokens=-1), [1], "max_tokens"),
        (SamplingParams(max_tokens=10**9), [1], "max_tokens"),
        (SamplingParams(logit_bias={9999: 1.0}), [1], "logit_bias"),
        (SamplingParams(), [1] * 160, "prompt"),
        (SamplingParams(), [], "prompt"),
        (SamplingParams(), [CONFIG.vocab_size], "prompt"),
    ):
        with pytest.raises(InvalidRequest) as error:
            engine.add(Request("bad", prompt, params))
        assert error.value.param == field


def test_a_full_queue_says_so_and_loses_nothing(engine):
    for index in range(engine.config.max_waiting):
        engine.add(Request(f"q{index}", [1, 2], greedy(4)))
    with pytest.raises(QueueFull):
        engine.add(Request("one too many", [1, 2], greedy(4)))
    finished = set()
    while engine.has_work:
        finished |= {output.request_id for output in engine.step() if output.finish_reason}
    assert finished == {f"q{index}" for index in range(engine.config.max_waiting)}


def test_damaged_weights_end_the_request_with_an_error_not_the_engine(engine):
    broken = dict(PARAMS)
    broken["final_norm.weight"] = broken["final_norm.weight"].at[3].set(jnp.nan)
    engine = twin(engine)
    engine.runner.use_params(broken)
    engine.add(Request("nan", [1, 2, 3], greedy(5)))
    last = outputs_of(engine, "nan")[-1]
    assert (last.finish_reason, last.error_kind) == ("error", "not_finite")
    assert "not finite" in last.error
    assert engine.stats().pages_used == 0
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate([[1, 2, 3]], greedy(5))


# -- grammars ---------------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar("json_schema", json.dumps(PERSON)),
    Grammar("regex", r"[a-f]{3,6}-[0-9]{2}(;[x-z]{1,4}){2}"),
    Grammar("choice", json.dumps(["yes", "no", "ne\u00e9"])),
    Grammar("lark", 'start: "(" start ")" | /[0-9]+/\n'),
]


def follows(grammar: Grammar, text: str) -> bool:
    if grammar.kind == "json_schema":
        value = json.loads(text)
        return set(value) == {"name", "age"} and len(value["name"]) <= 5 and value["age"] == int(value["age"]) <= 999
    if grammar.kind == "choice":
        return text in json.loads(grammar.text)
    if grammar.kind == "lark":
        depth = len(text) - len(text.lstrip("("))
        return re.fullmatch(r"[0-9]+", text[depth : len(text) - depth]) is not None and text.endswith(")" * depth)
    return re.fullmatch(grammar.text, text) is not None


def test_grammars_hold_alone_and_among_neighbours_and_change_nothing_for_them(engine):
    every = [SamplingParams(max_tokens=100, temperature=1.5, seed=n, grammar=one) for n, one in enumerate(GRAMMARS)]
    plain = [SamplingParams(max_tokens=30, ignore_eos=True, **one) for one in VARIED[:3]]
    asked = prompts(7, longest=55, seed=12)
    mixed = engine.generate(asked, every + plain)
    for done, params in zip(mixed, every, strict=False):
        assert done.finish_reason == "stop" or params.grammar.kind == "lark"
        assert follows(params.grammar, done.text) or done.finish_reason == "length"
    for index in range(7):
        alone = engine.generate([asked[index]], (every + plain)[index])[0]
        assert (alone.token_ids, alone.text) == (mixed[index].token_ids, mixed[index].text)
    without = engine.generate(asked[4:], plain)
    assert [done.token_ids for done in without] == [done.token_ids for done in mixed[4:]]


def test_preempted_requests_go_on_in_their_grammar(engine, small_engine):
    grammar = Grammar("regex", r"([a-z]{4} [0-9]{3}, ){20}")
    params = [SamplingParams(max_tokens=60, seed=n, grammar=grammar) for n in range(6)]
    before = small_engine.stats().preemptions
    crowded = small_engine.generate(prompts(6, longest=60, seed=5), params)
    assert small_engine.stats().preemptions > before
    roomy = engine.generate(prompts(6, longest=60, seed=5), params)
    assert [done.token_ids for done in crowded] == [done.token_ids for done in roomy]
    assert all(re.fullmatch(r"([a-z]{4} [0-9]{3}, )+[a-z]{0,4} ?[0-9]{0,3},?", done.text) for done in crowded)


def test_the_end_of_a_grammar_and_the_limits_of_a_request(engine):
    prompt, eos = prompts(1, seed=13)[0], TOKENIZER.eos_id

    def run(text: str, **more):
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 9, "grammar": Grammar("regex", text)} | more)
        done = engine.generate([prompt], params)[0]
        return done.text, done.finish_reason, done.token_ids

    to_eos = {"logit_bias": {eos: 100.0}}
    assert run("ab") == ("ab", "stop", [97, 98])  # complete: no end-of-sequence is needed
    assert run("a+b?", **to_eos) == ("a", "stop", [97, eos])
    assert run("a{3}b?", **to_eos) == ("aaa", "stop", [97, 97, 97, eos])  # a bias does not end it early
    assert run("a{3,}", min_tokens=5, **to_eos) == ("aaaaa", "stop", [97] * 5 + [eos])
    assert run("a{3,}", ignore_eos=True, **to_eos) == ("a" * 9, "length", [97] * 9)
    assert run("a{2,3}", ignore_eos=True, **to_eos) == ("aaa", "stop", [97] * 3)
    assert run("a{2,3}", min_tokens=6) == ("aaa", "stop", [97] * 3)  # nothing is left to wait for
    assert run("a{20}") == ("a" * 9, "length", [97] * 9)
    assert run("a{9}")[1] == "stop"
    assert run("abcdef", stop=["cd"]) == ("ab", "stop", [97, 98, 99, 100])
    assert run("abcdef", stop_token_ids=[99])[2] == [97, 98, 99]
    assert run("(ab)?", **to_eos) == ("", "stop", [eos])


def test_log_probabilities_are_the_models_own_whatever_a_grammar_allows(engine):
    params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=3, grammar=Grammar("regex", "[a-c]{4}"))
    done = engine.generate(prompts(1, seed=14), params)[0]
    ids = done.prompt_ids + done.token_ids
    logprobs = np.asarray(jax.nn.log_softmax(full_logits(ids)))[len(done.prompt_ids) - 1 : -1]
    for own, expected in zip(done.logprobs, logprobs, strict=True):
        assert own.logprob == pytest.approx(expected[own.id], abs=1e-4)
        assert [token for token, _ in own.top] == np.argsort(-expected)[:3].tolist()
        assert own.id == 97 + np.argmax(expected[97:100])


def test_a_grammar_that_fails_ends_its_own_request(engine):
    """One that needs a token that is held back, one that is too costly to go on with, and their neighbour."""
    held = SamplingParams(grammar=Grammar("regex", "ab"), stop_token_ids=[98], min_tokens=5)
    costly = SamplingParams(grammar=Grammar("regex", "x(a{1000}){1000}"))
    fine = SamplingParams(grammar=Grammar("regex", "[0-9]{12}"))
    each = {"held": held, "costly": costly, "fine": fine}
    last, text = {}, ""
    for output in engine.stream([Request(name, prompts(1)[0], params) for name, params in each.items()]):
        last[output.request_id] = output
        text += output.text if output.request_id == "fine" else ""
    assert (last["held"].finish_reason, last["held"].error_kind) == ("error", "grammar")
    assert "after 1 tokens: no token" in last["held"].error
    assert (last["costly"].finish_reason, last["costly"].error_kind) == ("error", "grammar")
    assert (last["fine"].finish_reason, len(text), text.isdecimal()) == ("stop", 12, True)
    with pytest.raises(GrammarError, match="after 1 tokens: no token"):
        engine.generate(prompts(1), held)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"[^\s\S]"), "no text"),
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text"),
        (Grammar("json_schema", "[1]"), "is an object"),
        (Grammar("json_schema", "{"), "written in JSON"),
        (Grammar("choice", "[]"), "one at least"),
        (Grammar("lark", "start: foo"), "foo"),
        (Grammar("lark", "start: a\na[temperature=0.5]: /[a-z]/"), "temperature of its own"),
        (Grammar("lark", ""), "non-empty"),
        (Grammar("lark", "a" * (MAX_GRAMMAR_BYTES + 1)), "bytes"),
        (Grammar("yaml", "a"), "json_schema, regex, lark, choice"),
    ],
)
def test_grammars_that_cannot_be_used_are_refused(engine, grammar, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        engine.add(Request("bad", [1], SamplingParams(grammar=grammar)))
    assert error.value.param == "grammar"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_len": 161}, "context of 160"),
        ({"cache_bytes": 1000}, "must hold one request"),
        ({"num_pages": 2**31 - 1}, r"this machine has [\d,]+; lower num_pages or cache_bytes"),
        ({"host_cache_bytes": 2**60}, r"this machine has [\d,]+; lower host_cache_bytes"),
    ],
)
def test_limits_that_do_not_fit_the_model_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Engine(loaded(), EngineConfig(compile_cache="", **config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running", 0),
        ("max_waiting", 0),
        ("max_model_len", 0),
        ("page_size", 0),
        ("num_pages", 0),
        ("chunk_tokens", 1),
        ("max_running", 2**14 + 1),
        ("num_pages", 2**31),
        ("page_size", 10**20),
        ("chunk_tokens", 10**9),
        ("max_token_ms", 0.0),
        ("host_cache_bytes", -1),
        ("dtype", "int8"),
        ("scheduler", "fare"),
        ("prefix_cache", "lfu"),
    ],
)
def test_limits_that_fit_no_model_are_refused_before_one_is_loaded(name, value):
    """By the name that they have on the command line, but for policies, whose error lists them."""
    message = {"scheduler": "no scheduler 'fare'", "prefix_cache": "no eviction policy 'lfu'"}.get(name, name)
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{name: value})
