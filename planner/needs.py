"""What a model needs at least of one kind of chip: bytes of everything, and how many devices hold it.

From shapes alone, in a moment: a first answer. `twinax plan` asks the compiler, and says which plan is the fastest.
"""

import dataclasses
import math
from typing import Any

from ..models.config import DecoderConfig
from ..sharding.plan import Plan
from .chips import GIB, Chip, find_chip
from .memory import train_memory
from .search import MARGIN
from .workload import PAGE, Layout, Workload

MOST_DEVICES = 4096
TRAIN_TOKENS = 4096  # of a row; every device has one
REST = 16  # bytes of a parameter while it is trained: itself, two moments and a gradient in float32


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes are of the whole model.

    Attributes:
        chip: that was asked for.
        weights: served, in bfloat16 or as they are quantised.
        cache_per_token: kept of each token, in bfloat16. state_per_request: kept of each request.
        context: tokens of the longest request.
        training: float32 parameters (of quantised ones what they stand for), two moments of the optimizer, gradients.
        serve_devices: devices that hold the weights and one request of `context` tokens; None: no plan does.
        train_devices: devices for a step of a row each (with its activations, where `with_activations`); None: none.
        train_tokens: of a row.
    """

    chip: Chip
    weights: float
    cache_per_token: float
    state_per_request: float
    context: int
    training: float
    serve_devices: int | None
    train_devices: int | None
    train_tokens: int
    with_activations: bool

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "chip": self.chip.name, "device_memory": self.chip.memory}

    def lines(self) -> list[str]:
        """For people."""
        kind = "device" if self.chip.devices_per_chip > 1 else "chip"
        found = [
            f"on {self.chip.name}, {_size(self.chip.memory)} a {kind}:",
            f"  weights       {_size(self.weights)} to serve",
            f"  cache         {_size(self.cache_per_token)} a token, {_size(self._longest)} at {self.context:,} tokens",
        ]
        if self.state_per_request:
            found.append(f"  state         {_size(self.state_per_request)} a request")
        found.append(f"  to serve      {_devices(self.serve_devices, kind)}, one request of the whole context")
        what = f"a row of {self.train_tokens:,} tokens each, plan fsdp={self.train_devices}"
        if not self.with_activations:
            what = "activations not counted"
        found.append(f"  training      {_size(self.training)}: float32 parameters, two moments, gradients")
        found.append(f"  to train      {_devices(self.train_devices, kind)}, {what}")
        return found

    @property
    def _longest(self) -> float:
        return self.cache_per_token * self.context


def needs(config: DecoderConfig, chip: str) -> Needs:
    """What the model needs of a chip by its name. PlannerError for an unknown chip."""
    found, weights = find_chip(chip), 0.0
    from ..models.decoder import param_shapes, weight_dtype

    for name, like in param_shapes(config).items():
        weights += math.prod(like.shape) * _itemsize(weight_dtype(name, "bfloat16", like.dtype))
    trained = dataclasses.replace(config, quantization=None)
    per_token, per_request = _cache(config)
    memory = MARGIN * found.memory
    longest = per_token * config.max_position_embeddings + per_request
    serve = _fewest(lambda n: not _problems(config, Plan(tensor=n)) and (weights + longest) / n <= memory)
    plain = config.mixers == ("attention",)
    tokens = min(config.max_position_embeddings, TRAIN_TOKENS)
    training = float(REST * sum(math.prod(like.shape) for like in param_shapes(trained).values()))

    def trains(devices: int) -> bool:
        plan = Plan(fsdp=devices)
        if training / devices > memory or _problems(trained, plan):
            return False
        if not plain:
            return True
        workload = Workload(trained, "train", devices, tokens)
        return sum(train_memory(workload, Layout(plan)).values()) <= memory

    return Needs(
        chip=found,
        weights=weights,
        cache_per_token=per_token,
        state_per_request=per_request,
        context=config.max_position_embeddings,
        training=training,
        serve_devices=serve,
        train_devices=_fewest(trains),
        train_tokens=tokens,
        with_activations=plain,
    )


def _itemsize(dtype: Any) -> int:
    import jax.numpy as jnp

    return jnp.dtype(dtype).itemsize


def _cache(config: DecoderConfig) -> tuple[float, float]:
    """Bytes that are kept of a token, in bfloat16, and of a request."""
    import jax
    import jax.numpy as jnp

    from ..models.cache import init_cache

    made = jax.eval_shape(lambda: init_cache(config, num_pages=1, page_size=PAGE, slots=1, dtype=jnp.bfloat16))
    pages, states = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for part in (made.pages, made.states)
    )
    return pages / PAGE, float(states)


def _problems(config: DecoderConfig, plan: Plan) -> list[str]:
    return plan.problems(config.dimensions)


def _fewest(fits: Any) -> int | None:
    devices = 1
    while devices <= MOST_DEVICES:
        if fits(devices):
            return devices
        devices *= 2
    return None


def _devices(count: int | None, kind: str) -> str:
    if count is None:
        return f"no plan of up to {MOST_DEVICES:,} {kind}s that divides the model"
    return f"{count:,} {kind}{'s' if count > 1 else ''} at least"


def _size(count: float) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,.0f} bytes"
