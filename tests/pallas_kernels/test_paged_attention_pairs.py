"""Every two options of paged_attention together, for every candidate, against the reference."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tests.pallas_kernels.pairs import pairs
from tests.pallas_kernels.test_paged_attention_tpu import Case, check, make, run
from tests.thorough import thorough
from twinax.pallas_kernels.paged_attention import gpu, tpu

OPTIONS = (
    *("window", "softcap", "scale", "sinks", "grouped", "quantised", "latent", "prefixes"),
    *("decodes only", "joint", "heads of 80"),
)
A_MIX = ((100, 1), (70, 1), (9, 40), (0, 0), (130, 1), (66, 3))
DECODES = ((100, 1), (70, 1), (0, 1), (0, 0), (130, 1))


def paired() -> dict[str, tuple[Case, str]]:
    """Cases and the layout of their pages; three of the decodes begin with the same two."""
    found = {}
    for has in pairs(OPTIONS):
        decodes, latent, grouped = ("decodes only" in has), ("latent" in has), ("grouped" in has)
        requests = DECODES if decodes else A_MIX
        K = 1 if latent else 2
        given = {"window": ("window", 50), "softcap": ("softcap", 2.0), "scale": ("scale", 0.3)}
        kept = (jnp.float8_e4m3fn if grouped else jnp.int8) if "quantised" in has else None
        leader, pages = np.arange(len(requests)), np.zeros(len(requests), int)
        leader[[0, 1, 4]], pages[[0, 1, 4]] = 0, 2
        found[", ".join(option for option in OPTIONS if option in has) or "no option"] = (
            Case(
                requests, 5, spare=0 if decodes else 2, H=3 * K if grouped else K, K=K, S=32,
                D=80 if "heads of 80" in has else 64, kept=kept, latent=48 if latent else None,
                sinks="sinks" in has, prefixes=(tuple(leader), tuple(pages)) if "prefixes" in has else None,
                options=dict(given[option] for option in given if option in has),
            ),
            "joint" if "joint" in has else "split",
        )  # fmt: skip
    return found


CASES = paired()


def check_xla(case: Case, layout: str) -> None:
    with jax.enable_x64(True):
        arguments = make(replace(case, dtype=np.float64), layout)
        out, pages = run(case, "xla", *arguments)
        wanted, wanted_pages = run(case, "reference", *arguments)
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, pages, wanted_pages)


def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few tokens and rows, too, on a TPU."""
    monkeypatch.setattr(tpu, "BLOCK_TOKENS", (64, 64))
    monkeypatch.setattr(tpu, "tile_rows", lambda T, *_: min(16, -(-T // 16) * 16))


@pytest.mark.parametrize("name", thorough(CASES, 3))
def test_xla(name):
    check_xla(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tpu(name, monkeypatch):
    """In both modes; pages are joint for these kernels, so that what says it says which mode."""
    case, layout = CASES[name]
    several_blocks(monkeypatch)
    check(case, "eager" if layout == "joint" else "on_wait")


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="for Pallas's interpreter")
@pytest.mark.parametrize("name", CASES)
def test_gpu(name, monkeypatch):
    monkeypatch.setattr(gpu, "PART", 64)
    monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
    monkeypatch.setattr(gpu.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(gpu.plgpu, "debug_barrier", lambda: None)  # one program after the other
    case, _ = CASES[name]
    arguments = make(case, "split")
    out, pages = run(case, "gpu", *arguments)
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, np.float64) for x in arguments[0]]
        wanted, _ = run(case, "reference", wide, *arguments[1:])
    _, wanted_pages = run(case, "reference", *arguments)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, pages, wanted_pages)
