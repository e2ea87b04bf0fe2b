"""Four-bit codes as 8-bit numbers: masks and shifts of whole words, four bytes at a time.

Each takes words of bytes and gives the numbers of their low and of their high four bits, times a power of two whose
inverse is in `UNITS`.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from ..float8 import NATIVE
from .formats import FLOAT8

INT8 = jnp.dtype(jnp.int8)
# These chips' matrix units multiply bfloat16 by two kinds of float8 as they are, and their vector units turn both into
# floats in one step, FLOAT8 in seven: float8 with a bias of 11 for 7, so of a 16th, and float8 with two bits of
# mantissa, which are enough for e2m1 and whose negative zero is one.
ELEVEN, E5M2 = jnp.dtype(jnp.float8_e4m3b11fnuz), jnp.dtype(jnp.float8_e5m2)
TURNING = ("v5e", "v5p", "v6e")
# What a matrix unit multiplies bfloat16 by as it is; FLOAT8 on a 7x.
NARROW = (FLOAT8, ELEVEN, E5M2)
SIXTEEN = 2.0**4
# The same in each byte of an int32.
TOP, HIGH, LOW = (x - (1 << 32) if x >> 31 else x for x in (0x80808080, 0xF0F0F0F0, 0x0F0F0F0F))
ONE, SEVEN, SEVENS, E2M1 = 0x01010101, 0x07070707, 0x7F7F7F7F, 0x1C1C1C1C
# By format and by the dtype that is made.
UNITS = {
    ("int4", FLOAT8): 2.0**9,
    ("int4", ELEVEN): SIXTEEN * 2.0**9,
    ("int4", INT8): 2.0**-4,
    ("mxfp4", FLOAT8): 2.0**6,
    ("mxfp4", INT8): 0.5,
    ("mxfp4", E5M2): 2.0**14,
}


def narrow(form: str) -> jnp.dtype:
    """Of `NARROW`, what a weight becomes in fewest steps; bfloat16 where the unit takes none of them."""
    chip = target_chip()
    if chip in TURNING:
        return E5M2 if form == "mxfp4" else ELEVEN
    return jnp.dtype(jnp.bfloat16) if chip == "v4" else FLOAT8


def on_the_way(form: str) -> jnp.dtype:
    """To bfloat16: float8 takes fewer steps to e2m1, where the chip turns float8 into floats itself."""
    if form == "mxfp4" and target_chip() in TURNING:
        return E5M2
    return FLOAT8 if form == "mxfp4" and target_chip() in NATIVE else INT8


def eleven(x: jax.Array) -> jax.Array:
    """16ths of float8's numbers, exact, but nan may be 480."""
    words = pltpu.bitcast(x, jnp.int32)
    # A negative 0 would be nan.
    words = words & (((words & SEVENS) + SEVENS) | SEVENS)
    return pltpu.bitcast(words, ELEVEN)


def spread(form: str, words: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """`dtype` is float8 or int8. float8 of "int4" are the codes 0 to 15, among its lowest numbers."""
    if form == "int4" and dtype in NARROW:
        halves = words & LOW, (words >> 4) & LOW
    elif form == "int4":
        # Of 0 to 15 less 8, the bits with the top one turned, as the high half of a byte: 16 times the number.
        halves = ((words << 4) & HIGH) ^ TOP, (words & HIGH) ^ TOP
    elif dtype == INT8:
        halves = _twice(words), _twice(words >> 4)
    else:
        # The exponent and the mantissa, one bit lower where only two bits are the mantissa's.
        lower = 1 if dtype == E5M2 else 0
        rest = E2M1 >> lower
        halves = ((words << 4) & TOP) | ((words << 2 - lower) & rest), (words & TOP) | ((words >> 2 + lower) & rest)
    return pltpu.bitcast(halves[0], dtype), pltpu.bitcast(halves[1], dtype)


def _twice(words: jax.Array) -> jax.Array:
    """Two times the e2m1 numbers of the low four bits, as int8: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives."""
    negative, large = (words >> 3) & ONE, (words >> 2) & ONE
    # From 4 on codes are less than they mean: 5 by 1, 6 by 2, 7 by 5.
    last = words & (words >> 1) & large
    size = (words & SEVEN) + (words & ((large << 1) | large)) + (last << 1)
    # Less than 0x80 a byte all along, so that no byte carries into the next, not even a negative 0.
    top = negative << 7
    return ((size ^ (top - negative)) + negative) ^ top
