"""Plans a workload on a topology: of the plans that are named, or of all there are."""

import dataclasses
from collections.abc import Sequence

from ..sharding.plan import Plan
from .compile import compile_layouts
from .devices import check_compiler
from .errors import CompileFailed, CompilerMissing, PlannerError
from .model import Estimate, estimate
from .progress import CompileDisplay
from .search import REMATS, best_of, distinct, search, search_batch, search_serving
from .serving import fewer_requests, most_requests
from .topology import Topology
from .verdict import Verdict
from .workload import Layout, Workload

RETRIES = 2  # of an engine that does not fit, each with fewer requests


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What is fixed, and what is to be found.

    Attributes:
        plans: to look at; empty: all that are possible.
        remats: those that may be used. accumulation: None: what fits.
        batch: whether the workload's rows are given; if not, they are searched for.
        compiled: how many of the best layouts are compiled; 0: none.
        display: show the progress of compilations.
    """

    plans: tuple[Plan, ...] = ()
    remats: tuple[str, ...] = REMATS
    accumulation: int | None = None
    batch: bool = True
    compiled: int = 3
    display: bool = True


def plan_on(workload: Workload, topology: Topology, wishes: Wishes) -> tuple[list[Verdict], list[Estimate]]:
    """The verdicts, best first (for named plans in their order), and all estimates that they were chosen from.

    PlannerError when nothing is possible, or a named plan is not; CompilerMissing for TPUs without libtpu.
    """
    if wishes.compiled:
        try:
            check_compiler(topology)
        except CompilerMissing as missing:
            if topology.chip.platform == "tpu":
                raise
            wishes, reason = dataclasses.replace(wishes, compiled=0), str(missing)
        else:
            reason = None
    else:
        reason = None
    if workload.mode == "serve":
        return _serving(workload, topology, wishes, reason)
    if wishes.plans:
        ranked = [_named(workload, topology, plan, wishes) for plan in wishes.plans]
        chosen = ranked
    else:
        find = search if wishes.batch else search_batch
        ranked = find(workload, topology, wishes.remats)
        chosen = distinct(ranked, max(1, wishes.compiled))
    verdicts = _compiled(topology, chosen, wishes, reason)
    if not wishes.plans:
        verdicts = sorted(verdicts, key=lambda v: (not v.fits, v.seconds / v.estimate.workload.tokens))
    return verdicts, ranked


def _named(workload: Workload, topology: Topology, plan: Plan, wishes: Wishes) -> Estimate:
    """The best way to run a plan that the user names."""
    if plan.devices > topology.devices:
        raise PlannerError(
            f"The plan {plan} takes {plan.devices} devices and {topology} has {topology.devices}. Use a smaller plan "
            "or a larger topology."
        )
    if wishes.accumulation is not None:
        found = [
            estimate(workload, topology, layout)
            for remat in wishes.remats
            if not (layout := Layout(plan, wishes.accumulation, remat)).problems(workload)
        ]
        best = min(found, key=lambda e: (not e.fits, e.seconds), default=None)
    else:
        best = best_of(workload, topology, plan, wishes.remats)
    if best is None:
        layout = Layout(plan, wishes.accumulation or 1, wishes.remats[0])
        sizes = {**workload.dimensions, "rows": max(1, workload.rows // layout.accumulation)}
        near = plan.nearest(sizes)
        advice = "No plan of as many devices fits." if near is None else f"The nearest plan that works is {near}."
        raise PlannerError(f"The plan {plan} does not fit: {'; '.join(layout.problems(workload))}. {advice}")
    return best


def _compiled(topology: Topology, chosen: Sequence[Estimate], wishes: Wishes, reason: str | None) -> list[Verdict]:
    if not wishes.compiled:
        return [Verdict(found, reason=reason) for found in chosen]
    verdicts = []
    with CompileDisplay(str(topology), enabled=wishes.display) as display:
        # Batches may differ, so each group of one workload goes together.
        for workload in dict.fromkeys(found.workload for found in chosen):
            group = [found for found in chosen if found.workload == workload]
            results = compile_layouts(workload, topology, [found.layout for found in group], display)
            for found, result in zip(group, results, strict=True):
                failed = isinstance(result, CompileFailed)
                verdicts.append(Verdict(found, reason=str(result)) if failed else Verdict(found, result))
    return verdicts


def _serving(
    workload: Workload, topology: Topology, wishes: Wishes, reason: str | None
) -> tuple[list[Verdict], list[Estimate]]:
    if wishes.plans:
        pairs = []
        for plan in wishes.plans:
            layout = Layout(plan, remat="none")
            if problems := layout.problems(workload):
                raise PlannerError(f"The plan {plan} does not fit: {'; '.join(problems)}.")
            requests = most_requests(workload, topology, layout)
            rows = dataclasses.replace(workload, rows=max(1, requests))
            pairs.append((estimate(rows, topology, layout), requests))
    else:
        pairs = search_serving(workload, topology)
    count = len(pairs) if wishes.plans else max(1, wishes.compiled)
    verdicts = [_largest_engine(topology, found, requests, wishes, reason) for found, requests in pairs[:count]]
    return verdicts, [found for found, _ in pairs]


def _largest_engine(
    topology: Topology, found: Estimate, requests: int, wishes: Wishes, reason: str | None
) -> Verdict:
    """The engine compiled; again with fewer requests while it needs more memory than the model thought.

    (Pages of few heads or of small ones are padded to tiles, by up to eight times.)
    """
    (verdict,) = _compiled(topology, [found], wishes, reason)
    for _ in range(RETRIES):
        if verdict.compiled is None or verdict.fits:
            break
        weights = verdict.compiled.memory["parameters"]
        fewer = fewer_requests(requests, topology.chip.memory, weights, verdict.total_memory)
        if fewer < 1:
            break
        requests = fewer
        found = estimate(dataclasses.replace(found.workload, rows=requests), topology, found.layout)
        (verdict,) = _compiled(topology, [found], wishes, reason)
    return dataclasses.replace(verdict, requests=requests)
