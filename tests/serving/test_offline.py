"""The order of an offline batch against a brute force over tries, and what it saves in a small cache."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from twinax.serving import kv_policies
from twinax.serving.allocator import PageAllocator
from twinax.serving.host_pages import HostPages
from twinax.serving.kv_policies import Use
from twinax.serving.offline import order, shared_tokens
from twinax.serving.prefix_cache import PrefixCache
from twinax.serving.step_times import StepTimes

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=12)


def brute_shared(prompts, page_size):
    """Tokens that need not be computed: of each prompt those before its first page that no earlier one has."""
    seen, saved = set(), 0
    for prompt in sorted(prompts):
        whole = [tuple(prompt[: end * page_size]) for end in range(1, len(prompt) // page_size + 1)]
        saved += page_size * sum(prefix in seen for prefix in whole)
        seen.update(whole)
    return saved


@given(PROMPTS, st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_each_request_once_and_prefixes_in_one_piece(prompts, page_size, rng):
    new = [rng.randrange(1, 50) for _ in prompts]
    found = order(prompts, new, page_size)
    assert sorted(found) == list(range(len(prompts)))
    assert shared_tokens(prompts, page_size) == brute_shared(prompts, page_size)
    # Whatever whole pages some prompts begin with, they stand side by side.
    for prefix in {tuple(p[: n * page_size]) for p in prompts for n in range(1, len(p) // page_size + 1)}:
        places = [at for at, one in enumerate(found) if tuple(prompts[one][: len(prefix)]) == prefix]
        assert places == list(range(places[0], places[0] + len(places)))


def test_long_decodes_come_early_and_equal_ones_as_they_came():
    prompts = [[1] * 10, [2] * 10, [3] * 10, [4] * 10]
    assert order(prompts, [5, 50, 5, 500]) == [3, 1, 0, 2]
    # Two that share nine of ten tokens decode more for what they cost than one that decodes a little more alone.
    assert order([[1] * 10, [2] * 9 + [1], [2] * 9 + [3]], [6, 5, 5]) == [1, 2, 0]


def test_a_cache_with_room_for_one_group_saves_all_that_an_endless_one_would():
    rng, page = random.Random(3), 4
    groups = [[rng.randrange(100) for _ in range(8 * page)] for _ in range(6)]
    prompts = [groups[n % 6] + [rng.randrange(100) for _ in range(2 * page)] for n in range(36)]

    def saved(sequence):
        pool = PageAllocator(14, page)
        host = HostPages(0, page, StepTimes([]))
        cache, hits = PrefixCache(pool, kv_policies.load("lru", 14), host), 0
        for index in sequence:
            prompt, name = prompts[index], str(index)
            nodes = cache.match(prompt, "")
            cache.take(nodes)
            hits += len(nodes)
            if (short := 10 - len(nodes) - pool.free_pages) > 0:
                cache.evict(short)
            pages = pool.allocate(10 - len(nodes), name)
            for at in range(len(nodes), 10):
                parent = nodes[-1] if nodes else None
                nodes.append(cache.put(parent, tuple(prompt[at * page : at * page + page]), pages.pop(0), name, ""))
            cache.leave(nodes, Use(10, 0))
        return hits * page

    assert saved(order(prompts, [1] * 36, page)) == shared_tokens(prompts, page) == 30 * 8 * page
    assert saved(range(36)) == 0


def test_prompts_that_extend_each_other_by_thousands_need_no_recursion():
    prompts = [[7] * n for n in range(1, 3001)]
    assert sorted(order(prompts, [1] * 3000)) == list(range(3000))
    assert shared_tokens(prompts) == sum(range(3000))
