"""Memory of one device from sizes alone: what a step holds at its fullest moment.

A training step has a few moments that can be the fullest. All hold parameters, moments, gradients and the batch.
- `loss`: the output projection as gathered, its whole gradient in float32, one chunk of logits, what is kept so far.
- `block`: the backward pass of one block at the time that all inputs are still kept: its weights as gathered, its
  activations computed again and their gradients. The output projection's whole gradient waits.
- `table`: the embedding's gradient, whole, before it is cut: twice, as what is summed over devices is a copy.
How many arrays of each width a block's backward pass holds was fitted to compiled programs (docs/plan-accuracy.md).
"""

import dataclasses

from ..sharding.plan import Plan
from ..train.loss import CHUNK_BYTES, LEAST_TOKENS
from .buffers import CLASSES
from .kept import kept_of
from .sizes import Share, computing, parameters, resting, share_of
from .workload import PAGE, Layout, Workload

WIDE = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class Holds:
    """Arrays that a block's backward pass holds at once, in bytes for each token and element of a width, and copies of
    its gathered weights."""

    width: float
    mlp: float
    heads: float
    kv_heads: float
    weights: float


RECOMPUTED = Holds(width=14, mlp=10, heads=10, kv_heads=8, weights=1.5)
FROM_KEPT = Holds(width=8, mlp=6, heads=8, kv_heads=8, weights=1.5)


def train_memory(workload: Workload, layout: Layout) -> dict[str, float]:
    """Bytes by class of `buffers.CLASSES`."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    share = share_of(workload, layout)
    at_rest, blocks = resting(model, plan), resting(model, plan, in_block=True)
    gradients = WIDE * at_rest * (2 if layout.accumulation > 1 else 1)
    kept = _kept(workload, layout, share)
    table, projection = _vocabulary(workload, plan)
    fixed = dict.fromkeys(CLASSES, 0.0) | {
        "parameters": WIDE * at_rest,
        "optimizer": 2 * WIDE * at_rest,
        "inputs": 5 * WIDE * workload.tokens / plan.batch_shards / plan.sequence,
    }
    cast = item * blocks if item < WIDE else 0.0
    moments = [
        {
            "gradients": projection * WIDE,
            "weights": projection * item + cast,
            "activations": kept,
            "temporaries": _logits(workload, share) + 3 * item * share.tokens * share.width,
        },
        {
            "gradients": gradients + projection * WIDE,
            "weights": cast + _block_weights(workload, plan),
            "activations": kept,
            "temporaries": _block(workload, layout, share),
        },
        {
            "gradients": gradients + WIDE * (2 * table + projection),
            "activations": 2 * item * share.tokens * share.width,
            "temporaries": WIDE * share.tokens * share.width,
        },
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return fixed | fullest


def _kept(workload: Workload, layout: Layout, share: Share) -> float:
    """Activations (and whatever else) that wait for the backward pass."""
    plan, model, item = layout.plan, workload.model, workload.itemsize
    each = kept_of(layout.remat, workload.dtype, model.moe is not None, plan.devices > 1)
    between = item * share.width / plan.tensor  # what enters a block, cut by tensor too
    inside = (each.width - item) * share.width + each.mlp * share.mlp
    inside += each.heads * share.heads + each.kv_heads * share.kv_heads + each.single
    layers = share.layers
    if layout.remat == "offload":
        between = 0.0
    pieces = 1.0
    if plan.stage > 1:
        pieces = 2 * plan.stage - 1 if plan.schedule == "1f1b" else plan.pieces * plan.rounds + plan.stage - 1
        if plan.schedule == "1f1b":
            return pieces * share.tokens * between + layers * share.tokens * (between + inside)
    return pieces * layers * share.tokens * (between + inside) + each.weights * layers * computing(model, plan)


def _vocabulary(workload: Workload, plan: Plan) -> tuple[float, float]:
    """Elements of the table's and of the output projection's gradient while they are whole; 0 when never."""
    whole = workload.model.vocab_size / plan.tensor * workload.model.hidden_size
    return whole, whole


def _logits(workload: Workload, share: Share) -> float:
    """One chunk of logits, their exponentials and their gradient."""
    tokens = max(LEAST_TOKENS, CHUNK_BYTES // (WIDE * share.vocab))
    return min(tokens, share.tokens) * share.vocab * (2 * WIDE + workload.itemsize)


def _block_weights(workload: Workload, plan: Plan) -> float:
    return RECOMPUTED.weights * workload.itemsize * computing(workload.model, plan)


def _block(workload: Workload, layout: Layout, share: Share) -> float:
    holds = FROM_KEPT if layout.remat == "none" else RECOMPUTED
    each = holds.width * share.width + holds.mlp * share.mlp
    each += holds.heads * share.heads + holds.kv_heads * share.kv_heads
    return each * share.tokens


def serve_memory(workload: Workload, layout: Layout) -> dict[str, float]:
    """Bytes by class for an engine with pages for all of its requests at full length."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    pages = workload.rows * -(-workload.seq_len // PAGE)
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim / plan.tensor * item
    logits = workload.rows * model.vocab_size * WIDE
    return dict.fromkeys(CLASSES, 0.0) | {
        "parameters": item * sum(p.elements(plan) for p in parameters(model)),
        "cache": pages * PAGE * token,
        "inputs": workload.rows * model.vocab_size * (1 + 2 * WIDE),
        "temporaries": 3 * logits,
    }
