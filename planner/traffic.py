"""What a step computes, reads and sends, from sizes alone: FLOPs, memory traffic, and bytes for each mesh axis.

The collectives are those that the program asks for (`sharding.rules`, the layers and the loss); a compiler may write
them otherwise, such as a gather as an all-reduce of pieces among zeros. Bytes are what one device sends, as in `costs`.
"""

import dataclasses
import math
from functools import lru_cache

from ..models.config import DecoderConfig
from ..sharding.plan import AXES, Plan
from ..train.flops import flops_per_token
from .costs import Key, Traffic
from .kept import kept_of
from .sizes import Parameter, Share, computing, multiplied, parameters, resting, share_of
from .workload import Layout, Workload

WIDE = 4  # bytes of float32
ATTENTION_BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass (5 to 2)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in one step.

    Attributes:
        flops: that it computes, with what remat computes again and what a pipeline's idle stages compute for nobody.
        attention_flops: those of them that attention computes between queries and keys, and with values.
        model_flops: its share of what the model asks for: what MFU counts (`train.flops`).
        hbm_bytes: read and written; an estimate.
        collectives: sent, by kind and mesh axes.
    """

    flops: float
    attention_flops: float
    model_flops: float
    hbm_bytes: float
    collectives: dict[Key, Traffic]


class _Wires:
    """Collects what is sent."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.found: dict[Key, Traffic] = {}

    def add(self, kind: str, axes: tuple[str, ...], size: float, times: float) -> None:
        """`times` collectives of arrays of `size` bytes: whole for a gather or scatter, held by each for the rest."""
        axes = tuple(name for name in AXES if name in axes and getattr(self.plan, name) > 1)
        if not axes or not size * times:
            return
        devices = _devices(self.plan, axes)
        part = (devices - 1) / devices
        sent = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(kind, part) * size * times
        self.found[kind, axes] = self.found.get((kind, axes), Traffic()).plus(Traffic(sent, times))


def _devices(plan: Plan, axes: tuple[str, ...]) -> int:
    return math.prod(getattr(plan, name) for name in axes)


def turns(plan: Plan) -> float:
    """Turns of a pipeline over the pieces of a micro-batch; 1 without one."""
    if plan.stage == 1:
        return 1.0
    idle = 2 * (plan.stage - 1) if plan.schedule == "1f1b" else plan.stage - 1
    return plan.pieces * plan.rounds + idle


def useful(plan: Plan) -> float:
    """The share of a pipeline's turns in which a stage has a piece."""
    return plan.pieces * plan.rounds / turns(plan)


def train_work(workload: Workload, layout: Layout) -> Work:
    model, plan = workload.model, layout.plan
    share = share_of(workload, layout)
    tokens = workload.tokens / plan.devices  # each device's part of the step's arithmetic
    blocks, outside = (2 * tokens * multiplied(model, in_block) for in_block in (True, False))
    attention = 2 * tokens * model.num_layers * model.num_heads * model.head_dim * workload.seq_len
    forwards, attentions = forward_passes(workload, layout)
    products, attention = blocks * (forwards + 2), attention * (attentions + ATTENTION_BACKWARD)
    wires = _Wires(plan)
    _weights(workload, layout, wires)
    _activations(workload, layout, share, wires)
    return Work(
        flops=(products + attention) / useful(plan) + 3 * outside,
        attention_flops=attention / useful(plan),
        model_flops=_asked_for(model, workload.seq_len) * tokens,
        hbm_bytes=_hbm(workload, layout, share),
        collectives=wires.found,
    )


def forward_passes(workload: Workload, layout: Layout) -> tuple[float, float]:
    """How often a block's forward pass is computed in all, and its attention's.

    What is kept says what is computed again: without the feed-forward's activations, all products but the last, whose
    result nobody needs; without the heads', attention.
    """
    model, plan = workload.model, layout.plan
    kept = kept_of(layout.remat, workload.dtype, model.moe is not None, plan.devices > 1)
    share = share_of(workload, layout)
    last = share.mlp * plan.tensor * model.hidden_size * model.num_layers / multiplied(model, in_block=True)
    again = 0.0 if kept.mlp else 1 - last
    attentions = 0.0 if kept.heads else 1.0
    if plan.stage > 1 and plan.schedule == "1f1b":
        again, attentions = again + 1, attentions + 1
    return 1 + again, 1 + attentions


@lru_cache(maxsize=64)
def _asked_for(model: DecoderConfig, seq_len: int) -> float:
    return flops_per_token(model, seq_len)


def _weights(workload: Workload, layout: Layout, wires: _Wires) -> None:
    """Weights to where they are computed with, and their gradients back."""
    plan, item = layout.plan, workload.itemsize
    # A stage's layers are gathered in each turn for the forward pass, and again for the backward pass.
    times = layout.accumulation * turns(plan)
    for p in parameters(workload.model):
        whole = p.elements(plan, gathered=True)
        axes = _gathered_over(p, plan)
        if p.in_block:
            wires.add("all-gather", axes, item * whole, 2 * times)
            _gradient(wires, p, axes, item * whole, times)
        else:
            # The table's rows are looked up, and the loss takes the output projection, each gathered once.
            uses = 2 if workload.model.tie_embeddings and p.name == "embed.weight" else 1
            wires.add("all-gather", axes, item * whole, uses * layout.accumulation)
            _gradient(wires, p, axes, WIDE * whole, uses * layout.accumulation)


def _gradient(wires: _Wires, p: Parameter, axes: tuple[str, ...], size: float, times: float) -> None:
    plan = wires.plan
    wires.add("reduce-scatter", axes, size, times)
    devices = _devices(plan, axes)
    batch = ("data", "fsdp", "sequence") if "experts" in p.axes else ("data", "fsdp", "expert", "sequence")
    wires.add("all-reduce", tuple(name for name in batch if name not in axes), size / devices, times)


def _gathered_over(p: Parameter, plan: Plan) -> tuple[str, ...]:
    return tuple(set(p.cuts(plan)) - set(p.cuts(plan, gathered=True)))


def _activations(workload: Workload, layout: Layout, share: Share, wires: _Wires) -> None:
    """What tokens cause to be sent."""
    model, plan, item = workload.model, layout.plan, workload.itemsize
    times = layout.accumulation * turns(plan) * share.layers
    forwards, attentions = forward_passes(workload, layout)
    width = item * share.tokens * share.width
    # Into attention and feed-forward the tokens are gathered over tensor, out of them summed and scattered; the
    # backward pass does the same the other way round, and what is computed again is gathered again.
    again = 1 if forwards > 1 else 0
    wires.add("all-gather", ("tensor",), width, (4 + 2 * again) * times)
    wires.add("reduce-scatter", ("tensor",), width, (4 + again) * times)
    outer = layout.accumulation * plan.pieces
    wires.add("all-reduce", ("tensor",), 2 * width, outer)  # the loss's gradient, in float32
    wires.add("all-reduce", ("tensor",), width, outer)  # rows of the table that another device holds

    keys = item * share.tokens * share.kv_heads
    if plan.attention == "all_to_all":
        exchanged = item * share.tokens * 2 * (share.heads + share.kv_heads)
        wires.add("all-to-all", ("sequence",), exchanged, (attentions + 1) * times)
    else:
        laps = plan.sequence - 1
        # Keys and values go round forward, and with their gradients in float32 backward.
        wires.add("collective-permute", ("sequence",), 2 * keys, (attentions + 1) * laps * times)
        wires.add("collective-permute", ("sequence",), 2 * keys * WIDE / item, laps * times)
    if model.moe is not None:
        rows = item * share.tokens / plan.tensor * model.moe.experts_per_token * share.width
        wires.add("all-to-all", ("expert",), rows, (2 * forwards + 2) * times)
    passed = width / plan.tensor
    wires.add("collective-permute", ("stage",), passed, 2 * layout.accumulation * turns(plan))


def _hbm(workload: Workload, layout: Layout, share: Share) -> float:
    """Each weight once a pass, each activation written once and read once, the optimizer's state once."""
    plan, model, item = layout.plan, workload.model, workload.itemsize
    passes = forward_passes(workload, layout)[0] + 2
    per_token = 8 * share.width + 4 * (share.heads + share.kv_heads) + 4 * share.mlp
    blocks = layout.accumulation * turns(plan) * share.layers * passes
    weights = item * computing(model, plan) * blocks
    activations = 2 * item * per_token * share.tokens * blocks
    logits = 4 * WIDE * share.vocab * share.tokens * layout.accumulation * plan.pieces / plan.stage
    # Parameter and two moments are read and written, the gradient is added up and read.
    return weights + activations + logits + WIDE * resting(model, plan) * (6 + 2 * layout.accumulation)
