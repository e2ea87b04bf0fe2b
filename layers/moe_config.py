"""Settings of a mixture of experts. No JAX here: configs are read where JAX is not wanted."""

import dataclasses
import math
from typing import Any

from . import plain

ROUTERS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A feed-forward of many experts, of which each token takes a few.

    Attributes:
        num_experts: experts of a layer.
        experts_per_token: how many a token takes.
        expert_size: hidden width of one expert.
        shared_experts: experts that every token takes besides; one feed-forward of so many times the width.
        router: "softmax" scores as Mixtral does, "sigmoid" as DeepSeek-V3.
        normalize: scale the weights of a token's experts so that they sum to one.
        route_scale: times these weights.
        groups: experts are in so many groups; a token takes experts of its best `groups_per_token` groups alone.
        group_top: a group is as good as the sum of its so many best scores.
        router_bias: a bias on the router's logits.
        bias: biases on the experts' projections.
        clamp: bounds the gate from above, and the other projection on both sides; None: no bounds.
        gate_slope: the experts' activation is x * sigmoid(gate_slope * x).
        up_offset: added to the projection that the activated gate multiplies.
        balance_loss: coefficient of the load-balancing loss.
        z_loss: coefficient of the router's z-loss.
        bias_update: what a step adds to, or takes from, the sigmoid router's bias of an expert that got too few or
            too many tokens.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_experts: int = 0
    router: str = "softmax"
    normalize: bool = True
    route_scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    group_top: int = 1
    router_bias: bool = False
    bias: bool = False
    clamp: float | None = None
    gate_slope: float = 1.0
    up_offset: float = 0.0
    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_update: float = 0.0

    def __post_init__(self) -> None:
        least_of = {"num_experts": 1, "experts_per_token": 1, "expert_size": 1, "shared_experts": 0}
        for name, least in {**least_of, "groups": 1, "groups_per_token": 1, "group_top": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number from {least} up; got {value!r}.")
        for name in ("balance_loss", "z_loss", "bias_update", "route_scale", "gate_slope", "up_offset"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is a number from 0 up; got {value!r}.")
        if self.router not in ROUTERS:
            raise ValueError(f"router is one of {', '.join(ROUTERS)}; got {self.router!r}.")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; lower it."
            )
        if self.clamp is not None and not (math.isfinite(self.clamp) and self.clamp > 0):
            raise ValueError(f"clamp is a positive number or None; got {self.clamp!r}.")
        self._check_groups()
        if self.bias_update and self.router != "sigmoid":
            raise ValueError(
                f"bias_update={self.bias_update} moves the bias of a sigmoid router; this router is {self.router!r}. "
                "Use router='sigmoid', or balance_loss."
            )

    def _check_groups(self) -> None:
        size, rest = divmod(self.num_experts, self.groups)
        if rest or self.groups_per_token > self.groups or self.group_top > size:
            raise ValueError(
                f"groups must divide num_experts, groups_per_token be at most groups and group_top at most a group's "
                f"experts; got {self.num_experts} experts, groups={self.groups}, "
                f"groups_per_token={self.groups_per_token}, group_top={self.group_top}."
            )
        if self.groups_per_token * size < self.experts_per_token:
            raise ValueError(
                f"{self.groups_per_token} groups of {size} experts have fewer than experts_per_token="
                f"{self.experts_per_token}; raise groups_per_token."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoEConfig":
        """Reads back `dataclasses.asdict`; ValueError on unknown or missing keys, and on values of another type."""
        return plain.read(cls, values, "moe")
