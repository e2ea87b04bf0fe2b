"""Running stacked blocks in turn.

Shapes: D width, L layers; L of a stack are those that have its module.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..layers.linear import PRODUCT
from ..layers.moe import Statistics
from ..sharding.rules import GATHERED, current
from .block import Ropes, between, bind_block
from .config import DecoderConfig, LayerKind
from .parameters import module_of

BLOCK_INPUT = "block_input"


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """What is kept without `remat`: all but weights, and tokens, as they were gathered.

    Said of the steps that gather as well as of the name: with the name alone, what goes into it would be kept.
    """
    if primitive.name == "name":
        return parameters["name"] != GATHERED
    return primitive.name not in ("sharding_constraint", "all_gather")


REMAT_POLICIES = {
    "none": _all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name: they are made in a `custom_vjp`, where JAX's policies see no product.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    # What enters each block waits in the host's memory; all else is computed again.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times the same `period` kinds of layers, from layer `start` on."""

    start: int
    period: int
    repeats: int


@lru_cache(maxsize=256)
def segments(kinds: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """The layers as runs that repeat, so cut that the fewest blocks are compiled."""
    count = len(kinds)
    best: list[tuple[int, tuple[Segment, ...]]] = [(0, ())] * (count + 1)  # of the layers from each one on
    for start in reversed(range(count)):
        choices = []
        for period in range(1, count - start + 1):
            repeats = 1
            while kinds[start : start + period] == kinds[(end := start + repeats * period) : end + period]:
                repeats += 1
            cost, rest = best[start + repeats * period]
            choices.append((period + cost, (Segment(start, period, repeats), *rest)))
        best[start] = min(choices, key=lambda choice: (choice[0], len(choice[1])))
    return best[0][1]


@dataclasses.dataclass(frozen=True)
class Run:
    """Runs blocks in turn: `scan` over what repeats, so that compile time does not grow with depth.

    Attributes:
        ropes, context: as `Block` takes them. remat: as `Decoder` does.
    """

    config: DecoderConfig
    ropes: Ropes
    context: Any
    remat: str

    def __call__(
        self, stacks: Mapping[str, jax.Array], kinds: tuple[LayerKind, ...], x: jax.Array, cache: Any = None
    ) -> tuple[tuple[jax.Array, Any], Statistics | None]:
        """Blocks of these kinds, whose parameters are in `stacks`: ((x, cache), statistics [L, ...] of the mixtures).

        The cache is a carry, so that it is updated in place.
        """
        carry, found = (x, cache), []
        for segment in segments(kinds):
            carry, statistics = self._segment(stacks, kinds, segment, carry)
            found.append(statistics)
        return carry, _join(found, jnp.concatenate)

    def _segment(
        self, stacks: Mapping[str, jax.Array], kinds: tuple[LayerKind, ...], segment: Segment, carry: Any
    ) -> tuple[Any, Statistics | None]:
        own = kinds[segment.start : segment.start + segment.period]
        before = self._count(stacks, kinds[: segment.start])
        each = self._count(stacks, own)

        def turn(carry: Any, take: Callable[[str, int], jax.Array], at: Any) -> Any:
            """One period. `take` gives a stack's array for the so-manieth layer of the period that has it."""
            found = []
            for nth, kind in enumerate(own):
                place = self._count(stacks, own[:nth])
                params = {
                    name: take(name, place[module])
                    for name in stacks
                    if self.config.has(kind, module := module_of(name))
                }
                layer = before[kind.mixer] + at * each[kind.mixer] + place[kind.mixer]
                carry, statistics = self._one(kind, carry, params, layer)
                found.append(statistics)
            return carry, _join(found, jnp.stack)

        if segment.repeats == 1:
            return turn(carry, lambda name, place: stacks[name][before[module_of(name)] + place], 0)
        if carry[1] is None:
            # The gradient of a scanned array is written once, that of an indexed one added to in every turn.
            scanned = {
                name: self._periods(stacks[name], before[module], each[module], segment)
                for name in stacks
                if each[module := module_of(name)]
            }

            def body(carry: Any, one: Any) -> Any:
                at, params = one
                return turn(carry, lambda name, place: params[name][place], at)

        else:
            # Serving: a part of a stack would be copied before it is scanned, which indices into all of it are not.
            scanned = {}

            def body(carry: Any, one: Any) -> Any:
                at = one[0]

                def take(name: str, place: int) -> jax.Array:
                    index = before[module_of(name)] + at * each[module_of(name)] + place
                    return jax.lax.dynamic_index_in_dim(stacks[name], index, keepdims=False)

                return turn(carry, take, at)

        carry, found = jax.lax.scan(body, carry, (jnp.arange(segment.repeats, dtype=jnp.int32), scanned))
        return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)

    def _count(self, stacks: Mapping[str, Any], kinds: tuple[LayerKind, ...]) -> dict[str, int]:
        modules = dict.fromkeys(map(module_of, stacks))
        return {module: sum(self.config.has(kind, module) for kind in kinds) for module in modules}

    @staticmethod
    def _periods(stack: jax.Array, start: int, each: int, segment: Segment) -> jax.Array:
        count = each * segment.repeats
        part = stack if count == len(stack) else stack[start : start + count]
        return part.reshape(segment.repeats, each, *part.shape[1:])

    def _one(self, kind: LayerKind, carry: Any, params: dict[str, jax.Array], layer: Any) -> Any:
        def step(carry: Any, params: dict[str, jax.Array], layer: Any) -> Any:
            x, cache = carry
            block = bind_block(self.config, kind, params)
            x, cache, statistics = block(checkpoint_name(x, BLOCK_INPUT), self.ropes, self.context, cache, layer)
            return (between(x), cache), statistics

        if self.remat != "none" or current() is not None:
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return step(carry, params, layer)


def _join(found: list[Any], how: Callable[[list[jax.Array]], jax.Array]) -> Any:
    """One tree for those that are not None; None if all are."""
    there = [one for one in found if one is not None]
    return jax.tree.map(lambda *parts: how(list(parts)), *there) if there else None
