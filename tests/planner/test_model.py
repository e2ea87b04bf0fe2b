"""The analytic model against programs that XLA compiled for simulated devices, and against itself."""

import dataclasses

import pytest

from tests.planner.helpers import DENSE, costs_of
from twinax.layers.mixer_config import LightningConfig
from twinax.models.config import LayerKind
from twinax.planner.errors import PlannerError
from twinax.planner.model import estimate
from twinax.planner.sizes import parameters, resting, share_of
from twinax.planner.topology import Topology
from twinax.planner.traffic import forward_passes, turns, useful
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan
from twinax.train.flops import flops_per_token

TOPOLOGY = Topology.parse("v5e:2x2")
WORKLOAD = Workload(DENSE, "train", 8, 512, "float32")


@pytest.mark.parametrize(
    ("plan", "remat"), [(Plan(fsdp=4), "full"), (Plan(fsdp=4), "none"), (Plan(data=2, fsdp=2), "full")]
)
def test_flops_are_those_of_the_compiled_step(plan: Plan, remat: str):
    layout = Layout(plan, 1, remat)
    costs = costs_of(WORKLOAD, layout)
    work = estimate(WORKLOAD, TOPOLOGY, layout).work
    # Attention computes its tiles of 128 x 128 on the diagonal whole; the model counts half of them.
    tokens, (_, attentions) = WORKLOAD.tokens / plan.devices, forward_passes(WORKLOAD, layout)
    diagonal = 2 * tokens * DENSE.num_layers * DENSE.num_heads * DENSE.head_dim * 128 * (attentions + 2.5)
    assert not costs.unknown
    assert work.flops + diagonal == pytest.approx(costs.flops, rel=0.005)
    assert costs.attend[0] == pytest.approx(diagonal / 128 * (WORKLOAD.seq_len + 128), rel=1e-6)


def test_gathers_are_those_of_the_compiled_step():
    layout = Layout(Plan(fsdp=4), 1, "full")
    costs = costs_of(WORKLOAD, layout)
    ours, theirs = estimate(WORKLOAD, TOPOLOGY, layout).work.collectives, costs.collectives
    key = ("all-gather", ("fsdp",))
    assert ours[key].sent == pytest.approx(theirs[key].sent, rel=0.05)
    # Gradients are scattered, or summed everywhere and then cut, which sends twice as much.
    sums = sum(t.sent for (kind, _), t in theirs.items() if kind in ("all-reduce", "reduce-scatter"))
    assert 0.95 <= sums / ours["reduce-scatter", ("fsdp",)].sent <= 2.1


def test_a_device_s_share_adds_up():
    plan = Plan(data=2, fsdp=2, tensor=2, sequence=2)
    workload = Workload(DENSE, "train", 16, 512)
    share = share_of(workload, Layout(plan))
    assert share.tokens * plan.batch_shards * plan.sequence == workload.tokens
    assert share.heads * plan.tensor == DENSE.num_heads * DENSE.head_dim
    whole = sum(p.elements(Plan()) for p in parameters(DENSE))
    assert resting(DENSE, Plan(fsdp=4)) == whole / 4
    assert resting(DENSE, Plan(data=4)) == whole


def test_mixers_that_it_does_not_know_are_refused():
    kinds = (LayerKind(), LayerKind(rope=None, mixer="lightning_attention"))
    model = dataclasses.replace(DENSE, pattern=kinds, lightning=LightningConfig(num_heads=2, head_dim=8))
    with pytest.raises(PlannerError, match="does not know yet what layers of lightning_attention take"):
        Workload(model, "serve", 8, 512)


def test_more_devices_share_the_work():
    one, four = (estimate(WORKLOAD, TOPOLOGY, Layout(Plan(fsdp=n), 1, "full")) for n in (1, 4))
    assert one.work.model_flops == 4 * four.work.model_flops
    assert one.work.model_flops == flops_per_token(DENSE, 512) * WORKLOAD.tokens
    assert one.work.flops == pytest.approx(4 * four.work.flops)
    assert not one.work.collectives
    assert one.memory["parameters"] == 4 * four.memory["parameters"]


def test_what_is_computed_again_costs_time_and_saves_memory():
    workload = Workload(DENSE, "train", 64, 2048)
    none, full = (estimate(workload, TOPOLOGY, Layout(Plan(fsdp=4), 1, remat)) for remat in ("none", "full"))
    assert full.work.flops > none.work.flops
    assert full.total_memory < none.total_memory
    assert forward_passes(workload, none.layout) == (1, 1)
    products, attention = forward_passes(workload, full.layout)
    assert 1.5 < products < 2
    assert attention == 2


def test_accumulation_takes_less_memory_and_sends_more():
    workload = Workload(DENSE, "train", 64, 2048)
    once, four = (estimate(workload, TOPOLOGY, Layout(Plan(fsdp=4), n, "none")) for n in (1, 4))
    assert four.total_memory < once.total_memory
    key = ("all-gather", ("fsdp",))
    assert four.work.collectives[key].sent == pytest.approx(4 * once.work.collectives[key].sent)
    assert four.work.flops == once.work.flops


def test_a_pipeline_s_idle_turns():
    assert turns(Plan()) == useful(Plan()) == 1
    gpipe = Plan(stage=4, microbatches=8)
    assert turns(gpipe) == 11
    assert useful(gpipe) == 8 / 11
    assert useful(Plan(stage=4, microbatches=8, schedule="interleaved", rounds=2)) == 16 / 19


def test_slower_links_make_a_slower_step():
    workload = Workload(DENSE, "train", 64, 2048)
    layout = Layout(Plan(tensor=2, fsdp=8), 1, "full")
    inside, across = (estimate(workload, Topology.parse(name), layout) for name in ("v5p:2x2x4", "h100:16"))
    assert inside.roofline.least <= inside.roofline.expected <= inside.roofline.most
    assert across.topology.bandwidth(layout.plan.sizes, ("fsdp",)) < across.topology.chip.link
    alone = estimate(workload, Topology.parse("h100:16"), Layout(Plan(fsdp=16), 1, "full"))
    assert not alone.roofline.exposed
    assert inside.roofline.exposed == inside.roofline.axes["tensor",] > 0


def test_rates_are_of_a_chip_and_not_of_a_device():
    workload = Workload(DENSE, "train", 64, 2048)
    found = estimate(workload, Topology.parse("tpu7x:2x2x1"), Layout(Plan(fsdp=8)))
    rates = found.rates(2.0)
    assert rates["tokens_per_second"] == workload.tokens / 2
    assert rates["tokens_per_second_per_chip"] == workload.tokens / 2 / 4
    assert rates["mfu"] == pytest.approx(flops_per_token(DENSE, 2048) * workload.tokens / 2 / 4 / 2307e12)


def test_a_workload_s_words():
    layout = Layout(Plan(fsdp=3))
    assert "embed of 64 cannot be cut" in "; ".join(layout.problems(WORKLOAD))
    assert "rows" in "; ".join(Layout(Plan(fsdp=4), 4).problems(WORKLOAD))
    serving = dataclasses.replace(WORKLOAD, mode="serve")
    assert "cut by tensor alone" in "; ".join(Layout(Plan(fsdp=2)).problems(serving))
