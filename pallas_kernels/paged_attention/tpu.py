"""Paged attention for TPUs: one kernel for the decodes, one for chunks of prompts; a step has either or both.

The cache is an input and an output of the kernels, in the same place: new tokens are written where they belong, and
nothing else of it moves. What the kernels ask of it is the layout "joint" of `pages.py`.

Shapes: T token rows, R requests, M pages a request, H query heads, K key/value heads, D head size, S slots a page,
C lanes of a key, V of a value, E of both in the cache, Z scales of a page.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..chips import CORES, target_chip
from .batch import SharedPrefixes, as_kept, token_rows
from .pages import LANES, Pages
from .tpu_block import Sizes
from .tpu_chunk import Rows, chunk
from .tpu_decode import decode

MIB = 2**20
BLOCK_BYTES = 2 * MIB  # of a block: long enough a copy to hide what a step costs, short enough for short contexts
BLOCK_TOKENS = (256, 512)
TABLE_BYTES = 512 * 1024  # of page tables that fit beside all else in the memory of scalars
VMEM = {"v4": 16 * MIB, "v5e": 100 * MIB, "v5p": 60 * MIB, "v6e": 100 * MIB, "7x": 50 * MIB}
# For chunks less: beside that, what a chunk does use, and XLA's own arrays of many rows, have to fit once more.
CHUNK_VMEM = {**VMEM, "v5e": 64 * MIB, "v5p": 40 * MIB, "v6e": 64 * MIB, "7x": 40 * MIB}
TILE_VMEM = {"v5e": 40 * MIB, "v6e": 40 * MIB}  # of that, for the rows of a tile; 20 MiB elsewhere
PART_TOKENS = 2048  # of a part of a request, which only one core takes
ROWS = 64  # decoding requests of a step of the grid at most


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
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    R, M = page_table_RM.shape
    _refuse(q_THD, pages, R, M)
    chip = target_chip()
    cores = CORES.get(chip or "", 1)
    shares = cores if K % cores == 0 else 1  # of the key heads
    vmem = VMEM.get(chip or "", 100 * MIB)
    v_lane = pages.value_lane // LANES * LANES
    n = pages_of_block(pages.page_size, K // shares * pages.lanes * pages.dtype.itemsize, M)
    sizes = Sizes(
        K=K // shares,
        S=pages.page_size,
        n=n,
        M=M,
        N=pages.lanes // LANES,
        C=_lanes(D),
        v_lane=v_lane,
        V=_lanes(pages.value_lane + pages.value_dim - v_lane),
        scale=scale,
        softcap=softcap,
        window=window,
        quantised=pages.quantised,
        dtype=q_THD.dtype,
        kept=pages.dtype,
        part=blocks_of_part(n, pages.page_size, M) if shares < cores else None,
    )
    common: dict[str, Any] = {
        "layer": layer,
        "table": jnp.clip(page_table_RM, 0, pages.num_pages - 1),
        "vmem_bytes": vmem,
    }
    kept = as_kept(pages, k_TKD, v_TKV)
    kept_TKE, new_scales = pages.join(kept.k_TKD, kept.v_TKV), kept.scales_TK2
    q_THC = jnp.pad(q_THD, ((0, 0), (0, 0), (0, sizes.C - D)))
    is_decode_R = (query_length_R == 1) & (query_start_R == jnp.arange(R)) & (query_start_R < decode_rows)
    kv, scales = pages.kv_LPKNSX, pages.scale_LPKZ
    assert kv is not None
    outs = []

    if decode_rows:
        N = min(decode_rows, R)
        step = min(ROWS, -(-N // 8) * 8)
        more = -N % step
        pad = lambda x: jnp.pad(x[:N], ((0, more),) + ((0, 0),) * (x.ndim - 1))  # noqa: E731
        lengths_N = pad(jnp.where(is_decode_R, lengths_R, 0))
        state: Any = None
        begin_N = jnp.zeros_like(lengths_N)
        if prefixes is not None:
            state, begin_N = _read_prefixes(
                sizes, q_THC[:N], lengths_N[:N], sinks_H, kv, scales, prefixes, shares, common
            )
            state, begin_N = tuple(pad(x) for x in state), pad(begin_N)
        new_scale_NKZ = None if new_scales is None else pad(jnp.repeat(new_scales[:N], sizes.S, -1))
        q_NrC = pad(_by_key_head(q_THC[:N], K))
        sinks_r = None if sinks_H is None else _by_key_head(sinks_H[None, :, None], K)[0, :, 0]
        out, kv, scales = decode(
            sizes, q_NrC, pad(_bits(kept_TKE)), new_scale_NKZ, sinks_r, state, kv, scales,
            lengths_N=lengths_N, begin_N=begin_N, block_rows=step, cores=cores, **common,
        )  # fmt: skip
        out = out[:N].reshape(N, K, -1, sizes.V)[:, :, : H // K].reshape(N, H, sizes.V)
        outs.append(jnp.pad(out, ((0, decode_rows - N), (0, 0), (0, 0))))

    if decode_rows < T:
        is_chunk_R = (query_length_R > 0) & ~is_decode_R
        count_R = jnp.where(is_chunk_R, query_length_R, 0)
        owned = token_rows(T, lengths_R, query_start_R, count_R)
        tile = tile_rows(T - decode_rows, H // shares, sizes)
        more = -(T - decode_rows) % tile
        pad = lambda x, fill=0: jnp.pad(x[decode_rows:], ((0, more),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)  # noqa: E731
        rows = Rows(
            query_start_R - decode_rows, count_R, lengths_R,
            pad(jnp.where(owned.owned_T, owned.request_T, -1), -1), pad(owned.position_T),
        )  # fmt: skip
        new = pad(kept_TKE.astype(jnp.float32)), None if new_scales is None else pad(new_scales)
        common["vmem_bytes"] = CHUNK_VMEM.get(chip or "", 64 * MIB)
        out, kv, scales = chunk(sizes, pad(q_THC), new, sinks_H, kv, scales, rows, tile=tile, cores=shares, **common)
        outs.append(out[: T - decode_rows])

    first = pages.value_lane - v_lane
    out_THV = jnp.concatenate(outs)[:, :, first : first + pages.value_dim]
    return out_THV, Pages(None, None, kv, scales, pages.head_dim, pages.value_dim, pages.latent)


def _refuse(q_THD: jax.Array, pages: Pages, R: int, M: int) -> None:
    if pages.layout != "joint":
        raise NotImplementedError('pages of the layout "split", which init_pages makes when not under a TPU mesh')
    if q_THD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries of {q_THD.dtype}; bfloat16 and float32 are taken")
    if pages.dtype.name not in ("bfloat16", "float32", "int8", "float8_e4m3fn"):
        raise NotImplementedError(f"pages of {pages.dtype}")
    tile = 32 // pages.dtype.itemsize
    if pages.page_size % tile:
        raise NotImplementedError(f"pages of {pages.page_size} slots: a multiple of {tile} is needed for {pages.dtype}")
    if 4 * R * M > TABLE_BYTES:
        raise NotImplementedError(
            f"page tables of {4 * R * M // 1024} KiB: {TABLE_BYTES // 1024} KiB fit, so take larger pages"
        )


def pages_of_block(page_size: int, token_bytes: int, M: int) -> int:
    """Pages of a block, by what a token is in bytes. It decides how a request's sums are cut."""
    low, high = BLOCK_TOKENS
    tokens = min(max(BLOCK_BYTES // token_bytes, low), high)
    return max(1, min(tokens // page_size, M))


def blocks_of_part(n: int, page_size: int, M: int) -> int | None:
    """None where no request is longer."""
    blocks = max(1, PART_TOKENS // (n * page_size))
    return blocks if blocks * n < M else None


def tile_rows(T: int, heads: int, sizes: Sizes) -> int:
    """Token rows of a tile of a chunk: as many as fit, so that pages are read for more queries at once."""
    row = heads * (4 * sizes.V + 6 * sizes.C + 4 * sizes.V + 1024) + 12 * sizes.B
    room = TILE_VMEM.get(target_chip() or "", 20 * MIB)
    most = next((t for t in (128, 64, 32) if t * row <= room), 16)
    return min(most, -(-T // 16) * 16)


def _lanes(x: int) -> int:
    return -(-x // LANES) * LANES


def _bits(x: jax.Array) -> jax.Array:
    """Of each number, in an int32."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.int32)


def _by_key_head(x_NHC: jax.Array, K: int) -> jax.Array:
    """[N, r, C]: the query heads of each key head, padded to 8 rows of a tile."""
    N, H, C = x_NHC.shape
    G = H // K
    return jnp.pad(x_NHC.reshape(N, K, G, C), ((0, 0), (0, 0), (0, -G % 8), (0, 0))).reshape(N, -1, C)


def _read_prefixes(
    sizes: Sizes,
    q_NHC: jax.Array,
    lengths_N: jax.Array,
    sinks_H: jax.Array | None,
    kv: Any,
    scales: Any,
    prefixes: SharedPrefixes,
    shares: int,
    common: dict[str, Any],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The softmax's state of each decode after the whole blocks of its shared prefix, and how many these are."""
    N, H, C = q_NHC.shape
    R = len(prefixes.leader_R)
    blocks_N = jnp.where(lengths_N > 0, prefixes.pages_R[:N] // sizes.n, 0)
    leader_N = jnp.where(blocks_N > 0, prefixes.leader_R[:N], R)
    order_N = jnp.argsort(leader_N, stable=True)
    owner_N = leader_N[order_N]
    count_R = jnp.zeros(R, jnp.int32).at[leader_N].add(1, mode="drop")
    start_R = jnp.searchsorted(owner_N, jnp.arange(R), side="left")
    tile = tile_rows(N, H // shares, sizes)
    more = -N % tile
    pad = lambda x, fill=0: jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)  # noqa: E731
    rows = Rows(
        start_R, count_R, prefixes.pages_R // sizes.n * sizes.B,
        pad(jnp.where(owner_N < R, owner_N, -1), -1), pad(lengths_N[order_N] - 1),
    )  # fmt: skip
    state, *_ = chunk(sizes, pad(q_NHC[order_N]), None, sinks_H, kv, scales, rows, tile=tile, cores=shares, **common)
    back_N = jnp.argsort(order_N)
    return tuple(_by_key_head(x[:N][back_N], sizes.K * shares) for x in state), blocks_N
