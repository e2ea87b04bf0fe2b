"""Quantised weights in the grouped products' kernel: read as they are kept, made bfloat16 on the chip, once a group.

Whole-byte weights with one block of inputs need no scaling there: their values are exact in bfloat16, and scales belong
to columns of the result, or, where outputs are summed over, to those of the rows. Others are scaled in float32 and
rounded, which is what `dequantize(weight, bfloat16)` says; their inputs come first. What else there is
(`arrange` gives None) becomes floats in memory before the product.

Shapes: E experts   O outputs   I inputs   G blocks of inputs   K inputs of a block, H bytes of them, L outputs of it
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..float8 import to_bfloat16
from ..quantized_matmul import QuantizedWeight
from ..quantized_matmul.formats import FLOAT8, PACKED, expand
from ..quantized_matmul.tpu_codes import UNITS, on_the_way, spread

LANES = 256  # outputs that are made floats at a time


@dataclass(frozen=True)
class Kept:
    """How weights are kept: the format, inputs of a scale (None: scales are left for rows or results), zero points."""

    format: str
    size: int | None
    zeros: bool
    inputs_first: bool

    @property
    def per_byte(self) -> int:
        return 2 if self.format in PACKED else 1

    def multiples(self, contract: int, scales: jnp.dtype) -> tuple[int, int]:
        """Of terms and columns of a block, so that blocks of scales are whole tiles and those of bytes too."""
        inputs = 64 if self.size is None else self.size * (32 if scales == jnp.uint8 else 8)
        return (inputs, 1) if contract == 2 else (1, inputs)


@dataclass(frozen=True)
class Arranged:
    """Values [E, O, I] or [E, I / per_byte, O], and scales and zero points [E, 1 or 2, G, O]."""

    kept: Kept
    values: jax.Array
    scales: jax.Array


def arrange(weight: QuantizedWeight, dtype: jnp.dtype) -> Arranged | None:
    """None for what the kernel does not read as it is kept."""
    O, I = weight.shape[-2:]
    packed, G, size = weight.format in PACKED, weight.scales.shape[-2], weight.block_sizes[1]
    inputs_first, bare = packed or weight.inputs_first, G == 1 and weight.zeros is None
    if dtype != jnp.bfloat16 or (not bare and not inputs_first) or (packed and I % 64):
        return None
    if not bare and (size % 16 or I % size):
        return None
    kept = Kept(weight.format, None if bare else size, weight.zeros is not None, inputs_first)
    spread = [
        jnp.broadcast_to(expand(blocks, (weight.block[0], 1), (O, G)).swapaxes(-1, -2), (len(blocks), G, O))
        for blocks in (weight.scales, weight.zeros)
        if blocks is not None
    ]
    spread = [x if x.dtype == jnp.uint8 else x.astype(jnp.float32) for x in spread]
    return Arranged(kept, weight.values, jnp.stack(spread, axis=1))


def fill(kept: Kept, values_ref: Any, scales_ref: Any, floats_ref: Any) -> None:
    """`floats_ref` [K, L] from values [1, K / per_byte, L] and scales [1, 1 or 2, G, L]; or, bare, as both lie."""
    width = floats_ref.shape[1]
    lanes = next((n for n in (LANES, 128) if width % n == 0), width)

    def some(first: Any) -> None:
        own = pl.ds(first, lanes)
        if kept.size is None and kept.per_byte == 1:
            floats_ref[:, own] = _floats(values_ref[0, :, own]).astype(floats_ref.dtype)
            return
        scales = None
        if kept.size is not None:
            scales = [_scales(scales_ref[0, place, :, own]) for place in range(1 + kept.zeros)]
        step = max(64, kept.size or 0)
        for start in range(0, floats_ref.shape[0], step):
            rows = min(step, floats_ref.shape[0] - start)
            codes = values_ref[0, start // kept.per_byte : (start + rows) // kept.per_byte, own]
            if kept.per_byte == 1:
                parts = [_floats(codes).astype(jnp.float32)]
            else:
                parts = [
                    half.astype(jnp.float32)
                    for half in spread(kept.format, pltpu.bitcast(codes, jnp.int32), on_the_way(kept.format))
                ]
            parts = [_scaled(part, kept, scales, start) for part in parts]
            floats = parts[0].astype(floats_ref.dtype) if len(parts) == 1 else _interleave(*parts)
            floats_ref[start : start + rows, own] = floats

    if width == lanes:
        return some(0)

    def turn(index: Any, _: None) -> None:
        some(pl.multiple_of(index * lanes, lanes))

    lax.fori_loop(0, width // lanes, turn, None)


def _floats(x: jax.Array) -> jax.Array:
    return to_bfloat16(x) if x.dtype == FLOAT8 else x


def _scaled(part: jax.Array, kept: Kept, scales: list[jax.Array] | None, start: int) -> jax.Array:
    """Inputs from `start` on, of which `per_byte` share a row."""
    unit = UNITS.get((kept.format, on_the_way(kept.format)), 1.0)
    if scales is None or kept.size is None:
        return part * unit
    rows, size = part.shape[0], kept.size // kept.per_byte
    pieces = []
    for first in range(0, rows, size):
        block = (start + first * kept.per_byte) // kept.size
        piece = part[first : first + size] * unit
        if kept.zeros:
            piece = piece - scales[1][block : block + 1]
        pieces.append(piece * scales[0][block : block + 1])
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)


def _interleave(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Rows [H, L] of even and odd inputs as bfloat16 [2 * H, L] in order: two rows are the halves of 32 bits."""
    low, high = (lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for x in (even, odd))
    return pltpu.bitcast(lax.shift_right_logical(low, jnp.int32(16)) | high, jnp.bfloat16)


def _scales(scales: jax.Array) -> jax.Array:
    """As floats; e8m0's 2 ** -127 is zero on a TPU."""
    if scales.dtype != jnp.uint8:
        return scales
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
