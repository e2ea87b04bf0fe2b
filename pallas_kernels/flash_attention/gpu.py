"""Attention on NVIDIA GPUs: the first of these kernels that takes the arguments.

| chip | kernel | dtypes | head sizes |
|---|---|---|---|
| H100, H200 | `hopper.py`, `hopper_backward.py` (Mosaic GPU) | bfloat16, float16, float8 | multiples of 16, up to 256 |
| B200, GB200 | `blackwell.py`, `blackwell_backward.py` (Mosaic GPU) | the same | multiples of 16, up to 256 |
| any | `triton.py` (Pallas's Triton backend, as long as JAX has it) | and float32 | any up to 256 |

All take all options. On Blackwell the gradients of head sizes that add up to more than 384 are Triton's, on Hopper
those of a bias with segments and heads over 192, and on every chip that of a bias, by a kernel of its own. Hopper and
Blackwell multiply float8 by float8, probabilities too; Triton widens it to bfloat16. No kernel takes float64, or a
scale that is not positive. Scores below -2**100 count as hidden.

There was no GPU when this was written: the numbers are those of an emulated one (in `tests/pallas_kernels/`) and of
Pallas's interpreter, registers and spills are ptxas's, and nothing has been timed.
"""

from collections.abc import Callable
from typing import Any

import jax

from ..chips import known_platform, target_chip
from .gpu_blocks import options_of
from .gradient import differentiable, without_padding

HOPPER, BLACKWELL = ("h100", "h200"), ("b200", "gb200", "b300", "gb300")
Kernel = Callable[..., Any]


def _kernels() -> list[tuple[str, Kernel, Kernel]]:
    """(name, forward, backward) of those for the chip that is traced for, best first."""
    platform, chip, found = known_platform(), target_chip(), []
    if platform not in (None, "cuda"):
        raise NotImplementedError(f"these kernels are for NVIDIA GPUs, and this program is for a {platform}")
    if chip in HOPPER:
        from . import hopper, hopper_backward

        found.append(("hopper", hopper.forward, or_triton(hopper_backward.backward)))
    if chip in BLACKWELL:
        from . import blackwell, blackwell_backward

        found.append(("blackwell", blackwell.forward, or_triton(blackwell_backward.backward)))
    triton = _triton()
    return found if triton is None else [*found, ("triton", triton.forward, triton.backward)]


def _triton() -> Any:
    try:
        from . import triton
    except ImportError:  # JAX deprecates its Triton backend
        return None
    return triton


def or_triton(backward: Kernel) -> Kernel:
    """For a forward pass that does more than the backward one."""

    def either(*inputs: Any) -> Any:
        try:
            return backward(*inputs)
        except NotImplementedError:
            triton = _triton()
            if triton is None:
                raise
            return triton.backward(*inputs)

    return either


def forward_by(kernel: Any) -> Any:
    def forward(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, **options: Any) -> Any:
        v_BSKE = without_padding(v_BSKE, options["kv_segment_ids_BS"])  # scores of the others are hidden
        return kernel(*options_of(q_BTHD, k_BSKD, **options), q_BTHD, k_BSKD, v_BSKE)

    return forward


def backward_by(kernel: Any) -> Any:
    def backward(q_BTHD: jax.Array, k_BSKD: jax.Array, *others: jax.Array, **options: Any) -> Any:
        o, arrays = options_of(q_BTHD, k_BSKD, **options)
        grads = kernel(o, arrays, q_BTHD, k_BSKD, *others)
        if not o.bias:
            return grads
        triton = _triton()
        if triton is None:
            raise NotImplementedError("the gradient of a bias is Triton's, which this JAX has no more")
        return *grads, triton.bias_gradient(o, arrays, q_BTHD, k_BSKD, *others)

    return backward


def flash_attention(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, **options: Any) -> Any:
    def of_kernel(forward: Kernel, backward: Kernel) -> Any:
        return differentiable(forward_by(forward), backward_by(backward))(q_BTHD, k_BSKD, v_BSKE, **options)

    return _first(of_kernel)


def flash_attention_backward(*inputs: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    return _first(lambda _, backward: backward_by(backward)(*inputs, **options))


def _first(run: Callable[[Kernel, Kernel], Any]) -> Any:
    """Of the first kernel that does not refuse."""
    reasons = []
    for name, forward, backward in _kernels():
        try:
            return run(forward, backward)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(reasons) or "this JAX has no kernels for this GPU")
