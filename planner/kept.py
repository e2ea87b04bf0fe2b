"""What the backward pass keeps of each block, read off JAX's own derivative of the model.

The derivative is taken of a toy whose sizes are all different, so that each array that it keeps says by its shape what
it is made of, and so how it grows with the real sizes. This follows the model's code wherever that goes, without a
compiler. What XLA then drops or computes again is not known here. Weights among what is kept are left out: the model
keeps them as they rest, never as gathered.
"""

import dataclasses
import math
from functools import lru_cache
from typing import Any

from ..models.config import DecoderConfig
from ..sharding.plan import Plan

# The toy: layers, rows, tokens of a row; widths. No product or quotient of two of them is a third.
LAYERS, ROWS, LENGTH = 3, 2, 22
WIDTH, MLP, HEADS, KV_HEADS, HEAD, VOCAB, EXPERTS = 26, 38, 10, 5, 34, 58, 4
TOKENS = ROWS * LENGTH


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes kept of one block, as coefficients.

    Attributes:
        width, mlp, heads, kv_heads: for each token and each element of that width.
        single: for each token.
    """

    width: float = 0.0
    mlp: float = 0.0
    heads: float = 0.0
    kv_heads: float = 0.0
    single: float = 0.0


@lru_cache(maxsize=32)
def kept_of(remat: str, dtype: str, has_experts: bool = False, on_mesh: bool = True) -> Kept:
    """What `remat` keeps with products in `dtype`; on one device, or on a mesh, where weights are gathered."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AbstractMesh, AxisType

    from ..layers.contexts import PackedContext
    from ..layers.moe_config import MoEConfig
    from ..models.decoder import functional, param_shapes

    moe = MoEConfig(num_experts=EXPERTS, experts_per_token=1, expert_size=MLP) if has_experts else None
    config = DecoderConfig(VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD, LENGTH, moe=moe)
    model = functional(config, dtype=jnp.dtype(dtype), remat=remat)

    def pull(params: Any, tokens_BT: Any) -> Any:
        context = PackedContext(jnp.ones_like(tokens_BT), jnp.zeros_like(tokens_BT))
        return jax.vjp(lambda params: model.hidden(params, tokens_BT, context)[0], params)[1]

    sizes = Plan(fsdp=2).sizes if on_mesh else {}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        leaves = jax.tree.leaves(
            jax.eval_shape(pull, param_shapes(config), jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32))
        )
    own = {tuple(like.shape) for name, like in param_shapes(config).items() if like.dtype == np.float32}
    found = dict.fromkeys((field.name for field in dataclasses.fields(Kept)), 0.0)
    for leaf in leaves:
        if leaf.shape[:1] != (LAYERS,) or (tuple(leaf.shape) in own and leaf.dtype == np.float32):
            continue  # not of the blocks, or a parameter itself, which is there anyway
        elements = math.prod(leaf.shape[1:])
        if elements % LENGTH == 0:
            kind, each = _kind(elements / TOKENS)
            found[kind] += leaf.dtype.itemsize * each
    return Kept(**found)


def _kind(each: float) -> tuple[str, float]:
    """Which coefficient of `Kept` an array of so many elements a token belongs to, and how much it adds."""
    for name, size in (("mlp", MLP), ("heads", HEADS * HEAD), ("kv_heads", KV_HEADS * HEAD), ("width", WIDTH)):
        if each % size == 0:
            return name, each / size
    return "single", each
