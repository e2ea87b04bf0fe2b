"""What `benchmarks.kernels` measures: one file an operation, named after it.

Each file has `cases(chip)`, the shapes of the table with our kernel and the library kernels that it is compared with,
and the builders that they name (see `benchmarks.static.Request`; they are called in a child process, so only there is
JAX imported). A new file is found by its name.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A builder of a case file by its name, or "module:function", and its JSON arguments.

    `environment`: of a library that lives in its own, its name (see `benchmarks.tokamax_peer`). `profiled`: False where
    the profiler comes to no end, as it does not follow what decides a loop; bundles are counted then.
    """

    function: str
    arguments: dict[str, Any]
    environment: str | None = None
    profiled: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        operation: the folder in `pallas_kernels`. name: the shape, in words.
        ours: our kernel. peers: of each library kernel, the variants (block sizes) of which the best counts.
        goal: how many times as fast as the best library kernel we want to be; None: only to be told.
        of_limit: the share of the chip's limit that we want to reach, or None.
    """

    operation: str
    name: str
    ours: Kernel
    peers: dict[str, tuple[Kernel, ...]]
    goal: float | None = 1.0
    of_limit: float | None = None

    def builder(self, kernel: Kernel) -> str:
        return kernel.function if ":" in kernel.function else f"{__name__}.{self.operation}:{kernel.function}"


def names() -> tuple[str, ...]:
    """The operations that have cases."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def cases(operation: str, chip: str) -> Iterator[Case]:
    """Of an operation on a chip as `planner.chips` names it. ValueError lists the operations."""
    if operation not in names():
        raise ValueError(f"there are no cases of {operation!r}; choose of {', '.join(names())}")
    yield from importlib.import_module(f"{__name__}.{operation}").cases(chip)
