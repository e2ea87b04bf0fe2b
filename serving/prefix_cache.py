"""Pages of tokens that were computed before, to be used again by requests that begin with the same tokens.

A radix tree whose edges are whole pages of tokens (RadixAttention: Zheng et al. 2023, arXiv:2312.07104). There is a
tree for each salt: requests with another one neither use nor find its pages.

Invariants:
- a page of the tree is owned by the cache; its numbers hang on its tokens and those of the pages before it alone;
- a page that a request uses is used with all pages before it, so that what nobody uses can go from the leaves on;
- `idle` counts the pages on the device that nobody uses: as good as free.

A page that has to go may be kept in the host's memory (`host_pages`): it stays in the tree, and takes the place of the
one there that goes first. What comes after it in the tree is on the host too. A request that finds it gets it copied
back to a page of the device.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

from .allocator import PageAllocator
from .host_pages import HostPages
from .kv_policies import EvictionPolicy, Use

OWNER = "the prefix cache"
ON_HOST = -2  # the page of a node that the host's memory has
GONE = -3  # and of one that is no longer in the tree
Tokens = tuple[int, ...]


class Node:
    """A page of the tree, whose tokens are its key; or a root, whose key is its salt.

    `users`: requests that hold it. `depth`: pages before it. `path`: hash of all keys down to its own. `left_at`: when
    its last user left it. `queue`: the one it waits in then, `ticket` of its place there. `note`: the policy's.
    `copy`: the host's number of it, if its page is ON_HOST. `on_device`: how many of its children are not.
    """

    __slots__ = (
        "children", "copy", "depth", "key", "left_at", "note", "on_device", "page", "parent", "path", "queue",
        "ticket", "users",
    )  # fmt: skip

    def __init__(self, parent: Node | None, key: Tokens | str, page: int):
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[Tokens, Node] = {}
        self.users, self.left_at, self.queue, self.ticket = 0, 0, 0, -1
        self.copy, self.on_device = -1, 0
        self.note: Any = None
        self.depth = -1 if parent is None else parent.depth + 1
        self.path = hash(key if parent is None else (parent.path, key))


Queues = dict[int, list[tuple[int, int, Node]]]


class PrefixCache:
    """See the module. Calls: `match` and `take` when a request begins, and `bring_back` for what of it is on the host;
    `put` for each page that it fills; `leave`."""

    def __init__(self, allocator: PageAllocator, policy: EvictionPolicy, host: HostPages):
        self.idle = 0
        self._allocator, self._policy, self._host = allocator, policy, host
        self._roots: dict[str, Node] = {}
        # Of pages that may go from the device and from the host, by the policy's numbers: heaps of (when it was left,
        # ticket, node). What a node's ticket no longer says is passed over.
        self._queues: Queues = {}
        self._host_queues: Queues = {}
        self._leaves = itertools.count()
        self._tickets = itertools.count()

    def __len__(self) -> int:
        """Pages of the device in the tree."""
        todo, count = list(self._roots.values()), 0
        while todo:
            node = todo.pop()
            todo += node.children.values()
            count += node.on_device
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
        """A request holds these pages, a chain from the root, from now on. Those ON_HOST it must `bring_back`."""
        for node in nodes:
            self._hold(node)
            self._policy.taken(node)

    def bring_back(self, nodes: list[Node], pages: list[int], owner: str) -> None:
        """What `owner` has taken of the host's is copied to `pages`, its own so far."""
        for node, page in zip(nodes, pages, strict=True):
            self._allocator.give(page, owner, OWNER)
            self._host.bring_back(node.copy, page)
            self._on_device(node, page)

    def put(self, before: Node | None, tokens: Tokens, page: int, owner: str, salt: str) -> Node:
        """The page after `before` (None: the first) is full with `tokens`. Its owner holds the node that comes back.

        If the tree has such a page already, `page` is freed and the node's is to be used from now on.
        """
        parent = before or self._roots.setdefault(salt, Node(None, salt, -1))
        node = parent.children.get(tokens)
        if node is None:
            self._allocator.give(page, owner, OWNER)
            node = parent.children[tokens] = Node(parent, tokens, page)
            parent.on_device += 1
            self.idle += 1
            self._hold(node)
            self._policy.put(node)
            return node
        if node.page == ON_HOST:
            self._allocator.give(page, owner, OWNER)
            self._host.drop(node.copy)
            self._on_device(node, page)
            self.idle += 1
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
        """Frees `count` pages of the device that nobody uses; there must be so many."""
        for _ in range(count):
            node = self._first_to_go(self._queues)
            if node is None:
                raise RuntimeError("a page is to go and none may: more were to be freed than nobody uses; a bug")
            page, parent = node.page, node.parent
            assert parent is not None
            if self._host.is_worth(node.depth) and self._host_has_room():
                node.page, node.copy = ON_HOST, self._host.keep(page)
                parent.on_device -= 1
                self._may_go(node)
            else:
                self._forget(node)
            self._allocator.free([page], OWNER)
            self.idle -= 1
            self._may_go(parent)

    def clear(self) -> None:
        """Forgets everything, as when its numbers are no longer those of the model. Nobody may use any of it."""
        if any(child.users for root in self._roots.values() for child in root.children.values()):
            raise RuntimeError("pages of the prefix cache are in use and can't be forgotten; that is a bug")
        todo = list(self._roots.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            if node.page >= 0:
                self._allocator.free([node.page], OWNER)
        for root in list(self._roots.values()):
            for node in list(root.children.values()):
                self._forget(node)
        self.idle = 0

    def _on_device(self, node: Node, page: int) -> None:
        assert node.parent is not None
        node.page, node.copy = page, -1
        node.parent.on_device += 1

    def _hold(self, node: Node) -> None:
        self.idle -= node.users == 0 and node.page != ON_HOST
        node.users += 1
        node.ticket = -1

    def _host_has_room(self) -> bool:
        """Makes room there, unless all of it is about to be copied back."""
        while self._host.used >= self._host.most:
            node = self._first_to_go(self._host_queues)
            if node is None:
                return False
            parent = node.parent
            assert parent is not None
            self._forget(node)
            if parent.page == ON_HOST:
                self._may_go(parent)
        return True

    def _forget(self, node: Node) -> None:
        """It, and what goes on with it, is no longer in the tree. Its own page is still to be freed."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]  # pyright: ignore[reportArgumentType] (not a root's)
        parent.on_device -= node.page >= 0
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]  # pyright: ignore[reportArgumentType] (a root's)
        todo = [node]
        while todo:
            node = todo.pop()
            todo += node.children.values()
            if node.page == ON_HOST:
                self._host.drop(node.copy)
            self._policy.evicted(node)
            node.page, node.ticket = GONE, -1

    def _first_to_go(self, queues: Queues) -> Node | None:
        least: tuple[float, int, list[tuple[int, int, Node]]] | None = None
        for queue in queues.values():
            while queue and queue[0][1] != queue[0][2].ticket:
                heapq.heappop(queue)
            if queue:
                left_at, _, node = queue[0]
                worth = self._policy.worth(node)
                if least is None or (worth, left_at) < least[:2]:
                    least = worth, left_at, queue
        if least is None:
            return None
        node = heapq.heappop(least[2])[2]
        node.ticket = -1
        return node

    def _may_go(self, node: Node) -> None:
        on_host = node.page == ON_HOST
        if node.users or node.parent is None or (node.children if on_host else node.on_device):
            return
        node.ticket = next(self._tickets)
        queue = (self._host_queues if on_host else self._queues).setdefault(node.queue, [])
        heapq.heappush(queue, (node.left_at, node.ticket, node))
        if len(queue) > 64 + 4 * (self._host.used if on_host else self.idle):
            queue[:] = [entry for entry in queue if entry[1] == entry[2].ticket]
            heapq.heapify(queue)
