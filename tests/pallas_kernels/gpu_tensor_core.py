"""Blackwell's products and tensor memory, for `gpu_emulator.py`.

- A product is issued by a warp and happens later, in the order of issue; a commit arrives at its barrier when all that
  the warp issued before has happened. Whoever reads before, reads what was there.
- What a warpgroup stores in tensor memory is nan until `commit_tmem`. What it has loaded it may not overwrite, nor give
  away by a barrier that orders tensor memory, before `wait_load_tmem`.
- Inlined Mosaic GPU code is emulated by its meaning, in `INLINED` by the name of its function. A condition of a
  warp is taken for the whole warpgroup, and what then would wait for the other warps is an error.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .gpu_memory import Ref, part_of, pick, product, unflatten

INLINED: dict[str, Callable[..., Any]] = {"vote_of_warp": lambda _, x: [np.int32(np.any(x))]}


def _float8_left(_: Any, p: np.ndarray) -> list[np.ndarray]:
    """16 columns as [half, 4, 2] become [4, half, 2]: what `turned` does to the keys of values."""
    rows = p.reshape(len(p), -1, 2, 4, 2).swapaxes(2, 3)
    return [rows.reshape(p.shape).astype(jnp.float8_e4m3fn)]


INLINED["float8_left"] = _float8_left
INLINED["in_fours"] = lambda _, x: [x.astype(jnp.float8_e4m3fn)]


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two parts of tensor memory have columns in common: their rows are laid out alike."""
    return np.shares_memory(a[0], b[0])


class TensorCore:
    """What a warpgroup or a warp does with tensor memory."""

    block: Any
    key: Any
    loaded: list[np.ndarray]  # parts that are being loaded
    stored: list[tuple[np.ndarray, np.ndarray]]  # (part, values) that are not committed

    def _async_load(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["tree"]], values[1:])
        source = part_of(values[0], transforms)
        self.loaded.append(source)
        return [source.copy()]
        yield

    _async_load_tmem = _async_load  # its name from some version on

    def _wait_load_tmem(self, eqn: Any, values: list[Any]) -> Any:
        self.loaded.clear()
        return []
        yield

    def _async_store_tmem(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["tree"]], values[2:])
        target = part_of(values[0], transforms)
        early = any(overlap(target, source) for source in self.loaded)
        assert not early, "tensor memory was loaded and is overwritten without wait_load_tmem"
        target[...] = np.nan
        self.stored.append((target, np.asarray(values[1])))
        return []
        yield

    def _commit_tmem(self, eqn: Any, values: list[Any]) -> Any:
        for target, value in self.stored:
            target[...] = value
        self.stored.clear()
        return []
        yield

    def _tcgen05_mma(self, eqn: Any, values: list[Any]) -> Any:
        params = eqn.params
        assert not params["scaled"] and not params["sparse"] and params["collective_axis"] is None
        names = ("acc", "a", "b", "barrier")
        trees = [params[name + "_transforms_tree"] for name in names]
        of_acc, of_a, of_b, of_barrier = unflatten(trees, values[4 + params["arrive"] :])
        acc, a, b = (part_of(x, t) for x, t in zip(values[:3], (of_acc, of_a, of_b), strict=True))
        keeps = bool(values[3])
        assert not any(x.written_by for x in values[1:3] if isinstance(x, Ref)), "a product of what was not committed"

        def land() -> None:
            sum_so_far = acc if keeps else np.zeros_like(acc)
            acc[...] = sum_so_far + product(a, b, acc.dtype)

        self._issue(land)
        if params["arrive"]:
            self._issue(pick(values[4], of_barrier).arrive)
        return []
        yield

    def _tcgen05_commit_arrive(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["barrier_transforms_tree"]], values[1:])
        self._issue(pick(values[0], transforms).arrive)
        return []
        yield

    def _issue(self, act: Callable[[], None]) -> None:
        from .gpu_emulator import Flight

        self.block.in_flight.append(Flight(act, self.key, "tensor"))

    def _inline_mgpu(self, eqn: Any, values: list[Any]) -> Any:
        return INLINED[eqn.params["mgpu_fn"].__name__](self, *values)
        yield


def _wait_load_of_warp(warpgroup: TensorCore) -> list[Any]:
    warpgroup.loaded.clear()
    return []


INLINED["wait_load_of_warp"] = _wait_load_of_warp
