"""Quantised weights: what is stored, and how it comes from floats and goes back.

Shapes: O outputs   I inputs   P blocks of outputs   G blocks of inputs. A weight may be stacked: leading dimensions
belong to all its arrays alike, so that `scan` and slicing treat it as they treat an array.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

# Chips whose matrix unit takes weights inputs first, as `with_inputs_first` has them.
INPUTS_FIRST = ("v6e", "7x")
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
# The dtype of the stored values (a byte holds two of four bits), and the largest magnitude of a value.
STORED = {"int8": jnp.dtype(jnp.int8), "int4": jnp.dtype(jnp.uint8), "fp8_e4m3": FLOAT8, "mxfp4": jnp.dtype(jnp.uint8)}
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0, "mxfp4": 6.0}
PACKED = ("int4", "mxfp4")
INTEGERS = ("int8", "int4")
MX_BLOCK = (1, 32)
E8M0_BIAS = 127
Block = tuple[int | None, int | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] as small values and scales of blocks: `w = (value - zero) * scale`.

    - `values` of "int8" and "fp8_e4m3" are [O, I] in their dtype. Those of "int4" and "mxfp4" are bytes [I / 2, O]:
      byte [i, o] has the value of input 2i in its low four bits, of input 2i + 1 in its high ones, so I is even. A
      TPU's matrix unit takes that order without turning it, and files have the two inputs of a byte together as well.
    - `inputs_first`: whole bytes are kept as [I, O] as well (see `with_inputs_first`). Always False of packed formats.
    - Four bits c of "int4" mean c - 8; of "mxfp4" an e2m1 float (a sign, two bits of exponent, one of mantissa).
    - `scales` are [G, P], inputs first: scale [g, p] belongs to inputs from g * block[1] and outputs from p * block[0].
      The last block may be shorter. Any float dtype; in "mxfp4" bytes e that mean 2 ** (e - 127) (e8m0).
    - `zeros`, like the scales and in units of the values, of any real dtype: integer formats only. None for zero.
    - `block` is how many outputs and inputs share a scale, None for all: (1, None) is a scale a channel, (None, None)
      one in all, (1, 64) groups of 64 inputs, (128, 128) the blocks of DeepSeek-V3. "mxfp4" has (1, 32).
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    format: str = field(metadata={"static": True})
    block: Block = field(metadata={"static": True})
    inputs_first: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I], as the floats' shape was."""
        *stack, first, second = self.values.shape
        if self.format in PACKED:
            return (*stack, second, 2 * first)
        return (*stack, second, first) if self.inputs_first else (*stack, first, second)

    @property
    def block_sizes(self) -> tuple[int, int]:
        """`block` with the numbers of outputs and inputs for None, and for more than there are."""
        O, I = self.shape[-2:]
        return min(self.block[0] or O, O), min(self.block[1] or I, I)

    def check(self) -> None:
        """Raises ValueError where the arrays are not what the class says."""
        if self.format not in STORED:
            raise ValueError(f"a quantised weight's format is one of {', '.join(STORED)}, got {self.format!r}")
        if self.values.dtype != STORED[self.format] or self.values.ndim < 2:
            raise ValueError(
                f"the values of an {self.format} weight are {STORED[self.format]} matrices, "
                f"got {self.values.dtype}{self.values.shape}"
            )
        if self.inputs_first and self.format in PACKED:
            raise ValueError(f"inputs_first is for int8 and fp8_e4m3: {self.format} weights have one order")
        *stack, O, I = self.shape
        check_block(self.format, self.block)
        rows, columns = self.block_sizes
        wanted = (*stack, -(-I // columns), -(-O // rows))
        floats = self.scales.dtype == jnp.uint8 if self.format == "mxfp4" else _is_float(self.scales)
        if self.scales.shape != wanted or not floats:
            kind = "uint8 (e8m0)" if self.format == "mxfp4" else "floats"
            raise ValueError(
                f"the scales of a weight [{O}, {I}] in blocks {self.block} are {kind} {wanted} (blocks of inputs, "
                f"blocks of outputs), got {self.scales.dtype}{self.scales.shape}"
            )
        if self.zeros is None:
            return
        if self.format not in INTEGERS:
            raise ValueError(f"only {' and '.join(INTEGERS)} weights have zero points, got them with {self.format}")
        if self.zeros.shape != wanted:
            raise ValueError(f"zero points have the scales' shape {wanted}, got {self.zeros.shape}")


def quantize(
    weight: jax.Array,
    format: str,
    *,
    block: Block | None = None,
    zero_points: bool = False,
    scale_dtype: jnp.dtype = jnp.float32,
) -> QuantizedWeight:
    """The nearest quantised weight [..., O, I] under scales that just reach each block's largest magnitude.

    Args:
      format: "int8", "int4", "fp8_e4m3" or "mxfp4" (OCP Microscaling: powers of two, 6 is reached by up to 7.99).
      block: outputs and inputs that share a scale, see `QuantizedWeight`; default (1, None), for "mxfp4" (1, 32).
      zero_points: for integers, spread the values between each block's smallest and largest (and zero, which stays
        exact), instead of around zero.
      scale_dtype: of the scales, not for "mxfp4". Values are rounded for the scale as it is stored.
    """
    if format not in STORED:
        raise ValueError(f"a quantised weight's format is one of {', '.join(STORED)}, got {format!r}")
    block = block or (MX_BLOCK if format == "mxfp4" else (1, None))
    check_block(format, block)
    if zero_points and format not in INTEGERS:
        raise ValueError(f"only {' and '.join(INTEGERS)} weights have zero points, got {format}")
    w_OI = jnp.asarray(weight)
    if not _is_float(w_OI) or w_OI.ndim < 2:
        raise ValueError(f"a weight to quantise is floats [..., O, I], got {w_OI.dtype}{w_OI.shape}")
    if format in PACKED and w_OI.shape[-1] % 2:
        raise ValueError(f"{format} puts two inputs into a byte: I must be even, got {w_OI.shape}")
    w_OI = w_OI.astype(jnp.promote_types(w_OI.dtype, jnp.float32))
    shape, largest = w_OI.shape[-2:], LARGEST[format]
    low, high = _reduce(jnp.min, w_OI, block), _reduce(jnp.max, w_OI, block)
    zeros = None
    if format == "mxfp4":
        exponent = jnp.frexp(jnp.maximum(high, -low))[1] - 1 - 2  # 6 is 1.5 * 2 ** 2
        stored = jnp.clip(exponent + E8M0_BIAS, 0, 2 * E8M0_BIAS).astype(jnp.uint8)
        stored = jnp.where(jnp.maximum(high, -low) == 0, jnp.uint8(E8M0_BIAS), stored)
    else:
        reach = high - low if zero_points else jnp.maximum(high, -low)
        levels = 2 * largest + 1 if zero_points else largest
        stored = jnp.where(reach == 0, 1, reach / levels).astype(scale_dtype)
    scales = scales_of(stored, w_OI.dtype)
    if zero_points:
        zeros = jnp.clip(jnp.round(-largest - 1 - low / scales), -largest - 1, largest).astype(jnp.int8)
    values = w_OI / expand(scales, block, shape)
    if zeros is not None:
        values = values + expand(zeros, block, shape).astype(values.dtype)
    if format == "mxfp4":
        codes = _to_e2m1(values)
    elif format == "fp8_e4m3":
        codes = jnp.clip(values, -largest, largest).astype(FLOAT8)
    else:
        codes = jnp.clip(jnp.round(values), -largest - zero_points, largest).astype(jnp.int8)
    return from_values(codes, stored.swapaxes(-1, -2), _turn_any(zeros), format=format, block=block)


def dequantize(weight: QuantizedWeight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The floats [..., O, I] that a weight stands for, computed in float32 (float64 for float64)."""
    wide = jnp.promote_types(dtype, jnp.float32)
    shape = weight.shape[-2:]
    values = values_of(weight).astype(wide)
    if weight.zeros is not None:
        values = values - expand(weight.zeros.astype(wide), weight.block, shape)
    return (values * expand(scales_of(weight.scales, wide), weight.block, shape)).astype(dtype)


def from_values(
    values_OI: jax.Array, scales_PG: jax.Array, zeros_PG: jax.Array | None = None, *, format: str, block: Block
) -> QuantizedWeight:
    """From unpacked values [..., O, I] and scales [..., P, G], outputs first, as files have them.

    Values are integers for "int8" and "int4" (-8 to 7), float8_e4m3fn, or codes 0 to 15 of e2m1 for "mxfp4".
    """
    values = values_OI
    if format in PACKED:
        if values.shape[-1] % 2:
            raise ValueError(f"{format} puts two inputs into a byte: I must be even, got {values.shape}")
        values = pack((values + 8 if format == "int4" else values).astype(jnp.uint8))
    weight = QuantizedWeight(values.astype(STORED[format]), _turn(scales_PG), _turn_any(zeros_PG), format, block)
    weight.check()
    return weight


def to_values(weight: QuantizedWeight) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What `from_values` takes: values [..., O, I] (codes of e2m1 for "mxfp4"), scales and zero points [..., P, G]."""
    if weight.format not in PACKED:
        values = _turn(weight.values) if weight.inputs_first else weight.values
        return values, _turn(weight.scales), _turn_any(weight.zeros)
    codes = unpack(weight.values)
    values = codes if weight.format == "mxfp4" else codes.astype(jnp.int8) - jnp.int8(8)
    return values, _turn(weight.scales), _turn_any(weight.zeros)


def with_inputs_first(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight, its values [..., I, O]: how TPUs from v6e on read int8 and float8 fastest.

    Their matrix units take weights inputs first and turn others around on the way: by the static profile, 4096 x 14336
    int8 take 1.6 times as long to multiply on a 7x as they are kept otherwise, float8 1.25 times. CPUs and GPUs want
    outputs first; so this is for a server that finds itself on one of `INPUTS_FIRST`. Packed formats are returned as
    they are.
    """
    if weight.format in PACKED or weight.inputs_first:
        return weight
    return replace(weight, values=_turn(weight.values), inputs_first=True)


def from_mxfp4_blocks(blocks_OGB: jax.Array, scales_OG: jax.Array) -> QuantizedWeight:
    """From gpt-oss's files: bytes [..., O, G, 16] of 32 inputs each, the first in the low bits; e8m0 [..., O, G]."""
    bytes_OH = blocks_OGB.reshape(*blocks_OGB.shape[:-2], -1)
    weight = QuantizedWeight(_turn(bytes_OH), _turn(scales_OG), None, "mxfp4", MX_BLOCK)
    weight.check()
    return weight


def pack(codes_OI: jax.Array) -> jax.Array:
    """Codes 0 to 15 [..., O, I] to bytes [..., I / 2, O]."""
    codes_IO = codes_OI.swapaxes(-1, -2)
    return codes_IO[..., ::2, :] | (codes_IO[..., 1::2, :] << 4)


def unpack(bytes_HO: jax.Array) -> jax.Array:
    """Bytes [..., I / 2, O] to codes 0 to 15 [..., O, I]."""
    *stack, H, O = bytes_HO.shape
    codes_IO = jnp.stack([bytes_HO & 15, bytes_HO >> 4], axis=-2).reshape(*stack, 2 * H, O)
    return codes_IO.swapaxes(-1, -2)


def values_of(weight: QuantizedWeight) -> jax.Array:
    """The values [..., O, I] as numbers: integers, float8, or for "mxfp4" float32."""
    values = to_values(weight)[0]
    return from_e2m1(values) if weight.format == "mxfp4" else values


def from_e2m1(codes: jax.Array) -> jax.Array:
    """Codes 0 to 15 to the floats they mean, by arithmetic on bits: a table would be a gather."""
    codes = codes.astype(jnp.uint32)
    # As if 0 and 1 had an implied leading one too: 0.5, 0.75, 1, 1.5, 2, 3, 4, 6.
    normal = lax.bitcast_convert_type(((codes & 7) + (126 << 1)) << 22, jnp.float32)
    magnitude = jnp.minimum(normal, 2 * normal - 1)
    return jnp.where(codes >= 8, -magnitude, magnitude)


def scales_of(scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Scales as floats, e8m0 bytes among them."""
    if scales.dtype != jnp.uint8:
        return scales.astype(dtype)
    exponent = scales.astype(jnp.uint32)
    # 2 ** -127 is float32's below-normal 1 << 22; byte 255 is not a number.
    power = lax.bitcast_convert_type(jnp.where(exponent == 0, 1 << 22, exponent << 23), jnp.float32)
    return jnp.where(exponent == 255, jnp.nan, power).astype(dtype)


def expand(blocks_GP: jax.Array, block: Block, shape: tuple[int, ...]) -> jax.Array:
    """One number a block [..., G, P] to one an element [..., O, I]; a dimension of one block stays 1."""
    for axis, size, step in ((-1, shape[0], block[0]), (-2, shape[1], block[1])):
        if blocks_GP.shape[axis] > 1 and step != 1:
            blocks_GP = lax.slice_in_dim(jnp.repeat(blocks_GP, step or size, axis=axis), 0, size, axis=axis)
    return blocks_GP.swapaxes(-1, -2)


def check_block(format: str, block: Block) -> None:
    if len(block) != 2 or any(step is not None and step < 1 for step in block):
        raise ValueError(f"a block is two positive numbers of outputs and inputs, or None for all, got {block}")
    if format == "mxfp4" and tuple(block) != MX_BLOCK:
        raise ValueError(f"mxfp4 has blocks {MX_BLOCK}, got {block}")


def _reduce(function, w_OI: jax.Array, block: Block) -> jax.Array:
    """`function` over each block and zero, [..., G, P]: zero pads the last block and is a value of every one."""
    *stack, O, I = w_OI.shape
    rows, columns = block[0] or O, block[1] or I
    P, G = -(-O // rows), -(-I // columns)
    padded = jnp.pad(w_OI, [(0, 0)] * len(stack) + [(0, P * rows - O), (0, G * columns - I)])
    reduced = function(padded.reshape(*stack, P, rows, G, columns), axis=(-3, -1), initial=0.0)
    return reduced.swapaxes(-1, -2)


def _to_e2m1(values: jax.Array) -> jax.Array:
    """The nearest code, halves to the even one, beyond 6 to 6."""
    size = jnp.abs(values)
    ties_up = (0.75, 1.75, 3.5)
    codes = jnp.zeros(values.shape, jnp.uint8)
    for edge in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        codes += (size >= edge if edge in ties_up else size > edge).astype(jnp.uint8)
    return codes | (jnp.signbit(values).astype(jnp.uint8) << 3)


def _turn(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).swapaxes(-1, -2)


def _turn_any(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else _turn(x)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
