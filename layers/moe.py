"""A mixture of experts that drops no token, whatever the load (as in MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

Shapes: B rows, T tokens, N tokens of one device, D width, E experts, K experts of one token, F hidden width of one;
R = N * K rows, one for each expert that a token takes; P devices of the mesh axis "expert", L = E / P experts of one.

On a mesh the layer is an island (`shard_map`) in which each device
- routes its own tokens and sorts them by expert,
- sends them to the devices that hold these experts (`sharding/exchange.py`),
- runs its experts over what arrived, sorted by expert: `grouped_matmul`, each expert's width cut over "tensor",
- weighs the results, sends them back, adds them, and sums over "tensor".

What it costs in memory: on arrival there is room for the case in which all tokens of P devices choose experts of one,
P * N * min(K, L) rows, of which an even load fills 1 / min(P, E / K).
"""

import dataclasses
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from ..pallas_kernels.grouped_matmul import grouped_matmul
from ..sharding.exchange import Exchange, give_back, send
from ..sharding.rules import (
    ACTIVATION_RULES,
    COMPUTE_RULES,
    PARAMETER_RULES,
    constrain,
    current,
    gather,
    gather_in_island,
    mesh_axes,
    partition_spec,
)
from .linear import PRODUCT
from .mlp import MLP
from .moe_config import MoEConfig
from .router import Router, route


@partial(jax.tree_util.register_dataclass, data_fields=["tokens_E", "probability_E", "z"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the tokens of all devices, padding left out. Of several layers: stacked, [L, E] and [L].

    Attributes:
        tokens_E: int32, how many tokens took each expert. Passes no gradient.
        probability_E: sum of the router's scores as shares (see `Routes`).
        z: sum of the tokens' z-losses.
    """

    tokens_E: jax.Array
    probability_E: jax.Array
    z: jax.Array


class ExpertLinear(nnx.Module):
    """The weights [E, O, I] of one projection of every expert, initialised as `Linear` is."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        axes: tuple[str, str, str],
        scale: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        draw = jax.random.normal(rngs.params(), shape, param_dtype)
        self.weight = nnx.Param(draw * jnp.asarray(scale * shape[2] ** -0.5, param_dtype), axes=axes)


class MoE(nnx.Module):
    """Router, experts (SwiGLU each) and shared experts. `out_scale` shrinks the initial weights of the last product."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        out_scale: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        common: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.router = Router(width, config, **common)
        into, out = (config.num_experts, config.expert_size, width), (config.num_experts, width, config.expert_size)
        into_axes, out_axes = ("experts", "expert_mlp", "expert_embed"), ("experts", "expert_embed", "expert_mlp")
        self.gate = ExpertLinear(into, axes=into_axes, **common)
        self.up = ExpertLinear(into, axes=into_axes, **common)
        self.down = ExpertLinear(out, axes=out_axes, scale=out_scale, **common)
        self.shared = (
            MLP(width, config.shared_experts * config.expert_size, out_scale=out_scale, **common)
            if config.shared_experts
            else None
        )

    def __call__(self, x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, Statistics]:
        """[..., D] to [..., D], and what training needs to balance the load.

        Args:
            x: tokens; on a mesh [B, T, D], cut as they lie between blocks.
            is_token: bool [...]; where False the token is padding: no expert sees it, and it gets zeros from them.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        bias = self.router.bias
        router = (
            gather(self.router.weight[...].astype(wide), self.router.weight.axes),
            None if bias is None else gather(bias[...].astype(wide), bias.axes),
        )
        experts = [p.weight for p in (self.gate, self.up, self.down)]
        # Cast before they are gathered: half the bytes travel.
        weights, axes = [weight[...].astype(x.dtype) for weight in experts], [weight.axes for weight in experts]
        mesh = current()
        if mesh is None:
            y, statistics = _mixture(self.config, None, x, is_token, router, weights)
        else:
            y, statistics = _on_mesh(self.config, mesh, x, is_token, router, weights, axes)
        if self.shared is not None:
            y += self.shared(constrain(x, ("batch", "tokens", "embed")) if x.ndim == 3 else x)
        return y, statistics


def _on_mesh(
    config: MoEConfig,
    mesh: AbstractMesh,
    x_BTD: jax.Array,
    is_token_BT: jax.Array,
    router: Any,
    weights: Any,
    axes: Any,
) -> tuple[jax.Array, Statistics]:
    """`_mixture` on every device of the mesh, over its own tokens."""
    if x_BTD.ndim != 3:
        raise NotImplementedError(f"On a mesh a mixture of experts takes [B, T, D]; got {x_BTD.shape}.")
    tokens = partition_spec(("batch", "tokens"), mesh, ACTIVATION_RULES, is_token_BT.shape)
    between = partition_spec(("batch", "sequence", None), mesh, ACTIVATION_RULES, x_BTD.shape)
    resting = [partition_spec(names, mesh, PARAMETER_RULES, w.shape) for names, w in zip(axes, weights, strict=True)]
    everywhere = PartitionSpec()

    def local(x: jax.Array, is_token: jax.Array, router: Any, weights: Any) -> tuple[jax.Array, Statistics]:
        weights = [gather_in_island(weight, names, mesh) for weight, names in zip(weights, axes, strict=True)]
        return _mixture(config, mesh, x, is_token, router, weights)

    island = jax.shard_map(
        local,
        in_specs=(between, tokens, everywhere, resting),
        out_specs=(between, everywhere),
        check_vma=False,
    )
    return island(x_BTD, is_token_BT, router, weights)


def _mixture(
    config: MoEConfig,
    mesh: AbstractMesh | None,
    x: jax.Array,
    is_token: jax.Array,
    router: tuple[jax.Array, jax.Array | None],
    weights: list[jax.Array],
) -> tuple[jax.Array, Statistics]:
    """The experts' part of the layer for the tokens of one device, and statistics of all devices."""
    # Devices that share the experts' width work on the same tokens, and each adds its part.
    tensor = () if mesh is None else mesh_axes("expert_mlp", mesh, COMPUTE_RULES)
    if tensor:
        x = jax.lax.all_gather(x, tensor, axis=1, tiled=True)
    x_ND, is_token_N = x.reshape(-1, x.shape[-1]), is_token.reshape(-1)
    N, D = x_ND.shape
    E, K = config.num_experts, config.experts_per_token
    routes = route(config, x_ND, *router)
    # Padding has the expert after the last: it is sorted to the end and counted nowhere.
    expert_R = jnp.where(is_token_N[:, None], routes.expert_NK, E).reshape(N * K)
    order = _order(expert_R)
    tokens_E = jnp.bincount(expert_R, length=E).astype(jnp.int32)
    weight_R1 = _spread(routes.weight_NK.reshape(N * K, 1), *order, 1)
    y_RD = _experts(mesh, _spread(x_ND, *order, K), weight_R1, tokens_E, K, weights)
    y_NKD = _spread(y_RD, *order[::-1], 1).reshape(N, K, D).astype(weight_R1.dtype)
    # In this order, whatever the compiler makes of a reduction.
    y_ND = reduce(jnp.add, [y_NKD[:, k] for k in range(K)])
    y = jnp.reshape(y_ND, x.shape).astype(x.dtype)

    statistics = Statistics(
        tokens_E,
        jnp.sum(jnp.where(is_token_N[:, None], routes.probability_NE, 0), axis=0),
        jnp.sum(jnp.where(is_token_N, routes.z_N, 0)),
    )
    if tensor:
        y = jax.lax.psum_scatter(y, tensor, scatter_dimension=1, tiled=True)
    if mesh is not None and (cut := (*mesh_axes("batch", mesh), *mesh_axes("tokens", mesh))):
        statistics = jax.lax.psum(statistics, cut)
    return y, statistics


def _experts(
    mesh: AbstractMesh | None,
    x_RD: jax.Array,
    weight_R1: jax.Array,
    tokens_E: jax.Array,
    most: int,
    weights: list[jax.Array],
) -> jax.Array:
    """Each row's expert applied to it, wherever that expert is, times the row's weight.

    Args:
        x_RD: rows sorted by expert. tokens_E: rows of each expert.
        most: K, the rows that one token can have.
    """
    axes = () if mesh is None else mesh_axes("experts", mesh, COMPUTE_RULES)
    if mesh is None or not axes:
        return _swiglu(x_RD, weight_R1, tokens_E, weights)
    (axis,) = axes
    P = mesh.shape[axis]
    L = len(tokens_E) // P
    sent_PL = tokens_E.reshape(P, L)
    received_PL = jax.lax.all_to_all(sent_PL, axis, 0, 0)
    counts = (jnp.sum(counts_PL, axis=1, dtype=jnp.int32) for counts_PL in (sent_PL, received_PL))
    sent_P, received_P = counts
    exchange = Exchange(axis, P, rows=len(x_RD), slots=len(x_RD) // most * min(most, L))

    x_SD, weight_S1 = (send(rows, sent_P, received_P, exchange) for rows in (x_RD, weight_R1))
    slot_S = jnp.arange(exchange.slots, dtype=jnp.int32)
    end_PL = jnp.cumsum(received_PL, axis=1, dtype=jnp.int32)
    # What one sender's rows are for, in order; empty slots have the expert after the last.
    expert_PS = jnp.sum(end_PL[:, None] <= slot_S[:, None], axis=-1, dtype=jnp.int32)
    order = _order(expert_PS.reshape(-1))
    x_SD, weight_S1 = (_spread(rows, *order, 1) for rows in (x_SD, weight_S1))
    y_SD = _swiglu(x_SD, weight_S1, jnp.sum(received_PL, axis=0, dtype=jnp.int32), weights)
    return give_back(_spread(y_SD, *order[::-1], 1), sent_P, received_P, exchange)


def _swiglu(x_RD: jax.Array, weight_R1: jax.Array, rows_L: jax.Array, weights: list[jax.Array]) -> jax.Array:
    def product(x_RI: jax.Array, weight_LOI: jax.Array) -> jax.Array:
        return checkpoint_name(grouped_matmul(x_RI, weight_LOI, rows_L), PRODUCT)

    gate_LFD, up_LFD, down_LDF = weights
    hidden_RF = jax.nn.silu(product(x_RD, gate_LFD)) * product(x_RD, up_LFD)
    # Weighed here and not where the results are added: the backward pass need not keep these, and XLA:CPU cannot fuse
    # product and sum, which it does for some numbers of tokens and not for others, with other bits.
    return product((hidden_RF * weight_R1).astype(x_RD.dtype), down_LDF)


def _order(expert_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows sorted by expert, those of one expert in their order, and the way back."""
    order_R = jnp.argsort(expert_R, stable=True)
    return order_R, jnp.argsort(order_R)


def _take(x_ND: jax.Array, order_R: jax.Array, inverse_R: jax.Array, times: int) -> jax.Array:
    """Each of the N rows so many `times`, in `order_R`; once is a permutation."""
    return x_ND[order_R // times]


_spread = jax.custom_vjp(_take, nondiff_argnums=(3,))
# JAX's own gradient would add rows in place one by one, in no certain order on a GPU.
_spread.defvjp(
    lambda x_ND, order_R, inverse_R, times: (_spread(x_ND, order_R, inverse_R, times), inverse_R),
    lambda times, inverse_R, dy_RD: (
        jnp.sum(dy_RD[inverse_R].reshape(-1, times, dy_RD.shape[1]), axis=1),
        None,
        None,
    ),
)
