"""A seeded order of n things, one element at a time: a permutation that is never stored.

A Feistel network on an even number of bits is a permutation of 0..4^k-1 whatever its round function; where it leaves
0..n-1 it is applied again until it comes back (cycle walking), which is a permutation of 0..n-1. So the i-th element
costs the same for a thousand things and for a trillion, on any host, and does not depend on NumPy's version.
"""

import numpy as np

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of `range(n)` for (seed, epoch) sends each index.

    Args:
      index: integers in [0, n), any shape.
      n: how many things there are.
      seed, epoch: any integers; they choose the permutation.

    Returns:
      int64, the shape of `index`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    start = np.array([seed & _MASK, epoch & _MASK], dtype=np.uint64)
    key = mix64(mix64(start[:1] + np.uint64(_GOLDEN)) + start[1:])
    keys = mix64(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))

    x = np.asarray(index).astype(np.uint64).ravel()
    walking = np.ones(x.shape, dtype=bool)
    while walking.any():
        left, right = x[walking] >> half, x[walking] & low
        for round_key in keys:
            left, right = right, left ^ (mix64(right + round_key) & low)
        x[walking] = left << half | right
        walking = x >= np.uint64(n)
    return x.astype(np.int64).reshape(np.shape(index))
