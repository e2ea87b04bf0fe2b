"""Pages of the prefix cache in the host's memory: the bits of a roomy engine, and nothing compiles late."""

import dataclasses

import jax
import pytest

from tests.serving.engines import TOKENIZER, engine_of, greedy, loaded, logprobs_of, prompts, twin
from twinax.models.config import DecoderConfig
from twinax.models.decoder import init_params
from twinax.serving.reload import exchange
from twinax.serving.request import Request, SamplingParams
from twinax.serving.runner import COPIES, MOST_COPIED
from twinax.serving.scheduler import Scheduler, SchedulerConfig

CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size + 1, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return engine_of(CONFIG, host_cache_bytes=1 << 20)


def crowded(engine, **limits):
    """With room for two requests, where copying is always cheaper: the model is so small that computing may win."""
    found = twin(engine, **{"max_running": 4, "num_pages": 9, **limits})
    found.scheduler.host_pages.page_seconds = 0.0
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "host_pages"), [("lru", 3), ("cost_aware", 100)])
def test_pages_kept_by_the_host_change_no_bit(engine, cache, host_pages):
    asked = prompts(9)[1:]
    more = {2: {"frequency_penalty": 0.5}, 3: {"repetition_penalty": 1.5}, 6: {"repetition_penalty": 1.5}}
    params = [greedy(max_tokens=30, **more.get(n, {})) for n in range(8)]
    want = twin(engine, prefix_cache=None, host_pages=0).generate(asked, params)
    small = crowded(engine, prefix_cache=cache, host_pages=host_pages)
    compiles = small.stats().compiles_after_warmup
    for _ in range(2):  # the second time they are all found, on the device or the host, where there is room
        found = small.generate(asked, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in want]
        assert list(map(logprobs_of, found)) == list(map(logprobs_of, want))
    stats = small.stats()
    assert stats.preemptions > 0 and 0 < stats.pages_copied_back <= stats.pages_copied_out
    assert (stats.compiles_after_warmup, stats.pages_used) == (compiles, 0)
    assert stats.host_pages_used <= stats.host_pages_total == host_pages
    if host_pages == 100:
        full = sum(len(one) // 16 for one in asked)
        assert stats.host_pages_used > 9 and stats.cached_tokens > 16 * (full - len(asked))


def test_a_long_prompt_goes_to_the_host_in_pieces_and_comes_back(engine):
    """More pages at once than may be on their way."""
    small, alone = crowded(engine, prefix_cache="lru", num_pages=16), twin(engine, prefix_cache=None, host_pages=0)
    runner, prompt, other = small.runner, list(range(250)), list(range(250, 0, -1))
    want = alone.generate([prompt], greedy(max_tokens=3))[0]
    assert small.generate([prompt, other], greedy(max_tokens=3))[0].token_ids == want.token_ids
    again = small.generate([prompt], greedy(max_tokens=3))[0]
    assert (again.token_ids, logprobs_of(again)) == (want.token_ids, logprobs_of(want))
    assert small.stats().pages_copied_back == 15
    many = [page % 16 for page in range(2 * MOST_COPIED + COPIES + 3)]
    copies = runner.read_pages(many)
    assert len(copies) == len(many)
    before = runner.to_host(runner.read_pages(range(16)))
    runner.write_pages(copies, many)
    after = runner.to_host(runner.read_pages(range(16)))
    assert [page.tobytes() for page in jax.tree.leaves(before)] == [page.tobytes() for page in jax.tree.leaves(after)]


def test_other_weights_find_nothing_of_the_old_ones_on_the_host(engine):
    small, prompt = crowded(engine, prefix_cache="lru"), list(range(100))
    small.generate([prompt, prompts(9)[2], list(range(100, 200))], greedy(max_tokens=3))
    assert small.stats().host_pages_used > 0
    params = init_params(CONFIG, 1)
    exchange(small, dataclasses.replace(loaded(CONFIG), params=params))
    assert small.stats().host_pages_used == 0
    fresh = twin(engine, prefix_cache=None, host_pages=0)
    fresh.runner.use_params(params)
    want, found = (one.generate([prompt], greedy(max_tokens=5))[0] for one in (fresh, small))
    assert (found.token_ids, logprobs_of(found)) == (want.token_ids, logprobs_of(want))
    assert not small._host_copies


def two_documents(host_pages: int, page_seconds: float, step_seconds: float | None, **params) -> Scheduler:
    """One after the other where there is room for one, and the first again."""
    config = SchedulerConfig(2, 4, 8, 40, 64, 9, prefix_cache="lru", host_pages=host_pages)
    scheduler = Scheduler(config)
    scheduler.host_pages.page_seconds = page_seconds
    if step_seconds:
        scheduler.times.add((8, 64), 1000.0, step_seconds)
    for number, first in enumerate((0, 100, 0)):
        one = SamplingParams(max_tokens=1, **params)
        scheduler.add(Request(str(number), list(range(first, first + 30)), one))
        plan = scheduler.schedule()
        scheduler.commit(plan, {str(number): 1})
        scheduler.finish(str(number))
    return scheduler


def test_what_is_cheaper_is_done_by_the_measured_rates():
    # A page is 4 tokens of a step of 64.
    for page_seconds, step_seconds, copied in ((0.001, 0.1, 7), (0.1, 0.1, 0), (0.1, None, 7)):
        scheduler = two_documents(20, page_seconds, step_seconds)
        assert scheduler.host_pages.copied_back == copied
        assert scheduler.stats().cached_tokens == 4 * copied


def test_what_the_host_has_no_room_for_is_computed_again_and_so_is_what_must_be():
    for host_pages, params in ((0, {}), (20, {"prompt_logprobs": 0})):
        scheduler = two_documents(host_pages, 0.0, None, **params)
        assert scheduler.host_pages.copied_back == scheduler.stats().cached_tokens == 0
    assert two_documents(3, 0.0, None).stats().cached_tokens > 0


def test_room_on_the_host_is_the_prefix_caches():
    with pytest.raises(ValueError, match="host_pages are the prefix cache's, got 4 without one"):
        SchedulerConfig(2, 4, 8, 40, 64, 9, host_pages=4)
