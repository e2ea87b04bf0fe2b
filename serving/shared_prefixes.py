"""Which decoding requests of a step begin with the same pages, so that attention reads these once for all of them.

Hydragen: Juravsky et al. 2024, arXiv:2402.05099. A matter of speed alone: no result depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .prefix_cache import Node


def best_prefix(nodes: Sequence[Node]) -> Node | None:
    """The page of the prefix cache down to which a request shares best: where the pages before it, times the other
    requests that hold them, are the most. None: nobody shares any."""
    best, most, start = None, 0, 0
    # Along a chain ever fewer requests hold a page; the last page of each number of them is a candidate.
    while start < len(nodes) and (users := nodes[start].users) > 1:
        low, high = start, len(nodes) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if nodes[middle].users == users else (low, middle - 1)
        if (users - 1) * (low + 1) > most:
            best, most = nodes[low], (users - 1) * (low + 1)
        start = low + 1
    return best


def groups(rows: Sequence[Sequence[Node]]) -> list[tuple[int, int]]:
    """For each row, given the cached pages that it holds: the row that leads its group, and how many pages it shares.

    A row that shares with no other row has 0 pages, and leads itself.
    """
    members: dict[int, list[int]] = {}
    found = [(row, 0) for row in range(len(rows))]
    chosen = [best_prefix(nodes) for nodes in rows]
    for row, node in enumerate(chosen):
        if node is not None:
            members.setdefault(id(node), []).append(row)
    for group in members.values():
        if len(group) > 1:
            node = chosen[group[0]]
            assert node is not None
            for row in group:
                found[row] = (group[0], node.depth + 1)
    return found
