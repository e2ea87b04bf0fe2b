"""Logical axes, the names parameters and activations carry, and the mesh axes they map to.

A layer only ever says what an axis *is* (`"embed"`, `"heads"`, `"batch"`); these rules say where it goes. Mesh axes of
size 1, or that a mesh lacks, are skipped, so the same rules serve one chip and a pod.

The mesh is JAX's own context (`with use(mesh):` around what is traced): a layer pins an array with `constrain` and
never holds a mesh, and without one nothing happens.

- Parameters rest cut over every axis that helps memory (`PARAMETER_RULES`). A block's are gathered as it runs
  (`COMPUTE_RULES`): fully sharded data parallelism, ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054). What stays cut
  is tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) and expert parallelism.
- Between blocks the tokens are cut over `tensor` too, so that norms and residuals are not computed twice (Korthikanti
  et al. 2022, arXiv:2205.05198): "sequence" there, "tokens" inside a layer.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Rules = dict[str, tuple[str, ...]]
AnyMesh = Mesh | AbstractMesh

# All that a parameter's width can be cut over: the devices that hold equal parameters otherwise.
_SHARED = ("fsdp", "expert", "sequence")
PARAMETER_RULES: Rules = {
    "embed": _SHARED,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": ("stage",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    # A router is small, and every device has all of it.
    "routes": (),
    "positions": (),
    # The width of an expert's weights, which the expert axis already cuts by expert.
    "expert_embed": ("fsdp", "sequence"),
}
COMPUTE_RULES: Rules = {**PARAMETER_RULES, "embed": (), "expert_embed": ()}
ACTIVATION_RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence", "tensor"),
    "tokens": ("sequence",),
    "embed": (),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "stage": ("stage",),
}
# Gathered weights are never kept for the backward pass, which gathers them again: kept, they would undo ZeRO-3.
GATHERED = "gathered_weight"


def use(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which what is traced sees `mesh`; with None, or one device, it sees none."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current() -> AbstractMesh | None:
    """The mesh in use, if it has several devices that the compiler places for us."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def mesh_axes(axis: str, mesh: AnyMesh, rules: Rules = ACTIVATION_RULES) -> tuple[str, ...]:
    """The mesh axes, of more than one device, over which the logical `axis` is cut; ValueError if it has no rule."""
    if axis not in rules:
        raise ValueError(f"Logical axis {axis!r} has no rule; the known ones are {sorted(rules)}.")
    return tuple(name for name in rules[axis] if mesh.shape.get(name, 1) > 1)


def partition_spec(
    axes: tuple[str | None, ...], mesh: AnyMesh, rules: Rules, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are the logical `axes`.

    Raises ValueError when an axis has no rule, when two dimensions claim one mesh axis, or (given a `shape`) when a
    dimension does not divide by the devices it is cut over.
    """
    entries: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for dimension, axis in enumerate(axes):
        if axis is None:
            entries.append(None)
            continue
        names = mesh_axes(axis, mesh, rules)
        for name in names:
            if name in taken:
                raise ValueError(
                    f"Mesh axis {name!r} would cut both {taken[name]!r} and {axis!r} of one array with axes {axes}; "
                    f"an array can use a mesh axis once. Change the rule of one of the two."
                )
            taken[name] = axis
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if shape is not None and shape[dimension] % parts:
            fitting = max(n for n in range(1, parts + 1) if shape[dimension] % n == 0)
            raise ValueError(
                f"Axis {axis!r} has size {shape[dimension]}, which does not divide over {parts} devices "
                f"(mesh axes {'x'.join(names)}). Use {fitting} devices there, or a multiple of {parts}."
            )
        entries.append(names or None)
    return PartitionSpec(*entries)


def parameter_sharding(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Where a parameter with logical `axes` lives; errors as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, PARAMETER_RULES, shape))


def activation_sharding(
    axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """Where an activation or a batch array with logical `axes` lives; errors as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, ACTIVATION_RULES, shape))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins activation `x` to its place on the mesh in use, so that the compiler gathers parameters, never the batch."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, ACTIVATION_RULES, x.shape))


def constrain_parameter(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins a parameter, or an array of its shape, to where parameters rest."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, PARAMETER_RULES, x.shape))


def gather(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as a block computes with it: whole, but for what tensor and expert parallelism cut.

    Its gradient comes back summed and cut as the parameter is (a reduce-scatter).
    """
    mesh = current()
    if mesh is None:
        return weight
    computing = partition_spec(axes, mesh, COMPUTE_RULES, weight.shape)
    if computing == partition_spec(axes, mesh, PARAMETER_RULES, weight.shape):
        return weight
    weight = constrain_parameter(weight, axes)
    return checkpoint_name(jax.lax.with_sharding_constraint(weight, computing), GATHERED)


def gather_in_island(weight: jax.Array, axes: tuple[str | None, ...], mesh: AnyMesh) -> jax.Array:
    """`gather` for a `shard_map` over `mesh` that is given its own part of the parameter, as it rests.

    There the sum of the gradients over devices is surely a reduce-scatter: outside of the island it would be an
    all-reduce inside, and cut only then.
    """
    gathered = weight
    for dimension, axis in enumerate(axes):
        if axis is not None:
            kept = mesh_axes(axis, mesh, COMPUTE_RULES)
            if names := tuple(name for name in mesh_axes(axis, mesh, PARAMETER_RULES) if name not in kept):
                gathered = jax.lax.all_gather(gathered, names, axis=dimension, tiled=True)
    return weight if gathered is weight else checkpoint_name(gathered, GATHERED)
