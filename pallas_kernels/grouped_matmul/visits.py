"""Which rows of which group a kernel works on, step by step: tiles of rows, each visited once by every group in it.

Shapes: N rows in M tiles of `tile` rows, G groups, V visits at most.

A tile in which groups meet is visited by each of them in turn, so its block of the result stays on the chip meanwhile.
What a visit is, is known on the device only: five numbers a visit, which kernels get as prefetched scalars. They are
cumulative sums and one comparison of visits with groups, so cheap. (megablox, which has the same idea, sorts it out by
repeats and histograms.) When the sizes are known while tracing, `known` gives the same from closed forms: the static
profiler follows these, and not what lies in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GROUP, TILE, LOW, HIGH, FIRST = range(5)


@partial(jax.tree_util.register_dataclass, data_fields=["table_5V", "count"], meta_fields=[])
@dataclass(frozen=True)
class Visits:
    """`count` visits; `table_5V` holds of each

    group, tile, the tile's rows [low, high) that are the group's, and whether it is the group's first.
    """

    table_5V: Any
    count: Any


def visits(sizes_G: jax.Array, N: int, tile: int, *, rest: bool) -> Visits:
    """In the order of the rows.

    Args:
        rest: True for results that are rows: those of no group are visited last, by a group G, and empty groups are not
            visited. False for results that are groups: an empty one is visited once, with no rows.
    """
    return _visits(jnp, sizes_G.astype(jnp.int32), N, tile, rest)


def _visits(np_: Any, sizes_G: Any, N: int, tile: int, rest: bool) -> Visits:
    M, int32 = -(-N // tile), np_.int32
    if rest:
        sizes_G = np_.concatenate([sizes_G, (N - np_.sum(sizes_G, keepdims=True)).astype(int32)])
    G = len(sizes_G)
    end_G = np_.cumsum(sizes_G, dtype=int32)
    first_G = (end_G - sizes_G) // tile
    tiles_G = np_.where(sizes_G > 0, -(-end_G // tile) - first_G, 0 if rest else 1)
    stop_G = np_.cumsum(tiles_G, dtype=int32)
    # Of G groups in order, each but the first shares at most one tile with those before it.
    visit_V = np_.arange(M + G - (1 if rest else 0), dtype=int32)
    group_V = np_.minimum(np_.sum(stop_G <= visit_V[:, None], axis=1, dtype=int32), G - 1)
    tile_V = np_.minimum((first_G + tiles_G - stop_G)[group_V] + visit_V, M - 1).astype(int32)
    low_V, high_V = (np_.clip(row_G[group_V] - tile_V * tile, 0, tile) for row_G in (end_G - sizes_G, end_G))
    is_first_V = visit_V == (stop_G - tiles_G)[group_V]
    rows = (group_V, tile_V, low_V, high_V, is_first_V)
    return Visits(np_.stack([row_V.astype(int32) for row_V in rows]), stop_G[-1])


def quotient(value: Any, by: int) -> Any:
    """Of a scalar from 0 up; a shift where that will do, as the static profiler follows no division."""
    value = jnp.asarray(value, jnp.int32)
    return jax.lax.shift_right_logical(value, by.bit_length() - 1) if by & (by - 1) == 0 else jax.lax.div(value, by)


class Known:
    """The table of sizes that are known, read by visit as a jax scalar: sums of steps, over a period of visits."""

    def __init__(self, sizes: Sequence[int], N: int, tile: int, *, rest: bool):
        found = _visits(np, np.asarray(sizes, np.int32), N, tile, rest)
        self.count = int(found.count)
        self._rows = [_Steps(row[: self.count]) for row in found.table_5V]

    def __getitem__(self, at: tuple[int, Any]) -> Any:
        return self._rows[at[0]](at[1])


class _Steps:
    """A list of integers as arithmetic: `a * (v // period)` and a sum of steps over `v % period`."""

    def __init__(self, values_V: np.ndarray):
        V = len(values_V)
        for period in range(1, V + 1):
            head, slope = values_V[:period], int(values_V[period] - values_V[0]) if period < V else 0
            visit_V = np.arange(V)
            if np.array_equal(values_V, head[visit_V % period] + slope * (visit_V // period)):
                break
        self._period, self._slope, self._head = period, slope, [int(x) for x in head]
        self._repeats = period < V
        self._inverse = -(-(1 << 16) // period)
        assert np.array_equal(np.arange(V) * self._inverse >> 16, np.arange(V) // period), "more visits than that"

    def __call__(self, visit: Any) -> Any:
        # A division that the static profiler follows.
        turn = jax.lax.shift_right_logical(visit * self._inverse, 16) if self._repeats else 0
        at = visit - turn * self._period
        value = self._head[0] + self._slope * turn
        for place in range(1, self._period):
            step = self._head[place] - self._head[place - 1]
            if step:
                # Neither a selection nor a least number, which the static profiler does not follow.
                value = value + step * (jnp.maximum(at - place + 1, 0) - jnp.maximum(at - place, 0))
        return value
