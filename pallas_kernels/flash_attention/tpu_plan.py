"""Which blocks of queries and keys meet, from program ids: shared by the forward and the backward kernel.

A block pair is empty (never loaded), full (every query sees every key, no mask) or an edge. Where keys pad the array to
whole blocks there is an edge too, unless causality hides them anyway.

Shapes: B batch rows, T queries, S keys, nq and nk blocks of them.
"""

import dataclasses
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
    every_pair: bool = False  # visits the empty pairs too: a gradient of a bias has to be written everywhere
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
        return self._rows, self.steps(self.per_key_block)

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

    def keys_of(self, i: Any, tables: Any, b: Any) -> tuple[Any, Any]:
        """The first and the last key block that query block i may see; last < first if there is none."""
        low, high = 0, self.nk - 1
        if self.every_pair:
            return low, high
        first = i * self.block_q + self._offset(tables, b)
        last = first + self.block_q - 1
        if self.causal:
            high = _min(high, _floor(last, self.block_k))
        elif self.window is not None:
            high = _min(high, _floor(last + self.window - 1, self.block_k))
        if self.window is not None:
            low = _max(low, _floor(first - self.window + 1, self.block_k))
        if self.segments and tables is not None:
            low = _max(low, tables["keys_low"][b * self.nq + i])
            high = _min(high, tables["keys_high"][b * self.nq + i])
        return low, high

    def queries_of(self, j: Any, tables: Any, b: Any) -> tuple[Any, Any]:
        """The first and the last query block that may see key block j: the inverse."""
        low, high = 0, self.nq - 1
        if self.every_pair:
            return low, high
        first = j * self.block_k - self._offset(tables, b)
        last = first + self.block_k - 1
        if self.causal:
            low = _max(low, _floor(first, self.block_q))
        elif self.window is not None:
            low = _max(low, _floor(first - self.window + 1, self.block_q))
        if self.window is not None:
            high = _min(high, _floor(last + self.window - 1, self.block_q))
        if self.segments and tables is not None:
            low = _max(low, tables["queries_low"][b * self.nk + j])
            high = _min(high, tables["queries_high"][b * self.nk + j])
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

    def steps(self, per_key_block: bool) -> int:
        """The most blocks that any block of the other side meets, at least 1."""
        of, blocks = (self.queries_of, self.nk) if per_key_block else (self.keys_of, self.nq)
        if self.offset is None:
            return self.nq if per_key_block else self.nk
        ranges = (of(n, None, 0) for n in range(blocks))
        return max(1, *(high - low + 1 for low, high in ranges))


def _all(masks: list[Any]) -> Any:
    if not masks:
        return None
    result = masks[0]
    for more in masks[1:]:
        result = result & more
    return result


def tables(plan: Plan, q_ids_BT: Any, k_ids_BS: Any, offset_B: Any) -> dict[str, jax.Array]:
    """What the kernels read from scalar memory, O(blocks), flat [B * blocks] int32; empty when all is static.

    For segments: the range of blocks that hold any id between a block's least and greatest, and for blocks of one
    segment only, its id. `q_ids_BT` and `k_ids_BS` come padded, as `padded_ids` makes them.
    """
    found: dict[str, jax.Array] = {}
    if plan.offset is None:
        found["offset"] = offset_B.astype(jnp.int32)
    if plan.segments:
        least_q, most_q, one_q = _summary(q_ids_BT.reshape(len(q_ids_BT), plan.nq, -1), PADDING_Q)
        least_k, most_k, one_k = _summary(k_ids_BS.reshape(len(k_ids_BS), plan.nk, -1), PADDING_K)
        meet = (least_q[:, :, None] <= most_k[:, None]) & (most_q[:, :, None] >= least_k[:, None])
        for name, meets, n in (("keys", meet, plan.nk), ("queries", jnp.swapaxes(meet, 1, 2), plan.nq)):
            some = meets.any(-1)
            found[f"{name}_low"] = jnp.where(some, jnp.argmax(meets, -1), n)
            found[f"{name}_high"] = jnp.where(some, n - 1 - jnp.argmax(meets[..., ::-1], -1), -1)
        found |= {"q_one": one_q, "k_one": one_k}
    return {name: x.astype(jnp.int32).reshape(-1) for name, x in found.items()}


def padded_ids(ids: jax.Array, length: int, padding: int) -> jax.Array:
    ids = jnp.where(ids == 0, padding, ids.astype(jnp.int32))
    return jnp.pad(ids, [(0, 0), (0, length - ids.shape[1])], constant_values=padding)


def _summary(ids: jax.Array, padding: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block: its least and greatest id without padding, and its id if it is the only one, else `padding`."""
    real, info = ids != padding, jnp.iinfo(jnp.int32)
    least = jnp.where(real, ids, info.max).min(-1)
    most = jnp.where(real, ids, info.min).max(-1)
    return least, most, jnp.where(real.all(-1) & (least == most), least, padding)


def _floor(x: Any, block: int) -> Any:
    """x // block. Shifts, as the static profiler does not follow what a traced division becomes."""
    return x // block if isinstance(x, int) else lax.shift_right_arithmetic(x, jnp.int32(block.bit_length() - 1))


def _min(x: Any, y: Any) -> Any:
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def _max(x: Any, y: Any) -> Any:
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)
