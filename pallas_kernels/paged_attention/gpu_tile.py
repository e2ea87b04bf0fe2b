"""A tile of queries against a part of its request's context, for the kernels of `gpu.py`.

A tile is up to t query tokens of which each row has a position of its own: a prompt's next tokens, one decode, or
decodes of several requests over pages that they share. All have the same shape and go through the same operations, so
that a row is rounded alike in each.

Shapes: S slots a page, K key/value heads, G query heads for each (padded to a power of two; of a latent, those of one
program), D head size, V size of a value; t: the tokens of a tile, r = t * G their rows; N: tiles.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2E = math.log2(math.e)
MOST_LANES = 128
NEW = ("new_k", "new_v", "new_scales")  # the new tokens, in kernels that write them
UNSEEN = -(2.0**100)  # stands for -inf where a difference of two of them must not be nan


@dataclass(frozen=True)
class Plan:
    """The static part of a call. `groups`: programs of a key head; `tokens` of a tile; `part`: pages."""

    window: int | None
    softcap: float | None
    scale: float
    K: int
    G: int
    groups: int
    tokens: int
    part: int

    @property
    def rows(self) -> int:
        return self.tokens * self.G

    def place(self, program: Any) -> tuple[Any, Any]:
        """A program's key head, and its query heads among those of this one."""
        if self.groups == 1:
            return program, pl.ds(0, self.G)
        return lax.div(program, self.groups), pl.ds(lax.rem(program, self.groups) * self.G, self.G)

    def of_tokens(self, x_t: jax.Array) -> jax.Array:
        """[r] from [t]."""
        return jnp.broadcast_to(x_t[:, None], (self.tokens, self.G)).reshape(self.rows)


class Tile(NamedTuple):
    """A row of the tiles' table, [N, 8].

    Attributes:
      request: whose pages these are. row, count: its tokens among the queries. low, high: the pages that it sees.
      last: the largest position that it sees. first_new, new_row: the position of the request's first new token, and
        that token's row: from there on keys come from the new ones, not from the pages.
    """

    request: Any
    row: Any
    count: Any
    low: Any
    high: Any
    last: Any
    first_new: Any
    new_row: Any

    def parts(self, plan: Plan) -> tuple[Any, Any]:
        """The parts [first, end) that it sees."""
        return lax.div(self.low, jnp.int32(plan.part)), lax.div(self.high + (plan.part - 1), jnp.int32(plan.part))


def read_tile(refs: Any, i: Any) -> Tile:
    return Tile(*(refs["tiles"][i, column] for column in range(len(Tile._fields))))


def lanes_of(size: int) -> list[Any]:
    """A head's numbers in powers of 2, which is what Triton's arrays are made of, and not more of them than registers
    hold beside others: 80 = 64 + 16, 576 = 4 * 128 + 64."""
    found, first = [], 0
    while first < size:
        width = min(MOST_LANES, 1 << ((size - first).bit_length() - 1))
        found.append(pl.ds(first, width))
        first += width
    return found


def start(plan: Plan, refs: Any, place: Any, V: int) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The state of a softmax over no keys yet, but for the sinks: values, maxima and sums."""
    head, heads = place
    values, top_r, total_r = nothing(plan, V)
    if "sinks" not in refs:
        return values, top_r, total_r
    sink_G = refs["sinks"][head, heads]
    sink_r = jnp.broadcast_to(sink_G[None], (plan.tokens, plan.G)).reshape(plan.rows)
    return values, jnp.maximum(sink_r, UNSEEN), total_r + 1.0


def nothing(plan: Plan, V: int) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    zeros_r = jnp.zeros((plan.rows,), jnp.float32)
    values = tuple(jnp.zeros((plan.rows, lanes.size), jnp.float32) for lanes in lanes_of(V))
    return values, zeros_r + UNSEEN, zeros_r


def combine(one: Any, other: Any) -> Any:
    (acc, top, total), (new_acc, new_top, new_total) = one, other
    highest = jnp.maximum(top, new_top)
    keep, take = jnp.exp2(top - highest), jnp.exp2(new_top - highest)
    acc = tuple(x * keep[:, None] + y * take[:, None] for x, y in zip(acc, new_acc, strict=True))
    return acc, highest, total * keep + new_total * take


def queries(plan: Plan, refs: Any, tile: Tile, place: Any) -> list[jax.Array]:
    """[r, lanes] for each of a head's lanes; other tokens' in rows that are no real one's."""
    head, heads = place
    rows = pl.ds(tile.row, plan.tokens)
    return [refs["q"][rows, head, heads, lanes].reshape(plan.rows, -1) for lanes in lanes_of(refs["q"].shape[3])]


def attend_part(plan: Plan, refs: Any, tile: Tile, head: Any, q: list[jax.Array], p: Any) -> Any:
    """The softmax over part p of a tile's pages: values, maxima and sums."""
    S, V, layer = refs["v"].shape[3], refs["v"].shape[4], refs["layer"][0]
    D, dtype = refs["k"].shape[3], q[0].dtype
    is_real_t = jnp.arange(plan.tokens, dtype=jnp.int32) < tile.count
    position_r = plan.of_tokens(jnp.where(is_real_t, refs["position"][pl.ds(tile.row, plan.tokens)], -1))

    def page(j: Any, state: Any, has_new: bool) -> Any:
        acc, top_r, total_r = state
        number = refs["table"][tile.request, j]
        s_S = j * S + jnp.arange(S, dtype=jnp.int32)
        is_new_S = s_S >= tile.first_new
        # Where the tokens of this page are, or would be, among the new ones, which have S more on both sides.
        near = pl.ds(tile.new_row + j * S - tile.first_new + S, S)
        # Slots beyond the request may hold what another one left, even nan, which a weight of 0 would not hide.
        is_mine_S = s_S <= tile.last
        sees_rS = s_S[None] <= position_r[:, None]
        if plan.window is not None:
            sees_rS &= s_S[None] > position_r[:, None] - plan.window

        def keys(lanes: Any) -> jax.Array:
            old_DS = refs["k"][layer, number, head, lanes, :].astype(dtype)
            if not has_new:
                return old_DS
            return jnp.where(is_new_S[None], refs["new_k"][head, lanes, near].astype(dtype), old_DS)

        def values(lanes: Any) -> jax.Array:
            v_SV = refs["v"][layer, number, head, :, lanes].astype(dtype)
            if has_new:
                v_SV = jnp.where(is_new_S[:, None], refs["new_v"][head, near, lanes].astype(dtype), v_SV)
            return jnp.where(is_mine_S[:, None], v_SV, 0)

        def scales(of_values: int) -> jax.Array:
            old_S = refs["scales"][layer, number, head, pl.ds(of_values * S, S)]
            return jnp.where(is_new_S, refs["new_scales"][of_values, head, near], old_S) if has_new else old_S

        products = (_dot(x, keys(lanes)) for x, lanes in zip(q, lanes_of(D), strict=True))
        x_rS = functools.reduce(jnp.add, products) * plan.scale
        if "scales" in refs:
            x_rS *= scales(0)[None]
        if plan.softcap is not None:
            x_rS = plan.softcap * (1.0 - 2.0 / (1.0 + jnp.exp2(x_rS * (2 * LOG2E / plan.softcap))))
        x_rS = jnp.where(sees_rS, x_rS * LOG2E, UNSEEN)
        new_top_r = jnp.maximum(top_r, x_rS.max(axis=1))
        keep_r = jnp.exp2(top_r - new_top_r)
        p_rS = jnp.where(sees_rS, jnp.exp2(x_rS - new_top_r[:, None]), 0.0)
        total_r = total_r * keep_r + p_rS.sum(axis=1)
        if "scales" in refs:
            p_rS = jnp.where(sees_rS, p_rS * scales(1)[None], 0.0)
        p_rS = p_rS.astype(dtype)
        pairs = zip(acc, lanes_of(V), strict=True)
        return tuple(x * keep_r[:, None] + _dot(p_rS, values(lanes)) for x, lanes in pairs), new_top_r, total_r

    first, end = jnp.maximum(tile.low, p * plan.part), jnp.minimum(tile.high, (p + 1) * plan.part)
    state = nothing(plan, V)
    if "new_k" not in refs:
        return lax.fori_loop(first, end, lambda j, x: page(j, x, False), state)
    turn = jnp.clip(lax.div(tile.first_new, jnp.int32(S)), first, jnp.maximum(first, end))
    state = lax.fori_loop(first, turn, lambda j, x: page(j, x, False), state)
    # No fori_loop, for which Triton loads ahead: the few pages of new tokens are not worth the registers.
    _, state = lax.while_loop(lambda x: x[0] < end, lambda x: (x[0] + 1, page(x[0], x[1], True)), (turn, state))
    return state


def write_tile(refs: Any, tile: Tile, head: Any) -> None:
    """A tile's new tokens into their pages, of one key head; those whose page does not exist are dropped."""
    layer, S, (_, P) = refs["layer"][0], refs["v"].shape[3], refs["v"].shape[:2]
    M = refs["wanted"].shape[1]

    def token(n: Any, _: None) -> None:
        row = tile.row + n
        position = refs["position"][row]
        entry, slot = lax.div(position, jnp.int32(S)), lax.rem(position, jnp.int32(S))
        page = refs["wanted"][tile.request, jnp.clip(entry, 0, M - 1)]
        exists = (position >= 0) & (entry < M) & (page >= 0) & (page < P)
        page, slot, from_row = jnp.clip(page, 0, P - 1), jnp.maximum(slot, 0), row + S

        def store(target: Any, x: jax.Array) -> None:
            plgpu.store(target, x, mask=jnp.broadcast_to(exists, x.shape))

        for lanes in lanes_of(refs["k"].shape[3]):
            store(refs["k_out"].at[layer, page, head, lanes, slot], refs["new_k"][head, lanes, from_row])
        for lanes in lanes_of(refs["v"].shape[4]):
            store(refs["v_out"].at[layer, page, head, slot, lanes], refs["new_v"][head, from_row, lanes])
        if "scales" in refs:
            for of_values in range(2):
                target = refs["scales_out"].at[layer, page, head, pl.ds(of_values * S + slot, 1)]
                store(target, refs["new_scales"][of_values, head, pl.ds(from_row, 1)])

    lax.fori_loop(0, tile.count, token, None)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
