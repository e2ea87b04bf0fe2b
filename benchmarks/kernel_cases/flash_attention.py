"""Flash attention, forward and backward, against jax's splash attention and flash attention.

Splash attention reads from prefetched tables which tiles to skip, which the static profiler cannot follow. It is
compiled here without the tables, so that it computes every tile and masks as it would, and the share of its tiles that
are not empty is counted: what skipping costs is given to it for nothing.

All get their own order of dimensions in memory, heads before tokens, for ours too: the copies that another order takes
are the surroundings' (between projections, rotary positions and the output's projection, XLA makes no copy of its own
for our kernels: the products write that order).

The profiler runs every step of the grid, so its time and memory grow with the heads, which are all alike, and with
the square of the length. It is given few heads (`_heads`), and of rows of 16,384 a part: for splash attention 4,096
queries and keys, as with all tiles computed these are all alike; for our forward kernel 4,096 queries against all keys,
under the diagonal the two blocks in the middle, which are the mean of all, as its grid pairs a long row with a short
one; for our backward kernel, without a mask, 4,096 keys. Cycles are multiplied accordingly, and so what begins and ends
a kernel is counted more than once.

Of a backward pass the pullback is compiled, with all that it does around its kernels.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

SHAPES = ((4, 4096, 16, 128), (1, 16384, 16, 128), (4, 1024, 16, 128), (4, 4096, 16, 64), (4, 4096, 16, 256))
# Rows and keys of a tile, keys of a product: the best of a wider search on v6e and TPU7x.
SPLASH = ((1024, 1024, 512), (1024, 1024, 1024))
# The last is whether one kernel makes all gradients; two were 1.2 to 1.5 times as slow on v6e.
SPLASH_BACKWARD = ((512, 512, 512, True), (1024, 1024, 512, True))
FLASH = ((512, 512, 512),)  # at 1,024 only: at 4,096 it is 1.4 times as slow as splash attention or slower
LONG = 16384  # tokens
PART = 4096  # tokens of a long row that a peer is given


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        yield from _on_gpus()
        return
    for B, T, H, D in SHAPES:
        for causal in (True, False):
            shape: dict[str, Any] = {"B": B, "T": T, "H": H, "D": D, "causal": causal}
            words = f"{B} x {T} x {H} x {D}, {'causal' if causal else 'full'}"
            ahead = causal and T <= 4096 and chip in ("v6e", "tpu7x")
            yield Case(
                "flash_attention",
                f"forward {words}",
                Kernel("forward", shape),
                {
                    "splash": tuple(Kernel("splash", {**shape, "blocks": x}) for x in SPLASH),
                    **({"flash": tuple(Kernel("flash", {**shape, "blocks": x}) for x in FLASH)} if T == 1024 else {}),
                },
                1.15 if ahead else 1.0,
            )
            yield Case(
                "flash_attention",
                f"backward {words}",
                Kernel("backward", shape),
                {"splash": tuple(Kernel("splash_backward", {**shape, "blocks": x}) for x in SPLASH_BACKWARD)},
                1.1,
            )


def _on_gpus() -> Iterator[Case]:
    for B, T, H, D in SHAPES:
        for causal in (True, False):
            shape: dict[str, Any] = {"B": B, "T": T, "H": H, "D": D, "causal": causal}
            words = f"{B} x {T} x {H} x {D}, {'causal' if causal else 'full'}"
            for kind in ("forward", "backward"):
                ours = Kernel(kind, {**shape, "implementation": "gpu"})
                peers = {
                    "cuDNN": (Kernel("cudnn", {**shape, "kind": kind}),),
                    "pallas": (Kernel("pallas", {**shape, "kind": kind}),),
                }
                yield Case("flash_attention", f"{kind} {words}", ours, peers)


def _work(B: int, T: int, H: int, D: int, causal: bool, backward: bool = False) -> tuple[float, float]:
    """FLOPs and bytes: two products of a tile forward, five backward; q, k, v, out, and d of each, of 2 bytes."""
    flops = (10 if backward else 4) * B * H * T * T * D / (2 if causal else 1)
    return flops, 2.0 * (8 if backward else 4) * B * T * H * D


def _heads(target: Any, B: int, T: int, H: int, backward: bool = False) -> int:
    """How many heads are profiled. v5p divides them over two cores; on 7x the profiler does not come through 16."""
    short = 16 if target.chip.name != "tpu7x" else 4 if backward else 8
    few = short if T < 2048 else 1 if backward and target.chip.name != "v5p" else 2
    return min(B * H, few)


def _part(T: int) -> tuple[int, float]:
    """How many queries and keys of the peers are profiled, and how often their tiles are there."""
    return (PART, (T / PART) ** 2) if T == LONG else (T, 1.0)


def forward(target: Any, B: int, T: int, H: int, D: int, causal: bool, implementation: str = "tpu") -> Program:
    from twinax.pallas_kernels.flash_attention import flash_attention

    if target.chip.platform != "tpu":

        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(q, k, v, causal=causal, implementation=implementation)

        return _of_library(target, attend, B, T, H, D, causal, "forward")
    heads, rows = _heads(target, B, T, H), min(T, 4096)  # two blocks, where there are two
    options = {"causal": causal, "q_offset": (T - rows) // 2 if causal else 0, "implementation": implementation}
    program = Program(
        _heads_first(lambda q, k, v: flash_attention(q, k, v, **options)),
        (target.array((1, heads, rows, D)), *[target.array((1, heads, T, D))] * 2),
        *_work(B, T, H, D, causal),
        share=B * H / heads * T / rows,
    )
    return _as_kernels_want(target, program)


def backward(target: Any, B: int, T: int, H: int, D: int, causal: bool, implementation: str = "tpu") -> Program:
    from twinax.pallas_kernels.flash_attention import flash_attention

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, causal=causal, implementation=implementation)

    work = _work(B, T, H, D, causal, backward=True)
    if target.chip.platform != "tpu":
        return _pullback(target, attend, [target.array((B, T, H, D))] * 3, work)
    heads, keys = _heads(target, B, T, H, True), T if causal else min(T, PART)
    q, k = target.array((1, T, heads, D)), target.array((1, keys, heads, D))
    return _pullback(target, attend, [q, k, k], work, B * H / heads * T / keys, heads_first=True)


def _heads_first(function: Any) -> Any:
    """The same of trees of arrays [B, H, T, ...]."""
    import jax
    import jax.numpy as jnp

    def swap(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), tree)

    return lambda *given: swap(function(*map(swap, given)))


def splash(target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int]) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    heads, (length, times) = _heads(target, B, T, H), _part(T)
    rows, keys, part = (min(size, T) for size in blocks)
    sizes = library.BlockSizes(block_q=rows, block_kv=keys, block_kv_compute=part)
    kernel = _splash(sizes, heads, (length, length), causal)
    x = target.array((heads, length, D))
    share = (_not_empty(T, rows, keys) if causal else 1.0) * B * H / heads * times
    work = _work(B, T, H, D, causal)
    return _as_kernels_want(target, Program(lambda q, k, v: kernel(q, k, v), (x, x, x), *work, share=share))


def splash_backward(
    target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int, bool]
) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    heads, (length, times) = _heads(target, B, T, H, True), _part(T)
    rows, keys, part = (min(size, T) for size in blocks[:3])
    fused = blocks[3]
    other = {} if fused else {"block_q_dq": rows, "block_kv_dq": keys}
    sizes = library.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_kv_compute=part,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_kv_dkv_compute=part,
        use_fused_bwd_kernel=fused,
        **other,
    )
    kernel = _splash(sizes, heads, (length, length), causal)
    share = (_not_empty(T, rows, keys) if causal else 1.0) * B * H / heads * times
    x = target.array((heads, length, D))
    work = _work(B, T, H, D, causal, backward=True)
    return _pullback(target, lambda q, k, v: kernel(q, k, v), [x, x, x], work, share)


def flash(target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int]) -> Program:
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    heads = _heads(target, B, T, H)
    rows, keys, part = (min(size, T) for size in blocks)
    sizes = library.BlockSizes(block_q=rows, block_k_major=keys, block_k=part, block_b=1)
    x = target.array((1, heads, T, D))
    program = Program(
        lambda q, k, v: library.flash_attention(q, k, v, causal=causal, block_sizes=sizes),
        (x, x, x),
        *_work(B, T, H, D, causal),
        share=B * H / heads,
    )
    return _as_kernels_want(target, program)


def _as_kernels_want(target: Any, program: Program) -> Program:
    """With arguments and results row by row in memory, which is not what XLA takes for heads of 64: it would copy."""
    import jax
    from jax.experimental.layout import Format, Layout

    def format_of(x: Any) -> Any:
        return Format(Layout(tuple(range(x.ndim))), target.array(()).sharding)

    with target.context():
        results = jax.eval_shape(program.function, *program.arguments)
    jax.clear_caches()  # what is compiled is traced again, with the block sizes that `benchmarks.tune` asks for
    formats = jax.tree.map(format_of, program.arguments), jax.tree.map(format_of, results)
    jitted = jax.jit(program.function, in_shardings=formats[0], out_shardings=formats[1])
    return dataclasses.replace(program, function=jitted)


def cudnn(target: Any, B: int, T: int, H: int, D: int, causal: bool, kind: str) -> Program:
    """Only for a device that is here: it is not compiled ahead."""
    import jax

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    return _of_library(target, attend, B, T, H, D, causal, kind)


def pallas(target: Any, B: int, T: int, H: int, D: int, causal: bool, kind: str) -> Program:
    """The attention among jax's own kernels, through Triton."""
    from jax.experimental.pallas.ops.gpu import attention as library

    def attend(q: Any, k: Any, v: Any) -> Any:
        return library.mha(q, k, v, segment_ids=None, sm_scale=D**-0.5, causal=causal)

    return _of_library(target, attend, B, T, H, D, causal, kind)


def _of_library(target: Any, attend: Any, B: int, T: int, H: int, D: int, causal: bool, kind: str) -> Program:
    given, work = [target.array((B, T, H, D))] * 3, _work(B, T, H, D, causal, kind == "backward")
    return Program(attend, tuple(given), *work) if kind == "forward" else _pullback(target, attend, given, work)


def _splash(sizes: Any, heads: int, shape: tuple[int, int], causal: bool) -> Any:
    """The kernel without its tables; see the module."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    mask = (masks.CausalMask if causal else masks.FullMask)(shape)
    several = masks.MultiHeadMask([mask] * heads)
    kernel = library.make_splash_mha(mask=several, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def without(info: Any) -> Any:
        return None if info is None else MaskInfo(None, None, None, None, info.q_sequence)

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return library.SplashAttentionKernel(*map(without, infos), **kernel.kwargs)


def _not_empty(T: int, rows: int, keys: int) -> float:
    """The share of tiles that a causal mask does not empty."""
    return sum(math.ceil(end / keys) for end in range(rows, T + 1, rows)) / ((T // rows) * (T // keys))


def _pullback(
    target: Any,
    attend: Any,
    given: list[Any],
    work: tuple[float, float],
    share: float = 1.0,
    heads_first: bool = False,
) -> Program:
    """The backward pass alone: what the forward one keeps is an argument. `heads_first`: of arrays [B, T, H, ...]."""
    import jax

    def argument(x: Any) -> Any:
        shape = (x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]) if heads_first else x.shape
        return target.array(shape, x.dtype)

    with target.context():
        out, pullback = jax.eval_shape(lambda *given: jax.vjp(attend, *given), *given)
    kept, d_out = jax.tree.map(argument, (pullback, out))

    def back(pullback: Any, d_out: Any) -> Any:
        return pullback(d_out)

    program = Program(_heads_first(back) if heads_first else back, (kept, d_out), *work, share=share)
    return _as_kernels_want(target, program) if target.chip.platform == "tpu" else program
