"""In which order to run a batch of requests that nobody waits for.

Requests that begin alike should run one after another, while what they share is in the prefix cache, and those that
generate much for what their prompts cost should begin early: at the end of a batch there are then no few long ones left
that decode alone, and all along there are prompts to fill the steps of those that decode. After BatchLLM (Zheng et al.
2024, arXiv:2412.03594), which takes one level of shared prefixes; here all levels count, as the cache is a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Node:
    """Prompts that share their first `depth` tokens. `request`: the one that this leaf stands for, or -1; `first`: the
    first to come of those below."""

    depth: int
    request: int = -1
    first: int = -1
    children: list[_Node] = field(default_factory=list)
    prompt_tokens: int = 0  # to compute, each shared one once, from the parent's depth on
    new_tokens: int = 0

    @property
    def decode_share(self) -> float:
        return self.new_tokens / max(self.prompt_tokens + self.new_tokens, 1)


def order(prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], page_size: int = 1) -> list[int]:
    """The order in which to run requests: a permutation of their indices.

    The prompts' prefix tree is walked from its root: what is below one node comes in one piece, and of the children of
    a node those first that decode the most for the prompt tokens they need. Equal ones keep the order they came in.
    The time is that of sorting the prompts.

    Args:
      prompts: token ids of each request.
      new_tokens: how many tokens each may generate.
      page_size: prefixes are shared in units of so many tokens.
    """
    if len(prompts) != len(new_tokens):
        raise ValueError(f"there is one count of new tokens a prompt; got {len(prompts)} and {len(new_tokens)}")
    root = _tree(prompts, new_tokens, page_size)
    found: list[int] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if node.request >= 0:
            found.append(node.request)
        # The first to come are the last on the stack.
        stack += sorted(node.children, key=lambda child: (child.decode_share, -child.first))
    return found


def shared_tokens(prompts: Sequence[Sequence[int]], page_size: int = 1) -> int:
    """How many of the prompts' tokens need not be computed, when each shared prefix is computed once."""
    return sum(map(len, prompts)) - _tree(prompts, [1] * len(prompts), page_size).prompt_tokens


def _tree(prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], page_size: int) -> _Node:
    """The prefix tree: sorted prompts have their neighbours' prefixes in common, so that one stack builds it."""
    lists = [list(prompt) for prompt in prompts]
    root = _Node(0)
    path, before = [root], None
    for index in sorted(range(len(lists)), key=lambda one: (lists[one], one)):
        prompt = lists[index]
        shared = 0 if before is None else _shared(before, prompt) // page_size * page_size
        below = None
        while path[-1].depth > shared or path[-1].request >= 0:
            below = _close(path)
        if path[-1].depth < shared:
            # The last one closed was a child of what is now split: what both share becomes a node between.
            assert below is not None and path[-1].children[-1] is below
            between = _Node(shared, children=[path[-1].children.pop()])
            below.prompt_tokens -= shared - path[-1].depth
            path[-1].children.append(between)
            path.append(between)
        leaf = _Node(len(prompt), index, index, new_tokens=new_tokens[index])
        path[-1].children.append(leaf)
        path.append(leaf)
        before = prompt
    while len(path) > 1:
        _close(path)
    root.prompt_tokens = sum(child.prompt_tokens for child in root.children)
    return root


def _close(path: list[_Node]) -> _Node:
    """Takes the last node from the path, now that all below it is known, and sums it up."""
    node = path.pop()
    node.prompt_tokens = node.depth - path[-1].depth + sum(child.prompt_tokens for child in node.children)
    node.first = min((child.first for child in node.children), default=node.first)
    node.new_tokens += sum(child.new_tokens for child in node.children)
    return node


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two prompts have in common at the start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is quick, a loop over tokens is not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
