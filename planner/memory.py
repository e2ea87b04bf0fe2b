"""Memory of one device from sizes alone: what a step holds at its fullest moment.

A training step has a few moments that can be the fullest. All hold parameters, moments, gradients and the batch.
- `loss`: the output projection as gathered, its whole gradient in float32, one chunk of logits, what is kept so far.
- `block`: the backward pass of one block at the time that all inputs are still kept: its weights as gathered, its
  activations computed again and their gradients. The output projection's whole gradient waits.
- `table`: a piece of the embedding's gradient before it is cut, three times: as it is added up, and copied to be sent.
How many arrays of each width a block's backward pass holds was fitted to compiled programs (docs/plan-accuracy.md).
"""

import dataclasses

from ..layers.embedding import pieces
from ..models.config import DecoderConfig
from ..sharding.plan import Plan
from ..train.loss import CHUNK_BYTES, LEAST_TOKENS
from .buffers import CLASSES
from .kept import kept_of
from .sizes import Share, computing, parameters, resting, share_of
from .workload import PAGE, Layout, Workload

WIDE = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class Holds:
    """Arrays that a block's backward pass holds at once.

    Attributes:
        width, mlp, heads, kv_heads: for each token and element of that width.
        weights: copies of the block's gathered weights.
        row_width, row_mlp: of a mixture, for each row that arrives at a device's experts.
    """

    width: float
    mlp: float
    heads: float
    kv_heads: float
    weights: float
    row_width: float = 4
    row_mlp: float = 2


RECOMPUTED = Holds(width=7, mlp=5, heads=5, kv_heads=4, weights=1)
FROM_KEPT = Holds(width=4, mlp=3, heads=4, kv_heads=4, weights=1)
GAP = 0.75  # what finds no place beside the output projection's gradient and its copy on the way, as a share of it


def train_memory(workload: Workload, layout: Layout) -> dict[str, float]:
    """Bytes by class of `buffers.CLASSES`."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    share = share_of(workload, layout)
    at_rest, blocks = resting(model, plan), resting(model, plan, in_block=True)
    gradients = WIDE * at_rest * (2 if layout.accumulation > 1 else 1)
    kept = _kept(workload, layout, share)
    vocabulary = share.vocab * share.width  # elements of the table, and of the output projection, while they are whole
    stream = share.tokens * share.width
    fixed = dict.fromkeys(CLASSES, 0.0) | {
        "parameters": WIDE * at_rest,
        "optimizer": 2 * WIDE * at_rest,
        "inputs": 5 * WIDE * workload.tokens / plan.batch_shards / plan.sequence,
    }
    cast = item * blocks if item < WIDE else 0.0
    moments = [
        {
            "gradients": WIDE * vocabulary,
            "weights": item * vocabulary + cast,
            "activations": kept,
            "temporaries": _logits(workload, share) + 2 * item * stream + (WIDE * stream if plan.tensor > 1 else 0),
            "unused": GAP * WIDE * vocabulary,
        },
        {
            "gradients": gradients + WIDE * vocabulary,
            "weights": cast + RECOMPUTED.weights * item * computing(model, plan),
            "activations": kept,
            "temporaries": _block(workload, layout, share),
        },
        {
            "gradients": gradients + 3 * WIDE * vocabulary / _pieces(model, plan),
            "activations": item * stream,
            "temporaries": WIDE * stream,
        },
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return fixed | fullest


def _pieces(model: DecoderConfig, plan: Plan) -> int:
    """Of the embedding, as it passes from and to the devices that share its width; see `layers.embedding`."""
    devices = plan.fsdp * plan.expert * plan.sequence
    shape = model.vocab_size // plan.tensor, model.hidden_size
    return 1 if devices == 1 else pieces(*shape, shape[1] // devices, WIDE)


def _kept(workload: Workload, layout: Layout, share: Share) -> float:
    """Activations (and whatever else) that wait for the backward pass."""
    plan, model, item = layout.plan, workload.model, workload.itemsize
    each = kept_of(layout.remat, workload.dtype, model.moe is not None, plan.devices > 1)
    between = item * share.width / plan.tensor  # what enters a block, cut by tensor too
    # Tensor parallelism cuts what is between the products too, but not what they read, nor what experts get.
    cut = (each.width - item - each.whole) / plan.tensor
    # Of a mixture's experts, the rows are as many as there is room for on arrival.
    rows = expert_rows(workload, layout, share) / share.tokens
    inside = (cut + each.whole + each.routed * rows) * share.width
    inside += each.mlp * share.mlp * rows / max(1, _routed(workload))
    inside += each.heads * share.heads + each.kv_heads * share.kv_heads + each.single
    if layout.remat == "offload":
        between = 0.0
    of_blocks = share.layers * share.tokens * (between + inside)
    if plan.stage == 1:
        return of_blocks
    if plan.schedule == "1f1b":
        return (2 * plan.stage - 1) * share.tokens * between + of_blocks
    return (plan.pieces * plan.rounds + plan.stage - 1) * of_blocks


def _routed(workload: Workload) -> int:
    return workload.model.moe.experts_per_token if workload.model.moe else 1


def expert_rows(workload: Workload, layout: Layout, share: Share) -> float:
    """Rows that a device's experts have room for: with an expert axis, for all that its devices might send."""
    moe, plan = workload.model.moe, layout.plan
    if moe is None:
        return share.tokens
    if plan.expert == 1:
        return share.tokens * moe.experts_per_token
    return share.tokens * plan.expert * min(moe.experts_per_token, moe.num_experts // plan.expert)


def _logits(workload: Workload, share: Share) -> float:
    """One chunk of logits in float32; what follows from them takes their place."""
    rows = max(share.rows, 1.0)
    most = max(1.0, max(CHUNK_BYTES, LEAST_TOKENS * WIDE * share.vocab) // (rows * WIDE * share.vocab))
    chunks = -(-share.length // most)
    return rows * -(-share.length // chunks) * share.vocab * WIDE


def _block(workload: Workload, layout: Layout, share: Share) -> float:
    holds = FROM_KEPT if layout.remat == "none" else RECOMPUTED
    item, moe = workload.itemsize, workload.model.moe
    each = holds.width * share.width + holds.heads * share.heads + holds.kv_heads * share.kv_heads
    if moe is None:
        return item * share.tokens * (each + holds.mlp * share.mlp)
    rows = expert_rows(workload, layout, share) / layout.plan.tensor
    of_rows = holds.row_width * share.width + holds.row_mlp * moe.expert_size
    shared = holds.mlp * moe.shared_experts * moe.expert_size / layout.plan.tensor
    return item * (share.tokens * (each + shared) + rows * of_rows)


def serve_memory(workload: Workload, layout: Layout) -> dict[str, float]:
    """Bytes by class for an engine with pages for all of its requests at full length."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    pages = workload.rows * -(-workload.seq_len // PAGE)
    token = 2 * model.num_layers * model.num_kv_heads * workload.cached_head_bytes / plan.tensor
    logits = workload.rows * model.vocab_size * WIDE
    return dict.fromkeys(CLASSES, 0.0) | {
        "parameters": item * sum(p.elements(plan) for p in parameters(model)),
        "cache": pages * PAGE * token,
        "inputs": workload.rows * model.vocab_size * (1 + 2 * WIDE),
        "temporaries": 3 * logits,
    }
