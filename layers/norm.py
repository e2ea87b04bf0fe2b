"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467). Shapes: D width."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import gather


class RMSNorm(nnx.Module):
    """Scales [..., D] to unit root mean square, then by a learned weight. Statistics are at least float32."""

    def __init__(self, width: int, *, epsilon: float, param_dtype: jnp.dtype = jnp.float32):
        self.weight = nnx.Param(jnp.ones((width,), param_dtype), axes=("embed",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        # Hugging Face rounds to the compute dtype before the weight; the order is kept, so that bfloat16 agrees too.
        return (wide * inverse).astype(x.dtype) * gather(self.weight[...], self.weight.axes).astype(x.dtype)
