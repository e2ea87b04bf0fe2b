"""An engine cut over several devices answers as one on a single device does. Simulated devices."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from tests.serving.test_engine import CONFIG as MODEL
from tests.serving.test_engine import TOKENIZER
from tests.thorough import thorough
from twinax.checkpoints.load import LoadedModel
from twinax.models.decoder import init_params
from twinax.serving import programs
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import SamplingParams
from twinax.sharding.plan import PlanError

PROMPTS = ([1, 2, 3, 4, 5], [7] * 40, [9, 8, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
CUT = dataclasses.replace(MODEL, vocab_size=TOKENIZER.vocab_size + 1, num_layers=4)  # 260 is cut in two and in four
PARAMS = init_params(CUT, 1)
LIMITS = {"max_running": 3, "page_size": 16, "chunk_tokens": 64, "compile_cache": "", "max_model_len": 96}


def loaded() -> LoadedModel:
    return LoadedModel(CUT, PARAMS, TOKENIZER, "llama", {}, pathlib.Path("here"), "hugging_face")


def answers(plan: str) -> tuple[Engine, list]:
    engine = Engine(loaded(), EngineConfig(plan=plan, **LIMITS))
    engine.warmup()
    params = [
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.9, seed=5, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.3, logit_bias={4: 2.0}, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=1, ignore_eos=True),
    ]
    return engine, engine.generate(list(PROMPTS), params)


@pytest.fixture(scope="module")
def alone() -> list:
    return answers("")[1]


@pytest.mark.parametrize("plan", thorough(["tensor=2", "tensor=2 stacked"]))
def test_the_same_tokens_and_nearly_the_same_log_probabilities(
    plan: str, alone: list, monkeypatch: pytest.MonkeyPatch
):
    if plan.endswith("stacked"):  # as on an accelerator: all blocks are one program
        monkeypatch.setattr(programs, "CPU_LAYERS", 0)
    engine, found = answers(plan.removesuffix(" stacked"))
    assert engine.stats().compiles_after_warmup == 0
    for one, other in zip(alone, found, strict=True):
        assert one.token_ids == other.token_ids
        pairs = [*zip(one.logprobs or (), other.logprobs or (), strict=True)]
        pairs += zip((one.prompt_logprobs or ())[1:], (other.prompt_logprobs or ())[1:], strict=True)
        for a, b in pairs:
            # float32 sums in another order
            np.testing.assert_allclose(a.logprob, b.logprob, rtol=0, atol=2e-5)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


def test_each_device_holds_its_part(alone: list):
    engine, _ = answers("tensor=2")
    runner = engine.runner
    pages = runner._cache.pages.v_LPKSD
    assert pages.sharding.shard_shape(pages.shape)[2] * 2 == pages.shape[2]
    query = runner._layers[0][0]["attention.query.weight"]
    assert query.sharding.shard_shape(query.shape) == (query.shape[0] // 2, query.shape[1])
    assert len(pages.sharding.device_set) == 2


@pytest.mark.slow
def test_all_blocks_as_one_program_alone(alone: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "CPU_LAYERS", 0)
    _, found = answers("")
    assert [one.token_ids for one in alone] == [other.token_ids for other in found]


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
        Engine(loaded(), EngineConfig(plan=plan, **LIMITS))
    assert says in str(error.value)


def test_there_are_several_devices():
    assert len(jax.devices()) >= 2
