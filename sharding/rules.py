"""Logical axes, the names parameters and activations carry, and the mesh axes they map to.

A layer only ever says what an axis *is* (`"embed"`, `"heads"`, `"batch"`); these rules say where it goes. The mesh
axes that a mesh lacks are skipped, so the same rules serve one chip and a pod.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Fully sharded data parallelism cuts every matrix along its model width, the one axis all of them have.
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "vocab": (),
    "heads": (),
    "kv_heads": (),
    "mlp": (),
    "layers": (),
}
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (),
    "embed": (),
}


def partition_spec(
    axes: tuple[str | None, ...], mesh: Mesh, rules: dict[str, tuple[str, ...]], shape: tuple[int, ...] | None = None
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
        if axis not in rules:
            raise ValueError(f"Logical axis {axis!r} has no rule; the known ones are {sorted(rules)}.")
        mesh_axes = tuple(name for name in rules[axis] if name in mesh.shape)
        for name in mesh_axes:
            if name in taken:
                raise ValueError(
                    f"Mesh axis {name!r} would cut both {taken[name]!r} and {axis!r} of one array with axes {axes}; "
                    f"an array can use a mesh axis once. Change the rule of one of the two."
                )
            taken[name] = axis
        parts = 1
        for name in mesh_axes:
            parts *= mesh.shape[name]
        if shape is not None and shape[dimension] % parts:
            fitting = max(n for n in range(1, parts + 1) if shape[dimension] % n == 0)
            raise ValueError(
                f"Axis {axis!r} has size {shape[dimension]}, which does not divide over {parts} devices "
                f"(mesh axes {'x'.join(mesh_axes)}). Use {fitting} devices there, or a multiple of {parts}."
            )
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def parameter_sharding(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Where a parameter with logical `axes` lives; errors as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, PARAMETER_RULES, shape))


def activation_sharding(
    axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """Where an activation or a batch array with logical `axes` lives; errors as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, mesh, ACTIVATION_RULES, shape))


def constrain(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Pins activation `x` to its place, so that the compiler gathers parameters and never the batch."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_sharding(axes, mesh, x.shape))
