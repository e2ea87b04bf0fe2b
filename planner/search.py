"""Finds the layout to use: the analytic model ranks all that are possible, the compiler checks the best few."""

import dataclasses
from collections.abc import Iterator, Sequence

from ..sharding.plan import Plan
from .errors import PlannerError
from .model import Estimate, estimate, fits
from .serving import most_requests
from .topology import Topology
from .workload import Layout, Workload

# In the order of what they cost: the first that fits is the fastest.
REMATS = ("none", "dots", "full", "offload")
CAUTION = 0.1  # of the time of what travels beside the products
MARGIN = 0.95  # of the memory, what an estimate may fill: it is not exact
ROWS_PER_DEVICE = (1, 2, 4, 8, 16)  # tried when the batch is not given


def plans(workload: Workload, devices: int) -> Iterator[Plan]:
    """Every plan of so many devices that can cut the model, whatever the batch."""
    sizes = workload.dimensions
    for plan in Plan().variants(devices):
        if workload.mode == "serve" and (plan.tensor != devices):
            continue
        for variant in _kinds(plan):
            if not variant.problems(sizes):
                yield variant


def _kinds(plan: Plan) -> Iterator[Plan]:
    """The plan with each way of sharing rows, and each schedule, that its axes give a meaning."""
    attentions = ("ring", "all_to_all") if plan.sequence > 1 else ("ring",)
    schedules = ("gpipe", "1f1b") if plan.stage > 1 else ("gpipe",)
    for attention in attentions:
        for schedule in schedules:
            yield dataclasses.replace(plan, attention=attention, schedule=schedule)


def layouts(workload: Workload, plan: Plan, remats: Sequence[str]) -> Iterator[Layout]:
    """The plan with each accumulation that cuts the batch evenly, fewest first, and each remat."""
    accumulation = 1
    while workload.rows % accumulation == 0 and workload.rows // accumulation >= plan.batch_shards * plan.pieces:
        for remat in remats:
            layout = Layout(plan, accumulation, remat)
            if not layout.problems(workload):
                yield layout
        accumulation *= 2


def best_of(workload: Workload, topology: Topology, plan: Plan, remats: Sequence[str] = REMATS) -> Estimate | None:
    """The quickest way to run a plan that fits; if none fits, the one that comes closest; None if none is possible."""
    best: Estimate | None = None
    for layout in layouts(workload, plan, remats):
        if best is not None and best.fits and not fits(workload, topology, layout, MARGIN):
            continue  # only the memory was looked at, which is quick
        found = estimate(workload, topology, layout)
        if best is None or _rank(found) < _rank(best):
            best = found
    return best


def _rank(found: Estimate) -> tuple[bool, float, int, float]:
    """Orders layouts: those that fit by time, the others by memory; of equals the one with fewer axes."""
    fits = found.total_memory <= MARGIN * found.topology.chip.memory
    axes = sum(size > 1 for size in found.layout.plan.sizes.values())
    return (not fits, score(found) if fits else found.total_memory, axes, found.total_memory)


def score(found: Estimate) -> float:
    """Seconds to rank by: what is sent beside the products counts a little, as it is never free."""
    return found.seconds + CAUTION * found.roofline.hidden


def distinct(ranked: Sequence[Estimate], count: int) -> list[Estimate]:
    """The first few that differ in the axes they use, so that compiling them says something."""
    chosen: dict[tuple[object, ...], Estimate] = {}
    for found in ranked:
        plan = found.layout.plan
        kind = (*(size > 1 for size in plan.sizes.values()), plan.attention, plan.schedule)
        chosen.setdefault(kind, found)
        if len(chosen) == count:
            break
    return list(chosen.values())


def search(workload: Workload, topology: Topology, remats: Sequence[str] = REMATS) -> list[Estimate]:
    """One estimate for each plan, best first. PlannerError when no plan can cut the model and batch."""
    found = [best for plan in plans(workload, topology.devices) if (best := best_of(workload, topology, plan, remats))]
    if not found:
        raise PlannerError(
            f"No plan of {topology.devices} devices cuts this model and a batch of {workload.rows} rows of "
            f"{workload.seq_len} tokens. {_advice(workload, topology)}"
        )
    return sorted(found, key=_rank)


def search_batch(workload: Workload, topology: Topology, remats: Sequence[str] = REMATS) -> list[Estimate]:
    """As `search`, over batches of 1 to 16 rows a device too; ranked by tokens a second."""
    found: list[Estimate] = []
    for rows in ROWS_PER_DEVICE:
        found += search(dataclasses.replace(workload, rows=rows * topology.devices), topology, remats)
    return sorted(found, key=lambda e: (_rank(e)[0], score(e) / e.workload.tokens, *_rank(e)[2:]))


def search_serving(workload: Workload, topology: Topology) -> list[tuple[Estimate, int]]:
    """Each way to split the chips into engines: the estimate of one with as many requests as fit, and how many.

    Best first: most tokens a second of all chips. PlannerError when not one request fits.
    """
    found = []
    sizes = [size for size in range(1, topology.devices + 1) if topology.devices % size == 0]
    for tensor in sizes:
        layout = Layout(Plan(tensor=tensor), remat="none")
        if layout.problems(workload):
            continue
        requests = most_requests(workload, topology, layout)
        if requests:
            full = dataclasses.replace(workload, rows=requests)
            found.append((estimate(full, topology, layout), requests))
    if not found:
        raise PlannerError(
            f"Not one request of {workload.seq_len} tokens fits beside the weights on {topology}, however it is cut. "
            "Take more or larger chips, or a smaller model."
        )
    return sorted(found, key=lambda pair: -pair[1] / pair[0].seconds / pair[0].layout.plan.devices)


def _advice(workload: Workload, topology: Topology) -> str:
    alone = Layout(Plan(fsdp=topology.devices))
    problems = alone.problems(workload)
    return f"fsdp={topology.devices}, for one: {'; '.join(problems)}." if problems else ""
