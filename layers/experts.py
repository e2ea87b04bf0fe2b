"""The experts of a mixture: one feed-forward each, over rows that are sorted by expert.

Shapes: R rows, D width, L experts of this device, F hidden width of one, O outputs and I inputs of a projection.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from ..pallas_kernels.grouped_matmul import grouped_matmul
from ..pallas_kernels.quantized_matmul import QuantizedWeight
from ..sharding.rules import COMPUTE_RULES, mesh_axes
from .linear import PRODUCT
from .moe_config import MoEConfig
from .quantization_config import Quantization
from .quantized import quantized_params, quantized_weight


class ExpertLinear(nnx.Module):
    """One projection of every expert: weights [E, O, I], initialised as `Linear` is, and biases [E, O] if wanted."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        axes: tuple[str, str, str],
        bias: bool = False,
        scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        draw = jax.random.normal(rngs.params(), shape, param_dtype)
        draw = draw * jnp.asarray(scale * shape[2] ** -0.5, param_dtype)
        self.quantization = quantization
        if quantization is None:
            self.weight = nnx.Param(draw, axes=axes)
        else:
            self.values, self.scales = quantized_params(draw, quantization, axes)
        self.bias = nnx.Param(jnp.zeros(shape[:2], param_dtype), axes=axes[:2]) if bias else None

    def weight_as(self, dtype: jnp.dtype) -> jax.Array | QuantizedWeight:
        """[E, O, I] in `dtype`, or as it is kept."""
        if self.quantization is not None:
            return quantized_weight(self.quantization, self.values, self.scales)
        return self.weight[...].astype(dtype)


class Experts(NamedTuple):
    """Weights and biases of the three projections of all experts, or what belongs to each. Biases may be None."""

    gate: Any
    up: Any
    down: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any

    def map(self, function: Callable[..., Any], *others: "Experts") -> "Experts":
        """`function` of each that is not None, and of those of `others` in its place."""
        return Experts(*(None if one[0] is None else function(*one) for one in zip(self, *others, strict=True)))


def experts_of(projections: tuple[ExpertLinear, ExpertLinear, ExpertLinear], dtype: jnp.dtype) -> Experts:
    """Weights and biases of (gate, up, down), in `dtype`."""
    biases = (None if one.bias is None else one.bias[...].astype(dtype) for one in projections)
    return Experts(*(one.weight_as(dtype) for one in projections), *biases)


def axes_of(projections: tuple[ExpertLinear, ExpertLinear, ExpertLinear]) -> Experts:
    """The logical axes of `experts_of`."""
    biases = (None if one.bias is None else one.bias.axes for one in projections)
    return Experts(*(None if one.quantization else one.weight.axes for one in projections), *biases)


def run_experts(
    config: MoEConfig,
    mesh: AbstractMesh | None,
    x_RD: jax.Array,
    weight_R1: jax.Array,
    rows_L: jax.Array,
    experts: Experts,
) -> jax.Array:
    """Each row's expert applied to it, times the row's weight.

    Args:
        mesh: that of the island around; where it cuts the experts' width, results are parts, to be added.
        rows_L: how many rows each expert has; those beyond their sum give zeros.
    """
    expert_RL = _one_hot(rows_L, len(x_RD), x_RD.dtype) if config.bias else None

    def project(x_RI: jax.Array, weight_LOI: Any) -> jax.Array:
        return checkpoint_name(grouped_matmul(x_RI, weight_LOI, rows_L), PRODUCT)

    def with_bias(y_RO: jax.Array, bias_LO: jax.Array | None, weight_R1: jax.Array | None = None) -> jax.Array:
        if bias_LO is None or expert_RL is None:
            return y_RO
        # A product, and not a gather, whose gradient adds rows in no certain order on a GPU. Ones and zeros: exact.
        bias_RO = jnp.einsum("rl,lo->ro", expert_RL, bias_LO, precision=jax.lax.Precision.HIGHEST)
        return y_RO + (bias_RO if weight_R1 is None else (bias_RO * weight_R1).astype(y_RO.dtype))

    gate_RF = with_bias(project(x_RD, experts.gate), experts.gate_bias)
    up_RF = with_bias(project(x_RD, experts.up), experts.up_bias)
    if config.clamp is not None:
        gate_RF, up_RF = jnp.minimum(gate_RF, config.clamp), jnp.clip(up_RF, -config.clamp, config.clamp)
    slope = config.gate_slope
    active_RF = jax.nn.silu(gate_RF) if slope == 1 else gate_RF * jax.nn.sigmoid(slope * gate_RF)
    hidden_RF = active_RF * (up_RF + config.up_offset if config.up_offset else up_RF)
    # Weighed here and not where the results are added: the backward pass need not keep these, and XLA:CPU cannot fuse
    # product and sum, which it does for some numbers of tokens and not for others, with other bits.
    y_RD = project((hidden_RF * weight_R1).astype(x_RD.dtype), experts.down)
    return with_bias(y_RD, _added_once(mesh, experts.down_bias), weight_R1)


def _added_once(mesh: AbstractMesh | None, bias_LD: jax.Array | None) -> jax.Array | None:
    """The bias on one of the devices whose results are added, zeros on the others."""
    tensor = () if mesh is None else mesh_axes("expert_mlp", mesh, COMPUTE_RULES)
    if bias_LD is None or not tensor:
        return bias_LD
    return jnp.where(jax.lax.axis_index(tensor) == 0, bias_LD, 0)


def _one_hot(rows_L: jax.Array, count: int, dtype: jnp.dtype) -> jax.Array:
    """[R, L]: 1 for the expert that a row is sorted to."""
    end_L = jnp.cumsum(rows_L)
    row_R1 = jnp.arange(count)[:, None]
    return ((row_R1 >= end_L - rows_L) & (row_R1 < end_L)).astype(dtype)
