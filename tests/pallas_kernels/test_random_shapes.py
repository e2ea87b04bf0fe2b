"""Shapes and options as they fall, for XLA's candidates and the kernels of TPUs and GPUs, by the contracts' own checks.

Lengths are those around a block's: 1, one less than a block, a block, one more, and some that are anything.
"""

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels import test_flash_attention as flash
from tests.pallas_kernels import test_flash_attention_gpu as flash_gpu
from tests.pallas_kernels import test_grouped_matmul as grouped
from tests.pallas_kernels import test_grouped_matmul_gpu as grouped_gpu
from tests.pallas_kernels import test_paged_attention_pairs as paged
from tests.pallas_kernels import test_quantized_matmul as quantized
from tests.pallas_kernels import test_quantized_matmul_gpu as quantized_gpu
from tests.pallas_kernels import test_ring_attention as ring
from tests.thorough import thorough
from twinax.pallas_kernels.flash_attention import triton as flash_triton
from twinax.pallas_kernels.grouped_matmul import gpu_triton as grouped_triton
from twinax.pallas_kernels.quantized_matmul import gpu, gpu_triton

# Eight seeds of XLA's; four of the interpreted kernels, which take as long.
BOTH = pytest.mark.parametrize(
    ("implementation", "seed"), thorough([*(("xla", n) for n in range(8)), *(("tpu", n) for n in range(4))], 2)
)
TRITON = pytest.mark.skipif(jax.default_backend() == "gpu", reason="for Pallas's interpreter")


def kernels(*names: str) -> pytest.MarkDecorator:
    """Of GPUs: a few seeds each, of which only the first kernel's first is quick."""
    runs = [(name, seed) for name in names for seed in range(4)]
    return pytest.mark.parametrize(("kernel", "seed"), thorough(runs))


def interpreted(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Triton's kernels run in Pallas's interpreter."""
    monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
    for module in modules:
        monkeypatch.setattr(module.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def around(rng: np.random.Generator, block: int) -> int:
    return int(rng.choice([1, block - 1, block, block + 1, rng.integers(1, 3 * block)]))


def some(rng: np.random.Generator, options: dict[str, Any], share: float = 0.4) -> dict[str, Any]:
    return {name: x for name, x in options.items() if rng.random() < share}


@BOTH
def test_flash_attention(seed, implementation, monkeypatch):
    from twinax.pallas_kernels.flash_attention import tpu, xla

    block, rng = (128 if implementation == "tpu" else 16), np.random.default_rng(seed)
    monkeypatch.setattr(tpu, "blocks", lambda *_: (128, 128))
    monkeypatch.setattr(xla, "BLOCK", 16)
    B, K, G, D = (int(n) for n in rng.integers(1, (4, 3, 4, 9)))
    T, S, H = around(rng, block), around(rng, block), K * G
    options = {"causal": False, "window": int(rng.integers(1, 2 * block)), "softcap": 1.5, "scale": 0.6, "sinks": True}
    options |= {"bias": (int(rng.choice([1, B])), int(rng.choice([1, H]))), "value_size": int(rng.integers(1, 9))}
    options |= {"segments": True, "q_offset": tuple(int(n) for n in rng.integers(-T, S + 1, B))}
    options = some(rng, options)
    S = T if "segments" in options else S
    monkeypatch.setattr(flash, "CASES", {"random": (B, T, S, H, K, D, options)})
    with jax.enable_x64(True):
        inputs, given = flash.make("random")
        wanted = flash.outputs_and_gradients(inputs, given, "reference")
        if implementation == "xla":
            flash.check(flash.outputs_and_gradients(inputs, given, "xla"), wanted, 1e-11)
            return
    with pltpu.force_tpu_interpret_mode():
        flash.check(flash.outputs_and_gradients(*flash.make("random", np.float32), "tpu"), wanted, 5e-6)


@TRITON
@kernels("hopper", "blackwell", "triton")
def test_flash_attention_on_gpus(kernel, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    B, K, G = (int(n) for n in rng.integers(1, (3, 3, 3)))
    T, S, H = around(rng, 128), around(rng, 128), K * G
    D, E = (16 * int(n) for n in rng.integers(1, 6, 2))
    options = {"causal": False, "window": int(rng.integers(1, 256)), "softcap": 2.0, "scale": 0.6, "sinks": True}
    options |= {"bias": (int(rng.choice([1, B])), int(rng.choice([1, H]))), "segments": True}
    options = some(rng, options | {"q_offset": tuple(int(n) for n in rng.integers(-T, S + 1, B))})
    S = T if "segments" in options else S
    name = f"random {seed}"  # of its own: what is wanted is kept for the other kernels
    monkeypatch.setitem(flash_gpu.CASES, name, (B, T, S, H, K, D, E, options))
    interpreted(monkeypatch, flash_triton)
    flash_gpu.test_output_and_gradients(kernel, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ring_attention(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    devices, chunk, K, G = (int(n) for n in rng.integers((2, 1, 1, 1), (9, 6, 3, 4)))
    options = {"window": int(rng.integers(1, 2 * devices * chunk)), "softcap": 1.5, "scale": 0.6, "segments": True}
    options = some(rng, options | {"sinks": True, "V": int(rng.integers(1, 9))})
    monkeypatch.setattr(ring, "CASES", {"random": (devices, chunk, K * G, K, options)})
    ring.check("random", two_way=bool(seed % 2))


def paged_case(rng: np.random.Generator) -> paged.Case:
    S = 32
    K, G, R = (int(n) for n in rng.integers(1, (3, 4, 6)))
    latent, kind = rng.random() < 0.3, rng.choice(["decodes", "prompts", "mixed"])
    K = 1 if latent else K
    D = int(rng.choice([16, 48, 64, 80, 128]))
    requests = []
    for _ in range(R):
        new = 1 if kind == "decodes" or (kind == "mixed" and rng.random() < 0.5) else around(rng, S)
        requests.append((int(rng.choice([0, around(rng, S), around(rng, 3 * S)])), new * int(rng.random() < 0.9)))
    kept = [None, None, np.int8, jax.numpy.float8_e4m3fn][rng.integers(4)]
    options = some(rng, {"window": int(rng.integers(1, 100)), "softcap": 2.0, "scale": 0.3})
    shared, prefixes = min(before // S for before, _ in requests), None
    if rng.random() < 0.5 and shared:
        prefixes = (0,) * R, (int(rng.integers(1, shared + 1)),) * R
    return paged.Case(
        tuple(requests), R if kind == "decodes" else int(rng.integers(0, R + 1)), spare=int(rng.integers(0, 3)),
        H=K * G, K=K, D=D, S=S, kept=kept, latent=D // 2 if latent else None, sinks=bool(rng.random() < 0.4),
        prefixes=prefixes, options=options,
    )  # fmt: skip


@BOTH
def test_paged_attention(seed, implementation, monkeypatch):
    rng = np.random.default_rng(seed)
    case = paged_case(rng)
    if implementation == "xla":
        paged.check_xla(case, str(rng.choice(["split", "joint"])))
        return
    paged.several_blocks(monkeypatch)
    paged.check(case, str(rng.choice(["eager", "on_wait"])))


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_paged_attention_on_gpus(seed, monkeypatch):
    case = paged_case(np.random.default_rng(seed))
    if case.latent is not None:  # values of 16, 32, ... numbers
        case = replace(case, latent=-(-case.latent // 16) * 16)
    monkeypatch.setitem(paged.CASES, "random", (case, "split"))
    paged.test_gpu("random", monkeypatch)


def quantized_case(rng: np.random.Generator) -> tuple[Any, ...]:
    form = str(rng.choice(["int8", "int4", "fp8_e4m3", "mxfp4"]))
    block: Any = (1, 32) if form == "mxfp4" else (1, [None, 32, 64, 128][rng.integers(4)])
    if form == "fp8_e4m3" and rng.random() < 0.5:
        block = [(128, 128), (None, None)][rng.integers(2)]
    rows = None if form == "mxfp4" or rng.random() < 0.5 else "fp8" if form == "fp8_e4m3" else "int8"
    zeros = form in ("int8", "int4") and bool(rng.random() < 0.5)
    dtype, activation = rng.choice(["float32", "bfloat16"]), [None, "relu", "silu", "gelu"][rng.integers(4)]
    I = 2 * around(rng, 128)
    return around(rng, 16), I, around(rng, 128), form, block, zeros, rows, str(dtype), activation


def check_quantized(case: tuple[Any, ...], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "CASES", {"random": case})
    x, weight, bias, options = quantized.make("random")
    y = quantized.run(quantized.product, implementation, x, weight, bias, **options)
    quantized.check(x, weight, bias, options, y)


@BOTH
def test_quantized_matmul(seed, implementation, monkeypatch):
    check_quantized(quantized_case(np.random.default_rng(seed)), implementation, monkeypatch)


@TRITON
@pytest.mark.parametrize("seed", thorough(range(4)))
def test_quantized_matmul_by_triton(seed, monkeypatch):
    M, I, O, form, block, zeros, rows, *rest = quantized_case(np.random.default_rng(seed))
    # Rows with one scale each, by weights of whole bytes, are XLA's.
    rows = rows if form == "int4" or (block[1] or I) < I else None
    interpreted(monkeypatch, gpu_triton)
    check_quantized((M, I, O, form, block, zeros, rows, *rest), "gpu", monkeypatch)


@kernels("hopper", "blackwell")
def test_quantized_matmul_on_gpus(kernel, seed, monkeypatch):
    """Shapes that tensor cores take, splits of which some may have no terms."""
    rng = np.random.default_rng(seed)
    is_hopper = kernel == "hopper"
    form = str(rng.choice(["int8", "fp8_e4m3", "int4", "mxfp4"][: 4 if is_hopper else 2]))
    packed = form in ("int4", "mxfp4")
    M, I = around(rng, [8, 64, 128][rng.integers(3)]), (64 if is_hopper else 128) * int(rng.integers(1, 6))
    O = 64 * int(rng.integers(3 if packed else 1 if is_hopper else 2, 6))
    size = 32 if form == "mxfp4" else [None, 32, 64, 128][rng.integers(4)]
    block = (128 if size == 128 and form == "fp8_e4m3" else 1, size)
    zeros = form in ("int8", "int4") and bool(rng.random() < 0.5)
    activation, splits = [None, "relu", "silu", "gelu"][rng.integers(4)], int(rng.integers(1, 4))
    cases = quantized_gpu.HOPPERS if is_hopper else quantized_gpu.BLACKWELLS
    monkeypatch.setitem(cases, "random", (M, I, O, form, block, zeros, activation, splits))
    (partial(quantized_gpu.test_hopper, seed=seed) if is_hopper else quantized_gpu.test_blackwell)("random")


def group_sizes(rng: np.random.Generator) -> list[int]:
    return [int(n) for n in rng.choice([0, 1, 15, 16, 17, 70], int(rng.integers(1, 8)))]


@BOTH
def test_grouped_matmul(seed, implementation, monkeypatch):
    rng = np.random.default_rng(seed)
    case = group_sizes(rng), int(rng.integers(1, 40)), around(rng, 128), around(rng, 128)
    monkeypatch.setattr(grouped, "CASES", {"random": case})
    grouped.test_values_and_gradients_are_those_of_each_row_with_its_weight("random", implementation)


@TRITON
@pytest.mark.parametrize("seed", thorough(range(4)))
def test_grouped_matmul_by_triton(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    case = group_sizes(rng), int(rng.integers(1, 40)), around(rng, 128), around(rng, 128)
    monkeypatch.setattr(grouped, "CASES", {"random": case})
    interpreted(monkeypatch, gpu_triton, grouped_triton)
    grouped_gpu.test_values_and_gradients_are_those_of_each_row_with_its_weight("random")


@kernels("hopper", "blackwell")
def test_grouped_matmul_on_gpus(kernel, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    sizes = [*group_sizes(rng), around(rng, 128)]
    I, O = (64 * int(n) for n in rng.integers(1, 4, 2))
    columns, stages = int(rng.choice([64, 128 if min(I, O) >= 128 else 64])), int(rng.integers(2, 5))
    warpgroups = [(2, 1), (1, 2)][rng.integers(2)]
    plan = (*warpgroups, columns, stages) if kernel == "hopper" else (columns, stages)
    cases = grouped_gpu.HOPPERS if kernel == "hopper" else grouped_gpu.BLACKWELLS
    monkeypatch.setitem(cases, "random", (sizes, int(rng.integers(0, 40)), I, O, plan))
    (grouped_gpu.test_hopper if kernel == "hopper" else grouped_gpu.test_blackwell)("random", seed)
