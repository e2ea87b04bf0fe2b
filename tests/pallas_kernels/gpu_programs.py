"""What the compilers make of the kernels for GPUs: no register is spilled, and no wgmma is serialised (C7510 to C7512).

Wants JAX's CUDA plug-in and ptxas, but no GPU. Each file of kernels has its list of programs, minutes of compiling in
all, and so for `TWINAX_ALL_GPU_PROGRAMS=1`; one of each kind is compiled in `test_gpu_programs.py`.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.static import Request, compile_all
from twinax.planner.devices import has_cuda_plugin

CAN_COMPILE = has_cuda_plugin() and shutil.which("ptxas") is not None
compiles = pytest.mark.skipif(not CAN_COMPILE, reason="wants JAX's CUDA plug-in and ptxas")
all_compile = pytest.mark.skipif(
    not CAN_COMPILE or not os.environ.get("TWINAX_ALL_GPU_PROGRAMS"),
    reason="wants JAX's CUDA plug-in, ptxas and TWINAX_ALL_GPU_PROGRAMS=1",
)


def check(chip: str, programs: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Programs are the file that builds them and its arguments (see `benchmarks.static`)."""
    requests = [Request(chip, f"{file}:build", given) for file, given in programs]
    for program, found in zip(programs, compile_all(requests), strict=True):
        assert found.failed is None, (program, found.failed)
        assert (found.spills, found.warnings) == (0, ()), (program, found)
