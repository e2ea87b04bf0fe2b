"""The loss of tokens over the vocabularies of Llama 3 and Gemma, against XLA's in one chunk, which keeps its logits.

Gradients are XLA's on every chip, and on GPUs the loss is too: there is nothing to compare.

The profiler is given a part of the vocabulary, `PART` blocks of the kernel's, and counts it as often; what begins and
ends a kernel counts each time.
"""

from collections.abc import Iterator
from typing import Any

from ..static import Program
from . import Case, Kernel

TOKENS, PART = 2048, 8
SHAPES = (("Llama-3 8B", 128_256, 4096), ("Gemma 2 2B", 256_000, 2304))


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        return
    for words, V, D in SHAPES:
        given: dict[str, Any] = {"V": V, "D": D}
        peers = {"XLA": (Kernel("loss", {**given, "implementation": "xla"}),)}
        yield Case("cross_entropy", f"loss, {TOKENS} tokens, {words}", Kernel("loss", given), peers, goal=None)


def loss(target: Any, V: int, D: int, implementation: str = "tpu") -> Program:
    from twinax.pallas_kernels.cross_entropy import cross_entropy
    from twinax.pallas_kernels.cross_entropy.tpu import WORDS

    part = PART * WORDS

    def run(hidden: Any, weight: Any, targets: Any) -> Any:
        return cross_entropy(hidden, weight, targets, chunk_bytes=1 << 40, implementation=implementation)

    given = target.array((1, TOKENS, D)), target.array((part, D)), target.array((1, TOKENS), "int32")
    return Program(run, given, 2.0 * TOKENS * V * D, 2.0 * D * (TOKENS + V), share=V / part)
