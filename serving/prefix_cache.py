"""Pages of tokens that were computed before, to be used again by requests that begin with the same tokens.

A radix tree whose edges are whole pages of tokens (RadixAttention: Zheng et al. 2023, arXiv:2312.07104). There is a
tree for each salt: requests with another one neither use nor find its pages.

Invariants:
- a page of the tree is owned by the cache; its numbers hang on its tokens and those of the pages before it alone;
- a page that a request uses is used with all pages before it, so that what nobody uses can go from the leaves on;
- `idle` counts the pages that nobody uses: as good as free.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

from .allocator import PageAllocator
from .kv_policies import EvictionPolicy, Use

OWNER = "the prefix cache"
GONE = -2  # the page of a node that is no longer in the tree
Tokens = tuple[int, ...]


class Node:
    """A page of the tree, whose tokens are its key; or a root, whose key is its salt.

    `users`: requests that hold it. `depth`: pages before it. `path`: hash of all keys down to its own. `left_at`: when
    its last user left it. `queue`: the one it waits in then, `ticket` of its place there. `note`: the policy's.
    """

    __slots__ = ("children", "depth", "key", "left_at", "note", "page", "parent", "path", "queue", "ticket", "users")

    def __init__(self, parent: Node | None, key: Tokens | str, page: int):
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[Tokens, Node] = {}
        self.users, self.left_at, self.queue, self.ticket = 0, 0, 0, -1
        self.note: Any = None
        self.depth = -1 if parent is None else parent.depth + 1
        self.path = hash(key if parent is None else (parent.path, key))


class PrefixCache:
    """See the module. Calls: `match` and `take` when a request begins; `put` for each page that it fills; `leave`."""

    def __init__(self, allocator: PageAllocator, policy: EvictionPolicy):
        self.idle = 0
        self._allocator, self._policy = allocator, policy
        self._roots: dict[str, Node] = {}
        # Of pages that may go, by the policy's numbers: heaps of (when it was left, ticket, node). What a node's ticket
        # no longer says is passed over.
        self._queues: dict[int, list[tuple[int, int, Node]]] = {}
        self._leaves = itertools.count()
        self._tickets = itertools.count()

    def __len__(self) -> int:
        """Pages in the tree."""
        todo, count = list(self._roots.values()), 0
        while todo:
            node = todo.pop()
            todo += node.children.values()
            count += len(node.children)
        return count

    def match(
        self, tokens: Sequence[int], salt: str, most: int | None = None, found: Sequence[Node] = ()
    ) -> list[Node]:
        """The longest chain of pages that `tokens`, or the first `most` of them, begin with. Nobody holds them yet.

        `found`: what it was some time ago. What of that is still there is not looked for again.
        """
        size, found = self._allocator.page_size, list(found)
        while found and found[-1].page == GONE:
            found.pop()
        node = found[-1] if found else self._roots.get(salt)
        for start in range(len(found) * size, (len(tokens) if most is None else most) - size + 1, size):
            node = None if node is None else node.children.get(tuple(tokens[start : start + size]))
            if node is None:
                break
            found.append(node)
        return found

    def take(self, nodes: list[Node]) -> None:
        """A request holds these pages, a chain from the root, from now on."""
        for node in nodes:
            self._hold(node)
            self._policy.taken(node)

    def put(self, before: Node | None, tokens: Tokens, page: int, owner: str, salt: str) -> Node:
        """The page after `before` (None: the first) is full with `tokens`. Its owner holds the node that comes back.

        If the tree has such a page already, `page` is freed and the node's is to be used from now on.
        """
        parent = before or self._roots.setdefault(salt, Node(None, salt, -1))
        node = parent.children.get(tokens)
        if node is None:
            self._allocator.give(page, owner, OWNER)
            node = parent.children[tokens] = Node(parent, tokens, page)
            self.idle += 1
            self._hold(node)
            self._policy.put(node)
        else:
            self._allocator.free([page], owner)
            self.take([node])
        return node

    def leave(self, nodes: list[Node], use: Use) -> None:
        """A request no longer holds these pages. They stay until room is needed."""
        for node in reversed(nodes):
            node.users -= 1
            node.left_at = next(self._leaves)
            if node.users == 0:
                self.idle += 1
                node.queue = self._policy.left(node, use)
                self._may_go(node)

    def evict(self, count: int) -> None:
        """Frees `count` pages that nobody uses; there must be so many."""
        while count:
            node = self._first_to_go()
            parent = node.parent
            assert parent is not None
            node.ticket = -1
            self._policy.evicted(node)
            del parent.children[node.key]  # pyright: ignore[reportArgumentType] (not a root's)
            self._allocator.free([node.page], OWNER)
            node.page = GONE
            self.idle -= 1
            count -= 1
            if parent.parent is None and not parent.children:
                del self._roots[parent.key]  # pyright: ignore[reportArgumentType] (a root's)
            self._may_go(parent)

    def _hold(self, node: Node) -> None:
        self.idle -= node.users == 0
        node.users += 1
        node.ticket = -1

    def _first_to_go(self) -> Node:
        least: tuple[float, int, list[tuple[int, int, Node]]] | None = None
        for queue in self._queues.values():
            while queue and queue[0][1] != queue[0][2].ticket:
                heapq.heappop(queue)
            if queue:
                left_at, _, node = queue[0]
                worth = self._policy.worth(node)
                if least is None or (worth, left_at) < least[:2]:
                    least = worth, left_at, queue
        if least is None:
            raise RuntimeError("a page is to go and none may: more were to be freed than nobody uses; that is a bug")
        return heapq.heappop(least[2])[2]

    def _may_go(self, node: Node) -> None:
        if node.users or node.children or node.parent is None:
            return
        node.ticket = next(self._tickets)
        queue = self._queues.setdefault(node.queue, [])
        heapq.heappush(queue, (node.left_at, node.ticket, node))
        if len(queue) > 64 + 4 * self.idle:
            queue[:] = [entry for entry in queue if entry[1] == entry[2].ticket]
            heapq.heapify(queue)
