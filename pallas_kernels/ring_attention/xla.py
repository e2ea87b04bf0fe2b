"""Ring attention by collective permutes, blockwise in between: the local products are `flash_attention`'s.

Device d of n holds chunks d and 2n - 1 - d of 2n (`zigzag`). Its own queries meet its own keys; every other pair of
devices (i with the queries, j with the keys) meets once, somewhere, and half of its products count: what causality
empties is never computed, and every meeting costs the same. Partial outputs merge by their log-sum-exp.

- One way (Liu et al. 2023, arXiv:2310.01889): keys and values go from device d to d + 1, n - 1 times. In the backward
  pass they do so again, and the sums of their gradients follow them until they are home.
- Two ways (after TokenRing, Wang et al. 2024, arXiv:2412.20501): keys and values make only the first a = n // 2 of
  these hops. The other b = (n - 1) // 2 meetings are at the keys' home: queries jump b devices ahead and come home hop
  by hop, against the keys, gathering their outputs. Backward likewise: queries and their output's gradient come round
  and gather dq; the sums of dk and dv follow the keys, and jump home when these are through.
- A window that does not reach around the ring leaves out the hops of which nobody has a use.

Bytes that a device sends, each direction (segment ids and numbers a row left out): B T D = 1, elements have e bytes and
sums s, which is 4 (8 for float64). A jump is one message that crosses several links.

                     with the keys                             against them
  one way  forward   (n - 1) 2Ke                               0
           backward  (n - 1) 2K(e + s)                         0
  two ways forward   a 2Ke + a jump of He                      (b - 1) He + b Hs
           backward  a 2Ke + (a - 1) 2Ks + a jump of 2He       (b - 1) 2He + b Hs + a jump of 2Ks

So two ways pay where there are as many key heads as query heads, and not where few key heads serve many queries.

What the next meeting needs is sent off before this one is computed, and sums travel one meeting behind what they
belong to: no product waits for a message that it does not use. The meetings are turns of a loop, so the program does
not grow with n, and beside what is in use there is only what comes next: never a whole row.

Shapes: B rows, T tokens of a device, C of a chunk (two make T), H query heads, K key/value heads, D head size.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..flash_attention import flash_attention, flash_attention_backward


@dataclass(frozen=True)
class _Ring:
    """The static part of a call: n devices on `axis` with chunks of C tokens, two each."""

    axis: str
    n: int
    C: int
    window: int | None
    scale: float | None
    softcap: float | None
    two_way: bool

    def paths(self) -> tuple[list[int], list[int]]:
        """Where the keys visit: hops from home; and where the queries do, nearer at each step."""
        reach = self.n - 1
        if self.window is not None:  # chunks further apart than this see nothing of each other
            reach = min(reach, (self.window + self.C - 2) // self.C)
        if self.two_way:
            away = min(reach, (self.n - 1) // 2)
            return list(range(1, min(reach, self.n // 2) + 1)), list(range(away, 0, -1))
        return sorted({*range(1, reach + 1), *range(self.n - reach, self.n)}), []


@dataclass(frozen=True)
class _Lap:
    """One meeting of travelling keys, and perhaps one of travelling queries. A number of hops is 0 where nothing moves.

    Attributes:
        keys_from, keys_to: hops since the keys' last meeting, and to their next.
        queries: whether queries meet keys at the keys' home. queries_from, queries_to: as for the keys.
    """

    keys_from: int
    keys_to: int
    queries: bool
    queries_from: int
    queries_to: int


def ring_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    axis: str,
    segment_ids_BT: jax.Array | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks_H: jax.Array | None,
    two_way: bool,
) -> jax.Array:
    o = _Ring(axis, jax.lax.axis_size(axis), q_BTHD.shape[1] // 2, window, scale, softcap, two_way)
    return _attention(o, q_BTHD, k_BTKD, v_BTKD, segment_ids_BT, sinks_H)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    o: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, sinks: jax.Array | None
) -> jax.Array:
    return _forward(o, q, k, v, ids, sinks)[0].astype(q.dtype)


def _attention_forward(
    o: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, sinks: jax.Array | None
) -> Any:
    out, lse = _forward(o, q, k, v, ids, sinks)
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, sinks, out, lse)


def _forward(
    o: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The output, not yet rounded, and the log-sum-exp of this device's queries."""
    me = jax.lax.axis_index(o.axis)
    rows, keys = (q, ids), (k, v, ids)
    nothing = _no_output(q, v)

    def lap(kind: _Lap, keys_at: Any, queries_at: Any, carry: Any) -> Any:
        guest_keys, guest_rows, found, guest_found = carry
        next_keys = _send(o, guest_keys, kind.keys_to)
        next_rows = _send(o, guest_rows, -kind.queries_to)
        found = _attend(o, found, rows, guest_keys, (me, _origin(o, me, keys_at)))
        if kind.queries:
            arrived = _send(o, guest_found, -kind.queries_from) if kind.queries_from else nothing
            guest_rows, keys_then, found = _settled((guest_rows, keys, found))
            guest_found = _attend(o, arrived, guest_rows, keys_then, (_origin(o, me, queries_at), me))
        return next_keys, next_rows, found, guest_found

    keys_path, queries_path = o.paths()
    guest_keys = _send(o, keys, keys_path[0]) if keys_path else None
    guest_rows = _send(o, rows, queries_path[0]) if queries_path else None
    found = _attend(o, nothing, rows, keys, (me, me), own=True)
    carry = (guest_keys, guest_rows, found, None)
    *_, found, guest_found = _laps(keys_path, queries_path, lap, carry, keys_gather=False)
    found = _merge(found, _send(o, guest_found, -queries_path[-1])) if queries_path else found
    if sinks is None:
        return found
    # One more key, without a value. Queries that see nothing but it, padding, stay at zero.
    out, lse = found
    sunk = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    return out * jnp.exp(lse - sunk)[..., None], sunk


def _attention_backward(o: _Ring, residuals: Any, d_out: jax.Array) -> Any:
    # Settled, or a compiler may see that some messages are those of the forward pass, and keep these until now.
    (q, k, v, ids, sinks, out, lse), d_out = _settled((residuals, d_out))
    me, wide = jax.lax.axis_index(o.axis), lse.dtype
    delta = (out.astype(wide) * d_out.astype(wide)).sum(-1)
    rows, keys = (q, ids, d_out, lse, delta), (k, v, ids)

    def lap(kind: _Lap, keys_at: Any, queries_at: Any, carry: Any) -> Any:
        guest_keys, guest_rows, dq, dkv, guest_dkv, guest_dq = carry
        next_keys = _send(o, guest_keys, kind.keys_to)
        next_rows = _send(o, guest_rows, -kind.queries_to)
        arrived = _send(o, guest_dkv, kind.keys_from) if kind.keys_from else _zeros((k, v))
        dq, guest_dkv = _attend_back(o, dq, arrived, rows, guest_keys, (me, _origin(o, me, keys_at)))
        if kind.queries:
            arrived = _send(o, guest_dq, -kind.queries_from) if kind.queries_from else _zeros(q)
            guest_rows, keys_then, dq, guest_dkv = _settled((guest_rows, keys, dq, guest_dkv))
            dkv = _zeros((k, v)) if dkv is None else dkv
            guest_dq, dkv = _attend_back(o, arrived, dkv, guest_rows, keys_then, (_origin(o, me, queries_at), me))
        return next_keys, next_rows, dq, dkv, guest_dkv, guest_dq

    keys_path, queries_path = o.paths()
    guest_keys = _send(o, keys, keys_path[0]) if keys_path else None
    guest_rows = _send(o, rows, queries_path[0]) if queries_path else None
    carry = (guest_keys, guest_rows, _zeros(q), None, None, None)
    carry = _laps(keys_path, queries_path, lap, carry, keys_gather=True)
    rows, keys, (*_, dq, dkv, guest_dkv, guest_dq) = _settled((rows, keys, carry))
    # Its own keys come last, while what it lent comes home.
    if keys_path:
        home = _send(o, guest_dkv, -keys_path[-1])
        dkv = home if dkv is None else _add(dkv, home)
    if queries_path:
        dq = dq + _send(o, guest_dq, -queries_path[-1])
    dq, dkv = _attend_back(o, dq, _zeros((k, v)) if dkv is None else dkv, rows, keys, (me, me), own=True)
    # A sink's share of a softmax takes from all values of it.
    d_sinks = None if sinks is None else -(jnp.exp(sinks.astype(wide) - lse) * delta).sum((0, 1)).astype(sinks.dtype)
    return *(grad.astype(x.dtype) for grad, x in zip((dq, *dkv), (q, k, v), strict=True)), None, d_sinks


_attention.defvjp(_attention_forward, _attention_backward)


def _laps(keys_path: list[int], queries_path: list[int], lap: Callable[..., Any], carry: Any, keys_gather: bool) -> Any:
    """`carry = lap(kind, keys_at, queries_at, carry)` along both paths; equal laps in a row are turns of one loop.

    Where the keys gather no sums, a first lap is as any other.
    """
    # The queries' path may be one shorter; its first lap is then left out, in which they are still on their way.
    queries_path = [0] * (len(keys_path) - len(queries_path)) + queries_path
    kinds = []
    for r in range(len(keys_path)):
        (keys_from, keys_to), (queries_from, queries_to) = _hops(keys_path, r), _hops(queries_path, r)
        kinds.append(_Lap(keys_from * keys_gather, keys_to, queries_path[r] > 0, -queries_from, -queries_to))
    first = 0
    for kind, group in itertools.groupby(kinds):
        turns = len(list(group))
        body = partial(_turn, lap, kind, keys_path[first], queries_path[first])
        # One turn is no loop: its carry may change its structure.
        carry = body(0, carry) if turns == 1 else jax.lax.fori_loop(0, turns, body, carry)
        first += turns
    return carry


def _turn(lap: Callable[..., Any], kind: _Lap, keys_at: int, queries_at: int, turn: Any, carry: Any) -> Any:
    return lap(kind, keys_at + turn, queries_at - turn, _settled(carry))


def _hops(path: list[int], r: int) -> tuple[int, int]:
    """From the stop before stop r, and to the one after; 0 at the ends."""
    before = path[r] - path[r - 1] if r and path[r - 1] else 0
    after = path[r + 1] - path[r] if r + 1 < len(path) and path[r] else 0
    return before, after


def _settled(x: Any) -> Any:
    """`x`, of which nothing is used before all is there, so that meetings do not hold memory for each other."""
    return jax.lax.optimization_barrier(x)


def _send(o: _Ring, x: Any, hops: int) -> Any:
    """Every array of `x` goes `hops` devices on; with 0, nothing moves."""
    if hops % o.n == 0:
        return x
    there = [(d, (d + hops) % o.n) for d in range(o.n)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, o.axis, there), x)


def _origin(o: _Ring, me: jax.Array, hops: Any) -> jax.Array:
    """The device whose part has come `hops` to get here."""
    return (me - hops) % o.n


def _meet(
    o: _Ring, local: Callable[..., Any], rows: Any, keys: Any, pair: tuple[Any, Any], own: bool
) -> list[tuple[Any, Any, Any]]:
    """`local(rows, keys, **how they see)` of what is not empty: (chunk of the queries, chunk of the keys, result).

    `pair` is the device of the queries and that of the keys; `own` says that they are the same. No chunk (None) is both
    at once. One after the other, so that the scratch is that of one.
    """
    i, j = pair
    if own and (o.window is None or o.n == 1):  # in the order of the row, if not without gaps
        return [(None, None, local(rows, keys, causal=True, window=o.window))]
    chunks: tuple[tuple[Any, Any], ...]
    late = 2 * o.n - 1 - i - j  # chunks from the early one of the keys to the late one of the queries
    if own:
        chunks, apart = ((0, 0), (1, 1), (1, 0)), (0, 0, late)
    else:
        # Late queries see early keys. Beside that, early queries see them if they come from before, and late queries
        # see late keys otherwise.
        half = jnp.where(i > j, 0, 1)
        chunks, apart = ((1, 0), (half, half)), (late, jnp.abs(i - j))

    def one(turn: tuple[jax.Array, jax.Array]) -> Any:
        (row, key), apart = turn
        within = {"causal": True, "window": o.window, "q_offset": apart * o.C}
        seeing = {"causal": False} if o.window is None else within
        return local(_take(rows, row), _take(keys, key), **seeing)

    found = jax.lax.map(one, (jnp.asarray(chunks), jnp.asarray(apart)))
    return [(row, key, jax.tree.map(lambda a, m=m: a[m], found)) for m, (row, key) in enumerate(chunks)]


def _attend(o: _Ring, found: Any, rows: Any, keys: Any, pair: tuple[Any, Any], own: bool = False) -> Any:
    """(output, log-sum-exp) of queries, `found` before, with these keys in view too."""

    def local(rows: Any, keys: Any, **seeing: Any) -> Any:
        (q, q_ids), (k, v, k_ids) = rows, keys
        options = {"q_segment_ids_BT": q_ids, "kv_segment_ids_BS": k_ids, "scale": o.scale, "softcap": o.softcap}
        return flash_attention(q, k, v, **options, **seeing, return_lse=True)

    for row, _, more in _meet(o, local, rows, keys, pair, own):
        found = _put(_merge, found, more, row)
    return found


def _attend_back(
    o: _Ring, dq: jax.Array, dkv: Any, rows: Any, keys: Any, pair: tuple[Any, Any], own: bool = False
) -> tuple[jax.Array, Any]:
    """dq and (dk, dv), with what these queries and keys pass each other added."""

    def local(rows: Any, keys: Any, **seeing: Any) -> Any:
        (q, q_ids, d_out, lse, delta), (k, v, k_ids) = rows, keys
        options = {"q_segment_ids_BT": q_ids, "kv_segment_ids_BS": k_ids, "scale": o.scale, "softcap": o.softcap}
        return flash_attention_backward(q, k, v, d_out, lse, delta, **options, **seeing)

    for row, key, (more_dq, *more_dkv) in _meet(o, local, rows, keys, pair, own):
        dq, dkv = _put(_add, dq, more_dq, row), _put(_add, dkv, tuple(more_dkv), key)
    return dq, dkv


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)


def _no_output(q: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = _zeros(jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), q.dtype))
    return out, jnp.full(q.shape[:3], -jnp.inf, out.dtype)


def _merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two outputs over different keys as one over all of them, each given with its log-sum-exp."""
    (out, lse), (more_out, more_lse) = one, other
    top = jnp.maximum(lse, more_lse)
    top = jnp.where(top > -jnp.inf, top, 0)
    part, more_part = jnp.exp(lse - top), jnp.exp(more_lse - top)
    whole = part + more_part
    safe = jnp.where(whole > 0, whole, 1)
    merged = out * (part / safe)[..., None] + more_out * (more_part / safe)[..., None]
    return merged, jnp.where(whole > 0, top + jnp.log(safe), -jnp.inf)


def _add(x: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, x, more)


def _take(x: Any, chunk: Any) -> Any:
    """A chunk, 0 or 1, of the tokens of every array of `x`."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, chunk * (a.shape[1] // 2), a.shape[1] // 2, 1), x)


def _put(combine: Callable[[Any, Any], Any], x: Any, more: Any, chunk: Any) -> Any:
    """`x` after `combine` of a chunk of it (or with None of all) with `more`."""
    if chunk is None:
        return combine(x, more)
    new = combine(_take(x, chunk), more)
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, chunk * b.shape[1], 1), x, new)
