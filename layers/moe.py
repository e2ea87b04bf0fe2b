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
from jax.sharding import AbstractMesh, PartitionSpec

from ..sharding.exchange import Exchange, give_back, send
from ..sharding.rules import (
    ACTIVATION_RULES,
    COMPUTE_RULES,
    PARAMETER_RULES,
    constrain,
    current,
    gather_in_island,
    mesh_axes,
    partition_spec,
)
from .experts import ExpertLinear, Experts, axes_of, experts_of, run_experts
from .mlp import MLP
from .moe_config import MoEConfig
from .quantization_config import Quantization
from .router import Router, RouterWeights, route


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


class MoE(nnx.Module):
    """Router, experts (SwiGLU each) and shared experts. `out_scale` shrinks the initial weights of the last product.

    Args:
        quantization: of the weights, if they are kept quantised.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        common: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.router = Router(width, config, **common)
        own = {**common, "bias": config.bias, "quantization": quantization and quantization.of("experts")}
        into, out = (config.num_experts, config.expert_size, width), (config.num_experts, width, config.expert_size)
        into_axes, out_axes = ("experts", "expert_mlp", "expert_embed"), ("experts", "expert_embed", "expert_mlp")
        self.gate = ExpertLinear(into, axes=into_axes, **own)
        self.up = ExpertLinear(into, axes=into_axes, **own)
        self.down = ExpertLinear(out, axes=out_axes, scale=out_scale, **own)
        shared = {**common, "out_scale": out_scale, "quantization": quantization}
        self.shared = (
            MLP(width, config.shared_experts * config.expert_size, **shared)
            if config.shared_experts
            else None
        )

    def __call__(self, x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, Statistics]:
        """[..., D] to [..., D], and what training needs to balance the load.

        Args:
            x: tokens; on a mesh [B, T, D], cut as they lie between blocks.
            is_token: bool [...]; where False the token is padding: no expert sees it, and it gets zeros from them.
        """
        router = self.router.weights(jnp.promote_types(x.dtype, jnp.float32))
        projections = (self.gate, self.up, self.down)
        experts = experts_of(projections, x.dtype)  # cast before they are gathered: half the bytes travel
        mesh = current()
        if mesh is None:
            y, statistics = _mixture(self.config, None, x, is_token, router, experts)
        else:
            y, statistics = _on_mesh(self.config, mesh, x, is_token, router, experts, axes_of(projections))
        if self.shared is not None:
            y += self.shared(constrain(x, ("batch", "tokens", "embed")) if x.ndim == 3 else x)
        return y, statistics


def _on_mesh(
    config: MoEConfig,
    mesh: AbstractMesh,
    x_BTD: jax.Array,
    is_token_BT: jax.Array,
    router: RouterWeights,
    experts: Experts,
    axes: Experts,
) -> tuple[jax.Array, Statistics]:
    """`_mixture` on every device of the mesh, over its own tokens."""
    if x_BTD.ndim != 3:
        raise NotImplementedError(f"On a mesh a mixture of experts takes [B, T, D]; got {x_BTD.shape}.")
    tokens = partition_spec(("batch", "tokens"), mesh, ACTIVATION_RULES, is_token_BT.shape)
    between = partition_spec(("batch", "sequence", None), mesh, ACTIVATION_RULES, x_BTD.shape)
    resting = axes.map(lambda names, weight: partition_spec(names, mesh, PARAMETER_RULES, weight.shape), experts)
    everywhere = PartitionSpec()

    def local(
        x: jax.Array, is_token: jax.Array, router: RouterWeights, experts: Experts
    ) -> tuple[jax.Array, Statistics]:
        experts = experts.map(lambda weight, names: gather_in_island(weight, names, mesh), axes)
        return _mixture(config, mesh, x, is_token, router, experts)

    island = jax.shard_map(
        local,
        in_specs=(between, tokens, everywhere, resting),
        out_specs=(between, everywhere),
        check_vma=False,
    )
    return island(x_BTD, is_token_BT, router, experts)


def _mixture(
    config: MoEConfig,
    mesh: AbstractMesh | None,
    x: jax.Array,
    is_token: jax.Array,
    router: RouterWeights,
    experts: Experts,
) -> tuple[jax.Array, Statistics]:
    """The experts' part of the layer for the tokens of one device, and statistics of all devices."""
    # Devices that share the experts' width work on the same tokens, and each adds its part.
    tensor = () if mesh is None else mesh_axes("expert_mlp", mesh, COMPUTE_RULES)
    if tensor:
        x = jax.lax.all_gather(x, tensor, axis=1, tiled=True)
    x_ND, is_token_N = x.reshape(-1, x.shape[-1]), is_token.reshape(-1)
    N, D = x_ND.shape
    E, K = config.num_experts, config.experts_per_token
    routes = route(config, x_ND, router)
    # Padding has the expert after the last: it is sorted to the end and counted nowhere.
    expert_R = jnp.where(is_token_N[:, None], routes.expert_NK, E).reshape(N * K)
    order = _order(expert_R)
    tokens_E = jnp.bincount(expert_R, length=E).astype(jnp.int32)
    weight_R1 = _spread(routes.weight_NK.reshape(N * K, 1), *order, 1)
    y_RD = _experts(config, mesh, _spread(x_ND, *order, K), weight_R1, tokens_E, experts)
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
    config: MoEConfig,
    mesh: AbstractMesh | None,
    x_RD: jax.Array,
    weight_R1: jax.Array,
    tokens_E: jax.Array,
    experts: Experts,
) -> jax.Array:
    """Each row's expert applied to it, wherever that expert is, times the row's weight.

    Args:
        x_RD: rows sorted by expert. tokens_E: rows of each expert.
    """
    axes = () if mesh is None else mesh_axes("experts", mesh, COMPUTE_RULES)
    if mesh is None or not axes:
        return run_experts(config, mesh, x_RD, weight_R1, tokens_E, experts)
    (axis,) = axes
    P = mesh.shape[axis]
    L = len(tokens_E) // P
    sent_PL = tokens_E.reshape(P, L)
    received_PL = jax.lax.all_to_all(sent_PL, axis, 0, 0)
    counts = (jnp.sum(counts_PL, axis=1, dtype=jnp.int32) for counts_PL in (sent_PL, received_PL))
    sent_P, received_P = counts
    K = config.experts_per_token
    exchange = Exchange(axis, P, rows=len(x_RD), slots=len(x_RD) // K * min(K, L))

    x_SD, weight_S1 = (send(rows, sent_P, received_P, exchange) for rows in (x_RD, weight_R1))
    slot_S = jnp.arange(exchange.slots, dtype=jnp.int32)
    end_PL = jnp.cumsum(received_PL, axis=1, dtype=jnp.int32)
    # What one sender's rows are for, in order; empty slots have the expert after the last.
    expert_PS = jnp.sum(end_PL[:, None] <= slot_S[:, None], axis=-1, dtype=jnp.int32)
    order = _order(expert_PS.reshape(-1))
    x_SD, weight_S1 = (_spread(rows, *order, 1) for rows in (x_SD, weight_S1))
    y_SD = run_experts(config, mesh, x_SD, weight_S1, jnp.sum(received_PL, axis=0, dtype=jnp.int32), experts)
    return give_back(_spread(y_SD, *order[::-1], 1), sent_P, received_P, exchange)


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
