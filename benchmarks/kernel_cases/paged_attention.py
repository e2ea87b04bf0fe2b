"""Paged decode: the heads of Llama-3 8B and 70B, and latents, 64 requests of 2,048 tokens, by bytes; and prompts.

Decodes once in a variant of our kernel whose lengths are known when it is compiled, which the static profiler can
follow; and once as it is, by the bundles that run with these lengths, against jax's paged and ragged paged attention.
Chunks of prompts, alone and among decodes, are by bundles, against the ragged one. jax's do not write the new tokens,
ours does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..kernels_timed import InPlace
from ..static import Program
from . import Case, Kernel

REQUESTS, CONTEXT, PAGE = 64, 2048, 64
# Of jax's kernels: tokens of a page, pages of a step, and of the ragged one queries of a tile; the best of a wider
# search on v6e (pages of 64 and 128, steps of 512 to 2,048 tokens, tiles of 8 to 32), of which the ragged one's larger
# tiles were slower.
PAGED = ((64, 32), (128, 16))
RAGGED = ((128, 16, 8),)
POOL = 2**18  # tokens that all pages hold: XLA would bring a small pool whole into fast memory
# Batches with prompts: (requests, new tokens of each, tokens before), decodes first; and jax's blocks, the best two of
# those tried on v6e (steps of 512 to 2,048 tokens, tiles of 16 to 256 queries).
LARGE, SMALL = ((128, 8, 128), (128, 8, 64)), ((128, 16, 32), (128, 16, 16))
BATCHES = {
    "prompt of 2048": (((1, 2048, 0),), LARGE),
    "prompt of 512 after 8192": (((1, 512, 8192),), LARGE),
    "63 decodes of 2048, prompt of 512 after 2048": (((63, 1, 2047), (1, 512, 2048)), SMALL),
}
HEADS = {"Llama-3 8B": (32, 8), "Llama-3 70B": (64, 8)}


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        yield from _on_gpus()
        return

    def ours(given: dict[str, Any]) -> Kernel:
        # Over 8-bit pages 7x's loop is led by what is in scalar memory.
        return Kernel("decode", given, profiled=chip != "tpu7x" or given["dtype"] == "bfloat16")

    for words, (H, K) in HEADS.items():
        for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
            given: dict[str, Any] = {"H": H, "K": K, "D": 128, "dtype": dtype}
            name = f"decode, {words}, {REQUESTS} x {CONTEXT}, pages of {dtype}"
            yield Case("paged_attention", name, ours(given), {}, of_limit=0.86)
    for dtype in ("bfloat16", "int8"):
        given = {"H": 32, "K": 8, "D": 128, "dtype": dtype}
        name = f"decode, Llama-3 8B, {REQUESTS} x {CONTEXT}, pages of {dtype}, lengths as data"
        peers = {"paged": tuple(Kernel("library", {**given, "page": x, "block": n}) for x, n in PAGED)}
        if dtype == "bfloat16":
            peers["ragged"] = tuple(
                Kernel("ragged", {**given, "page": x, "block": n, "queries": m}) for x, n, m in RAGGED
            )
        yield Case("paged_attention", name, ours({**given, "known": False}), peers, of_limit=0.86)
    for words, (batch, blocks) in BATCHES.items():
        given = {"H": 32, "K": 8, "D": 128, "dtype": "bfloat16", "batch": [list(some) for some in batch]}
        ragged = tuple(Kernel("ragged", {**given, "page": x, "block": n, "queries": m}) for x, n, m in blocks)
        name = f"Llama-3 8B, {words}, pages of bfloat16"
        yield Case("paged_attention", name, Kernel("mixed", given), {"ragged": ragged})
        name = f"Llama-3 8B, {words}, pages of int8"
        yield Case("paged_attention", name, Kernel("mixed", {**given, "dtype": "int8"}), {})
    for H in (128, 16):
        given = {"H": H, "K": 1, "D": 576, "dtype": "bfloat16", "latent": 512}
        chunk = {**given, "batch": [[1, 512, 2048]]}
        name = f"latents for {H} heads, prompt of 512 after 2048, pages of bfloat16"
        yield Case("paged_attention", name, Kernel("mixed", chunk), {})
        name = f"decode, latents for {H} heads, {REQUESTS} x {CONTEXT}, pages of bfloat16"
        yield Case("paged_attention", name, Kernel("decode", given), {}, of_limit=0.86)
        # On v5p each core has one, as it has half of a request that is twice as long; whose parts are then merged.
        given = {**given, "requests": 2, "context": 16384}
        name = f"decode, latents for {H} heads, 2 x 16384, pages of bfloat16"
        yield Case("paged_attention", name, Kernel("decode", given), {}, of_limit=0.86)
        name = f"merging one of 32768 that was cut, latents for {H} heads"
        yield Case("paged_attention", name, Kernel("merge", {"H": H, "V": 512, "later": 16384}), {})


def _on_gpus() -> Iterator[Case]:
    """Static, registers and spills; timed, also jax's own paged attention, by the split of the context."""
    for words, (H, K) in HEADS.items():
        for dtype in ("bfloat16", "int8"):
            given: dict[str, Any] = {"H": H, "K": K, "D": 128, "dtype": dtype}
            library = tuple(Kernel("pallas", {**given, "splits": splits}) for splits in (4, 16))
            peers = {"pallas": library} if dtype == "bfloat16" else {}
            name = f"decode, {words}, {REQUESTS} x {CONTEXT}, pages of {dtype}"
            yield Case("paged_attention", name, Kernel("decode_on_gpu", given), peers, of_limit=0.86)


def _requests() -> tuple[Any, Any]:
    """Page table and lengths of requests whose pages lie apart, as data that nothing is computed from beforehand."""
    import jax
    import numpy as np

    M = CONTEXT // PAGE
    table_NM = np.random.default_rng(0).permutation(REQUESTS * M).reshape(REQUESTS, M).astype(np.int32)
    return jax.lax.optimization_barrier((jax.numpy.asarray(table_NM), jax.numpy.full(REQUESTS, CONTEXT, "int32")))


def decode_on_gpu(target: Any, H: int, K: int, D: int, dtype: str) -> Program:
    """Decodes alone, which write their tokens into pages that they are given for good: others would be copied."""
    import jax
    import jax.numpy as jnp

    from twinax.pallas_kernels.paged_attention import gpu, init_pages

    N, kept = REQUESTS, jnp.dtype(dtype)
    made = jax.eval_shape(lambda: init_pages(1, N * CONTEXT // PAGE, PAGE, K, D, kept, layout="split"))
    pages = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)

    def step(q_NHD: Any, new_NKD: Any, pages: Any) -> Any:
        table_NM, lengths_N = _requests()
        r_N = jnp.arange(N, dtype=jnp.int32)
        ragged = table_NM, lengths_N, r_N, jnp.ones_like(r_N)
        return gpu.attend(q_NHD, new_NKD, new_NKD, pages, 0, *ragged, N, None, D**-0.5, None, None)

    given = target.array((N, H, D)), target.array((N, K, D)), pages
    hbm_bytes = N * CONTEXT * K * (2 * D * kept.itemsize + (8 if kept.itemsize == 1 else 0))
    donated = jax.jit(step, donate_argnums=2)
    return InPlace(donated, given, 4.0 * N * H * CONTEXT * D, float(hbm_bytes), updated=2)


def pallas(target: Any, H: int, K: int, D: int, dtype: str, splits: int) -> Program:
    from jax.experimental.pallas.ops.gpu import paged_attention as library

    def step(q_NHD: Any, k_KPSD: Any, v_KPSD: Any) -> Any:
        return library.paged_attention(q_NHD * D**-0.5, k_KPSD, v_KPSD, *_requests(), k_splits=splits)

    N, pages = REQUESTS, target.array((K, REQUESTS * CONTEXT // PAGE, PAGE, D), dtype)
    work = 4.0 * N * H * CONTEXT * D, 4.0 * N * CONTEXT * K * D
    return Program(step, (target.array((N, H, D)), pages, pages), *work)


def decode(
    target: Any,
    H: int,
    K: int,
    D: int,
    dtype: str,
    latent: int | None = None,
    requests: int = REQUESTS,
    context: int = CONTEXT,
    known: bool = True,
) -> Program:
    """The kernel of decodes alone, all requests as long, written as the public function calls it.

    `latent`: how much of a key is the value too. `known`: the lengths, when it is compiled.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinax.pallas_kernels.chips import CORES
    from twinax.pallas_kernels.paged_attention import tpu_decode

    N, L, S, M = requests, context, PAGE, context // PAGE
    kept, cores = jnp.dtype(dtype), CORES.get(target.chip.name, 1)
    sizes = _sizes(K, D, kept, M, cores, latent)
    C, E, quantised = sizes.C, 128 * sizes.N, sizes.quantised

    def step(q: Any, new: Any, news: Any, kv: Any, scale: Any, layer: Any, table: Any, lengths: Any) -> Any:
        return tpu_decode.decode(
            sizes, q, new, news, None, None, kv, scale, layer=layer, table=table, lengths_N=lengths,
            begin_N=jnp.zeros_like(lengths), block_rows=N, cores=cores, vmem_bytes=48 * 2**20,
            static_length=L if known else None,
        )  # fmt: skip

    def array(shape: tuple[int, ...], dtype: Any, wanted: bool = True) -> Any:
        return target.array(shape, dtype) if wanted else None

    given = (
        array((N, K * max(8, H // K), C), "bfloat16"),
        array((N, K, E), "int32"),
        array((N, K, 2 * S), "float32", quantised),
        array((2, N * M, K, E // 128, S, 128), kept),
        array((2, N * M, K, 2 * S), "float32", quantised),
        array((), "int32"),
        array((N, M), "int32"),
        array((N,), "int32"),
    )
    hbm_bytes = N * L * K * (E * kept.itemsize + (8 if quantised else 0))
    donated = jax.jit(step, donate_argnums=(3, 4) if quantised else (3,))
    data = None if known else (*[None] * 5, np.int32(0), *_batch([[N, 1, L - 1]], PAGE)[:2])
    return Program(donated, given, 2.0 * N * H * L * (D + (latent or D)), hbm_bytes, data=data)


def _sizes(K: int, D: int, kept: Any, M: int, cores: int, latent: int | None = None) -> Any:
    import jax.numpy as jnp

    from twinax.pallas_kernels.paged_attention import tpu_block
    from twinax.pallas_kernels.paged_attention.tpu import blocks_of_part, pages_of_block

    S, C = PAGE, -(-D // 128) * 128
    E, V = (C, latent) if latent else (2 * C, C)
    of_core = K // cores if K % cores == 0 else K
    n = pages_of_block(S, of_core * E * kept.itemsize, M)
    return tpu_block.Sizes(
        K=of_core, S=S, n=n, M=M, N=E // 128,
        C=C, v_lane=0 if latent else C, V=V, scale=D**-0.5,
        softcap=None, window=None, quantised=kept.itemsize == 1, dtype=jnp.dtype("bfloat16"), kept=kept,
        part=blocks_of_part(n, S, M) if K % cores else None,
    )  # fmt: skip


def mixed(
    target: Any, H: int, K: int, D: int, dtype: str, batch: Sequence[Sequence[int]], latent: int | None = None
) -> Program:
    """The public function for a batch as in BATCHES; queries, keys, values and results lie head by head."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinax.pallas_kernels.chips import CORES
    from twinax.pallas_kernels.paged_attention import init_pages, paged_attention
    from twinax.pallas_kernels.paged_attention.tpu import tile_rows

    data = table_RM, lengths_R, new_R = _batch(batch, PAGE)
    decodes = int(np.sum(new_R == 1))
    made = jax.eval_shape(
        lambda: init_pages(1, POOL // PAGE, PAGE, K, D, jnp.dtype(dtype), latent=latent, layout="joint")
    )
    pages = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)

    def step(q_HTD: Any, k_KTD: Any, v_KTD: Any, pages: Any, table: Any, lengths: Any, new: Any) -> Any:
        q_THD, k_TKD, v_TKD = (jnp.swapaxes(x, 0, 1) for x in (q_HTD, k_KTD, v_KTD))
        out_THD, pages = paged_attention(
            q_THD, k_TKD, None if latent else v_TKD, pages, layer=0, page_table_RM=table,
            lengths_R=lengths, query_start_R=jnp.cumsum(new) - new, query_length_R=new, decode_rows=decodes,
            implementation="tpu",
        )  # fmt: skip
        return jnp.swapaxes(out_THD, 0, 1), pages

    T = int(new_R.sum())
    sizes = _sizes(K, D, made.dtype, table_RM.shape[1], CORES.get(target.chip.name, 1), latent)
    with target.context():  # tiles are the chip's
        tile = tile_rows(T - decodes, H * sizes.K // K, sizes)
    moved = tokens_read(new_R[:decodes], lengths_R[:decodes], 1, PAGE)
    moved += tokens_read(new_R[decodes:], lengths_R[decodes:], tile, PAGE)
    given = target.array((H, T, D)), target.array((K, T, D)), target.array((K, T, D)), pages
    scalars = [target.array(x.shape, "int32") for x in data]
    donated = jax.jit(step, donate_argnums=3)
    return Program(
        donated, (*given, *scalars), *_work(H, K, D, new_R, lengths_R, latent, made.dtype), data=(*[None] * 4, *data),
        moved_bytes=float(K * (128 * sizes.N * made.dtype.itemsize + _scale_bytes(made.dtype)) * moved),
    )  # fmt: skip


def _batch(batch: Sequence[Sequence[int]], page: int) -> tuple[Any, Any, Any]:
    """Of each request its pages, its length with the new tokens, and how many these are."""
    import numpy as np

    count, new, before = (np.array(x, np.int32) for x in zip(*batch, strict=True))
    new_R, lengths_R = np.repeat(new, count), np.repeat(new + before, count)
    R, M = len(new_R), -(-int(lengths_R.max()) // page)
    return np.arange(R * M, dtype=np.int32).reshape(R, M), lengths_R, new_R


def tokens_read(new_R: Any, lengths_R: Any, tile: int, block: int, causal: bool = True) -> int:
    """Keys read by tiles of `tile` token rows, `block` at once: of each request in a tile, or only what it sees."""
    read = stop = 0
    for new, length in zip(map(int, new_R), map(int, lengths_R), strict=True):
        start, stop = stop, stop + new
        for edge in range(start // tile * tile + tile, stop + tile, tile):
            seen = length - max(0, stop - edge) if causal else length
            read += -(-seen // block) * block
    return read


def _work(
    H: int, K: int, D: int, new_R: Any, lengths_R: Any, latent: int | None = None, dtype: Any = "bfloat16"
) -> tuple[float, float]:
    """What cannot be avoided: products of what is seen, and the bytes of pages."""
    import jax.numpy as jnp

    seen = sum(new * (length - new) + new * (new + 1) / 2 for new, length in zip(new_R, lengths_R, strict=True))
    kept = jnp.dtype(dtype)
    token_bytes = (1 if latent else 2) * D * kept.itemsize + _scale_bytes(kept)
    return 2.0 * H * (D + (latent or D)) * float(seen), float(K * token_bytes * lengths_R.sum())


def _scale_bytes(dtype: Any) -> int:
    """Of a head's token: a float32 of its key and one of its value, where pages are of 8 bits."""
    return 8 if dtype.itemsize == 1 else 0


def library(target: Any, H: int, K: int, D: int, dtype: str, page: int, block: int) -> Program:
    """jax's paged attention; `block`: pages of a step."""
    from jax.experimental.pallas.ops.tpu import paged_attention as library
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

    from twinax.pallas_kernels.chips import CORES

    mode = "kv_head" if CORES.get(target.chip.name, 1) == 2 else None

    def step(q_NHD: Any, k_KPSD: Any, v_KPSD: Any, table: Any, lengths: Any) -> Any:
        return library.paged_attention(
            q_NHD, k_KPSD, v_KPSD, lengths, table, pages_per_compute_block=block, megacore_mode=mode
        )

    N, token_bytes = REQUESTS, 2 * D * 2.0
    table_NM, lengths_N, _ = _batch([[N, 1, CONTEXT - 1]], page)
    pages = target.array((K, table_NM.size, page, D), dtype)
    if dtype == "int8":  # of a scale, the kernel reads a whole row of lanes
        pages, token_bytes = QuantizedTensor(pages, target.array((*pages.shape[:-1], 1), "float32")), 2 * D * 5.0
    given = target.array((N, H, D)), pages, pages, target.array(table_NM.shape, "int32"), target.array((N,), "int32")
    work = 4.0 * N * H * CONTEXT * D, N * CONTEXT * K * token_bytes
    return Program(step, given, *work, data=(None, None, None, table_NM, lengths_N))


def ragged(
    target: Any,
    H: int,
    K: int,
    D: int,
    dtype: str,
    page: int,
    block: int,
    queries: int,
    batch: Sequence[Sequence[int]] = ((REQUESTS, 1, CONTEXT - 1),),
) -> Program:
    """jax's ragged paged attention; `block`: pages of a step, `queries`: of its tile, which reads whole requests."""
    import numpy as np
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def step(q_THD: Any, pages: Any, table: Any, lengths: Any, ends: Any, count: Any) -> Any:
        return ragged_paged_attention(
            q_THD, pages, lengths, table, ends, count, num_kv_pages_per_block=block,
            num_queries_per_block=queries, vmem_limit_bytes=48 * 2**20,
        )  # fmt: skip

    table_RM, lengths_R, new_R = _batch(batch, page)
    ends = np.concatenate([[0], np.cumsum(new_R)]).astype(np.int32)
    data = table_RM, lengths_R, ends, np.full(1, len(new_R), np.int32)
    scalars = [target.array(x.shape, "int32") for x in data]
    T = int(new_R.sum())
    moved = 4.0 * K * D * tokens_read(new_R, lengths_R, queries, block * page, causal=False)
    given = target.array((T, H, D)), target.array((POOL // page, page, 2 * K, D), dtype), *scalars
    work = _work(H, K, D, new_R, lengths_R)
    return Program(step, given, *work, data=(None, None, *data), moved_bytes=moved)


def merge(target: Any, H: int, V: int, later: int) -> Program:
    """What v5p does for a request that both cores have, whose last `later` tokens are the second core's."""
    import jax

    from twinax.pallas_kernels.paged_attention import tpu_decode
    from twinax.pallas_kernels.paged_attention.tpu import PART_TOKENS

    count = 1 + later // PART_TOKENS

    def step(out: Any, *states: Any) -> Any:
        return tpu_decode.merge(out, states, 0, count, 48 * 2**20)

    states = [target.array((count, H, lanes), "float32") for lanes in (128, 128, V)]
    given = target.array((REQUESTS, 1, H, V), "bfloat16"), *states
    return Program(jax.jit(step, donate_argnums=0), given, 0.0, 4.0 * count * H * (V + 256))
