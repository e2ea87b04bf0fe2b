"""Paged attention on NVIDIA GPUs, by Pallas's Triton backend.

A request's context is cut into parts of about `PART` tokens, counted from its first. A part's softmax goes page by
page, and parts are merged in their order. Decoding gives each part a program of its own and merges them in a second
kernel (Flash-Decoding, Dao et al. 2023), so that few long requests fill a GPU too; a prompt's tile goes through its
parts in one program. Parts of a prefix that decodes share are computed once for up to a tile of them (Hydragen,
arXiv:2402.05099). Either way the same parts are merged in the same order, whatever else is in the batch: the split is
always pinned.

The same kernels write the new tokens: the pages are inputs and outputs of theirs, in place. A decode's last part writes
its token, waits for its own threads, and reads it with the rest of the page. A prompt's tile writes its own tokens, but
reads new ones where they came in, laid over the page that they are written to, as another tile may not have written
yet; for this latents, and an A100, leave no registers: there those of prompts are written before, by XLA.

There was no GPU when this was written: the numbers are those of Pallas's interpreter, registers and spills are ptxas's,
nothing has been timed, and that Triton rounds a row alike in its three kernels has not been tried on one.

Shapes: T token rows, R requests, M pages a request, H query heads, S slots a page, K key/value heads, G query heads for
each (padded to a power of two; of a latent, those of one program), D head size, V size of a value; t: the tokens of a
tile; N: tiles, or decodes; P: parts.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..chips import known_platform, target_chip
from .batch import SharedPrefixes, as_kept, token_rows, write
from .gpu_tile import NEW, Plan, Tile, attend_part, combine, lanes_of, queries, read_tile, start, write_tile
from .pages import Pages

ROWS = 64  # of a tile: queries times heads
FEWEST = 16  # rows that a product of Triton's takes
PART = 512  # tokens
WIDE = 256  # larger heads (those of a latent) leave registers for `FEWEST` rows only
WIDEST = 1024


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
        scale, softcap, sinks_H, prefixes,
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
    prefixes: SharedPrefixes | None = None,
) -> tuple[jax.Array, Pages]:
    """`paged_attention`, for whatever platform it is lowered for."""
    _check(q_THD, pages)
    (T, H, _), R, K = q_THD.shape, page_table_RM.shape[0], k_TKD.shape[1]
    owners = token_rows(T, lengths_R, query_start_R, query_length_R)
    first_R = (lengths_R - query_length_R).astype(jnp.int32)  # position of the first new token
    r_R = jnp.arange(R, dtype=jnp.int32)
    in_decode_R = (query_length_R == 1) & (query_start_R == r_R) & (r_R < decode_rows)
    G, wide = H // K, pages.head_dim > WIDE
    heads, groups = _heads(G, wide)
    rows = FEWEST if wide else ROWS // 2 if pages.head_dim > 128 else ROWS
    plan = Plan(window, softcap, scale, K, heads, groups, max(1, rows // heads), max(1, PART // pages.page_size))
    more = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "table": jnp.clip(page_table_RM, 0, pages.num_pages - 1).astype(jnp.int32),
        "wanted": page_table_RM.astype(jnp.int32),
    }
    new = _new_tokens(pages, k_TKD, v_TKV)
    if sinks_H is not None:
        sinks_KG = sinks_H.astype(jnp.float32).reshape(K, -1) * math.log2(math.e)
        more["sinks"] = jnp.pad(sinks_KG, ((0, 0), (0, heads * groups - G)))
    out_THV = jnp.zeros((T, H, pages.value_dim), q_THD.dtype)
    if decode_rows:
        N = min(decode_rows, R)
        real_N, position_N = in_decode_R[:N], first_R[:N]
        low_N, high_N = _extent(plan, pages.page_size, position_N, position_N)
        tiles = Tile(r_R[:N], r_R[:N], real_N, low_N, jnp.where(real_N, high_N, low_N), position_N, position_N, r_R[:N])
        q_NKGD = _grouped(_after(q_THD[:N], plan.tokens), plan)
        decoded_NKGV, pages = _decode(plan, pages, q_NKGD, _after(position_N, plan.tokens), tiles, more, new, prefixes)
        decoded_NHV = decoded_NKGV[:, :, :G].reshape(N, H, -1)
        out_THV = out_THV.at[:N].set(jnp.where(real_N[:, None, None], decoded_NHV, 0))
    if decode_rows < T:
        length_R = jnp.where(in_decode_R, 0, query_length_R)
        r_N, row_N, nth_N, count_N = _cut(plan.tokens, T - decode_rows, length_R, query_start_R)
        position_N = first_R[r_N] + nth_N
        last_N = position_N + count_N - 1
        low_N, high_N = _extent(plan, pages.page_size, position_N, last_N)
        tiles = Tile(r_N, row_N, count_N, low_N, high_N, last_N, first_R[r_N], query_start_R[r_N])
        given = more | {"q": _grouped(_after(q_THD, plan.tokens), plan), "tiles": _table(tiles)}
        given["position"] = _after(owners.position_T.astype(jnp.int32), plan.tokens)
        of_prompt_T = owners.owned_T & ~in_decode_R[owners.request_T]
        before = wide or target_chip() == "a100"
        if before:
            pages = write(pages, layer, k_TKD, v_TKV, owners._replace(owned_T=of_prompt_T), page_table_RM)
        chunks_TKGV, pages = _prompts(plan, pages, given if before else given | new)
        chunks_THV = chunks_TKGV[:T, :, :G].reshape(out_THV.shape)
        out_THV = jnp.where(of_prompt_T[:, None, None], chunks_THV, out_THV)
    return out_THV, pages


def _new_tokens(pages: Pages, k_TKD: jax.Array, v_TKV: jax.Array | None) -> dict[str, jax.Array]:
    """As the pages keep them: keys [K, D, S + T + S], values [K, S + T + S, V], scales [2, K, S + T + S]."""
    S, new = pages.page_size, as_kept(pages, k_TKD, v_TKV)
    around = lambda x, axis: jnp.pad(x, [(S, S) if i == axis else (0, 0) for i in range(x.ndim)])  # noqa: E731
    found = {
        "new_k": around(new.k_TKD.transpose(1, 2, 0), 2),
        "new_v": around(new.v_TKV.transpose(1, 0, 2), 1),
    }
    if pages.quantised:
        assert new.k_scale_TK is not None and new.v_scale_TK is not None
        found["new_scales"] = around(jnp.stack([new.k_scale_TK.T, new.v_scale_TK.T]), 2)
    return found


def _extent(plan: Plan, S: int, first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pages [low, high) that queries from position `first` to `last` see."""
    low = jnp.zeros_like(first) if plan.window is None else jnp.maximum(first - (plan.window - 1), 0) // S
    return low, jnp.maximum(last // S + 1, low)


def _table(tiles: Tile) -> jax.Array:
    return jnp.stack([x.astype(jnp.int32) for x in tiles], -1)


def _after(x: jax.Array, n: int) -> jax.Array:
    """n rows more: a tile reads whole ones."""
    return jnp.pad(x, ((0, n),) + ((0, 0),) * (x.ndim - 1))


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


def _heads(G: int, wide: bool) -> tuple[int, int]:
    """Query heads of a program, a power of 2, and how many such groups a key head has."""
    padded = pl.next_power_of_2(G)
    mine = min(padded, FEWEST) if wide else padded
    return mine, -(-padded // mine)


def _grouped(q_THD: jax.Array, plan: Plan) -> jax.Array:
    T, H, D = q_THD.shape
    q_TKGD = q_THD.reshape(T, plan.K, H // plan.K, D)
    return jnp.pad(q_TKGD, ((0, 0), (0, 0), (0, plan.G * plan.groups - H // plan.K), (0, 0)))


def _cut(t: int, rows: int, length_R: jax.Array, start_R: jax.Array) -> tuple[jax.Array, ...]:
    """Owners' rows in tiles of t, [N]: each tile's owner, first row, how many come before it, and how many it has."""
    R = length_R.shape[0]
    end_R = jnp.cumsum(-(-length_R // t))
    i_N = jnp.arange(-(-rows // t) + R, dtype=jnp.int32)  # each owner may end in a tile that is not full
    r_N = jnp.minimum(jnp.searchsorted(end_R, i_N, side="right"), R - 1)
    nth_N = (i_N - (end_R - -(-length_R // t))[r_N]) * t
    count_N = jnp.where(i_N < end_R[-1], jnp.clip(length_R[r_N] - nth_N, 0, t), 0)
    nth_N = jnp.where(count_N > 0, nth_N, 0)
    return r_N, jnp.where(count_N > 0, start_R[r_N] + nth_N, 0), nth_N, count_N


def _launch(
    name: str,
    kernel: Any,
    given: dict[str, Any],
    outs: dict[str, Any],
    grid: Any,
    warps: int,
    pages: Pages | None = None,
) -> tuple[dict[str, jax.Array], Any]:
    """Runs kernel(refs), these by name; and the pages, if it writes to them: inputs k, v, scales, outputs k_out, ..."""
    kept = {} if pages is None else _as_read(pages)
    written = {f"{name}_out": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in kept.items()}

    def entry(*refs: Any) -> None:
        kernel(dict(zip((*kept, *given, *outs, *written), refs, strict=True)))

    heads = (kept | given).get("k")
    stages = 1 if target_chip() == "a100" and heads is not None and heads.shape[3] > WIDE else 2  # less shared memory
    # Every array whole: what a program reads of them follows from the page table.
    found = pl.pallas_call(
        entry,
        grid=grid,
        out_shape=[*outs.values(), *written.values()],
        input_output_aliases={i: len(outs) + i for i in range(len(kept))},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )(*kept.values(), *given.values())
    if pages is not None:
        at = dict(zip(kept, found[len(outs) :], strict=True))
        pages = dataclasses.replace(pages, k_LPKDS=at["k"], v_LPKSD=at["v"], scale_LPKZ=at.get("scales"))
    return dict(zip(outs, found, strict=False)), pages


def _as_read(pages: Pages) -> dict[str, jax.Array]:
    kept = {"k": pages.k_LPKDS, "v": pages.v_LPKSD, "scales": pages.scale_LPKZ}
    return {name: x for name, x in kept.items() if x is not None}


def _store(ref: Any, count: Any, x: jax.Array) -> None:
    """The first `count` of x's rows."""
    is_real = jnp.arange(x.shape[0], dtype=jnp.int32) < count
    plgpu.store(ref, x, mask=jnp.broadcast_to(is_real.reshape(-1, *(1,) * (x.ndim - 1)), x.shape))


def _prompts(plan: Plan, pages: Pages, given: dict[str, Any]) -> tuple[jax.Array, Pages]:
    """Prompts' tiles, [T, K, G, V], anything in rows that are no real token's; and the pages with their tokens."""
    V, q_TKGD = pages.value_dim, given["q"]

    def kernel(refs: Any) -> None:
        tile, place = read_tile(refs, pl.program_id(0)), plan.place(pl.program_id(1))
        head, heads = place

        @pl.when(tile.count > 0)
        def _() -> None:
            if "new_k" in refs:
                pl.when(heads.start == 0)(lambda: write_tile(refs, tile, head))
            q = queries(plan, refs, tile, place)

            def step(p: Any, state: Any) -> Any:
                return combine(state, attend_part(plan, refs, tile, head, q, p))

            acc, _, total_r = lax.fori_loop(*tile.parts(plan), step, start(plan, refs, place, V))
            for lanes, acc_rV in zip(lanes_of(V), acc, strict=True):
                out_rV = (acc_rV / jnp.where(total_r > 0, total_r, 1.0)[:, None]).astype(q_TKGD.dtype)
                rows = pl.ds(tile.row, plan.tokens)
                out_tGV = out_rV.reshape(plan.tokens, plan.G, lanes.size)
                _store(refs["out"].at[rows, head, heads, lanes], tile.count, out_tGV)

    outs = {"out": jax.ShapeDtypeStruct((*q_TKGD.shape[:3], V), q_TKGD.dtype)}
    warps = 8 if max(pages.head_dim, V) > 64 else 4  # of 4, each would hold more of a tile than its registers do
    grid = (given["tiles"].shape[0], plan.K * plan.groups)
    if "new_k" in given:
        found, pages = _launch("paged_attention_prompts", kernel, given, outs, grid, warps, pages)
    else:
        found, _ = _launch("paged_attention_prompts", kernel, _as_read(pages) | given, outs, grid, warps)
    return found["out"], pages


def _decode(
    plan: Plan,
    pages: Pages,
    q_NKGD: jax.Array,
    position_N: jax.Array,
    tiles: Tile,
    more: dict[str, Any],
    new: dict[str, jax.Array],
    prefixes: SharedPrefixes | None,
) -> tuple[jax.Array, Pages]:
    """[N, K, G, V]: one token for each of the first requests, anything for those that decode none; and the pages with
    their tokens. Queries and positions have plan.tokens rows more."""
    N, (P, V), G = len(tiles.row), (-(-more["table"].shape[1] // plan.part), pages.value_dim), q_NKGD.shape[2]
    known = {"tiles": _table(tiles)}
    own = tiles
    if prefixes is not None:
        shared_N, known["back"], of_shared, order_N = _share(plan, pages.page_size, tiles, prefixes)
        own = tiles._replace(low=jnp.maximum(tiles.low, jnp.minimum(shared_N * plan.part, tiles.high)))
        known["shared"] = shared_N
        of_all = {"q": _after(q_NKGD[order_N], plan.tokens), "position": _after(position_N[order_N], plan.tokens)}
        found, _ = _parts(plan, V, P, _as_read(pages) | more | of_all | {"tiles": _table(of_shared)}, None)
        known |= {f"shared_{name}": x for name, x in found.items()}
    given = more | new | {"q": q_NKGD, "position": position_N, "tiles": _table(own)}
    found, pages = _parts(plan, V, P, given, pages)
    known |= found
    if "sinks" in more:
        known["sinks"] = more["sinks"]
    alone = dataclasses.replace(plan, tokens=1)

    def merge(refs: Any) -> None:
        i, place = pl.program_id(0), plan.place(pl.program_id(1))
        (head, heads), tile = place, read_tile(refs, i)

        def step(prefix: str, row: Any) -> Any:
            def one(p: Any, state: Any) -> Any:
                acc = tuple(refs[prefix + "acc"][row, head, p, heads, lanes] for lanes in lanes_of(V))
                place = row, head, p, heads
                return combine(state, (acc, refs[prefix + "top"][place], refs[prefix + "total"][place]))

            return one

        (first, end), state = tile.parts(plan), start(alone, refs, place, V)
        if prefixes is not None:
            turn = jnp.clip(refs["shared"][i], first, jnp.maximum(first, end))
            state = lax.fori_loop(first, turn, step("shared_", refs["back"][i]), state)
            first = turn
        acc, _, total_G = lax.fori_loop(first, end, step("", i), state)
        for lanes, acc_GV in zip(lanes_of(V), acc, strict=True):
            out_GV = acc_GV / jnp.where(total_G > 0, total_G, 1.0)[:, None]
            refs["out"][i, head, heads, lanes] = out_GV.astype(q_NKGD.dtype)

    outs = {"out": jax.ShapeDtypeStruct((N, plan.K, G, V), q_NKGD.dtype)}
    found, _ = _launch("paged_attention_merge", merge, known, outs, (N, plan.K * plan.groups), 4)
    return found["out"], pages


def _parts(plan: Plan, V: int, P: int, given: dict[str, Any], pages: Pages | None) -> tuple[dict[str, jax.Array], Any]:
    """The softmax of each part of each tile, in its rows: values [rows, K, P, G, V], maxima and sums [rows, K, P, G].

    With pages to write to, the program of a tile's last part writes its tokens.
    """

    def kernel(refs: Any) -> None:
        tile, place, p = read_tile(refs, pl.program_id(0)), plan.place(pl.program_id(1)), pl.program_id(2)
        head, heads = place

        @pl.when((tile.count > 0) & (p * plan.part < tile.high) & ((p + 1) * plan.part > tile.low))
        def _() -> None:
            read = refs
            if pages is not None:
                # Every program that reads the token writes it: those of a latent's heads the same bits.
                pl.when((p + 1) * plan.part >= tile.high)(lambda: write_tile(refs, tile, head))
                plgpu.debug_barrier()
                written = {name: refs[f"{name}_out"] for name in _as_read(pages)}
                read = {name: x for name, x in refs.items() if name not in NEW} | written
            acc, top_r, total_r = attend_part(plan, read, tile, head, queries(plan, refs, tile, place), p)
            rows, shape = pl.ds(tile.row, plan.tokens), (plan.tokens, plan.G)
            for name, x_r in (("top", top_r), ("total", total_r)):
                _store(refs[name].at[rows, head, p, heads], tile.count, x_r.reshape(shape))
            for lanes, acc_rV in zip(lanes_of(V), acc, strict=True):
                _store(refs["acc"].at[rows, head, p, heads, lanes], tile.count, acc_rV.reshape(*shape, lanes.size))

    rows, K, G, D = given["q"].shape
    outs = {
        "acc": jax.ShapeDtypeStruct((rows, K, P, G, V), jnp.float32),
        "top": jax.ShapeDtypeStruct((rows, K, P, G), jnp.float32),
        "total": jax.ShapeDtypeStruct((rows, K, P, G), jnp.float32),
    }
    grid = (given["tiles"].shape[0], plan.K * plan.groups, P)
    name = "paged_attention_shared_parts" if pages is None else "paged_attention_parts"
    return _launch(name, kernel, given, outs, grid, 8 if max(D, V) > 64 else 4, pages)


def _share(plan: Plan, S: int, tiles: Tile, prefixes: SharedPrefixes) -> tuple[jax.Array, jax.Array, Tile, jax.Array]:
    """How many whole parts each decode shares, its row in the order of leaders, tiles in that order, and the order."""
    N, R = len(tiles.row), len(prefixes.leader_R)
    parts_R = (prefixes.pages_R // plan.part).astype(jnp.int32)
    shared_N = jnp.where(tiles.count > 0, parts_R[:N], 0)
    leader_N = jnp.where(shared_N > 0, prefixes.leader_R[:N], R)
    order_N = jnp.argsort(leader_N, stable=True)
    count_R = jnp.zeros(R, jnp.int32).at[leader_N].add(1, mode="drop")
    r_N, row_N, _, count_N = _cut(plan.tokens, N, count_R, jnp.cumsum(count_R) - count_R)
    high_N = parts_R[r_N] * plan.part
    none_N = jnp.zeros_like(r_N)
    last_N = high_N * S - 1
    of_shared = Tile(r_N, row_N, count_N, none_N, high_N, last_N, last_N + 1, none_N)
    return shared_N, jnp.argsort(order_N).astype(jnp.int32), of_shared, order_N
