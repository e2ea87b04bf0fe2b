"""The search over layouts against trying everything."""

import itertools

import pytest

from tests.planner.helpers import DENSE, SPARSE
from twinax.models.config import DecoderConfig
from twinax.planner.errors import PlannerError
from twinax.planner.model import estimate
from twinax.planner.search import MARGIN, REMATS, best_of, distinct, plans, score, search, search_batch, search_serving
from twinax.planner.serving import most_requests
from twinax.planner.topology import Topology
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan

LLAMA = DecoderConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128, max_position_embeddings=8192,
)  # fmt: skip


@pytest.mark.parametrize("model", [DENSE, SPARSE])
def test_plans_are_all_that_cut_the_model(model: DecoderConfig):
    workload = Workload(model, "train", 64, 512)
    found = {tuple(plan.sizes.values()) for plan in plans(workload, 8)}
    sizes = [n for n in (1, 2, 4, 8)]
    every = [
        dict(zip(Plan().sizes, sizes, strict=True))
        for sizes in itertools.product(sizes, repeat=6)
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4] * sizes[5] == 8
    ]
    right = {tuple(s.values()) for s in every if not Plan(**s).problems(workload.dimensions)}
    assert found == right
    assert any(sizes[3] > 1 for sizes in found) == (model is SPARSE)


def test_the_first_is_the_quickest_that_fits():
    workload, topology = Workload(LLAMA, "train", 64, 4096), Topology.parse("v5p:2x2x2")
    ranked = search(workload, topology)
    fitting = [found for found in ranked if found.total_memory <= MARGIN * topology.chip.memory]
    assert ranked[: len(fitting)] == fitting
    assert fitting
    for plan in [found.layout.plan for found in ranked]:
        for accumulation in (1, 2, 4, 8):
            for remat in REMATS:
                layout = Layout(plan, accumulation, remat)
                if layout.problems(workload):
                    continue
                one = estimate(workload, topology, layout)
                if one.total_memory <= MARGIN * topology.chip.memory:
                    assert score(ranked[0]) <= score(one) * (1 + 1e-9)


def test_a_plan_that_does_not_fit_is_made_to_if_it_can_be():
    workload, topology = Workload(LLAMA, "train", 512, 4096), Topology.parse("v5p:2x2x2")
    best = best_of(workload, topology, Plan(fsdp=8))
    assert best is not None
    assert best.fits
    roomy = estimate(workload, topology, Layout(Plan(fsdp=8), 1, "none"))
    assert not roomy.fits
    assert (best.layout.accumulation, best.layout.remat) != (1, "none")


def test_nothing_fits_is_the_one_that_comes_closest():
    workload, topology = Workload(LLAMA, "train", 8, 4096), Topology.parse("v5e:2x2")
    ranked = search(workload, topology)
    assert not ranked[0].fits
    assert ranked[0].total_memory == min(found.total_memory for found in ranked)


def test_no_plan_at_all_says_why():
    workload = Workload(DENSE, "train", 3, 512)
    with pytest.raises(PlannerError, match="rows of 3 cannot be cut over"):
        search(workload, Topology.parse("a100:7"))


def test_the_ones_to_compile_use_different_axes():
    ranked = search(Workload(LLAMA, "train", 64, 4096), Topology.parse("v5p:2x2x2"))
    chosen = distinct(ranked, 3)
    assert chosen[0] is ranked[0]
    kinds = [tuple(size > 1 for size in found.layout.plan.sizes.values()) for found in chosen]
    assert len({*kinds}) == len(chosen) == 3


def test_the_batch_is_found_too():
    topology = Topology.parse("v5e:2x2")
    ranked = search_batch(Workload(DENSE, "train", 4, 512), topology)
    assert len({found.workload.rows for found in ranked}) > 1
    rates = [found.rates()["tokens_per_second"] for found in ranked if found.fits]
    assert rates[0] == pytest.approx(max(rates), rel=0.1)


def test_as_many_requests_as_fit():
    workload, topology = Workload(LLAMA, "serve", 1, 4096), Topology.parse("v6e:2x2")
    for found, requests in search_serving(workload, topology):
        layout = found.layout
        assert requests == most_requests(workload, topology, layout) == found.workload.rows
        assert found.fits
        more = Workload(LLAMA, "serve", int(requests * 1.1) + 1, 4096)
        assert estimate(more, topology, layout).total_memory > 0.95 * topology.chip.memory
    longer = Workload(LLAMA, "serve", 1, 8192)
    assert most_requests(longer, topology, Layout(Plan(tensor=4))) < most_requests(
        workload, topology, Layout(Plan(tensor=4))
    )


def test_a_model_that_is_too_large_to_serve():
    with pytest.raises(PlannerError, match="Not one request of 8192 tokens fits"):
        search_serving(Workload(LLAMA, "serve", 1, 8192), Topology.parse("v5e:1x1"))
