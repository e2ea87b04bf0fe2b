"""The prefix cache by itself: what it finds, who owns which page, what goes first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from twinax.serving import kv_policies
from twinax.serving.allocator import PageAllocator
from twinax.serving.prefix_cache import OWNER, PrefixCache

SIZE, PAGES = 2, 12


class Machine(RuleBasedStateMachine):
    policy = "lru"

    @initialize()
    def start(self):
        self.allocator = PageAllocator(PAGES, SIZE)
        self.cache = PrefixCache(self.allocator, kv_policies.load(self.policy))
        self.held = {}  # request -> (salt, tokens, nodes)
        self.pages = {}  # (salt, tokens so far) -> page, of what must be there: pages that are held
        self.count = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), salt=st.sampled_from(["", "a"]))
    def request(self, tokens, salt):
        """Finds what is there, computes the rest, and holds all its full pages."""
        nodes = self.cache.match(tokens, salt)
        for depth, node in enumerate(nodes):
            assert node.key == tuple(tokens[depth * SIZE : (depth + 1) * SIZE]) and node.depth == depth
        chain = tuple(node.page for node in nodes)
        assert len(set(chain)) == len(chain)
        full = len(tokens) // SIZE
        new = full - len(nodes)
        if new > self.allocator.free_pages + self.cache.idle - sum(node.users == 0 for node in nodes):
            return
        name, self.count = f"r{self.count}", self.count + 1
        self.cache.take(nodes)
        if (short := new - self.allocator.free_pages) > 0:
            self.cache.evict(short)
        pages = self.allocator.allocate(new, name)
        for at in range(len(nodes), full):
            before = nodes[-1] if nodes else None
            key = tuple(tokens[at * SIZE : (at + 1) * SIZE])
            nodes.append(self.cache.put(before, key, pages[at - full + new], name, salt))
        self.held[name] = (salt, tokens, nodes)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def done(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.leave(self.held.pop(name)[2])

    @precondition(lambda self: self.cache.idle)
    @rule(data=st.data())
    def evict(self, data):
        count = data.draw(st.integers(1, self.cache.idle))
        before = self.allocator.free_pages
        self.cache.evict(count)
        assert self.allocator.free_pages == before + count

    @invariant()
    def what_is_held_is_there_and_found(self):
        if not hasattr(self, "cache"):
            return
        owners = [self.allocator.owner(page) for page in range(PAGES)]
        assert set(owners) <= {OWNER, None}
        assert owners.count(OWNER) == len(self.cache)
        held = {id(node) for _, _, nodes in self.held.values() for node in nodes}
        assert len(self.cache) == len(held) + self.cache.idle
        for salt, tokens, nodes in self.held.values():
            assert self.cache.match(tokens, salt) == nodes
        pages = [node.page for node in {id(n): n for _, _, ns in self.held.values() for n in ns}.values()]
        assert len(set(pages)) == len(pages)


@pytest.mark.parametrize("policy", kv_policies.names())
def test_random_use(policy):
    machine = type("Machine", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, derandomize=True))


def fill(cache: PrefixCache, allocator: PageAllocator, tokens: list[int], uses: int = 1, salt: str = "") -> None:
    """A request that computes all its pages, which `uses - 1` others then take."""
    for _ in range(uses):
        nodes = cache.match(tokens, salt)
        cache.take(nodes)
        for at in range(len(nodes), len(tokens) // SIZE):
            (page,) = allocator.allocate(1, "r")
            before, key = nodes[-1] if nodes else None, tuple(tokens[at * SIZE : at * SIZE + SIZE])
            nodes.append(cache.put(before, key, page, "r", salt))
        cache.leave(nodes)


def made(policy: str) -> tuple[PrefixCache, PageAllocator]:
    allocator = PageAllocator(PAGES, SIZE)
    return PrefixCache(allocator, kv_policies.load(policy)), allocator


def test_lru_lets_the_oldest_go_from_its_end():
    cache, allocator = made("lru")
    fill(cache, allocator, [1, 1, 2, 2])
    fill(cache, allocator, [3, 3, 4, 4])
    fill(cache, allocator, [1, 1])
    cache.evict(1)
    assert [len(cache.match(tokens, "")) for tokens in ([1, 1, 2, 2], [3, 3, 4, 4])] == [1, 2]
    cache.evict(2)
    assert [len(cache.match(tokens, "")) for tokens in ([1, 1, 2, 2], [3, 3, 4, 4])] == [1, 0]


def test_cost_aware_keeps_what_is_used_often():
    cache, allocator = made("cost_aware")
    fill(cache, allocator, [1, 1], uses=5)
    fill(cache, allocator, [2, 2])
    fill(cache, allocator, [3, 3])
    cache.evict(2)
    assert [len(cache.match([n, n], "")) for n in (1, 2, 3)] == [1, 0, 0]
    # Not for ever: what came later outlives it in the end.
    for n in range(4, 100):
        fill(cache, allocator, [n, n])
        if not allocator.free_pages:
            cache.evict(1)
    assert not cache.match([1, 1], "")


def test_another_salt_finds_nothing_and_shares_nothing():
    cache, allocator = made("lru")
    fill(cache, allocator, [1, 1, 2, 2], salt="mine")
    assert not cache.match([1, 1, 2, 2], "") and not cache.match([1, 1, 2, 2], "yours")
    fill(cache, allocator, [1, 1, 2, 2], salt="yours")
    assert len(cache) == 4


def test_an_unknown_policy_lists_the_choices():
    with pytest.raises(ValueError, match="choose one of cost_aware, lru"):
        kv_policies.load("fifo")
