"""An engine cut over several devices answers as one on a single device does. Simulated devices."""

import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.serving.test_engine import CONFIG as MODEL
from tests.serving.test_engine import TOKENIZER
from tests.serving.test_engine_pooling import pooled
from twinax.checkpoints.load import LoadedModel
from twinax.models.config import DecoderConfig
from twinax.models.decoder import init_params
from twinax.serving import programs
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import Grammar, SamplingParams
from twinax.sharding.plan import PlanError

PROMPTS = ([1, 2, 3, 4, 5], [7] * 40, [9, 8, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
CUT = dataclasses.replace(MODEL, vocab_size=TOKENIZER.vocab_size + 1, num_layers=4)  # 260 is cut in two and in four
EIGHT = dataclasses.replace(CUT, vocab_size=264, num_heads=8, num_kv_heads=8, head_dim=8, num_layers=2)
LIMITS = {"max_running": 3, "page_size": 16, "chunk_tokens": 64, "compile_cache": "", "max_model_len": 96}
# So few pages that three long requests preempt each other, whose pages the host then keeps.
CROWDED = {"num_pages": 9, "host_cache_bytes": 1 << 20}


@functools.cache
def loaded(config: DecoderConfig) -> LoadedModel:
    return LoadedModel(config, init_params(config, 1), TOKENIZER, "llama", {}, pathlib.Path("here"), "hugging_face")


def made(config: DecoderConfig, **limits) -> Engine:
    engine = Engine(loaded(config), EngineConfig(**LIMITS, **limits))
    engine.warmup()
    return engine


@functools.cache
def alone_with(config: DecoderConfig) -> Engine:
    return made(config)


@pytest.fixture(
    scope="module",
    params=[
        (CUT, "tensor=2", False),
        pytest.param((CUT, "tensor=2", True), marks=pytest.mark.slow),  # as on an accelerator: blocks are one program
        pytest.param((EIGHT, "tensor=8", False), marks=pytest.mark.slow),
    ],
    ids=["tensor=2", "tensor=2 stacked", "tensor=8"],
)
def engines(request) -> tuple[Engine, Engine]:
    """On one device, and on a mesh."""
    config, plan, stacked = request.param
    alone = alone_with(config)  # first: a process counts its compiles together
    with pytest.MonkeyPatch.context() as patch:
        if stacked:
            patch.setattr(programs, "CPU_LAYERS", 0)
        cut = made(config, plan=plan, **CROWDED)
    cut.scheduler.host_pages.page_seconds = 0.0  # the model is so small that computing may win
    return alone, cut


def check_same(engines: tuple[Engine, Engine], prompts: list[list[int]], params: list[SamplingParams]) -> list:
    """The same tokens, nearly the same log-probabilities, and nothing compiled for them. Returns what the mesh gave."""
    alone, cut = (engine.generate(prompts, params) for engine in engines)
    assert engines[1].stats().compiles_after_warmup == 0
    assert engines[1].stats().pages_used == 0
    for one, other in zip(alone, cut, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        pairs = [*zip(one.logprobs or (), other.logprobs or (), strict=True)]
        pairs += zip((one.prompt_logprobs or ())[1:], (other.prompt_logprobs or ())[1:], strict=True)
        for a, b in pairs:
            # float32 sums in another order
            np.testing.assert_allclose(a.logprob, b.logprob, rtol=0, atol=2e-5)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
    return cut


def test_the_same_tokens_and_nearly_the_same_log_probabilities(engines):
    params = [
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.9, seed=5, top_p=0.9, prompt_logprobs=0, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.3, logit_bias={4: 2.0}, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=1, ignore_eos=True),
    ]
    found = check_same(engines, list(PROMPTS), params)
    assert [len(done.prompt_logprobs or ()) for done in found] == [5, 40, 0, 0]


def test_pages_go_to_the_hosts_memory_and_back(engines):
    _, cut = engines
    wrote, write = [], cut.runner.write_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut.runner, "write_pages", lambda *given: (wrote.append(given), write(*given)))
        prompts = [np.random.default_rng(n).integers(0, 256, 20 + n).tolist() for n in range(6)]
        check_same(engines, prompts, [SamplingParams(max_tokens=60, temperature=0.0, logprobs=1, ignore_eos=True)] * 6)
    assert sum(len(pages) for _, pages in wrote) > 0


def test_what_a_grammar_allows(engines):
    kinds = [Grammar("regex", "[ab]{3}-[0-9]{2}"), None, Grammar("choice", '["left", "right"]')]
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=n, grammar=kind) for n, kind in enumerate(kinds)]
    found = check_same(engines, list(PROMPTS[:3]), params)
    assert re.fullmatch("[ab]{3}-[0-9]{2}", bytes(found[0].token_ids[:6]).decode())
    assert bytes(token for token in found[2].token_ids if token < 256).decode() in ("left", "right")


def test_choices_of_one_prompt_share_its_pages(engines):
    _, cut = engines
    copied, copy = [], cut.runner.copy_pages
    prompt = np.random.default_rng(9).integers(0, 256, 37).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut.runner, "copy_pages", lambda copies: (copied.extend(copies), copy(copies)))
        before = cut.stats().cached_tokens
        params = [SamplingParams(max_tokens=9, seed=n, logprobs=2, ignore_eos=True) for n in range(3)]
        found = check_same(engines, [prompt] * 3, params)
    assert len({tuple(done.token_ids) for done in found}) > 1
    assert len(copied) == 2 and cut.stats().cached_tokens - before == 2 * 36


def test_vectors_of_prompts(engines):
    for kind in ("last", "mean"):
        alone, cut = (pooled(engine, list(PROMPTS), kind) for engine in engines)
        np.testing.assert_allclose(alone, cut, rtol=0, atol=1e-5)  # of a norm's results, of about 1
    assert engines[1].stats().compiles_after_warmup == 0


def test_each_device_holds_its_part(engines):
    runner = engines[1].runner
    parts = runner._made.mesh.size
    pages = runner._cache.pages.v_LPKSD
    assert pages.sharding.shard_shape(pages.shape)[2] * parts == pages.shape[2]
    if runner._made.group:
        query = runner._calls[runner.buckets[0]][0][1][0]["attention.query.weight"]
        assert query.sharding.shard_shape(query.shape) == (query.shape[0] // parts, query.shape[1])
    assert len(pages.sharding.device_set) == parts


@pytest.mark.slow
def test_all_blocks_as_one_program_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "CPU_LAYERS", 0)
    stacked, params = made(CUT), SamplingParams(max_tokens=12, temperature=0.0, logprobs=1, ignore_eos=True)
    check_same((alone_with(CUT), stacked), list(PROMPTS), [params] * len(PROMPTS))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("fsdp=2", "An engine is cut over tensor alone, as in plan=tensor=2"),
        ("tensor=4", "kv_heads of 2 cannot be cut over tensor = 4"),
        ("tensr=2", "Did you mean 'tensor'?"),
    ],
)
def test_plans_that_do_not_fit(plan: str, says: str):
    with pytest.raises(PlanError) as error:
        Engine(loaded(CUT), EngineConfig(plan=plan, **LIMITS))
    assert says in str(error.value)


def test_there_are_several_devices():
    assert len(jax.devices()) >= 2
