"""float8 (e4m3) within a TPU's kernel: as bfloat16, by the bits, or multiplied as it is.

Where the chip has no float8, what Mosaic makes of a conversion takes 1.5 to 3 times as long: it spends more on the
numbers that are not normal than on all others. A v6e computes in bfloat16, so that two numbers a word are converted.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .chips import target_chip

NATIVE = ("7x",)
PAIRED = ("v6e",)  # computes in bfloat16
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
LEAST = 2.0**-6  # the least normal number
BIAS = 127 - 7  # of a float's exponent, more than of float8's


def to_bfloat16(x: jax.Array, *, normal: bool = False) -> jax.Array:
    """[even rows, lanes], exact, but nan may be 480.

    Args:
        normal: there are only normal numbers and 0, for which less is to be done. Others may become 0.
    """
    chip = target_chip()
    if chip in PAIRED:
        return _pairs(x, normal)
    if chip in NATIVE or not normal:
        return x.astype(jnp.bfloat16)
    from jax.experimental.pallas import tpu as pltpu  # not above: who only asks for numbers need not wait for it

    bits = pltpu.bitcast(x, jnp.int8).astype(jnp.int32) << 20
    return (pltpu.bitcast(bits & _signed(0x87F00000), jnp.float32) * 2.0**BIAS).astype(jnp.bfloat16)


def pieces(x_NI: jax.Array, reach: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Floats for `product`, for chips that multiply float8: two pieces [2 N, I], and what [N, 1] their sum counts for.

    A row times a power of two is the nearest float8, plus a 32nd of the float8 nearest to what that leaves: the 8
    digits of bfloat16, and of small numbers down to 2 ** -22 of the reach. A row that is not finite gives nan.

    Args:
        reach: what no magnitude of a row exceeds, [N or 1, 1]; None: the largest.
    """
    x_NI = x_NI.astype(jnp.float32)
    if reach is None:
        reach = jnp.max(jnp.abs(x_NI), axis=1, keepdims=True)
    # The power of two above it, from the bits, is brought to 2 ** 8, where its reciprocal is a normal number.
    up = 8 - jnp.clip((lax.bitcast_convert_type(reach, jnp.int32) >> 23) - 126, -100, 128)
    scale, back = (lax.bitcast_convert_type((power + 127) << 23, jnp.float32) for power in (up, -up))
    x_NI = x_NI * scale
    high_NI = x_NI.astype(FLOAT8)
    low_NI = ((x_NI - high_NI.astype(jnp.float32)) * 32).astype(FLOAT8)
    return jnp.concatenate([high_NI, low_NI]), jnp.where(reach < jnp.inf, back, jnp.nan)


def product(x: tuple[jax.Array, jax.Array], y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Of `pieces` and float8, which is not converted, in float32; the `axes` of each are summed."""
    x_NI, back = x
    sums = lax.dot_general(x_NI, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)
    N = len(x_NI) // 2
    return (sums[:N] + sums[N:] * (1 / 32)) * back


def _pairs(x: jax.Array, normal: bool) -> jax.Array:
    from jax.experimental.pallas import tpu as pltpu

    words = pltpu.bitcast(pltpu.bitcast(x, jnp.int8).astype(jnp.int16), jnp.int32)
    if normal:
        return pltpu.bitcast((words << 4) & _signed(0x87F087F0), jnp.bfloat16) * jnp.bfloat16(2.0**BIAS)
    size = pltpu.bitcast(((words << 4) & 0x07F007F0) + ((BIAS << 7) * 0x10001), jnp.bfloat16)
    # Numbers without the first digit have exponent 0 for 1, and were read as with one.
    size = jnp.minimum(size, 2 * size - jnp.bfloat16(LEAST))
    return pltpu.bitcast(pltpu.bitcast(size, jnp.int32) | (words & _signed(0x80008000)), jnp.bfloat16)


def _signed(word: int) -> int:
    return word - (1 << 32)
