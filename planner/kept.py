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
from .workload import ITEMSIZES

# The toy: layers, rows, tokens of a row; widths. No product or quotient of two of them is a third.
LAYERS, ROWS, LENGTH = 3, 2, 22
WIDTH, MLP, HEADS, KV_HEADS, HEAD, VOCAB, EXPERTS = 26, 38, 12, 6, 34, 58, 4
TOKENS = ROWS * LENGTH


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes kept of one block, as coefficients.

    Attributes:
        width, mlp, heads, kv_heads: for each token and each element of that width; of a mixture, `mlp` for each expert
            that a token has.
        single: for each token.
        routed: for each expert that a token has and each element of the model's width.
        whole: of `width`, what tensor parallelism does not cut.
    """

    width: float = 0.0
    mlp: float = 0.0
    heads: float = 0.0
    kv_heads: float = 0.0
    single: float = 0.0
    routed: float = 0.0
    whole: float = 0.0


@lru_cache(maxsize=32)
def kept_of(remat: str, dtype: str, has_experts: bool = False, on_mesh: bool = True) -> Kept:
    """What `remat` keeps with products in `dtype`; on one device, or on a mesh, where weights are gathered."""
    kept = _of_toy(remat, dtype, 1 if has_experts else 0, Plan(fsdp=2) if on_mesh else Plan())
    # The inputs of attention's products and of the MLP's are gathered, and kept so where they are not computed again.
    inputs = (1 if has_experts else 2) * ITEMSIZES[dtype] if remat == "none" else 0
    if not has_experts:
        return dataclasses.replace(kept, whole=inputs)
    routed = _of_toy(remat, dtype, 2, Plan(fsdp=2) if on_mesh else Plan()).width - kept.width
    # What a device of several has whole of a mixture, the toy's arrays hold as often as there are devices.
    twice = _of_toy(remat, dtype, 1, Plan(fsdp=2, tensor=2)).width - kept.width if on_mesh else routed
    return dataclasses.replace(kept, width=kept.width - routed, routed=routed, whole=inputs + twice - routed)


def _of_toy(remat: str, dtype: str, experts_per_token: int, plan: Plan) -> Kept:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AbstractMesh, AxisType

    from ..layers.contexts import PackedContext
    from ..layers.moe_config import MoEConfig
    from ..models.decoder import functional, param_shapes

    moe = None
    if experts_per_token:
        moe = MoEConfig(num_experts=EXPERTS, experts_per_token=experts_per_token, expert_size=MLP)
    config = DecoderConfig(VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD, LENGTH, moe=moe)
    model = functional(config, dtype=jnp.dtype(dtype), remat=remat)

    def pull(params: Any, tokens_BT: Any) -> Any:
        context = PackedContext(jnp.ones_like(tokens_BT), jnp.zeros_like(tokens_BT))
        return jax.vjp(lambda params: model.hidden(params, tokens_BT, context)[0], params)[1]

    sizes = plan.sizes if plan.devices > 1 else {}
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
