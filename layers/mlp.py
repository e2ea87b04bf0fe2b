"""Feed-forward layers. Shapes: D width, F hidden width."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import constrain
from .linear import Linear
from .quantization_config import Quantization

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, [..., D] to [..., D] (SwiGLU and GeGLU: Shazeer, 2020, arXiv:2002.05202).

    Args:
        gated: False is the older `down(act(up(x)))`.
        activation: a name of `ACTIVATIONS`.
        out_scale: shrinks the initial weights of `down`.
        quantization: of the weights, if they are kept quantised.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        bias: bool = False,
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        quantization = quantization and quantization.of("linear")
        common = {"bias": bias, "quantization": quantization, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = Linear(width, hidden, axes=("mlp", "embed"), **common) if gated else None
        self.up = Linear(width, hidden, axes=("mlp", "embed"), **common)
        self.down = Linear(hidden, width, axes=("embed", "mlp"), scale=out_scale, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        if hidden.ndim == 3:
            # For its gradient's sake, which else the compiler would place where the next norm wants tokens.
            hidden = constrain(hidden, ("batch", "tokens", "mlp"))
        return self.down(hidden)
