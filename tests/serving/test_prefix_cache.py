"""The prefix cache by itself: what it finds, who owns which page, what goes first."""

import itertools
import random

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
from twinax.serving.host_pages import HostPages
from twinax.serving.kv_policies import Use
from twinax.serving.prefix_cache import GONE, ON_HOST, OWNER, PrefixCache
from twinax.serving.step_times import StepTimes

SIZE, PAGES = 2, 12
TIMES = StepTimes([(8, 64)])


class Machine(RuleBasedStateMachine):
    policy = "lru"
    host_pages = 0

    @initialize()
    def start(self):
        self.allocator = PageAllocator(PAGES, SIZE)
        self.host = HostPages(self.host_pages, SIZE, TIMES)
        self.cache = PrefixCache(self.allocator, kv_policies.load(self.policy, PAGES), self.host)
        self.on_device, self.on_host = {}, {}  # what pages and copies hold: salt and all tokens so far
        self.held = {}  # request -> (salt, tokens, nodes)
        self.pages = {}  # (salt, tokens so far) -> page, of what must be there: pages that are held
        self.count = 0
        self.waits = []  # (salt, tokens, nodes that were there)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), salt=st.sampled_from(["", "a"]))
    def wait(self, tokens, salt):
        self.waits.append((salt, tokens, self.cache.match(tokens, salt)))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), salt=st.sampled_from(["", "a"]))
    def request(self, tokens, salt):
        """Finds what is there, computes the rest, and holds all its full pages."""
        nodes = self.cache.match(tokens, salt)
        for depth, node in enumerate(nodes):
            assert node.key == tuple(tokens[depth * SIZE : (depth + 1) * SIZE]) and node.depth == depth
        chain = tuple(node.page for node in nodes if node.page != ON_HOST)
        assert len(set(chain)) == len(chain) and min(chain, default=0) >= 0
        assert all(node.page == ON_HOST for node in nodes[len(chain) :])
        full = len(tokens) // SIZE
        new = full - len(chain)
        if new > self.allocator.free_pages + self.cache.idle - sum(node.users == 0 for node in nodes):
            return
        name, self.count = f"r{self.count}", self.count + 1
        self.cache.take(nodes)
        if (short := new - self.allocator.free_pages) > 0:
            self.cache.evict(short)
        pages = self.allocator.allocate(new, name)
        away, pages = pages[: len(nodes) - len(chain)], pages[len(nodes) - len(chain) :]
        self.cache.bring_back(nodes[len(chain) :], away, name)
        self.move()
        for at, page in enumerate(pages, len(nodes)):
            self.on_device[page] = salt, tuple(tokens[: (at + 1) * SIZE])
        for at, page in enumerate(pages, len(nodes)):
            before = nodes[-1] if nodes else None
            key = tuple(tokens[at * SIZE : (at + 1) * SIZE])
            nodes.append(self.cache.put(before, key, page, name, salt))
        self.held[name] = (salt, tokens, nodes)

    def move(self):
        """As an engine does before each step."""
        moves = self.host.take_moves()
        self.on_host |= {copy: self.on_device[page] for copy, page in moves.out.items()}
        self.on_device |= {page: self.on_host.pop(copy) for copy, page in moves.back.items()}
        for copy in moves.gone:
            del self.on_host[copy]
        type(self).brought_back += len(moves.back)

    @precondition(lambda self: not self.held)
    @rule()
    def clear(self):
        self.cache.clear()
        assert (len(self.cache), self.cache.idle, self.host.used, self.allocator.used_pages) == (0, 0, 0, 0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def done(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        use = Use(data.draw(st.integers(0, 4)), data.draw(st.integers(0, 99)), data.draw(st.booleans()))
        self.cache.leave(self.held.pop(name)[2], use)

    @precondition(lambda self: self.cache.idle)
    @rule(data=st.data())
    def evict(self, data):
        count = data.draw(st.integers(1, self.cache.idle))
        before = self.allocator.free_pages
        self.cache.evict(count)
        assert self.allocator.free_pages == before + count
        self.move()

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
        for salt, tokens, found in self.waits:
            assert self.cache.match(tokens, salt, found=found) == self.cache.match(tokens, salt)
        pages = [node.page for node in {id(n): n for _, _, ns in self.held.values() for n in ns}.values()]
        assert len(set(pages)) == len(pages)
        copies, todo = [], [(root, salt, ()) for salt, root in self.cache._roots.items()]
        while todo:
            parent, salt, before = todo.pop()
            for key, node in parent.children.items():
                assert node.page != GONE and (node.page == ON_HOST or parent.page != ON_HOST)
                copies += [node.copy] * (node.page == ON_HOST)
                kept = self.on_host[node.copy] if node.page == ON_HOST else self.on_device[node.page]
                assert kept == (salt, before + key)
                todo.append((node, salt, before + key))
            assert parent.on_device == sum(node.page != ON_HOST for node in parent.children.values())
        assert len(set(copies)) == len(copies) == self.host.used <= self.host_pages


@pytest.mark.parametrize("host_pages", [0, 1, 7])
@pytest.mark.parametrize("policy", kv_policies.names())
def test_random_use(policy, host_pages):
    machine = type("Machine", (Machine,), {"policy": policy, "host_pages": host_pages, "brought_back": 0})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, derandomize=True))
    assert (machine.brought_back > 0) == (host_pages > 0)


def fill(cache: PrefixCache, allocator: PageAllocator, tokens: list[int], answer=0, salt="", preempted=False) -> int:
    """A request that computes what is not there of its pages, making room; the number of those that were there."""
    nodes = cache.match(tokens, salt)
    found = len(nodes)
    cache.take(nodes)
    for at in range(found, len(tokens) // SIZE):
        if not allocator.free_pages:
            cache.evict(1)
        (page,) = allocator.allocate(1, "r")
        before, key = nodes[-1] if nodes else None, tuple(tokens[at * SIZE : at * SIZE + SIZE])
        nodes.append(cache.put(before, key, page, "r", salt))
    cache.leave(nodes, Use(len(nodes), answer, preempted))
    return found


def made(policy: str, pages: int = PAGES, host_pages: int = 0) -> tuple[PrefixCache, PageAllocator]:
    allocator = PageAllocator(pages, SIZE)
    host = HostPages(host_pages, SIZE, TIMES)
    return PrefixCache(allocator, kv_policies.load(policy, pages + host_pages), host), allocator


def test_lru_lets_the_oldest_go_from_its_end():
    cache, allocator = made("lru")
    fill(cache, allocator, [1, 1, 2, 2])
    fill(cache, allocator, [3, 3, 4, 4])
    fill(cache, allocator, [1, 1])
    cache.evict(1)
    assert [len(cache.match(tokens, "")) for tokens in ([1, 1, 2, 2], [3, 3, 4, 4])] == [1, 2]
    cache.evict(2)
    assert [len(cache.match(tokens, "")) for tokens in ([1, 1, 2, 2], [3, 3, 4, 4])] == [1, 0]


def found_of(policy: str, asked: list[tuple[int, int]], pages: int = 64) -> int:
    """Pages found by requests of one page, (its number, tokens of the answer), one after another."""
    cache, allocator = made(policy, pages)
    return sum(fill(cache, allocator, [number, number], answer) for number, answer in asked)


def documents(rounds: int, rng: random.Random, answer: int = 2, other: int = 200) -> list[tuple[int, int]]:
    """48 documents that are asked short questions in turn, and twice as many that are asked for one long answer."""
    asked, fresh = [], itertools.count(1000)
    for _ in range(rounds):
        order = [(number, answer) for number in rng.sample(range(48), 48)]
        asked += [one for each in order for one in (each, (next(fresh), other), (next(fresh), other))]
    return asked


def test_cost_aware_learns_which_kind_of_page_is_asked_for_again():
    """Between two questions about a document some 150 pages come, and there is room for 64: LRU finds few again. With
    the one-off pages gone at once, all documents have room. That it can be the other way round is learned as well."""
    rng = random.Random(0)
    asked = documents(40, rng)
    turned = asked + documents(40, rng, answer=200, other=2)
    for traffic in (asked, turned):
        assert found_of("cost_aware", traffic) > 4 * found_of("lru", traffic)


def test_cost_aware_is_lru_where_pages_do_not_differ():
    rng = random.Random(1)
    asked = [(int(rng.paretovariate(0.6)) % 400, 5) for _ in range(6000)]
    lru, ours = found_of("lru", asked), found_of("cost_aware", asked)
    assert 0.97 * lru < ours
    assert found_of("cost_aware", [(number, 5) for number in range(3000)]) == 0


def test_what_was_preempted_is_kept_before_what_ended():
    cache, allocator = made("cost_aware", 32)
    for number in range(100):
        fill(cache, allocator, [number, number], preempted=True)
        fill(cache, allocator, [number, number], 9)  # it comes back soon
    fill(cache, allocator, [-1, -1], preempted=True)
    for number in (100, 101):
        fill(cache, allocator, [number, number], 9)
    cache.evict(cache.idle - 1)
    assert cache.match([-1, -1], "")


def test_no_policy_keeps_notes_without_bound():
    cache, allocator = made("cost_aware", 16)
    sizes = []
    for number in range(2000):
        fill(cache, allocator, [number, number, number, number])
        sizes.append(len(cache._policy._went))
    assert max(sizes) <= 3 * 16 + 16


def test_on_the_host_too_the_oldest_makes_room_for_what_has_to_go():
    cache, _ = made("lru", pages=2, host_pages=2)
    allocator = cache._allocator
    for number in range(5):
        fill(cache, allocator, [number, number])
    assert [node.page == ON_HOST for number in range(5) for node in cache.match([number, number], "")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not cache.match([0, 0], "")
    moves = cache._host.take_moves()
    assert (list(moves.out.values()), moves.back, moves.gone) == ([1, 0], {}, [])


def test_what_was_computed_again_is_no_longer_on_the_host():
    """As by a request that did not look, while the page was on the host."""
    cache, allocator = made("lru", pages=2, host_pages=2)
    fill(cache, allocator, [1, 1, 2, 2])
    cache.evict(2)
    (page,) = allocator.allocate(1, "r")
    node = cache.put(None, (1, 1), page, "r", "")
    assert (node.page, node.users, cache.idle, cache._host.used, len(cache)) == (page, 1, 0, 1, 1)
    assert [one.page for one in cache.match([1, 1, 2, 2], "")] == [page, ON_HOST]


def test_a_page_that_is_no_longer_worth_it_goes_with_what_the_host_has_after_it():
    cache, allocator = made("lru", pages=2, host_pages=2)
    fill(cache, allocator, [1, 1, 2, 2])
    cache.evict(1)
    cache._host.is_worth = lambda depth: False
    cache.evict(1)
    assert not cache.match([1, 1], "") and not cache._roots
    assert (cache._host.used, allocator.free_pages, cache._host.take_moves().out) == (0, 2, {})


def test_what_is_in_use_cannot_be_cleared():
    cache, allocator = made("lru")
    fill(cache, allocator, [1, 1])
    cache.take(cache.match([1, 1], ""))
    with pytest.raises(RuntimeError, match="in use"):
        cache.clear()


def test_another_salt_finds_nothing_and_shares_nothing():
    cache, allocator = made("lru")
    fill(cache, allocator, [1, 1, 2, 2], salt="mine")
    assert not cache.match([1, 1, 2, 2], "") and not cache.match([1, 1, 2, 2], "yours")
    fill(cache, allocator, [1, 1, 2, 2], salt="yours")
    assert len(cache) == 4


def test_an_unknown_policy_lists_the_choices():
    with pytest.raises(ValueError, match="choose one of cost_aware, lru"):
        kv_policies.load("fifo", PAGES)
