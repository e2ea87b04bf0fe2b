"""The memory of an emulated block: references, what `at` makes of them, and barriers."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Ref:
    """An array in some memory, in its logical order: tiles and swizzles are left out."""

    array: np.ndarray
    written_by: set[int] = field(default_factory=set)  # warpgroups whose stores no commit_smem has followed


@dataclass
class Barrier:
    arrivals: int
    ordered: bool = False  # with tensor memory
    count: int = 0
    phases: int = 0
    seen: dict[Any, int] = field(default_factory=dict)  # phases that each warpgroup, or warp, has waited for

    def arrive(self) -> None:
        self.count += 1
        if self.count == self.arrivals:
            self.count, self.phases = 0, self.phases + 1


def uninitialized(shape: Any, dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.full(shape, np.nan, dtype)
    return np.full(shape, jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else True, dtype)


def part_of(ref: Any, transforms: Any) -> np.ndarray:
    """The part of a reference's array that `transforms` name; writes to it reach the reference."""
    array = ref.array
    for transform in transforms:
        match type(transform).__name__:
            case "NDIndexer":
                index = []
                for i, size in zip(transform.indices, array.shape, strict=True):
                    if hasattr(i, "size") and hasattr(i, "start"):
                        start = int(i.start)
                        assert start >= 0 and start + i.size * i.stride <= size, f"{start}+{i.size} outside {size}"
                        index.append(slice(start, start + i.size * i.stride, i.stride))
                    else:
                        assert 0 <= int(i) < size, f"{int(i)} outside {size}"
                        index.append(slice(int(i), int(i) + 1))
                kept = [not hasattr(i, "start") or not hasattr(i, "size") for i in transform.indices]
                array = array[tuple(index)]
                shape = [n for n, scalar in zip(array.shape, kept, strict=True) if not scalar]
                array = array.reshape(shape, copy=False)
            case "TransposeTransform":
                array = array.transpose(transform.permutation)
            case "ExtractAliasedRef":
                array = _alias(array, transform)
            case "UnswizzleRef" | "UntilingTransform":
                pass
            case other:
                raise NotImplementedError(other)
    return array


def _alias(columns: np.ndarray, transform: Any) -> np.ndarray:
    """What a union of references in tensor memory holds as another dtype."""
    size = np.dtype(transform.dtype).itemsize
    assert columns.dtype == np.int32, "only unions in tensor memory are emulated"
    assert transform.layout.vector_length * size == 4, "only packed values are emulated"
    start, width = 4 * transform.offset, transform.shape[1] * size
    return columns.view(np.uint8)[:, start : start + width].view(transform.dtype)


def unflatten(trees: list[Any], leaves: list[Any]) -> list[Any]:
    it = iter(leaves)
    return [() if t is None else jax.tree.unflatten(t, list(itertools.islice(it, t.num_leaves))) for t in trees]


def product(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    wide = np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int64
    with np.errstate(invalid="ignore"):  # of inf, a GPU makes nan and says nothing
        return (a.astype(wide) @ b.astype(wide)).astype(dtype)


def pick(barriers: list[Barrier], transforms: Any) -> Barrier:
    if not transforms:
        (barrier,) = barriers
        return barrier
    return barriers[int(transforms[0].indices[0])]


def allocate(aval: Any, transforms: Any) -> Any:
    inner, shape = aval.inner_aval, aval.inner_aval.shape
    if hasattr(inner.dtype, "num_arrivals"):
        ordered = getattr(inner.dtype, "orders_tensor_core", False)
        return [Barrier(inner.dtype.num_arrivals, ordered) for _ in range(math.prod(shape))]
    if hasattr(aval, "refs"):
        return Ref(np.full(shape, -1, np.int32))  # nan, as whatever it is read
    for transform in transforms:
        if type(transform).__name__ == "UntilingTransform":
            tiled = len(transform.tiling)
            outer, tiles = shape[: -2 * tiled], shape[-2 * tiled : -tiled]
            shape = (*outer, *(n * t for n, t in zip(tiles, transform.tiling, strict=True)))
    registers = str(aval.memory_space) == "regs"
    return Ref(np.zeros(shape, inner.dtype) if registers else uninitialized(shape, inner.dtype))
