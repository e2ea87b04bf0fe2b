"""Paged attention on NVIDIA GPUs, by Pallas's Triton backend.

A request's context is cut into parts of about `PART` tokens, counted from its first. A part's softmax goes page by
page, and parts are merged in their order. Decoding gives each part a program of its own and merges them in a second
kernel (Flash-Decoding, Dao et al. 2023), so that few long requests fill a GPU too; a prompt's tile goes through its
parts in one program. Either way the same parts are merged in the same order, whatever else is in the batch.

New tokens are written before, by XLA's scatter. Shared prefixes are read for each request.

There was no GPU when this was written: the numbers are those of Pallas's interpreter, registers and spills are ptxas's,
nothing has been timed, and that a decode rounds as a prompt's tile does has not been tried on one.

Shapes: T token rows, R requests, M pages a request, S slots a page, K key/value heads, G query heads for each (padded
to a power of two; of a latent, those of one program), D head size, V size of a value; t: the tokens of a tile,
r = t * G their rows; N: tiles; P: parts.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..chips import known_platform, target_chip
from .batch import SharedPrefixes, token_rows, write
from .pages import Pages

ROWS = 64  # of a prompt's tile
FEWEST = 16  # rows that a product of Triton's takes
PART = 512  # tokens
WIDE = 256  # larger heads (those of a latent) leave registers for `FEWEST` rows only
WIDEST = 1024
LOG2E = math.log2(math.e)
UNSEEN = -(2.0**100)  # stands for -inf where a difference of two of them must not be nan


@dataclass(frozen=True)
class _Plan:
    """The static part of a call."""

    window: int | None
    softcap: float | None
    scale: float
    K: int
    G: int
    groups: int
    tokens: int  # of a tile
    part: int  # pages of a part

    @property
    def rows(self) -> int:
        return self.tokens * self.G

    def place(self, program: Any) -> tuple[Any, Any]:
        """A program's key head, and its query heads among those of this one."""
        if self.groups == 1:
            return program, pl.ds(0, self.G)
        return lax.div(program, self.groups), pl.ds(lax.rem(program, self.groups) * self.G, self.G)


def paged_attention(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKV: jax.Array | None,
    pages: Pages,
    *,
    layer: int | jax.Array,
    page_table_RM: jax.Array,
    lengths_R: jax.Array,
    query_start_R: jax.Array,
    query_length_R: jax.Array,
    decode_rows: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: jax.Array | None,
    prefixes: SharedPrefixes | None,
) -> tuple[jax.Array, Pages]:
    if known_platform() not in (None, "cuda"):
        raise NotImplementedError(f"this kernel is for NVIDIA GPUs, and the program is for a {known_platform()}")
    return attend(
        q_THD, k_TKD, v_TKV, pages, layer, page_table_RM, lengths_R, query_start_R, query_length_R, decode_rows, window,
        scale, softcap, sinks_H,
    )  # fmt: skip


def attend(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKV: jax.Array | None,
    pages: Pages,
    layer: int | jax.Array,
    page_table_RM: jax.Array,
    lengths_R: jax.Array,
    query_start_R: jax.Array,
    query_length_R: jax.Array,
    decode_rows: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: jax.Array | None,
) -> tuple[jax.Array, Pages]:
    """`paged_attention`, for whatever platform it is lowered for."""
    _check(q_THD, pages)
    (T, H, _), R, K = q_THD.shape, page_table_RM.shape[0], k_TKD.shape[1]
    owners = token_rows(T, lengths_R, query_start_R, query_length_R)
    pages = write(pages, layer, k_TKD, v_TKV, owners, page_table_RM)
    table_RM = jnp.clip(page_table_RM, 0, pages.num_pages - 1).astype(jnp.int32)
    first_R = (lengths_R - query_length_R).astype(jnp.int32)  # position of the first new token
    r_R = jnp.arange(R, dtype=jnp.int32)
    in_decode_R = (query_length_R == 1) & (query_start_R == r_R) & (r_R < decode_rows)
    G, part = H // K, max(1, PART // pages.page_size)
    wide = pages.head_dim > WIDE
    out_THV = jnp.zeros((T, H, pages.value_dim), q_THD.dtype)
    common = (pages, jnp.asarray(layer, jnp.int32).reshape(1), table_RM, sinks_H)
    if decode_rows:
        N = min(decode_rows, R)
        plan = _Plan(window, softcap, scale, K, *_heads(G, wide, FEWEST), 1, part)
        tiles = jnp.stack([r_R[:N], r_R[:N], first_R[:N], in_decode_R[:N].astype(jnp.int32)], -1)
        decoded_NKGV = _decode(plan, _grouped(q_THD[:N], plan), tiles, *common)
        decoded_NHV = decoded_NKGV[:, :, :G].reshape(N, *out_THV.shape[1:])
        out_THV = out_THV.at[:N].set(jnp.where(in_decode_R[:N, None, None], decoded_NHV, 0))
    if decode_rows < T:
        padded, groups = _heads(G, wide, 1)
        rows = FEWEST if wide else ROWS // 2 if pages.head_dim > 128 else ROWS
        plan = _Plan(window, softcap, scale, K, padded, groups, max(1, rows // padded), part)
        tiles = _tiles(plan.tokens, T - decode_rows, jnp.where(in_decode_R, 0, query_length_R), query_start_R, first_R)
        q_TKGD = _grouped(jnp.pad(q_THD, ((0, plan.tokens), (0, 0), (0, 0))), plan)
        chunks_THV = _prompts(plan, q_TKGD, tiles, *common)[:T, :, :G].reshape(out_THV.shape)
        of_prompt_T = owners.owned_T & ~in_decode_R[owners.request_T]
        out_THV = jnp.where(of_prompt_T[:, None, None], chunks_THV, out_THV)
    return out_THV, pages


def _check(q_THD: jax.Array, pages: Pages) -> None:
    if pages.layout != "split":
        raise NotImplementedError("the Triton kernel wants pages of layout 'split'")
    if q_THD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Triton kernel takes bfloat16, float16 and float32, got {q_THD.dtype}")
    if not pages.quantised and pages.dtype != q_THD.dtype:
        raise NotImplementedError(
            f"the Triton kernel reads pages of the queries' dtype or quantised, got {pages.dtype}"
        )
    if pages.dtype == jnp.float8_e4m3fn and target_chip() in ("a100",):
        raise NotImplementedError("an A100 has no float8")
    for what, size in {"head size": pages.head_dim, "size of a value": pages.value_dim}.items():
        if size % FEWEST or size > WIDEST:
            raise NotImplementedError(f"the Triton kernel wants a {what} of 16, 32, 48, ..., {WIDEST}, got {size}")
    if pages.page_size not in (16, 32, 64, 128, 256):
        raise NotImplementedError(
            f"the Triton kernel wants pages of 16, 32, 64, 128 or 256 slots, got {pages.page_size}"
        )
    count = math.prod(pages.v_LPKSD.shape) if pages.v_LPKSD is not None else 0
    if 2**31 <= count < 2**32 and pages.dtype.itemsize == 1:
        raise NotImplementedError("Pallas addresses arrays of 2 to 4 GiB by 32 bits with a sign")


def _heads(G: int, wide: bool, fewest: int) -> tuple[int, int]:
    """Query heads of a program, a power of 2, and how many such groups a key head has."""
    padded = pl.next_power_of_2(G)
    mine = max(fewest, min(padded, FEWEST) if wide else padded)
    return mine, -(-padded // mine)


def _lanes(size: int) -> list[Any]:
    """A head's numbers as powers of 2, which is what Triton's arrays are made of: 80 = 64 + 16, 576 = 512 + 64."""
    powers = [bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]
    starts = [size >> (bit + 1) << (bit + 1) for bit in powers]
    return [pl.ds(start, 1 << bit) for start, bit in zip(starts, powers, strict=True)]


def _grouped(q_THD: jax.Array, plan: _Plan) -> jax.Array:
    T, H, D = q_THD.shape
    q_TKGD = q_THD.reshape(T, plan.K, H // plan.K, D)
    return jnp.pad(q_TKGD, ((0, 0), (0, 0), (0, plan.G * plan.groups - H // plan.K), (0, 0)))


def _tiles(t: int, rows: int, length_R: jax.Array, start_R: jax.Array, first_R: jax.Array) -> jax.Array:
    """[N, 4]: each tile's request, first token row, that token's position, and how many of its t tokens are real."""
    R = length_R.shape[0]
    end_R = jnp.cumsum(-(-length_R // t))
    i_N = jnp.arange(-(-rows // t) + R, dtype=jnp.int32)  # each request may end in a tile that is not full
    r_N = jnp.minimum(jnp.searchsorted(end_R, i_N, side="right"), R - 1)
    nth_N = (i_N - (end_R - -(-length_R // t))[r_N]) * t
    count_N = jnp.where(i_N < end_R[-1], jnp.clip(length_R[r_N] - nth_N, 0, t), 0)
    row_N = jnp.where(count_N > 0, start_R[r_N] + nth_N, 0)
    return jnp.stack([r_N, row_N, first_R[r_N] + nth_N, count_N], -1).astype(jnp.int32)


def _given(plan: _Plan, q: jax.Array, tiles: jax.Array, pages: Pages, layer: Any, table: Any, sinks_H: Any) -> Any:
    given = {"q": q, "tiles": tiles, "layer": layer, "table": table, "k": pages.k_LPKDS, "v": pages.v_LPKSD}
    if pages.quantised:
        given["scales"] = pages.scale_LPKZ
    if sinks_H is not None:
        sinks_KG = sinks_H.astype(jnp.float32).reshape(plan.K, -1) * LOG2E
        given["sinks"] = jnp.pad(sinks_KG, ((0, 0), (0, plan.G * plan.groups - sinks_KG.shape[1])))
    return given


def _start(plan: _Plan, refs: Any, place: Any, V: int) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The state of a softmax over no keys yet, but for the sinks: values, maxima and sums."""
    head, heads = place
    zeros_r = jnp.zeros((plan.rows,), jnp.float32)
    values = tuple(jnp.zeros((plan.rows, lanes.size), jnp.float32) for lanes in _lanes(V))
    if "sinks" not in refs:
        return values, zeros_r + UNSEEN, zeros_r
    sink_G = refs["sinks"][head, heads]
    sink_r = jnp.broadcast_to(sink_G[None], (plan.tokens, plan.G)).reshape(plan.rows)
    return values, jnp.maximum(sink_r, UNSEEN), zeros_r + 1.0


def _combine(one: Any, other: Any) -> Any:
    (acc, top, total), (new_acc, new_top, new_total) = one, other
    highest = jnp.maximum(top, new_top)
    keep, take = jnp.exp2(top - highest), jnp.exp2(new_top - highest)
    acc = tuple(x * keep[:, None] + y * take[:, None] for x, y in zip(acc, new_acc, strict=True))
    return acc, highest, total * keep + new_total * take


def _extent(plan: _Plan, S: int, position: Any, count: Any) -> tuple[Any, Any]:
    """The pages [low, high) that a tile sees whose first token has this position."""
    low = 0 if plan.window is None else lax.div(jnp.maximum(position - (plan.window - 1), 0), jnp.int32(S))
    return low, jnp.where(count > 0, lax.div(position + count - 1, jnp.int32(S)) + 1, low)


def _part(plan: _Plan, refs: Any, tile: Any, head: Any, q: Any, p: Any, extent: Any) -> Any:
    """The softmax over part p of a tile's request: values, maxima and sums. `q` is cut as `_lanes` says."""
    request, _, position, count = tile
    S, V, layer = refs["v"].shape[3], refs["v"].shape[4], refs["layer"][0]
    D, dtype = refs["k"].shape[3], q[0].dtype
    nth_r = lax.div(jnp.arange(plan.rows, dtype=jnp.int32), jnp.int32(plan.G))
    position_r, real_r = position + nth_r, nth_r < count

    def page(j: Any, state: Any) -> Any:
        acc, top_r, total_r = state
        number = refs["table"][request, j]
        s_S = j * S + jnp.arange(S, dtype=jnp.int32)
        # Slots beyond the request may hold what another one left, even nan, which a weight of 0 would not hide.
        is_mine_S = s_S <= position + count - 1
        sees_rS = (s_S[None] <= position_r[:, None]) & real_r[:, None]
        if plan.window is not None:
            sees_rS &= s_S[None] > position_r[:, None] - plan.window
        keys = [refs["k"][layer, number, head, lanes, :].astype(dtype) for lanes in _lanes(D)]
        x_rS = functools.reduce(jnp.add, (_dot(x, k_DS) for x, k_DS in zip(q, keys, strict=True))) * plan.scale
        if "scales" in refs:
            x_rS *= refs["scales"][layer, number, head, pl.ds(0, S)][None]
        if plan.softcap is not None:
            x_rS = plan.softcap * (1.0 - 2.0 / (1.0 + jnp.exp2(x_rS * (2 * LOG2E / plan.softcap))))
        x_rS = jnp.where(sees_rS, x_rS * LOG2E, UNSEEN)
        new_top_r = jnp.maximum(top_r, x_rS.max(axis=1))
        keep_r = jnp.exp2(top_r - new_top_r)
        p_rS = jnp.where(sees_rS, jnp.exp2(x_rS - new_top_r[:, None]), 0.0)
        total_r = total_r * keep_r + p_rS.sum(axis=1)
        if "scales" in refs:
            p_rS = jnp.where(sees_rS, p_rS * refs["scales"][layer, number, head, pl.ds(S, S)][None], 0.0)
        p_rS = p_rS.astype(dtype)
        values = (refs["v"][layer, number, head, :, lanes].astype(dtype) for lanes in _lanes(V))
        values = [jnp.where(is_mine_S[:, None], v_SV, 0) for v_SV in values]
        acc = tuple(x * keep_r[:, None] + _dot(p_rS, v_SV) for x, v_SV in zip(acc, values, strict=True))
        return acc, new_top_r, total_r

    low, high = extent
    zeros_r = jnp.zeros((plan.rows,), jnp.float32)
    first, last = jnp.maximum(low, p * plan.part), jnp.minimum(high, (p + 1) * plan.part)
    nothing = tuple(jnp.zeros((plan.rows, lanes.size), jnp.float32) for lanes in _lanes(V))
    return lax.fori_loop(first, last, page, (nothing, zeros_r + UNSEEN, zeros_r))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _read_tile(refs: Any, i: Any) -> tuple[Any, Any, Any, Any]:
    return tuple(refs["tiles"][i, column] for column in range(4))  # pyright: ignore[reportReturnType]


def _launch(
    name: str, kernel: Any, given: dict[str, Any], outs: dict[str, Any], grid: Any, warps: int = 4
) -> list[jax.Array]:
    def entry(*refs: Any) -> None:
        kernel(dict(zip((*given, *outs), refs, strict=True)))

    # Every array whole: what a program reads of them follows from the page table.
    return pl.pallas_call(
        entry,
        grid=grid,
        out_shape=list(outs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        name=name,
    )(*given.values())


def _prompts(plan: _Plan, q_TKGD: jax.Array, tiles: jax.Array, *common: Any) -> jax.Array:
    """Prompts' tiles, [T, K, G, V]; anything in rows that are no real token's."""
    given = _given(plan, q_TKGD, tiles, *common)
    S, V = given["v"].shape[3:]

    def kernel(refs: Any) -> None:
        tile, place = _read_tile(refs, pl.program_id(0)), plan.place(pl.program_id(1))
        (_, row, position, count), (head, heads) = tile, place

        @pl.when(count > 0)
        def _() -> None:
            rows = pl.ds(row, plan.tokens)
            q = [refs["q"][rows, head, heads, lanes].reshape(plan.rows, -1) for lanes in _lanes(q_TKGD.shape[3])]
            low, high = extent = _extent(plan, S, position, count)
            parts = (lax.div(jnp.int32(low), jnp.int32(plan.part)), lax.div(high + (plan.part - 1), plan.part))

            def step(p: Any, state: Any) -> Any:
                return _combine(state, _part(plan, refs, tile, head, q, p, extent))

            acc, _, total_r = lax.fori_loop(*parts, step, _start(plan, refs, place, V))
            real_t11 = (jnp.arange(plan.tokens, dtype=jnp.int32) < count)[:, None, None]
            for lanes, acc_rV in zip(_lanes(V), acc, strict=True):
                out_rV = acc_rV / jnp.where(total_r > 0, total_r, 1.0)[:, None]
                shape = (plan.tokens, plan.G, lanes.size)
                plgpu.store(
                    refs["out"].at[rows, head, heads, lanes],
                    out_rV.reshape(shape).astype(q_TKGD.dtype),
                    mask=jnp.broadcast_to(real_t11, shape),
                )

    outs = {"out": jax.ShapeDtypeStruct((*q_TKGD.shape[:3], V), q_TKGD.dtype)}
    warps = 8 if max(q_TKGD.shape[3], V) > 64 else 4  # of 4, each would hold more of a tile than its registers do
    return _launch("paged_attention_prompts", kernel, given, outs, (tiles.shape[0], plan.K * plan.groups), warps)[0]


def _decode(plan: _Plan, q_NKGD: jax.Array, tiles: jax.Array, *common: Any) -> jax.Array:
    """[N, K, G, V]: one token for each of the first requests; anything for those that decode none."""
    given = _given(plan, q_NKGD, tiles, *common)
    (N, K, G, _), (S, V) = q_NKGD.shape, given["v"].shape[3:]
    P = -(-given["table"].shape[1] // plan.part)

    def parts(refs: Any) -> None:
        i, (head, heads), p = pl.program_id(0), plan.place(pl.program_id(1)), pl.program_id(2)
        tile = _read_tile(refs, i)
        low, high = extent = _extent(plan, S, tile[2], tile[3])

        @pl.when((p * plan.part < high) & ((p + 1) * plan.part > low))
        def _() -> None:
            q = [refs["q"][i, head, heads, lanes] for lanes in _lanes(q_NKGD.shape[3])]
            acc, refs["top"][i, head, p, heads], refs["total"][i, head, p, heads] = _part(
                plan, refs, tile, head, q, p, extent
            )
            for lanes, acc_GV in zip(_lanes(V), acc, strict=True):
                refs["acc"][i, head, p, heads, lanes] = acc_GV

    wide = {
        "acc": jax.ShapeDtypeStruct((N, K, P, G, V), jnp.float32),
        "top": jax.ShapeDtypeStruct((N, K, P, G), jnp.float32),
        "total": jax.ShapeDtypeStruct((N, K, P, G), jnp.float32),
    }
    warps = 8 if max(q_NKGD.shape[3], V) > 128 else 4
    found = dict(
        zip(wide, _launch("paged_attention_parts", parts, given, wide, (N, K * plan.groups, P), warps), strict=True)
    )

    def merge(refs: Any) -> None:
        i, place = pl.program_id(0), plan.place(pl.program_id(1))
        head, heads = place
        _, _, position, count = _read_tile(refs, i)
        low, high = _extent(plan, S, position, count)

        def step(p: Any, state: Any) -> Any:
            acc = tuple(refs["acc"][i, head, p, heads, lanes] for lanes in _lanes(V))
            return _combine(state, (acc, refs["top"][i, head, p, heads], refs["total"][i, head, p, heads]))

        first, last = lax.div(jnp.int32(low), jnp.int32(plan.part)), lax.div(high + (plan.part - 1), plan.part)
        acc, _, total_G = lax.fori_loop(first, last, step, _start(plan, refs, place, V))
        for lanes, acc_GV in zip(_lanes(V), acc, strict=True):
            out_GV = acc_GV / jnp.where(total_G > 0, total_G, 1.0)[:, None]
            refs["out"][i, head, heads, lanes] = out_GV.astype(q_NKGD.dtype)

    known = {"tiles": tiles, **({"sinks": given["sinks"]} if "sinks" in given else {}), **found}
    outs = {"out": jax.ShapeDtypeStruct((N, K, G, V), q_NKGD.dtype)}
    return _launch("paged_attention_merge", merge, known, outs, (N, K * plan.groups))[0]
