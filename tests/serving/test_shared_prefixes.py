"""Groups of requests that share pages, against all pairs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from twinax.serving import kv_policies
from twinax.serving.allocator import PageAllocator
from twinax.serving.host_pages import HostPages
from twinax.serving.prefix_cache import PrefixCache
from twinax.serving.shared_prefixes import best_prefix, groups
from twinax.serving.step_times import StepTimes


def held(texts):
    """The pages that each of these requests holds in a cache with pages of one token."""
    pool = PageAllocator(1000, 1)
    host = HostPages(0, 1, StepTimes([]))
    cache, found = PrefixCache(pool, kv_policies.load("lru", 1000), host), []
    for number, text in enumerate(texts):
        nodes = []
        for token in text:
            page = pool.allocate(1, str(number))[0]
            nodes.append(cache.put(nodes[-1] if nodes else None, (token,), page, str(number), ""))
        found.append(nodes)
    return found


@given(st.lists(st.lists(st.integers(0, 1), max_size=7), max_size=7))
@settings(max_examples=200, deadline=None)
def test_a_group_shares_what_it_says_and_its_best(texts):
    rows = held(texts)
    found = groups(rows)
    for row, (leader, shared) in enumerate(found):
        assert found[leader] == (leader, shared), "a leader leads itself and promises as much"
        assert rows[row][:shared] == rows[leader][:shared] and (shared > 0 or leader == row)
    for row, nodes in enumerate(rows):
        gains = [
            depth * sum(texts[other][:depth] == texts[row][:depth] for other in range(len(texts)) if other != row)
            for depth in range(1, len(nodes) + 1)
        ]
        best = best_prefix(nodes)
        assert max(gains, default=0) == (0 if best is None else gains[best.depth])


def test_a_request_that_is_not_in_the_step_is_no_member():
    rows = held(["aab", "aab", "aac"])
    assert groups(rows[:1]) == [(0, 0)]
    assert groups([rows[0], [], rows[1]]) == [(0, 2), (1, 0), (0, 2)]
