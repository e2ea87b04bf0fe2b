"""Steps compiled for TPUs by libtpu on this machine. Skipped where libtpu is not installed."""

import dataclasses
import importlib.util

import pytest

from tests.planner.helpers import DENSE, SPARSE
from twinax.planner.compile import Compilation, compile_layouts
from twinax.planner.errors import CompileFailed
from twinax.planner.model import estimate
from twinax.planner.plan import Wishes, plan_on
from twinax.planner.serving import MOST_REQUESTS, most_requests
from twinax.planner.sizes import resting
from twinax.planner.topology import Topology
from twinax.planner.traffic import forward_passes
from twinax.planner.verdict import scheduled_seconds
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TOPOLOGY = Topology.parse("v5e:2x2")


@pytest.fixture(scope="module")
def step() -> tuple[Workload, Layout, Compilation]:
    workload, layout = Workload(DENSE, "train", 8, 256), Layout(Plan(fsdp=4), 1, "full")
    stages = []
    (found,) = compile_layouts(workload, TOPOLOGY, [layout], lambda layout, stage: stages.append(stage))
    assert isinstance(found, Compilation), found
    assert stages == ["starting", "lowering", "compiling", "reading", "done"]
    return workload, layout, found


def test_the_trainer_s_step(step: tuple[Workload, Layout, Compilation]):
    workload, layout, found = step
    (program,) = found.programs
    assert program.refused is None
    assert not program.unknown
    # Arrays are padded to tiles of 8 x 128, which is a lot for so small ones.
    at_rest = 4 * resting(DENSE, layout.plan)
    assert at_rest <= program.memory["parameters"] <= 4 * at_rest
    assert program.memory["optimizer"] == pytest.approx(2 * program.memory["parameters"], rel=0.01)
    assert program.cycles > 0
    assert {axes for _, axes in program.collectives} == {("fsdp",)}


def test_its_flops_are_the_model_s(step: tuple[Workload, Layout, Compilation]):
    workload, layout, found = step
    ours = estimate(workload, TOPOLOGY, layout)
    tokens, (_, attentions) = workload.tokens / 4, forward_passes(workload, layout)
    # A kernel declares the pairs that see each other: with the diagonal, half a pair a token more than half of all.
    diagonal = 2 * tokens * DENSE.num_layers * DENSE.num_heads * DENSE.head_dim * (attentions + 2.5)
    assert ours.work.flops + diagonal == pytest.approx(found.programs[0].flops, rel=0.01)
    scheduled = scheduled_seconds(ours, found.programs[0])
    assert scheduled is not None
    assert scheduled > ours.roofline.compute


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_its_memory_known():
    workload, layout = Workload(DENSE, "train", 65536, 4096), Layout(Plan(fsdp=4), 1, "none")
    wishes = Wishes(plans=(layout.plan,), remats=("none",), accumulation=1, display=False)
    (verdict,), _ = plan_on(workload, TOPOLOGY, wishes)
    assert verdict.compiled is not None
    assert "available HBM" in (verdict.compiled.refused or "")
    assert not verdict.fits
    assert verdict.total_memory > 10 * TOPOLOGY.chip.memory


@pytest.mark.slow
def test_the_engine_s_programs():
    """While they are read, pages of so small heads are padded: fewer requests fit than shapes alone would have it."""
    long = dataclasses.replace(DENSE, max_position_embeddings=131072)
    workload = Workload(long, "serve", 1, 131072)
    layout = Layout(Plan(tensor=2), remat="none")
    thought = most_requests(workload, TOPOLOGY, layout)
    (verdict,), _ = plan_on(workload, TOPOLOGY, Wishes(plans=(layout.plan,), display=False))
    assert verdict.compilation is not None, verdict.reason
    assert [program.name for program in verdict.compilation.programs] == ["decode", "chunk", "finish", "prompt"]
    assert verdict.fits
    assert verdict.requests is not None
    assert 1 < verdict.requests < thought < MOST_REQUESTS
    assert verdict.estimate.workload.rows == verdict.requests
    assert verdict.compilation.programs[0].memory["cache"] >= verdict.estimate.memory["cache"]
    assert 0.5 < verdict.total_memory / TOPOLOGY.chip.memory <= 1


def test_what_cannot_be_lowered_says_why():
    workload, layout = Workload(SPARSE, "serve", 4, 256), Layout(Plan(tensor=2), remat="none")
    (found,) = compile_layouts(workload, TOPOLOGY, [layout])
    assert isinstance(found, CompileFailed)
    assert "NotImplementedError" in str(found)
    assert "tensor=2 on v5e:2x2 cannot be compiled" in str(found)
