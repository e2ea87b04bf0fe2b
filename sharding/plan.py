"""A plan: how many devices each kind of parallelism gets, and how. A value: printed, compared, stored."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from .platform import distrust_compile_cache
from .rules import activation_sharding, parameter_sharding

# Outermost first: what talks most is innermost, where devices are closest.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
CHOICES = {
    "attention": ("ring", "ring_two_way", "all_to_all"),
    "schedule": ("gpipe", "1f1b", "interleaved"),
}


class PlanError(ValueError):
    """A plan that a model or a batch cannot be cut by; the message says which plan could."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Devices per mesh axis, and what the axes do.

    Attributes:
        data: Replicas of the whole model; each takes its share of the batch.
        fsdp: Devices that share one copy of parameters and optimizer state, and the batch too.
        tensor: Devices that share each product: heads, feed-forward and vocabulary are cut over them, and between the
            blocks the tokens.
        sequence: Devices that share each row's tokens.
        expert: Devices that share the experts of a mixture, and the batch; for all else they are as `fsdp`.
        stage: Devices (or groups of them) that hold consecutive layers, a pipeline.
        attention: How attention crosses `sequence`: keys and values go round a "ring"; "ring_two_way" sends queries and
            outputs the other way; "all_to_all" exchanges tokens for heads (Ulysses).
        schedule: Order of a pipeline's work: "gpipe", "1f1b" or "interleaved".
        microbatches: Pieces that a pipeline cuts a batch into; 0 is twice the stages.
        rounds: Groups of layers on each stage, for "interleaved".
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1
    attention: str = "ring"
    schedule: str = "gpipe"
    microbatches: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            least = 0 if name == "microbatches" else 1
            if name in CHOICES:
                if value not in CHOICES[name]:
                    raise PlanError(f"A plan's {name} is one of {', '.join(CHOICES[name])}; got {value!r}.")
            elif not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"A plan's numbers are whole and from {least} up; {name}={value!r} is not.")
        if self.rounds > 1 and self.schedule != "interleaved":
            raise PlanError(f"rounds={self.rounds} is for schedule=interleaved; the schedule is {self.schedule}.")

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads `"fsdp=4,data=2"`; empty text is one device. PlanError names the nearest right axis."""
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise PlanError(f"A plan has the parts {', '.join(names)}, written fsdp=4,data=2; got {part!r}.{hint}")
            if name in values:
                raise PlanError(f"A plan names each part once; {name!r} is there twice in {text!r}.")
            if name not in CHOICES and (not equals or not value.isdecimal()):
                raise PlanError(f"{name!r} of a plan needs a whole number, as in {name}=4; got {part!r}.")
            values[name] = value if name in CHOICES else int(value)
        return cls(**values)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices of each mesh axis, outermost first."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def devices(self) -> int:
        """How many devices the plan takes."""
        return math.prod(self.sizes.values())

    @property
    def batch_shards(self) -> int:
        """Over how many devices the rows of a batch are cut."""
        return self.data * self.fsdp * self.expert

    @property
    def pieces(self) -> int:
        """Micro-batches of the pipeline; 1 without one."""
        return 1 if self.stage == 1 else self.microbatches or 2 * self.stage

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        default = Plan.__dataclass_fields__
        changed = {name: value for name, value in self.to_dict().items() if value != default[name].default}
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "one device"

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over the first devices (default: of `jax.devices()`); raises PlanError when there are too few."""
        devices = jax.devices() if devices is None else devices
        if len(devices) < self.devices:
            raise PlanError(
                f"The plan {self} takes {self.devices} devices and there are {len(devices)} ({devices[0].platform}). "
                f"Use a smaller plan; on a CPU, JAX_NUM_CPU_DEVICES={self.devices} simulates more."
            )
        distrust_compile_cache(devices[: self.devices])
        grid = np.asarray(devices[: self.devices]).reshape(tuple(self.sizes.values()))
        return Mesh(grid, tuple(self.sizes), axis_types=(AxisType.Auto,) * len(self.sizes))

    def param_sharding(
        self, mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None
    ) -> NamedSharding:
        """Where a parameter with logical `axes` lives on this plan's mesh."""
        return parameter_sharding(axes, mesh, shape)

    def batch_sharding(self, mesh: Mesh) -> NamedSharding:
        """Where arrays with rows first (`[B, ...]`) live: the rows cut over the batch's devices."""
        return activation_sharding(("batch",), mesh)

    def problems(self, dimensions: Mapping[str, int]) -> list[str]:
        """Why this plan cannot cut a model or batch of these sizes; empty if it can.

        Args:
            dimensions: any of "embed", "heads", "kv_heads", "mlp", "vocab", "latent_ranks" (their common divisor),
                "layers", "layer_runs" (how often the same kinds of layers come in the same order), "experts" (0:
                dense), "expert_mlp", "states" (mixers that keep a state), "rows" (of a batch, before a pipeline cuts
                it) and "tokens" (of a row). What is left out is not checked.
        """
        found = []
        parts, layers, runs = self.stage * self.rounds, dimensions.get("layers", 0), dimensions.get("layer_runs", 0)
        if runs % parts and layers % parts == 0:
            found.append(
                f"{layers} layers whose kinds repeat every {layers // runs} cannot be cut over stage x rounds = "
                f"{parts}, as all stages hold the same kinds"
            )
        for name, (parts, why) in self._divisors().items():
            size = dimensions.get(name)
            if size and size % parts:
                found.append(f"{name} of {size} cannot be cut over {why} = {parts}")
        if self.expert > 1 and dimensions.get("experts") == 0:
            found.append(f"expert={self.expert} needs a mixture of experts, and the model is dense")
        for name in ("sequence", "tensor"):
            if (count := getattr(self, name)) > 1 and dimensions.get("states"):
                found.append(f"{name}={count} cannot cut layers that keep a state (Mamba-2, lightning attention) yet")
        return found

    def _divisors(self) -> dict[str, tuple[int, str]]:
        """By dimension: what must divide it, and as which product of axes."""
        shared = self.fsdp * self.expert * self.sequence
        heads, heads_why = self.tensor, "tensor"
        tokens, tokens_why = self.sequence * self.tensor, "sequence x tensor"
        if self.sequence > 1 and self.attention == "all_to_all":
            heads, heads_why = self.tensor * self.sequence, "tensor x sequence (attention=all_to_all)"
        elif self.sequence > 1:
            tokens, tokens_why = 2 * tokens, "2 (zigzag order) x sequence x tensor"
        return {
            "embed": (shared, "fsdp x expert x sequence"),
            "latent_ranks": (shared, "fsdp x expert x sequence"),
            "heads": (heads, heads_why),
            "kv_heads": (self.tensor, "tensor"),
            "mlp": (self.tensor, "tensor"),
            "expert_mlp": (self.tensor, "tensor"),
            "vocab": (self.tensor, "tensor"),
            "layers": (self.stage * self.rounds, "stage x rounds"),
            "experts": (self.expert, "expert"),
            "rows": (self.batch_shards * self.pieces, "data x fsdp x expert x microbatches"),
            "tokens": (tokens, tokens_why),
        }

    def check(self, dimensions: Mapping[str, int]) -> None:
        """Raises PlanError with every problem and the nearest plan that has none (see `problems`)."""
        found = self.problems(dimensions)
        if found:
            near = self.nearest(dimensions)
            advice = "No plan fits these sizes." if near is None else f"The nearest plan that works is {near}."
            raise PlanError(f"The plan {self} does not fit: " + "; ".join(found) + ". " + advice)

    def nearest(self, dimensions: Mapping[str, int]) -> "Plan | None":
        """The plan that fits, on as many devices if there is one, with axis sizes as close as possible."""
        for count in (n for n in range(self.devices, 0, -1) if self.devices % n == 0):
            fitting = [plan for plan in self.variants(count) if not plan.problems(dimensions)]
            if fitting:
                return min(fitting, key=self._distance)
        return None

    def variants(self, devices: int) -> "Iterator[Plan]":
        """This plan with every other way of dividing `devices` over the axes."""
        for sizes in _factorizations(devices, len(AXES)):
            yield dataclasses.replace(self, **dict(zip(AXES, sizes, strict=True)))

    def _distance(self, other: "Plan") -> tuple[float, ...]:
        """How far the sizes are; of equals, what asks least of a model and of the links comes first."""
        own, others = self.sizes.values(), other.sizes.values()
        far = sum(abs(math.log2(a / b)) for a, b in zip(own, others, strict=True))
        return round(far, 6), -other.fsdp, -other.data, *others


ONE_DEVICE = Plan()


def _factorizations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write `number` as a product of `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in _factorizations(number // first, count - 1):
            yield (first, *rest)
