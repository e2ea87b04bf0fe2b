"""Shapes and options as they fall, for XLA's candidates and a TPU's kernels, by the contracts' own checks.

Lengths are those around a block's: 1, one less than a block, a block, one more, and some that are anything.
"""

from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels import test_flash_attention as flash
from tests.pallas_kernels import test_grouped_matmul as grouped
from tests.pallas_kernels import test_paged_attention_pairs as paged
from tests.pallas_kernels import test_quantized_matmul as quantized
from tests.pallas_kernels import test_ring_attention as ring
from tests.thorough import thorough

SEEDS = pytest.mark.parametrize("seed", thorough(range(8), 2))
BOTH = pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])


def around(rng: np.random.Generator, block: int) -> int:
    return int(rng.choice([1, block - 1, block, block + 1, rng.integers(1, 3 * block)]))


def some(rng: np.random.Generator, options: dict[str, Any], share: float = 0.4) -> dict[str, Any]:
    return {name: x for name, x in options.items() if rng.random() < share}


@BOTH
@SEEDS
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


@pytest.mark.slow
@SEEDS
def test_ring_attention(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    devices, chunk, K, G = (int(n) for n in rng.integers((2, 1, 1, 1), (9, 6, 3, 4)))
    options = {"window": int(rng.integers(1, 2 * devices * chunk)), "softcap": 1.5, "scale": 0.6, "segments": True}
    options = some(rng, options | {"sinks": True, "V": int(rng.integers(1, 9))})
    monkeypatch.setattr(ring, "CASES", {"random": (devices, chunk, K * G, K, options)})
    ring.check("random", two_way=bool(seed % 2))


@BOTH
@SEEDS
def test_paged_attention(seed, implementation, monkeypatch):
    S, rng = 32, np.random.default_rng(seed)
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
    case = paged.Case(
        tuple(requests), R if kind == "decodes" else int(rng.integers(0, R + 1)), spare=int(rng.integers(0, 3)),
        H=K * G, K=K, D=D, S=S, kept=kept, latent=D // 2 if latent else None, sinks=bool(rng.random() < 0.4),
        prefixes=prefixes, options=options,
    )  # fmt: skip
    if implementation == "xla":
        paged.check_xla(case, str(rng.choice(["split", "joint"])))
        return
    paged.several_blocks(monkeypatch)
    paged.check(case, str(rng.choice(["eager", "on_wait"])))


@BOTH
@SEEDS
def test_quantized_matmul(seed, implementation, monkeypatch):
    rng = np.random.default_rng(seed)
    form = str(rng.choice(["int8", "int4", "fp8_e4m3", "mxfp4"]))
    block: Any = (1, 32) if form == "mxfp4" else (1, [None, 32, 64, 128][rng.integers(4)])
    if form == "fp8_e4m3" and rng.random() < 0.5:
        block = [(128, 128), (None, None)][rng.integers(2)]
    rows = None if form == "mxfp4" or rng.random() < 0.5 else "fp8" if form == "fp8_e4m3" else "int8"
    zeros = form in ("int8", "int4") and bool(rng.random() < 0.5)
    dtype, activation = rng.choice(["float32", "bfloat16"]), [None, "relu", "silu", "gelu"][rng.integers(4)]
    I = 2 * around(rng, 128)
    monkeypatch.setattr(
        quantized,
        "CASES",
        {"random": (around(rng, 16), I, around(rng, 128), form, block, zeros, rows, str(dtype), activation)},
    )
    x, weight, bias, options = quantized.make("random")
    y = quantized.run(quantized.product, implementation, x, weight, bias, **options)
    quantized.check(x, weight, bias, options, y)


@BOTH
@SEEDS
def test_grouped_matmul(seed, implementation, monkeypatch):
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.choice([0, 1, 15, 16, 17, 70], int(rng.integers(1, 8)))]
    case = sizes, int(rng.integers(1, 40)), around(rng, 128), around(rng, 128)
    monkeypatch.setattr(grouped, "CASES", {"random": case})
    grouped.test_values_and_gradients_are_those_of_each_row_with_its_weight("random", implementation)
