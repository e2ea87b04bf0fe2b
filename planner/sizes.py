"""Sizes of a model's parameters and of one device's share of everything, from shapes alone."""

import dataclasses
import math
from functools import lru_cache

from ..models.config import DecoderConfig
from ..sharding.plan import Plan
from ..sharding.rules import COMPUTE_RULES, PARAMETER_RULES
from .workload import Layout, Workload


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A name, a shape, and the logical axes of its dimensions; what all layers have is stacked, "layers" first."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def in_block(self) -> bool:
        return self.axes[0] == "layers"

    def elements(self, plan: Plan, gathered: bool = False) -> float:
        """Of one device: at rest, or gathered to compute with."""
        return math.prod(self.shape) / math.prod(getattr(plan, name) for name in _names(self.axes, gathered))

    def cuts(self, plan: Plan, gathered: bool = False) -> tuple[str, ...]:
        """The mesh axes of more than one device that cut it then."""
        return tuple(name for name in _names(self.axes, gathered) if getattr(plan, name) > 1)


@lru_cache(maxsize=256)
def _names(axes: tuple[str | None, ...], gathered: bool) -> tuple[str, ...]:
    rules = COMPUTE_RULES if gathered else PARAMETER_RULES
    return tuple(name for axis in axes if axis is not None for name in rules[axis])


@lru_cache(maxsize=16)
def parameters(model: DecoderConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model."""
    from ..models.decoder import param_axes, param_shapes

    axes = param_axes(model)
    return tuple(Parameter(name, tuple(like.shape), axes[name]) for name, like in param_shapes(model).items())


def resting(model: DecoderConfig, plan: Plan, in_block: bool | None = None) -> float:
    """Parameters that rest on one device: of the blocks, of the rest, or (None) of both."""
    return sum(p.elements(plan) for p in parameters(model) if in_block in (None, p.in_block))


def computing(model: DecoderConfig, plan: Plan) -> float:
    """Parameters of one layer as a device computes with them: cut by tensor and expert parallelism alone."""
    per_stage = model.num_layers / plan.stage
    return sum(p.elements(plan, gathered=True) for p in parameters(model) if p.in_block) / per_stage


@lru_cache(maxsize=64)
def multiplied(model: DecoderConfig, in_block: bool) -> float:
    """Parameters that a token is multiplied with, over the whole model: of a mixture, those of its experts."""
    total = 0.0
    for p in parameters(model):
        if p.in_block != in_block or (p.name == "embed.weight" and not model.tie_embeddings):
            continue
        share = 1.0
        if "experts" in p.axes and model.moe is not None:
            share = model.moe.experts_per_token / model.moe.num_experts
        total += share * math.prod(p.shape)
    return total


@dataclasses.dataclass(frozen=True)
class Share:
    """One device's share of a micro-batch (of one piece of it, in a pipeline), and of a layer's widths.

    Attributes:
        tokens: that its layers work on; between layers tensor parallelism cuts them further.
        length: of a row that it sees.
        rows: of the micro-batch.
        layers: on its stage.
        width, heads, kv_heads, mlp: elements of a token in each; heads and kv_heads times the size of a head.
        vocab: rows of the output projection that it multiplies with.
    """

    tokens: float
    length: float
    rows: float
    layers: float
    width: int
    heads: float
    kv_heads: float
    mlp: float
    vocab: float


def share_of(workload: Workload, layout: Layout) -> Share:
    model, plan = workload.model, layout.plan
    if workload.mode == "train":
        rows = workload.rows / layout.accumulation / plan.batch_shards / plan.pieces
        length = workload.seq_len / plan.sequence
        tokens = rows * length
    else:
        rows, length, tokens = workload.rows, workload.seq_len, workload.rows
    mlp = float(model.intermediate_size)
    if model.moe is not None:
        mlp = (model.moe.experts_per_token + model.moe.shared_experts) * model.moe.expert_size
    return Share(
        tokens=tokens,
        length=length,
        rows=rows,
        layers=model.num_layers / plan.stage,
        width=model.hidden_size,
        heads=model.num_heads * model.head_dim / plan.tensor,
        kv_heads=model.num_kv_heads * model.head_dim / plan.tensor,
        mlp=mlp / plan.tensor,
        vocab=model.vocab_size / plan.tensor,
    )
