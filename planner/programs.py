"""The programs that the trainer and the engine run, ready to be lowered for described devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models.config import DecoderConfig
from ..models.decoder import param_axes, param_shapes
from ..sharding.plan import Plan
from ..sharding.rules import PARAMETER_RULES, partition_spec
from ..train import schedules
from ..train.data.dataset import Batch
from ..train.place import batch_sharding
from ..train.recipe import OptimizerConfig, ScheduleConfig
from ..train.step import make_step, state_like
from .buffers import Names

Program = tuple[str, Callable[[], Any], Names]
TRAIN_ARGUMENTS = {"state['params']": "parameters", "state['optimizer']": "optimizer", "batch": "inputs"}


def programs(request: dict[str, Any], plan: Plan, mesh: Mesh) -> Iterator[Program]:
    """What a request of `compile` asks for: name, how to lower it, and how its arguments and weights are told apart."""
    config = DecoderConfig.from_dict(request["model"])
    if request["mode"] == "train":
        lower = functools.partial(lower_train, request, config, plan, mesh)
        yield "step", lower, names_of(config, mesh, TRAIN_ARGUMENTS)
    else:
        from .serve_programs import serve_programs

        yield from serve_programs(request, config, plan, mesh)


def lower_train(request: dict[str, Any], config: DecoderConfig, plan: Plan, mesh: Mesh) -> Any:
    """The trainer's own step, for a batch of the request's size."""
    step = make_step(
        config,
        OptimizerConfig(),
        schedules.make(ScheduleConfig(), 1e-3, 1000),
        mesh,
        dtype=jnp.dtype(request["dtype"]),
        remat=request["remat"],
        plan=plan,
    )
    return step.lower(state_like(config, mesh), batch_like(request, mesh))


def batch_like(request: dict[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `train.step.put_batch` makes."""
    shape = (request["accumulation"], request["rows"] // request["accumulation"], request["seq_len"])
    place = batch_sharding(mesh)
    batch = {
        field.name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if field.name == "weights_BT" else jnp.int32, sharding=place
        )
        for field in dataclasses.fields(Batch)
        if field.name.endswith("_BT")
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {**batch, "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)}


def names_of(config: DecoderConfig, mesh: Mesh, arguments: dict[str, str]) -> Names:
    """The shapes that parameters have, at rest and while computing."""
    weights: set[tuple[int, ...]] = set()
    shapes, every = param_shapes(config), {name: () for name in PARAMETER_RULES}
    for name, axes in param_axes(config).items():
        for rules in (PARAMETER_RULES, {**PARAMETER_RULES, **{k: () for k in ("embed", "expert_embed")}}, every):
            spec = partition_spec(axes, mesh, rules)
            parts = [_devices(mesh, names) for names in spec]
            dims = [size // part for size, part in zip(shapes[name].shape, parts, strict=True)]
            weights.add(tuple(sorted(size for size in dims[axes[0] == "layers" :] if size != 1)))
    return Names(arguments, frozenset(weights), config.num_layers)


def _devices(mesh: Mesh, names: Any) -> int:
    """Over how many devices an entry of a PartitionSpec cuts: None, one axis or several."""
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
