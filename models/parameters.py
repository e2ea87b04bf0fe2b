"""A model's parameters, by name: shapes, dtypes, layers. No Flax here, which takes a third of a second to import.

Shapes: L layers of a stack.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .config import DecoderConfig, keeps_dtype

Params = dict[str, jax.Array]
BLOCKS = "blocks."  # begins the name of every parameter that layers have, stacked

_shapes: dict[DecoderConfig, dict[str, jax.ShapeDtypeStruct]] = {}  # as float32


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by name. The modules are asked, unless `know_shapes` has said them."""
    if config not in _shapes:
        from .decoder import abstract_params

        _shapes[config] = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in abstract_params(config).items()}
    found = _shapes[config]
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype if keeps_dtype(n) else dtype) for n, a in found.items()}


def know_shapes(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """`shapes` are what `param_shapes` gave for `config` in another process, of the same sources."""
    _shapes.setdefault(config, dict(shapes))


def weight_dtype(name: str, dtype: Any, stored: Any = None) -> Any:
    """The dtype to keep the parameter `name` in when only products in `dtype` are to come.

    Routers and what decays a state stay float32; parts of quantised weights stay as they are `stored`.
    """
    if keeps_dtype(name):
        return stored
    is_wide = ".router." in f".{name}" or name.rpartition(".")[2] in ("A_log", "dt_bias", "D")
    return jnp.promote_types(dtype, jnp.float32) if is_wide else dtype


def module_of(name: str) -> str:
    """The module of a block that a stacked parameter belongs to: "mlp" of "mlp.up.weight"."""
    return name.partition(".")[0]


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters outside of the blocks by their names, and the stacked ones, such as "mlp.up.weight"."""
    outside = {name: value for name, value in params.items() if not name.startswith(BLOCKS)}
    return outside, {name.removeprefix(BLOCKS): value for name, value in params.items() if name.startswith(BLOCKS)}


def split_layers(config: DecoderConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters outside of the blocks by their names, and those of each layer, such as "mlp.up.weight" [F, D]."""
    outside, stacks = split(params)
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    for name, stack in stacks.items():
        for array, layer in zip(stack, config.layers_with(module_of(name)), strict=True):
            layers[layer][name] = array
    return outside, layers
