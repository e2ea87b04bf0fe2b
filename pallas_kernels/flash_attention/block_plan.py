"""Which blocks of queries and keys meet, from program ids: shared by the forward and the backward kernel.

A block pair is empty (never loaded), full (every query sees every key, no mask) or an edge. Where keys pad the array to
whole blocks there is an edge too, unless causality hides them anyway.

A kernel's grid goes over rows of blocks (of queries forward, of keys backward) and, for each, over the blocks of the
other side that it meets: the keys' last first, the queries' first first. A step without a pair of its own names the
blocks of the last pair, which are there, so that nothing is copied. Only if no pair of a whole batch row is left is a
block loaded for nothing, one a head, as a kernel's first step loads something.

Shapes: B batch rows, T queries, S keys, nq and nk blocks of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

PADDING_Q, PADDING_K = -(2**31), -(2**31) + 1  # ids of segment 0, that equal nothing: no caller's


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call. `offset` is None when it differs by batch row or is traced.

    `block_q`, `block_k` and `chunk` are powers of two; T, S, D and E are without padding.
    """

    T: int
    S: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None
    offset: int | None
    segments: bool
    D: int = 0
    E: int = 0
    every_pair: bool = False  # a row's empty pairs have steps too, its last: a bias's gradient is written everywhere
    per_key_block: bool = False  # rows of the grid are blocks of keys: the backward kernel
    chunk: int = 256  # of a block, at a time: queries forward, keys backward

    @property
    def nq(self) -> int:
        return pl.cdiv(self.T, self.block_q)

    @property
    def nk(self) -> int:
        return pl.cdiv(self.S, self.block_k)

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other, by position. With unknown offsets, as if the queries came last."""
        at = np.arange(self.T) + (self.S - self.T if self.offset is None else self.offset)
        low, high = np.zeros_like(at), np.full_like(at, self.S - 1)
        if self.causal:
            high = np.minimum(high, at)
        elif self.window is not None:
            high = np.minimum(high, at + self.window - 1)
        if self.window is not None:
            low = np.maximum(low, at - self.window + 1)
        return int(np.maximum(high - low + 1, 0).sum())

    @property
    def is_static(self) -> bool:
        return self.offset is not None and not self.segments

    @property
    def hides_padded_keys(self) -> bool:
        """Whether causality keeps every real query from the keys that are padding."""
        return self.S % self.block_k == 0 or (
            self.causal and self.offset is not None and self.T + self.offset <= self.S
        )

    @property
    def diagonal(self) -> bool:
        """Whether the only edges are blocks on the diagonal, which begin at the same position on both sides."""
        if self.block_q != self.block_k or self.offset is None or self.offset % self.block_q:
            return False
        if self.offset < 0 and not self.per_key_block:  # rows that see nothing are visited all the same
            return False
        return (
            not self.every_pair and self.causal and self.window is None and not self.segments and self.hides_padded_keys
        )

    @property
    def covered(self) -> bool:
        """Whether it is known that each block of queries meets the first block of keys, and each block of keys some."""
        if not self.is_static or self.queries_of(0, None, 0) != (0, self.nq - 1):
            return False
        ranges = (self.queries_of(j, None, 0) for j in range(self.nk))
        return all(low <= high for low, high in ranges)

    @property
    def folded(self) -> bool:
        """Whether each row of the grid takes two rows of blocks, number n and n before the last.

        Under the diagonal every such pair meets as many blocks of the other side, so no step of the grid is without.
        """
        if not self.diagonal or self._rows % 2:
            return False
        first, last = self._meets(0), self._meets(self._rows - 1)
        return min(first, last) >= 1 and max(first, last) <= (self.nq if self.per_key_block else self.nk)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows, over blocks of queries (of keys, if `per_key_block`), and the steps of each, over what these meet."""
        if self.folded:
            return self._rows // 2, self._meets(0) + self._meets(self._rows - 1)
        return self._rows, self.steps

    def place(self, n: Any, t: Any) -> tuple[Any, Any]:
        """The row's block at step t of the grid's row n, and the number of the block that it meets."""
        if not self.folded:
            return n, t
        is_first = t < self._meets(n)
        return jnp.where(is_first, n, self._rows - 1 - n), jnp.where(is_first, t, t - self._meets(n))

    @property
    def _rows(self) -> int:
        return self.nk if self.per_key_block else self.nq

    def _meets(self, n: Any) -> Any:
        """How many blocks row n meets, if it is `diagonal`."""
        assert self.offset is not None
        behind = self.offset // self.block_k
        return self.nq - n + behind if self.per_key_block else n + 1 + behind

    @property
    def _others(self) -> int:
        return self.nq if self.per_key_block else self.nk

    @functools.cached_property
    def counts(self) -> list[int] | None:
        """How many blocks each row meets, where that is static."""
        if not self.is_static:
            return None
        return [max(0, high - low + 1) for low, high in (self._range(n, None, 0) for n in range(self._rows))]

    @property
    def steps(self) -> int:
        """The most that any row takes, at least 1."""
        if self.offset is None or self.every_pair:
            return self._others
        alone = dataclasses.replace(self, segments=False)
        return max(1, *(alone.counts or ()))

    @property
    def has_empty_rows(self) -> bool:
        """Whether a row may meet no block."""
        return self.counts is None or 0 in self.counts

    def blocks(self, n: Any, t: Any, tables: Any, b: Any) -> tuple[Any, Any, Any]:
        """The blocks that are in memory at step t of the grid's row n, the row's and the other, and if they meet."""
        row, t = self.place(n, t)
        if self.folded or self.counts == [self.steps] * self._rows:
            return row, self.nth(row, t, tables, b), True
        if not self.has_empty_rows:
            count = self._count(row, tables, b)
            return row, self.nth(row, _min(t, count - 1), tables, b), t < count
        held = self._held(row, tables, b)
        last = _max(self._count(held, tables, b) - 1, 0)
        at = jnp.where(held == row, _min(t, last), last)
        return held, self.nth(held, at, tables, b), (held == row) & (t < self._count(row, tables, b))

    def nth(self, row: Any, t: Any, tables: Any, b: Any) -> Any:
        """The block that comes at the row's step t; after those that it meets, with `every_pair`, the others."""
        if self._others == 1:
            return 0
        if self.segments:
            return tables["order"][(b * self._rows + row) * self.steps + t]
        low, high = self._range(row, tables, b)
        if not self.per_key_block:
            return high - t if self.folded else _min(_max(high - t, 0), self.nk - 1)
        if self.folded:
            return low + t
        block = _min(_max(low, 0), self.nq - 1) + t
        if self.every_pair:
            return jnp.where(block < self.nq, block, block - self.nq)
        return _min(block, self.nq - 1)

    def _count(self, row: Any, tables: Any, b: Any) -> Any:
        if self.segments:
            return tables["count"][b * self._rows + row]
        low, high = self._range(row, tables, b)
        return high - low + 1

    def _held(self, row: Any, tables: Any, b: Any) -> Any:
        """The row itself, or if it meets nothing one that does: the last before it, else the first, else any."""
        if self.segments:
            return tables["held"][b * self._rows + row]
        of = self.keys_of if self.per_key_block else self.queries_of
        low, high = of(0, tables, b)[0], of(self._others - 1, tables, b)[1]
        return _min(_max(_min(_max(row, low), high), 0), self._rows - 1)

    def _range(self, row: Any, tables: Any, b: Any) -> tuple[Any, Any]:
        return (self.queries_of if self.per_key_block else self.keys_of)(row, tables, b)

    def keys_of(self, i: Any, tables: Any, b: Any) -> tuple[Any, Any]:
        """The first and the last key block that query block i sees, by position; last < first if there is none."""
        low, high = 0, self.nk - 1
        first = i * self.block_q + self._offset(tables, b)
        last = first + self.block_q - 1
        if self.T % self.block_q:
            last = _min(last, self.T - 1 + self._offset(tables, b))
        if self.causal:
            high = _min(high, _floor(last, self.block_k))
        elif self.window is not None:
            high = _min(high, _floor(last + self.window - 1, self.block_k))
        if self.window is not None:
            low = _max(low, _floor(first - self.window + 1, self.block_k))
        return low, high

    def queries_of(self, j: Any, tables: Any, b: Any) -> tuple[Any, Any]:
        """The first and the last query block that sees key block j: the inverse."""
        low, high = 0, self.nq - 1
        first = j * self.block_k - self._offset(tables, b)
        last = first + self.block_k - 1
        if self.S % self.block_k:
            last = _min(last, self.S - 1 - self._offset(tables, b))
        if self.causal:
            low = _max(low, _floor(first, self.block_q))
        elif self.window is not None:
            low = _max(low, _floor(first - self.window + 1, self.block_q))
        if self.window is not None:
            high = _min(high, _floor(last + self.window - 1, self.block_q))
        return low, high

    def is_full(self, i: Any, j: Any, tables: Any, b: Any) -> Any:
        """Whether every query of block i sees every key of block j: a bool, or a traced one."""
        first_q = i * self.block_q + self._offset(tables, b)
        last_q = first_q + self.block_q - 1
        first_k, last_k = j * self.block_k, (j + 1) * self.block_k - 1
        full = [] if self.hides_padded_keys else [last_k < self.S]
        if self.causal:
            full.append(last_k <= first_q)
        elif self.window is not None:
            full.append(last_k < first_q + self.window)
        if self.window is not None:
            full.append(first_k > last_q - self.window)
        if self.segments and tables is not None:
            full.append(tables["q_one"][b * self.nq + i] == tables["k_one"][b * self.nk + j])
        result: Any = True
        for more in full:
            result = (result and more) if isinstance(result, bool) and isinstance(more, bool) else result & more
        return result

    def sees(self, first_q: Any, first_k: Any, shape: tuple[int, ...], q_axis: int) -> jax.Array | None:
        """The mask of a tile by positions, without segments: where its queries begin, the offset added, and its keys.

        Queries lie along `q_axis` of `shape`.
        """
        q, k = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (q_axis, 1 - q_axis))
        distance, masks = q - k, []
        if self.causal:
            masks.append(distance >= first_k - first_q)
        elif self.window is not None:
            masks.append(distance > first_k - first_q - self.window)
        if self.window is not None:
            masks.append(distance < first_k - first_q + self.window)
        if not self.hides_padded_keys:
            masks.append(k < self.S - first_k)
        return _all(masks)

    def position(self, i: Any, tables: Any, b: Any) -> Any:
        """Of the first query of block i, among the keys."""
        return i * self.block_q + self._offset(tables, b)

    def _offset(self, tables: Any, b: Any) -> Any:
        if self.offset is not None:
            return self.offset
        return tables["offset"][b]


def _all(masks: list[Any]) -> Any:
    if not masks:
        return None
    result = masks[0]
    for more in masks[1:]:
        result = result & more
    return result


def tables(plan: Plan, q_ids_BT: Any, k_ids_BS: Any, offset_B: Any) -> dict[str, jax.Array]:
    """What the kernels read from scalar memory, flat int32; empty when all is static.

    For segments, of each row of blocks in each batch row: how many blocks it meets (count), these in the order of its
    steps (order, O(rows * steps)), and a row that meets some (held); of blocks of one segment only, its id. `q_ids_BT`
    and `k_ids_BS` come padded, as `padded_ids` makes them.
    """
    found: dict[str, jax.Array] = {}
    if plan.offset is None:
        found["offset"] = offset_B.astype(jnp.int32)
    if plan.segments:
        meets = meet(plan, q_ids_BT, k_ids_BS, offset_B)
        meets = jnp.swapaxes(meets, 1, 2) if plan.per_key_block else meets[..., ::-1]  # the last keys come first
        others, row = jnp.arange(plan._others), jnp.arange(plan._rows)
        order = jnp.sort(jnp.where(meets, others, others + plan._others)) % plan._others
        found["order"] = (order if plan.per_key_block else plan.nk - 1 - order)[..., : plan.steps]
        found["count"] = count = meets.sum(-1)
        before = lax.cummax(jnp.where(count > 0, row, -1), axis=1)
        found["held"] = jnp.where(before < 0, jnp.argmax(count > 0, 1)[:, None], before)
        found["q_one"] = _summary(q_ids_BT, plan.nq, PADDING_Q)[2]
        found["k_one"] = _summary(k_ids_BS, plan.nk, PADDING_K)[2]
    return {name: x.astype(jnp.int32).reshape(-1) for name, x in found.items()}


def meet(plan: Plan, q_ids_BT: Any, k_ids_BS: Any, offset_B: Any) -> jax.Array:
    """[B, nq, nk]: whether any query of a block sees any key of another, by segments and positions.

    In packed rows, where ids go up by one at most, their least and greatest tell; else every two are compared.
    """
    B, offset = len(q_ids_BT), {"offset": offset_B}
    i, b = jnp.arange(plan.nq)[None, :, None], jnp.arange(B)[:, None, None]
    low, high = plan.keys_of(i, offset, b)
    near = (jnp.arange(plan.nk) >= low) & (jnp.arange(plan.nk) <= high)

    def by_range() -> jax.Array:
        least_q, most_q, _ = _summary(q_ids_BT, plan.nq, PADDING_Q)
        least_k, most_k, _ = _summary(k_ids_BS, plan.nk, PADDING_K)
        return (least_q[:, :, None] <= most_k[:, None]) & (most_q[:, :, None] >= least_k[:, None]) & near

    def of_block(given: tuple[Any, Any]) -> jax.Array:
        at, ids = given
        sees = ids[:, :, None] == k_ids_BS[:, None]
        by_position = plan.sees(plan.position(at, offset, b), 0, sees.shape[1:], 0)
        sees = sees if by_position is None else sees & by_position
        return sees.reshape(B, plan.block_q, plan.nk, plan.block_k).any((1, 3))

    def by_pair() -> jax.Array:  # a block at a time, for its memory
        ids = jnp.swapaxes(q_ids_BT.reshape(B, plan.nq, plan.block_q), 0, 1)
        return jnp.swapaxes(lax.map(of_block, (jnp.arange(plan.nq, dtype=jnp.int32), ids)), 0, 1)

    packed = _ascend(q_ids_BT, PADDING_Q) & _ascend(k_ids_BS, PADDING_K)
    if plan.causal or plan.window is not None:
        packed &= _in_place(plan, q_ids_BT, k_ids_BS, offset)
    return lax.cond(packed, by_range, by_pair)


def _in_place(plan: Plan, q_ids_BT: Any, k_ids_BS: Any, offset: Any) -> Any:
    """Whether queries have the ids of the keys at their positions."""
    if plan.T > plan.S:
        return False
    wanted = jnp.where(q_ids_BT == PADDING_Q, PADDING_K, q_ids_BT)[:, : plan.T]
    at = plan._offset(offset, slice(None))
    if isinstance(at, int):
        return 0 <= at <= plan.S - plan.T and (wanted == k_ids_BS[:, at : at + plan.T]).all()
    given = jax.vmap(lambda ids, n: lax.dynamic_slice(ids, (n,), (plan.T,)))(k_ids_BS, at)
    return (wanted == given).all() & ((at >= 0) & (at <= plan.S - plan.T)).all()


def _ascend(ids: jax.Array, padding: int) -> jax.Array:
    """Whether ids begin anywhere and go up by one at most, and padding comes last."""
    now, then = ids[:, :-1], ids[:, 1:]
    return ((then == padding) | ((now != padding) & ((then == now) | (then == now + 1)))).all()


def padded_ids(ids: jax.Array, length: int, padding: int) -> jax.Array:
    ids = jnp.where(ids == 0, padding, ids.astype(jnp.int32))
    return jnp.pad(ids, [(0, 0), (0, length - ids.shape[1])], constant_values=padding)


def _summary(ids: jax.Array, blocks: int, padding: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block: its least and greatest id without padding, and its id if it is the only one, else `padding`."""
    ids = ids.reshape(len(ids), blocks, -1)
    real, info = ids != padding, jnp.iinfo(jnp.int32)
    least = jnp.where(real, ids, info.max).min(-1)
    most = jnp.where(real, ids, info.min).max(-1)
    return least, most, jnp.where(real.all(-1) & (least == most), least, padding)


def _floor(x: Any, block: int) -> Any:
    """x // block. Shifts, as the static profiler does not follow what a traced division becomes."""
    return x // block if isinstance(x, int) else jnp.right_shift(x, jnp.int32(block.bit_length() - 1))


def _min(x: Any, y: Any) -> Any:
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def _max(x: Any, y: Any) -> Any:
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)
