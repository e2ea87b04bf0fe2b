"""A program of each kind of kernel for GPUs through its compiler; those of all options are `gpu_programs.all_compile`.

They are shorter than real ones, which changes no instruction of a kernel.
"""

from pathlib import Path

import pytest

from tests.pallas_kernels.gpu_programs import check, compiles

# As many as one process compiles.
PROGRAMS = (
    ("flash_attention", {"D": 128, "E": 128, "window": 100, "softcap": 30.0, "segments": True}),  # and its gradients
    ("flash_attention", {"D": 128, "E": 128, "dtype": "float8_e4m3fn"}),
    ("paged_attention", {"prefixes": True, "dtype": "int8", "sinks": True, "window": 500}),
    ("grouped_matmul", {"N": 4096, "G": 8, "I": 2048, "O": 768}),
    ("quantized_matmul", {"M": 64, "I": 4096, "O": 1024, "form": "int8"}),
    ("quantized_matmul", {"M": 64, "I": 4096, "O": 1024, "form": "int4", "block": (1, 128), "zeros": True}),
)


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")
@compiles
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_no_spills_and_no_serialised_products(chip):
    folder = Path(__file__).parent
    check(chip, [(str(folder / f"test_{kernel}_gpu.py"), given) for kernel, given in PROGRAMS])
