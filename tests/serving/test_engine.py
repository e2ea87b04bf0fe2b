"""The engine against the full forward, against itself alone, and against a client that goes away."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import full_compile
from twinax.checkpoints.load import LoadedModel
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.layers.contexts import PackedContext
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, init_params
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import InvalidRequest, QueueFull, Request, SamplingParams

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


def loaded(params=PARAMS) -> LoadedModel:
    return LoadedModel(CONFIG, params, TOKENIZER, "llama", {}, pathlib.Path("here"), "hugging_face")


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
def small_engine() -> Engine:
    """So few pages that requests push each other out."""
    config = EngineConfig(max_running=4, page_size=16, num_pages=12, chunk_tokens=64, compile_cache="")
    engine = Engine(loaded(), config)
    engine.warmup()
    return engine


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


def test_damaged_weights_end_the_request_with_an_error_not_the_engine():
    broken = dict(PARAMS)
    broken["final_norm.weight"] = broken["final_norm.weight"].at[3].set(jnp.nan)
    engine = Engine(loaded(broken), EngineConfig(max_running=2, page_size=16, chunk_tokens=64, compile_cache=""))
    engine.warmup()
    engine.add(Request("nan", [1, 2, 3], greedy(5)))
    last = outputs_of(engine, "nan")[-1]
    assert last.finish_reason == "error"
    assert "not finite" in last.error
    assert engine.stats().pages_used == 0
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate([[1, 2, 3]], greedy(5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_len": 161}, "context of 160"),
        ({"cache_bytes": 1000}, "must hold one request"),
        ({"chunk_tokens": 1}, "chunk_tokens"),
        ({"max_running": 0}, "max_running"),
    ],
)
def test_limits_that_make_no_engine_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Engine(loaded(), EngineConfig(compile_cache="", **config))
