"""SwiGLU feed-forward (Shazeer, 2020, arXiv:2002.05202). Shapes: D width, F hidden width."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import constrain
from .linear import Linear


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, [..., D] to [..., D]. `out_scale` shrinks the initial weights of `down`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        out_scale: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"bias": bias, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = Linear(width, hidden, axes=("mlp", "embed"), **common)
        self.up = Linear(width, hidden, axes=("mlp", "embed"), **common)
        self.down = Linear(hidden, width, axes=("embed", "mlp"), scale=out_scale, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        if hidden.ndim == 3:
            # For its gradient's sake, which else the compiler would place where the next norm wants tokens.
            hidden = constrain(hidden, ("batch", "tokens", "mlp"))
        return self.down(hidden)
