"""What a step of the engine takes: every running request gets one token. And how many requests fit."""

from .costs import Key, Traffic
from .memory import serve_memory
from .sizes import multiplied, parameters, share_of
from .topology import Topology
from .traffic import COMPUTE, Work
from .workload import PAGE, Layout, Workload

# Of the memory that weights leave, the share that pages may take; the rest is for what a step computes.
CACHE_SHARE = 0.95


def serve_work(workload: Workload, layout: Layout) -> Work:
    """One decoding step with all requests at full length, so each reads all of its pages."""
    model, plan = workload.model, layout.plan
    share = share_of(workload, layout)
    rows, context = workload.rows, workload.seq_len
    products = 2 * rows * (multiplied(model, True) + multiplied(model, False)) / plan.tensor
    attention = 4 * rows * model.num_layers * share.heads * context
    weights = COMPUTE * sum(p.elements(plan) for p in parameters(model) if p.name != "embed.weight")
    if model.tie_embeddings:
        weights += COMPUTE * model.vocab_size * model.hidden_size / plan.tensor
    cache = serve_memory(workload, layout)["cache"]
    sent: dict[Key, Traffic] = {}
    if plan.tensor > 1:
        part = (plan.tensor - 1) / plan.tensor
        width = COMPUTE * rows * model.hidden_size
        sums = 2 * model.num_layers
        sent["all-reduce", ("tensor",)] = Traffic(2 * part * width * (sums + 1), sums + 1)
        logits = 4 * rows * model.vocab_size
        sent["all-gather", ("tensor",)] = Traffic(part * logits, 1)
    flops = products + attention
    return Work(flops, flops, weights + cache, sent)


def most_requests(workload: Workload, topology: Topology, layout: Layout) -> int:
    """How many requests of the workload's length fit beside the weights; 0 if not one."""
    from .model import estimate

    def at(rows: int) -> float:
        import dataclasses

        return estimate(dataclasses.replace(workload, rows=rows), topology, layout).total_memory

    one, two = at(1), at(2)
    left = topology.chip.memory - one
    if left < 0:
        return 0
    return 1 + int(CACHE_SHARE * left / max(two - one, 1.0))


__all__ = ["CACHE_SHARE", "PAGE", "most_requests", "serve_work"]
