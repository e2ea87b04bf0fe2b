"""Preempted requests whose pages wait in the host's memory: the bits of a roomy engine, and nothing compiles late."""

import pytest

from tests.serving.engines import TOKENIZER, engine_of, greedy, logprobs_of, prompts, twin
from twinax.models.config import DecoderConfig
from twinax.serving.request import Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig

CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size + 1, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return engine_of(CONFIG, swap_bytes=1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "lru"])
def test_pages_kept_by_the_host_change_no_bit(engine, cache):
    asked = prompts(9)[1:]
    more = {2: {"frequency_penalty": 0.5}, 3: {"repetition_penalty": 1.5}, 6: {"repetition_penalty": 1.5}}
    params = [greedy(max_tokens=30, **more.get(n, {})) for n in range(8)]
    want = twin(engine, prefix_cache=None, swap_pages=0).generate(asked, params)
    crowded = twin(engine, max_running=4, num_pages=9, prefix_cache=cache)
    crowded.scheduler.host_pages.page_seconds = 0.0  # the model is so small that computing may win
    wrote, write = [], crowded.runner.write_pages
    crowded.runner.write_pages = lambda *given: (wrote.append(given), write(*given))
    compiles = crowded.stats().compiles_after_warmup
    found = crowded.generate(asked, params)
    stats = crowded.stats()
    assert stats.swaps > 0 and stats.preemptions >= stats.swaps and wrote
    assert (stats.compiles_after_warmup, crowded.scheduler.host_pages.used, stats.pages_used) == (compiles, 0, 0)
    assert stats.pages_copied_out >= stats.swaps and 0 < stats.pages_copied_back <= stats.pages_copied_out
    assert stats.pages_copied_back == sum(count - first for _, _, first, count in wrote)
    assert (stats.host_pages_used, stats.host_pages_total) == (0, crowded.scheduler.config.swap_pages)
    assert [one.token_ids for one in found] == [one.token_ids for one in want]
    assert list(map(logprobs_of, found)) == list(map(logprobs_of, want))


def test_what_is_cheaper_is_done_by_the_measured_rates():
    for page_seconds, step_seconds, swaps in ((0.001, 0.1, 1), (0.1, 0.001, 0), (0.1, None, 1)):
        scheduler = Scheduler(SchedulerConfig(2, 4, 12, 40, 64, 9, policy="priority", swap_pages=12))
        scheduler.host_pages.page_seconds = page_seconds
        if step_seconds:
            scheduler.times.add((8, 64), 100.0, step_seconds)
        scheduler.add(Request("low", [1] * 20, SamplingParams(max_tokens=9), priority=1))
        scheduler.schedule()
        scheduler.add(Request("high", [1] * 30, SamplingParams(max_tokens=9), priority=0))
        plan = scheduler.schedule()
        assert [sequence.id for sequence in plan.preempted] == ["low"]
        assert scheduler.stats().swaps == len(plan.swapped_out) == swaps
        assert scheduler.host_pages.used == scheduler.host_pages.copied_out == 5 * swaps
        scheduler.cancel("low")
        assert scheduler.host_pages.used == 0


def test_requests_that_must_be_computed_and_a_full_host_recompute():
    for pages, params in ((4, {}), (5, {"presence_penalty": 1.0}), (5, {"prompt_logprobs": 0})):
        scheduler = Scheduler(SchedulerConfig(2, 4, 12, 40, 64, 9, policy="priority", swap_pages=pages))
        scheduler.add(Request("low", [1] * 20, SamplingParams(max_tokens=9, **params), priority=1))
        scheduler.schedule()
        scheduler.add(Request("high", [1] * 30, SamplingParams(max_tokens=9), priority=0))
        assert len(scheduler.schedule().preempted) == 1 and scheduler.host_pages.used == 0
