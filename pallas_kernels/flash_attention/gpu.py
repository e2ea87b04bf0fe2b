"""Attention on NVIDIA GPUs: the kernel of the chip that a program is for.

| chip | forward | backward |
|---|---|---|
| H100, H200 | `hopper.py` | `hopper_backward.py` |

What these do not take (bias, float8, float32 and wider, head sizes that are no multiples of 16) and other chips are
refused, here or by them.

There was no GPU when this was written. The numbers come from `tests/pallas_kernels/gpu_emulator.py`, the registers from
ptxas, and nothing has been timed.
"""

from typing import Any

import jax

from ..chips import known_platform, target_chip
from .gpu_blocks import options_of
from .gradient import differentiable

HOPPER = ("h100", "h200")


def _kernels() -> Any:
    """The module whose `forward` and `backward` are for the chip that is traced for."""
    platform, chip = known_platform(), target_chip()
    if platform not in (None, "cuda"):
        raise NotImplementedError(f"these kernels are for NVIDIA GPUs, and this program is for a {platform}")
    if chip in HOPPER:
        from . import hopper, hopper_backward

        return hopper.forward, hopper_backward.backward
    raise NotImplementedError(f"no kernel is written for {chip or 'this GPU'} yet")


def _split(options: dict[str, Any]) -> tuple[Any, Any]:
    segments = options["q_segment_ids_BT"], options["kv_segment_ids_BS"]
    offset = options["q_offset"]
    return None if segments[0] is None else segments, None if isinstance(offset, int) else offset


def forward_by(kernel: Any) -> Any:
    def forward(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, **options: Any) -> Any:
        o, (segments, offset_B) = options_of(q_BTHD, k_BSKD, **options), _split(options)
        return kernel(o, q_BTHD, k_BSKD, v_BSKE, segments, offset_B, options.get("sinks_H"))

    return forward


def backward_by(kernel: Any) -> Any:
    def backward(
        q_BTHD: jax.Array,
        k_BSKD: jax.Array,
        v_BSKE: jax.Array,
        d_out_BTHE: jax.Array,
        lse_BTH: jax.Array,
        delta_BTH: jax.Array,
        **options: Any,
    ) -> Any:
        o, (segments, offset_B) = options_of(q_BTHD, k_BSKD, **options), _split(options)
        return kernel(o, q_BTHD, k_BSKD, v_BSKE, d_out_BTHE, lse_BTH, delta_BTH, segments, offset_B)

    return backward


def flash_attention(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array, **options: Any) -> Any:
    forward, backward = _kernels()
    return differentiable(forward_by(forward), backward_by(backward))(q_BTHD, k_BSKD, v_BSKE, **options)


def flash_attention_backward(*inputs: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    return backward_by(_kernels()[1])(*inputs, **options)
