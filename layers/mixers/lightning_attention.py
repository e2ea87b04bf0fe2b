"""Lightning attention: linear attention with a fixed decay for each head (Qin et al. 2024, arXiv:2401.04658).

As MiniMax-01 has it (arXiv:2501.08313). Shapes: E model width, H heads, D head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..linear import Linear
from ..mixer_config import LightningConfig
from ..norm import RMSNorm
from ..quantization_config import Quantization

NAME = "lightning_attention"


def slopes(num_heads: int, layer: Any, num_layers: int) -> jax.Array:
    """`-log(decay)` [H] float32 of a layer (of the whole model, from 0): ALiBi's slopes, gentler the deeper it is."""
    slope_H = (2.0 ** (-8.0 / num_heads)) ** jnp.arange(1, num_heads + 1, dtype=jnp.float32)
    return slope_H * (1 - jnp.asarray(layer, jnp.float32) / (num_layers - 1 + 1e-5) + 1e-5)


class LightningAttention(nnx.Module):
    """Projects [..., E] to queries, keys and values, each through SiLU; back from normed, gated results.

    It keeps a state of H x D x D numbers for each request.

    Args:
        layers: the layers of the model that have this mixer, in order. num_layers: of the whole model.
    """

    def __init__(
        self,
        width: int,
        config: LightningConfig,
        *,
        layers: tuple[int, ...],
        num_layers: int,
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.layers, self.num_layers = config, layers, num_layers
        inner = config.num_heads * config.head_dim
        linear = {
            "quantization": quantization and quantization.of("linear"),
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        # Heads are whole on every device: their axis has no name.
        self.qkv = Linear(width, 3 * inner, axes=(None, "embed"), **linear)
        self.gate = Linear(width, inner, axes=(None, "embed"), **linear)
        self.norm = RMSNorm(inner, epsilon=config.norm_eps, axis=None, param_dtype=param_dtype)
        self.out = Linear(inner, width, axes=("embed", None), scale=out_scale, **linear)

    def __call__(
        self, x: jax.Array, rope: None, context: Any, cache: Any, layer: Any, window: int | None = None
    ) -> tuple[jax.Array, Any]:
        """[..., E] and the cache to [..., E] and the cache. `layer`: which one of `layers`."""
        config = self.config
        qkv = jax.nn.silu(self.qkv(x)).reshape(*x.shape[:-1], config.num_heads, 3 * config.head_dim)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        number = jnp.asarray(self.layers, jnp.int32)[layer]
        log_decay = jnp.broadcast_to(-slopes(config.num_heads, number, self.num_layers), v.shape[:-1])
        with jax.named_scope("attend"):
            y, cache = context.attend_linear(q, k, v, log_decay, cache, layer, NAME)
        y = self.norm(y.reshape(*x.shape[:-1], -1))
        return self.out(jax.nn.sigmoid(self.gate(x)) * y), cache
