"""Token embedding. Shapes: B rows, T tokens of one, V vocabulary, D width; N devices share a width, P pieces of it.

On a mesh whose devices share the table's width, none ever holds the whole table, or the whole of its gradient: both
pass in pieces [V, D / P], gathered, looked up and forgotten; or added up, scattered and forgotten. (In float32
the table of Llama 3.1 405B has 7.8 GiB, and a compiler holds several of it at once.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from ..sharding.rules import ACTIVATION_RULES, PARAMETER_RULES, current, gather, mesh_axes, partition_spec

PIECE_BYTES = 512 * 2**20  # of a piece of the gradient, where the width can be cut so finely


class Embedding(nnx.Module):
    """Rows of a table, [...] int32 to [..., D]. Tokens must lie in [0, V): the edges check that, a gather can't."""

    def __init__(self, vocab_size: int, width: int, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (vocab_size, width), param_dtype)
        self.weight = nnx.Param(draw * jnp.asarray(0.02, param_dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        weight_VD, mesh = self.weight[...], current()
        if mesh is None or tokens.ndim != 2 or not mesh_axes("embed", mesh, PARAMETER_RULES):
            return weight_VD[tokens].astype(dtype)
        return _look_up(_Cut(mesh, weight_VD.shape, weight_VD.dtype, jnp.dtype(dtype)), weight_VD, tokens)


class PositionTable(nnx.Module):
    """A learned vector [D] for each of `count` positions (GPT-2): int32 [...] to [..., D].

    Positions lie below `count`; rows that are padding may say any, and get some vector.
    """

    def __init__(self, count: int, width: int, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (count, width), param_dtype)
        self.weight = nnx.Param(draw * jnp.asarray(0.02, param_dtype), axes=("positions", "embed"))

    def __call__(self, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        weight_PD = gather(self.weight[...].astype(dtype), self.weight.axes)
        return weight_PD[jnp.clip(positions, 0, len(weight_PD) - 1)]


def pieces(height: int, width: int, part: int, itemsize: int) -> int:
    """How many pieces hold to the bound, of a table of which a device has `part` of the width; they divide the part."""
    size = height * width * itemsize
    return next(p for p in range(1, part + 1) if part % p == 0 and (p == part or size <= p * PIECE_BYTES))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A table on a mesh: its shape and dtype, and the dtype of the embeddings. The methods see one device's part."""

    mesh: AbstractMesh
    shape: tuple[int, ...]
    weight_dtype: Any
    dtype: Any

    @property
    def width_axes(self) -> tuple[str, ...]:
        return mesh_axes("embed", self.mesh, PARAMETER_RULES)

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        return mesh_axes("vocab", self.mesh, PARAMETER_RULES)

    @property
    def other_axes(self) -> tuple[str, ...]:
        """Devices along these have other tokens, and the same part of the table."""
        return tuple(name for name in mesh_axes("batch", self.mesh) if name not in self.width_axes)

    @property
    def weight(self) -> PartitionSpec:
        return partition_spec(("vocab", "embed"), self.mesh, PARAMETER_RULES, self.shape)

    def activations(self, tokens_BT: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
        """Where tokens and embeddings live."""
        tokens = partition_spec(("batch", "tokens"), self.mesh, ACTIVATION_RULES, tokens_BT.shape)
        shape = (*tokens_BT.shape, self.shape[1])
        return tokens, partition_spec(("batch", "sequence", "embed"), self.mesh, ACTIVATION_RULES, shape)

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)

    @property
    def pieces(self) -> int:
        height, width = self.shape[0] // self._devices(self.vocab_axes), self.shape[1]
        return pieces(height, width, width // self._devices(self.width_axes), max(4, self.weight_dtype.itemsize))

    def _rows(self, tokens_BT: jax.Array, height: int) -> jax.Array:
        """Each token's row of this device's part of the vocabulary; `height`, which is none, for another's."""
        if self.vocab_axes:
            tokens_BT = tokens_BT - lax.axis_index(self.vocab_axes) * height
        return jnp.where((tokens_BT >= 0) & (tokens_BT < height), tokens_BT, height)

    def look_up(self, weight_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """The embeddings [B, T, D] of these tokens; T cut over the devices that share the vocabulary."""
        height, part = weight_VD.shape
        rows_BT, size = self._rows(tokens_BT, height), part // self.pieces

        def piece(start: Any) -> jax.Array:
            columns = lax.dynamic_slice_in_dim(weight_VD, start, size, 1).astype(self.dtype)
            gathered = lax.all_gather(columns, self.width_axes, axis=1)  # [V, N, D / N P]
            found = gathered.at[rows_BT].get(mode="fill", fill_value=0)
            if self.vocab_axes:
                found = lax.psum_scatter(found, self.vocab_axes, scatter_dimension=1, tiled=True)
            return found

        found_PBTNd = _each(piece, self.pieces, size)
        return jnp.moveaxis(found_PBTNd, 0, 3).reshape(*found_PBTNd.shape[1:3], -1)

    def gradient(self, tokens_BT: jax.Array, d_out_BTD: jax.Array) -> jax.Array:
        """The gradient of the device's part of the table, [V, D / N], summed over all devices."""
        if self.vocab_axes:
            d_out_BTD = lax.all_gather(d_out_BTD, self.vocab_axes, axis=1, tiled=True)
        height = self.shape[0] // self._devices(self.vocab_axes)
        devices = self._devices(self.width_axes)
        size = self.shape[1] // devices // self.pieces
        rows_BT = self._rows(tokens_BT, height)
        d_out_BTNd = d_out_BTD.reshape(*tokens_BT.shape, devices, -1)
        wide = jnp.promote_types(self.weight_dtype, jnp.float32)

        def piece(start: Any) -> jax.Array:
            columns = lax.dynamic_slice_in_dim(d_out_BTNd, start, size, 3).astype(wide)
            summed = jnp.zeros((height, devices, size), wide).at[rows_BT].add(columns, mode="drop")
            own = lax.psum_scatter(summed.reshape(height, -1), self.width_axes, scatter_dimension=1, tiled=True)
            return lax.psum(own, self.other_axes) if self.other_axes else own

        d_weight_PVd = _each(piece, self.pieces, size)
        return jnp.moveaxis(d_weight_PVd, 0, 1).reshape(height, -1).astype(self.weight_dtype)


def _each(piece: Callable[[Any], jax.Array], pieces: int, size: int) -> jax.Array:
    """`piece(start)` for each piece, stacked; one after the other, so that memory is that of one."""
    return piece(0)[None] if pieces == 1 else lax.map(piece, jnp.arange(pieces) * size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(cut: _Cut, weight_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    tokens, embedded = cut.activations(tokens_BT)
    island = jax.shard_map(cut.look_up, in_specs=(cut.weight, tokens), out_specs=embedded, check_vma=False)
    return island(weight_VD, tokens_BT)


def _forward(cut: _Cut, weight_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _look_up(cut, weight_VD, tokens_BT), tokens_BT


def _backward(cut: _Cut, tokens_BT: jax.Array, d_out_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens, embedded = cut.activations(tokens_BT)
    island = jax.shard_map(cut.gradient, in_specs=(tokens, embedded), out_specs=cut.weight, check_vma=False)
    return island(tokens_BT, d_out_BTD), None


_look_up.defvjp(_forward, _backward)
