"""The engine with a prefix cache: the bits that it gives without one, whatever was computed before."""

import dataclasses

import numpy as np
import pytest

from tests.serving.engines import TOKENIZER, engine_of, greedy, loaded, logprobs_of, twin
from tests.serving.test_engine_states import HYBRID
from twinax.layers.rope_config import DynamicScaling, RopeConfig
from twinax.models.config import DecoderConfig, LayerKind
from twinax.serving import shared_prefixes
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import InvalidRequest, Request, SamplingParams

CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, max_position_embeddings=128, pattern=(LayerKind(), LayerKind(window=24)),
)  # fmt: skip
STRETCHED = RopeConfig(scaling=DynamicScaling(2.0, 64))


def conversations() -> list[list[int]]:
    """Prompts of which each goes on where another ended, or begins as it."""
    rng = np.random.default_rng(5)
    first = rng.integers(0, 256, 40).tolist()
    longer = first + rng.integers(0, 256, 30).tolist()
    return [first, longer, first[:32], [*first, 7], longer + first[:10], first[:16] + [9] * 20, longer]


@pytest.fixture(scope="module")
def cached():
    return engine_of(CONFIG)


@pytest.fixture(scope="module")
def plain(cached):
    return twin(cached, prefix_cache=None)


def run(engine: Engine, requests: list[Request]) -> dict[str, list]:
    for request in requests:
        engine.add(request)
    found: dict[str, list] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    return found


def test_the_bits_are_those_without_a_cache(plain, cached):
    want = plain.generate(conversations(), greedy())
    found_before = cached.stats().cached_tokens
    # One after the other, then all at once, then again: from what was computed before, and beside it.
    one_by_one = [cached.generate([prompt], greedy())[0] for prompt in conversations()]
    together, again = (cached.generate(conversations(), greedy()) for _ in range(2))
    for expected, *others in zip(want, one_by_one, together, again, strict=True):
        for other in others:
            assert other.token_ids == expected.token_ids
            assert logprobs_of(other) == logprobs_of(expected)
    stats = cached.stats()
    assert stats.cached_tokens - found_before > 600 and plain.stats().cached_tokens == 0
    assert stats.pages_used == 0 and stats.running == 0, "what nobody uses is free"


def test_what_requests_share_is_read_once_for_all_of_them(plain, cached, monkeypatch):
    start = np.random.default_rng(6).integers(0, 256, 64).tolist()
    prompts = [[*start, n, n] for n in range(6)]
    cached.generate([start], greedy(max_tokens=1))
    seen = []
    real = shared_prefixes.groups
    monkeypatch.setattr(shared_prefixes, "groups", lambda rows: seen.append(real(rows)) or seen[-1])
    got, want = (engine.generate(prompts, greedy(max_tokens=20)) for engine in (cached, plain))
    assert [(0, 4)] * 6 in seen, "six requests, four pages of 16"
    assert [logprobs_of(one) for one in got] == [logprobs_of(one) for one in want]


def test_a_request_hears_how_much_was_there(cached):
    prompt = np.random.default_rng(8).integers(0, 256, 50).tolist()
    counts = []
    for name in ("a", "b"):
        outputs = run(cached, [Request(name, prompt, greedy())])[name]
        counts.append(outputs[-1].cached_tokens)
    assert counts == [0, 48]  # three whole pages of 16


def test_generated_tokens_are_found_too(cached):
    prompt = np.random.default_rng(9).integers(0, 256, 20).tolist()
    (done,) = cached.generate([prompt], greedy(max_tokens=30))
    whole = prompt + done.token_ids
    outputs = run(cached, [Request("next", [*whole, 5], greedy())])["next"]
    assert outputs[-1].cached_tokens == 48  # of 20 and 30, of which the last was never an input


def test_log_probabilities_of_the_prompt_are_computed_from_it(plain, cached):
    prompts = conversations()
    cached.generate(prompts, greedy())
    found_before = cached.stats().cached_tokens
    want, got = (engine.generate(prompts, greedy(prompt_logprobs=0)) for engine in (plain, cached))
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert [logprobs_of(one) for one in got] == [logprobs_of(one) for one in want]
    assert cached.stats().cached_tokens == found_before


@pytest.mark.parametrize(
    "more",
    [
        {"presence_penalty": 1.9},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.7},
    ],
)
def test_penalties_count_what_is_found_and_after_a_preemption_all_that_was_generated(plain, cached, more):
    prompts = conversations()
    cached.generate(prompts, greedy())
    found_before = cached.stats().cached_tokens
    want, got = (engine.generate(prompts, greedy(max_tokens=30, **more)) for engine in (plain, cached))
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert [logprobs_of(one) for one in got] == [logprobs_of(one) for one in want]
    assert cached.stats().cached_tokens - found_before > 200
    # A request with a lower number takes the place of the one that runs, most of whose pages stay in the cache.
    policy = twin(cached, max_running=1, policy="priority")
    asked = Request("low", prompts[0], greedy(max_tokens=60, **more), priority=1)
    (alone,) = plain.generate([asked.prompt_ids], asked.params)
    policy.add(asked)
    tokens = []
    while policy.has_work:
        tokens += [token for output in policy.step() if output.request_id == "low" for token in output.token_ids]
        if len(tokens) == 40 and not policy.stats().preemptions:
            policy.add(Request("high", [5], greedy(max_tokens=1)))
    assert policy.stats().preemptions == 1 and policy.stats().cached_tokens > 0
    assert tokens == alone.token_ids


def test_another_salt_finds_nothing(cached):
    prompt = np.random.default_rng(10).integers(0, 256, 50).tolist()
    salts = ["", "mine", "yours", "mine"]
    counts = [
        run(cached, [Request(f"s{n}", prompt, greedy(), cache_salt=salt)])[f"s{n}"][-1].cached_tokens
        for n, salt in enumerate(salts)
    ]
    assert counts == [0, 0, 0, 48]
    with pytest.raises(InvalidRequest, match="cache_salt must be a text"):
        cached.add(Request("bad", prompt, SamplingParams(), cache_salt=3))


def test_a_full_cache_makes_room(plain, cached):
    crowded = twin(cached, max_running=4, num_pages=10)
    rng = np.random.default_rng(11)
    asked = [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(20, 70, 12)]
    asked += asked[:4]
    got, want = (engine.generate(asked, greedy(max_tokens=25)) for engine in (crowded, plain))
    assert [logprobs_of(one) for one in got] == [logprobs_of(one) for one in want]
    stats = crowded.stats()
    assert stats.preemptions > 0 and stats.cached_tokens > 0 and stats.pages_used == 0


@pytest.mark.parametrize("config", [dataclasses.replace(CONFIG, rope=STRETCHED), HYBRID], ids=["dynamic", "hybrid"])
def test_models_whose_keys_hang_on_more_than_the_tokens_before_have_none(config):
    engine = Engine(loaded(config), EngineConfig(compile_cache=""))
    assert engine.scheduler.cache is None


def test_an_unknown_policy_lists_the_choices():
    with pytest.raises(ValueError, match="choose one of cost_aware, lru"):
        Engine(loaded(CONFIG), EngineConfig(prefix_cache="fifo", compile_cache=""))


@pytest.mark.parametrize(
    ("seed", "more"), [(12, {}), (13, {"presence_penalty": 1.0}), (14, {"repetition_penalty": 9.0})]
)
def test_choices_of_one_prompt_compute_it_once(plain, cached, monkeypatch, seed, more):
    prompt = np.random.default_rng(seed).integers(0, 256, 75).tolist()
    options = {"temperature": 1.0, "max_tokens": 30, "logprobs": 1, "ignore_eos": True, **more}
    requests = [Request(f"choice {n}", prompt, SamplingParams(seed=n, **options)) for n in range(4)]
    copied, computed = [], []
    copy, pack = cached.runner.copy_pages, cached._pack
    monkeypatch.setattr(cached.runner, "copy_pages", lambda copies: (copied.extend(copies), copy(copies)))
    monkeypatch.setattr(
        cached, "_pack", lambda batch, entry, *at: (computed.append(entry.length), pack(batch, entry, *at))
    )
    got, want = run(cached, requests), run(plain, requests)
    for request in requests:
        mine, theirs = ([(o.token_ids, o.logprobs) for o in found[request.id]] for found in (got, want))
        assert mine == theirs
    assert len({tuple(t for o in outputs for t in o.token_ids) for outputs in got.values()}) == 4, "four seeds"
    assert len(copied) == 3, "each fork has its own copy of the page in which the prompt ends"
    assert sum(computed) == 75 + 3 + 4 * 29, "the prompt once, its last token for each fork, and what was generated"
    assert cached.stats().pages_used == 0
