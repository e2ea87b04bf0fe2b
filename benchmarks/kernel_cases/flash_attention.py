"""Flash attention, forward and backward, against jax's splash attention and flash attention.

Splash attention reads from prefetched tables which tiles to skip, which the static profiler cannot follow. It is
compiled here without the tables, so that it computes every tile and masks as it would, and the share of its tiles that
are not empty is counted: what skipping costs is given to it for nothing. Libraries get their own order of dimensions,
[B, H, T, D]; the batch is folded into the heads, which for them is the same grid.
"""

import math
from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

SHAPES = ((4, 4096, 16, 128), (1, 16384, 16, 128), (4, 1024, 16, 128), (4, 4096, 16, 64), (4, 4096, 16, 256))
# Rows and keys of a tile, keys of a product: the best of a wider search on v6e and TPU7x.
SPLASH = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024))
SPLASH_BACKWARD = ((512, 512, 512, True), (1024, 1024, 512, True), (512, 512, 512, False), (1024, 1024, 512, False))
FLASH = ((512, 512, 512),)


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
                    "flash": tuple(Kernel("flash", {**shape, "blocks": x}) for x in FLASH),
                },
                1.15 if ahead else 1.0,
            )
            yield Case(
                "flash_attention",
                f"backward {words}",
                Kernel("backward", shape),
                {"splash": tuple(Kernel("splash_backward", {**shape, "blocks": x}) for x in SPLASH_BACKWARD)},
                1.1 if ahead else 1.0,
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


def forward(target: Any, B: int, T: int, H: int, D: int, causal: bool, implementation: str = "tpu") -> Program:
    from twinax.pallas_kernels.flash_attention import flash_attention

    x = target.array((B, T, H, D))
    return Program(
        lambda q, k, v: flash_attention(q, k, v, causal=causal, implementation=implementation),
        (x, x, x),
        *_work(B, T, H, D, causal),
    )


def backward(target: Any, B: int, T: int, H: int, D: int, causal: bool, implementation: str = "tpu") -> Program:
    from twinax.pallas_kernels.flash_attention import flash_attention

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, causal=causal, implementation=implementation)

    work = _work(B, T, H, D, causal, backward=True)
    return _pullback(target, attend, [target.array((B, T, H, D))] * 3, work)


def splash(target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int]) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    rows, keys, part = (min(size, T) for size in blocks)
    sizes = library.BlockSizes(block_q=rows, block_kv=keys, block_kv_compute=part)
    kernel = _splash(sizes, B * H, T, causal)
    x = target.array((B * H, T, D))
    share = _not_empty(T, rows, keys) if causal else 1.0
    return Program(lambda q, k, v: kernel(q, k, v), (x, x, x), *_work(B, T, H, D, causal), share=share)


def splash_backward(
    target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int, bool]
) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

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
    kernel = _splash(sizes, B * H, T, causal)
    share = _not_empty(T, rows, keys) if causal else 1.0
    work = _work(B, T, H, D, causal, backward=True)
    return _pullback(target, lambda q, k, v: kernel(q, k, v), [target.array((B * H, T, D))] * 3, work, share)


def flash(target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int]) -> Program:
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    rows, keys, part = (min(size, T) for size in blocks)
    sizes = library.BlockSizes(block_q=rows, block_k_major=keys, block_k=part, block_b=1)
    x = target.array((B, H, T, D))
    return Program(
        lambda q, k, v: library.flash_attention(q, k, v, causal=causal, block_sizes=sizes),
        (x, x, x),
        *_work(B, T, H, D, causal),
    )


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


def _splash(sizes: Any, heads: int, T: int, causal: bool) -> Any:
    """The kernel without its tables; see the module."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    mask = (masks.CausalMask if causal else masks.FullMask)((T, T))
    several = masks.MultiHeadMask([mask] * heads)
    kernel = library.make_splash_mha(mask=several, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def without(info: Any) -> Any:
        return None if info is None else MaskInfo(None, None, None, None, info.q_sequence)

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return library.SplashAttentionKernel(*map(without, infos), **kernel.kwargs)


def _not_empty(T: int, rows: int, keys: int) -> float:
    """The share of tiles that a causal mask does not empty."""
    return sum(math.ceil(end / keys) for end in range(rows, T + 1, rows)) / ((T // rows) * (T // keys))


def _pullback(target: Any, attend: Any, given: list[Any], work: tuple[float, float], share: float = 1.0) -> Program:
    """The backward pass alone: what the forward one keeps is an argument."""
    import jax

    with target.context():
        out, pullback = jax.eval_shape(lambda *given: jax.vjp(attend, *given), *given)
    kept, d_out = jax.tree.map(lambda x: target.array(x.shape, x.dtype), (pullback, out))
    return Program(lambda pullback, d_out: pullback(d_out), (kept, d_out), *work, share=share)
