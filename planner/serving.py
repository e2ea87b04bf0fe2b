"""What a step of the engine takes: every running request gets one token. And how many requests fit."""

import dataclasses

from .costs import Key, Traffic
from .memory import serve_memory
from .sizes import multiplied, parameters, share_of
from .topology import Topology
from .traffic import Work
from .workload import Layout, Workload

# Of the memory that weights leave, the share that pages may take; the rest is for what a step computes.
CACHE_SHARE = 0.95
MOST_REQUESTS = 4096  # at once, however small they are: a bound on the programs that are compiled


def serve_work(workload: Workload, layout: Layout) -> Work:
    """One decoding step with all requests at full length, so each reads all of its pages."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    rows = workload.rows
    products = 2 * rows * (multiplied(model, True) + multiplied(model, False)) / plan.tensor
    attention = serve_attention_flops(workload, layout)
    weights = item * sum(p.elements(plan) for p in parameters(model) if p.name != "embed.weight")
    if model.tie_embeddings:
        weights += item * model.vocab_size * model.hidden_size / plan.tensor
    cache = serve_memory(workload, layout)["cache"]
    sent: dict[Key, Traffic] = {}
    if plan.tensor > 1:
        part = (plan.tensor - 1) / plan.tensor
        width = item * rows * model.hidden_size
        sums = 2 * model.num_layers
        sent["all-reduce", ("tensor",)] = Traffic(2 * part * width * (sums + 1), sums + 1)
        logits = 4 * rows * model.vocab_size
        sent["all-gather", ("tensor",)] = Traffic(part * logits, 1)
    flops = products + attention
    return Work(flops, attention, flops, weights + cache, sent)


def serve_attention_flops(workload: Workload, layout: Layout) -> float:
    """Of one decoding step on a device: each request's token with all that were before it."""
    heads = share_of(workload, layout).heads
    return 4 * workload.rows * workload.model.num_layers * heads * workload.seq_len


def most_requests(workload: Workload, topology: Topology, layout: Layout) -> int:
    """How many requests of the workload's length fit beside the weights, up to MOST_REQUESTS; 0 if not one."""

    def at(rows: int) -> float:
        return sum(serve_memory(dataclasses.replace(workload, rows=rows), layout).values())

    one, two = at(1), at(2)
    left = topology.chip.memory - one
    if left < 0:
        return 0
    return min(MOST_REQUESTS, 1 + int(CACHE_SHARE * left / max(two - one, 1.0)))


def fewer_requests(requests: int, available: float, weights: float, used: float) -> int:
    """How many to try next when so many requests take `used` bytes with the weights; at least one less."""
    each = (used - weights) / requests
    return min(requests - 1, int(CACHE_SHARE * (available - weights) / each))
