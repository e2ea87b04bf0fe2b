"""Mamba-2's mixer, a state space model with a scalar decay for each head (Dao and Gu 2024, arXiv:2405.21060).

Shapes: E model width, I inner width, C channels of the convolution, H heads, P head size, G groups, N state size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..convolution import Convolution
from ..linear import Linear
from ..mixer_config import Mamba2Config
from ..norm import RMSNorm
from ..quantization_config import Quantization

NAME = "mamba2"
STEP_RANGE = (0.001, 0.1)  # of the initial time steps, evenly in their logarithm


class Mamba2(nnx.Module):
    """Projects [..., E] to a gate, the convolution's channels and a time step a head; back from gated, normed results.

    It keeps, for each request, the convolution's last inputs and a state of H x N x P numbers.

    Args:
        norm_options: of the RMSNorm of the gated results, each group by itself.
    """

    def __init__(
        self,
        width: int,
        config: Mamba2Config,
        *,
        norm_options: dict[str, Any],
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        heads, inner = config.num_heads, config.inner_size
        linear = {
            "bias": config.bias,
            "quantization": quantization and quantization.of("linear"),
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        # Heads are whole on every device: their axis has no name.
        self.in_proj = Linear(width, inner + config.conv_size + heads, axes=(None, "embed"), **linear)
        self.conv = Convolution(
            config.conv_size, config.conv_width, bias=config.conv_bias, param_dtype=param_dtype, rngs=rngs
        )
        low, high = map(math.log, STEP_RANGE)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        self.dt_bias = self._of_heads(step_H + jnp.log(-jnp.expm1(-step_H)), param_dtype)
        self.A_log = self._of_heads(jnp.log(jnp.arange(1, heads + 1, dtype=jnp.float32)), param_dtype)
        self.D = self._of_heads(jnp.ones(heads), param_dtype)
        self.norm = RMSNorm(inner, groups=config.groups, axis=None, param_dtype=param_dtype, **norm_options)
        self.out_proj = Linear(inner, width, axes=("embed", None), scale=out_scale, **linear)

    def __call__(
        self, x: jax.Array, rope: None, context: Any, cache: Any, layer: Any, window: int | None = None
    ) -> tuple[jax.Array, Any]:
        """[..., E] and the cache to [..., E] and the cache."""
        config = self.config
        wide = jnp.promote_types(x.dtype, jnp.float32)
        gate, channels, dt = jnp.split(
            self.in_proj(x), [config.inner_size, config.inner_size + config.conv_size], axis=-1
        )
        channels, cache = context.convolve(self.conv, channels, cache, layer, NAME)
        values, keys, queries = jnp.split(
            jax.nn.silu(channels), [config.inner_size, config.inner_size + config.groups * config.state_size], axis=-1
        )
        keys, queries = (a.reshape(*a.shape[:-1], config.groups, config.state_size) for a in (keys, queries))
        values = values.reshape(*values.shape[:-1], config.num_heads, config.head_dim).astype(wide)
        dt_bias_H, A_log_H, D_H = (p[...].astype(wide) for p in (self.dt_bias, self.A_log, self.D))
        dt = jax.nn.softplus(dt.astype(wide) + dt_bias_H)
        with jax.named_scope("attend"):
            y, cache = context.attend_linear(
                queries, keys, dt[..., None] * values, -dt * jnp.exp(A_log_H), cache, layer, NAME
            )
        y = y + D_H[:, None] * values
        y = y.reshape(*y.shape[:-2], config.inner_size) * jax.nn.silu(gate.astype(wide))
        return self.out_proj(self.norm(y).astype(x.dtype)), cache

    @staticmethod
    def _of_heads(value_H: jax.Array, param_dtype: jnp.dtype) -> nnx.Param:
        return nnx.Param(value_H.astype(param_dtype), axes=(None,))
