"""Block sizes of the grouped products on TPUs, in closed form from the chip and the shapes.

Shapes as in `tpu.py`. What a choice costs is estimated: products or memory, whichever is longer, and what every step
takes. Memory: rows are read once for each part of C, weights once for each group if A is not cut, else once a visit.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from ..chips import target_chip
from ..tuned import best

MIB = 1 << 20
PARTS = (256, 384, 512, 768, 1024, 1536, 2048, 4096)
# Of one product, rows times columns times terms, by the side of the chip's unit: the program of a product is unrolled,
# and takes long to compile. Larger ones are faster.
LARGEST_PRODUCT = {128: 1 << 30, 256: 2 << 30}
LARGEST_PART = 1 << 22  # of weights whose terms are cut: half of it is as fast, and the profiler follows no larger ones
STEP_SECONDS = 0.4e-6  # what a step of the grid takes besides its products


@dataclass(frozen=True)
class Chip:
    """One core: what it multiplies in bfloat16, how fast it reads, what it holds, and the side of its unit."""

    flops: float
    bytes_per_second: float
    vmem: int
    unit: int
    cores: int = 1


CHIPS = {
    "v5e": Chip(197e12, 819e9, 96 * MIB, 128),
    "v5p": Chip(230e12, 1382e9, 48 * MIB, 128, cores=2),
    "v6e": Chip(918e12, 1640e9, 96 * MIB, 256),
    "7x": Chip(1153e12, 3690e9, 48 * MIB, 256),
}


@dataclass(frozen=True)
class ProductBlocks:
    """Rows, columns and terms of a block; a piece of one of `s` rows by `chunk` columns is computed at a time.

    Of a tile that has one group, `wide` columns at a time: larger products are faster, and take longer to compile.
    """

    n: int
    c: int
    a: int
    s: tuple[int, ...]
    chunk: int
    wide: int


@dataclass(frozen=True)
class GradientBlocks:
    """Rows, outputs and inputs of a block; a tile that has one group is multiplied whole, others in pieces of `s`."""

    n: int
    o: int
    i: int
    s: tuple[int, ...]


def chip() -> Chip:
    return CHIPS.get(target_chip() or "v5e", CHIPS["v5p"])


def vmem_bytes() -> int:
    return chip().vmem


def _key(kernel: str, N: int, A: int, C: int, G: int, dtype: jnp.dtype) -> dict[str, int | str | bool]:
    """Rows up to a power of two, terms and columns (of the gradient: inputs and outputs), groups."""
    rows = 1 << max(N - 1, 0).bit_length()
    return {"kernel": kernel, "N": rows, "A": A, "C": C, "G": G, "dtype": jnp.dtype(dtype).name}


def tuning_space(name: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    """For `benchmarks.tune`: block sizes worth trying on a chip, the closed form first."""
    on, dtype = CHIPS[name], jnp.dtype(key["dtype"])
    N, A, C, G = (key[part] for part in "NACG")
    if key["kernel"] == "dweight":
        first = _gradient_blocks(on, N, A, C, G, dtype)
        others = [replace(first, o=o) for o in _cuts(C, PARTS, False)]
        others += [replace(first, i=i) for i in _cuts(A, PARTS, False)]
        others += [replace(first, n=n, s=pieces(n)) for n in (256, 512)]
        others = [b for b in others if b.n * b.o * b.i <= LARGEST_PRODUCT[128]]
        held = lambda b: 2 * dtype.itemsize * (b.n * (b.o + b.i) + b.o * b.i) + 8 * b.o * b.i  # noqa: E731
    else:
        first = _product_blocks(on, N, A, C, G, dtype)
        others = [replace(first, n=n, s=pieces(n)) for n in (256, 512, 1024)]
        cuts = [c for c in _cuts(C, PARTS, False) if c >= 512]
        others += [replace(first, c=c, chunk=_chunk(c, first.chunk), wide=_chunk(c, first.wide)) for c in cuts]
        parts = [_chunk(first.c, first.wide // n) for n in (2, 4) if first.wide // n >= 128]
        others += [replace(first, chunk=part, wide=part) for part in parts]
        held = lambda b: 2 * dtype.itemsize * (b.n * (b.a + b.c) + b.a * b.c)  # noqa: E731
    fitting = [b for b in others if b != first and held(b) <= on.vmem * 0.9]
    return [asdict(b) for b in [first, *dict.fromkeys(fitting)]][:12]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _cuts(size: int, choices: tuple[int, ...], exact: bool) -> list[int]:
    """The parts in which `size` may be cut: the whole, or multiples of 128."""
    cuts = [part for part in choices if part < size and (size % part == 0 or not exact)]
    if exact and size % 128 == 0:
        cuts += [size // n for n in range(2, 9) if size % n == 0 and size // n % 128 == 0]
    return sorted({size, *cuts})


def pieces(N: int) -> tuple[int, ...]:
    """Sizes of pieces for N rows in all: the more rows, the better weights that a unit has loaded are used."""
    largest = next((size for size in (512, 256, 128, 64, 32) if size <= N), 16)
    return tuple(size for size in (512, 256, 128) if size <= largest) or (largest,)


def _chunk(size: int, most: int) -> int:
    """The largest part of at most `most` that divides the whole and is made of full lanes."""
    if size <= most or size % 128:
        return size
    return max(part for part in range(128, most + 1, 128) if size % part == 0)


def product_blocks(
    N: int, A: int, C: int, G: int, dtype: jnp.dtype, contract: int, multiples: tuple[int, int] = (1, 1)
) -> ProductBlocks:
    """For rows [N, A] times weights to [N, C]. Terms and columns of a block are `multiples` or all that there are."""
    found = best("grouped_matmul", target_chip(), _key("forward" if contract == 2 else "dx", N, A, C, G, dtype))
    if found and all(found[x] >= all_ or found[x] % m == 0 for x, all_, m in zip("ac", (A, C), multiples, strict=True)):
        return ProductBlocks(**{**found, "s": tuple(found["s"])})
    return _product_blocks(chip(), N, A, C, G, jnp.dtype(dtype), multiples)


def _product_blocks(
    on: Chip, N: int, A: int, C: int, G: int, dtype: jnp.dtype, multiples: tuple[int, int] = (1, 1)
) -> ProductBlocks:
    size = dtype.itemsize
    s = pieces(N if N // G > 256 else min(N, 256))
    # Tiles of one or two groups: in smaller ones weights are less used, in larger ones most are shared.
    n, least = min(_up(N, s[0]), 1024 if N // G >= 1024 else 512 if N // G >= 256 else s[0]), None
    for a, c in itertools.product(_cuts(A, (), True), _cuts(C, PARTS, False)):
        held = 2 * size * (n * a + a * c + n * c) + 4 * n * c * (a < A) + 4 * s[0] * c
        if held > on.vmem * 0.8 or (a < A and a % multiples[0]) or (c < C and c % multiples[1]):
            continue
        if a < A and a * c > LARGEST_PART:
            continue
        columns, parts = -(-C // c), -(-A // a)
        visits = -(-N // n) + G
        weights = columns * c * A * (G if parts == 1 else visits) * size
        moved = columns * N * A * size + weights + N * C * size
        # A group's last piece is computed whole, and columns beyond the last too.
        flops = 2 * (N + G * s[-1] / 2) * A * columns * c * (3 if size == 4 else 1)
        seconds = max(flops / on.flops, moved / on.bytes_per_second) + STEP_SECONDS * columns * visits * parts
        # Weights are fetched one step ahead, so a step had better be as long.
        seconds += columns * G * max(0, a * c * size / on.bytes_per_second - 2 * n * a * c / on.flops)
        if columns % on.cores:
            seconds *= 1 + 1 / columns
        if least is None or seconds < least[0] * 0.999:
            least = seconds, a, c
    if least is None:
        raise NotImplementedError(f"no blocks of {A} terms by {C} columns fit the chip's {on.vmem} bytes")
    _, a, c = least
    wide = max(256, LARGEST_PRODUCT[on.unit] // (s[0] * a))
    return ProductBlocks(n, c, a, s, _chunk(c, max(256, wide // 2)), _chunk(c, wide))


def gradient_blocks(N: int, I: int, O: int, G: int, dtype: jnp.dtype) -> GradientBlocks:
    """For [G, O, I] from rows [N, I] and [N, O]."""
    found = best("grouped_matmul", target_chip(), _key("dweight", N, I, O, G, dtype))
    if found:
        return GradientBlocks(**{**found, "s": tuple(found["s"])})
    return _gradient_blocks(chip(), N, I, O, G, jnp.dtype(dtype))


def _gradient_blocks(on: Chip, N: int, I: int, O: int, G: int, dtype: jnp.dtype) -> GradientBlocks:
    size = dtype.itemsize
    s = pieces(N if N // G > 256 else min(N, 256))
    n, least = (1024 if N // G >= 1024 else s[0]), None
    # 2 to 3% for groups that are not aligned; no faster on v5e, and 7x's profiled program would not fit.
    if 256 <= N // G < 1024 and on in (CHIPS["v5p"], CHIPS["v6e"]):
        n = 512
    for o, i in itertools.product(_cuts(O, PARTS, False), _cuts(I, PARTS, False)):
        held = 2 * size * (n * o + n * i + o * i) + 8 * o * i + 6 * n * (o + i)
        if held > on.vmem * 0.8 or n * o * i > LARGEST_PRODUCT[on.unit]:
            continue
        blocks_o, blocks_i = -(-O // o), -(-I // i)
        visits = -(-N // n) + G
        moved = size * (blocks_o * N * I + blocks_i * N * O + G * O * I)
        flops = 2 * (N + G * s[-1]) * blocks_o * o * blocks_i * i * (3 if size == 4 else 1)
        # dy is turned around for every block of inputs, x is loaded anew for every block of outputs.
        seconds = max(flops / on.flops * (1 + 64 / i + 64 / o), moved / on.bytes_per_second)
        seconds += STEP_SECONDS * blocks_o * blocks_i * visits
        if blocks_o * blocks_i % on.cores:
            seconds *= 1 + 1 / (blocks_o * blocks_i)
        if least is None or seconds < least[0] * 0.999:
            least = seconds, o, i
    if least is None:
        raise NotImplementedError(f"no blocks of {O} by {I} fit the chip's {on.vmem} bytes")
    return GradientBlocks(n, *least[1:], tuple(size for size in s if size < n) or s)
