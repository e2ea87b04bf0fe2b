"""One block of the decoder: a token mixer, then a feed-forward, each added to the residual stream.

Shapes: D width. Tokens are [B, T, D] in training and [T, D] in serving; the context alone knows the difference.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..layers.mixers.attention import Attention
from ..layers.mixers.latent_attention import LatentAttention
from ..layers.mixers.lightning_attention import LightningAttention
from ..layers.mixers.mamba2 import Mamba2
from ..layers.mlp import MLP
from ..layers.moe import MoE, Statistics
from ..layers.norm import LayerNorm, RMSNorm
from ..sharding.rules import constrain
from .config import DecoderConfig, LayerKind

Ropes = dict[str, tuple[jax.Array, jax.Array]]  # cosines and sines by the config's field


class Block(nnx.Module):
    """A token mixer, then a feed-forward. Modules that a layer of this `kind` has not are None."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        # Two additions a layer: scaled so that the residual stream's variance does not grow with depth (GPT-2).
        out_scale = (2 * config.num_layers) ** -0.5
        self.mixer, self.rope, self.window = kind.mixer, kind.rope, kind.window
        self.residual_scale = config.residual_scale
        self.mixer_scales, self.feed_forward_scales = kind.mixer_scales, kind.feed_forward_scales
        self.norms_residual = config.norm_placement == "residual"
        before = config.norm_placement in ("before", "both", "residual")
        after = config.norm_placement in ("after", "both")
        common = {
            "out_scale": out_scale,
            "quantization": config.quantization,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.attention_norm = norm_of(config, param_dtype) if before else None
        setattr(self, kind.mixer, _mixer(config, kind.mixer, common))
        self.attention_out_norm = norm_of(config, param_dtype) if after else None
        feed_forward = config.feed_forward(kind)
        self.mlp_norm = norm_of(config, param_dtype) if before and feed_forward else None
        width, more = config.hidden_size, {"gated": config.gated, "activation": config.activation}
        self.mlp = (
            MLP(width, config.intermediate_size, bias=config.mlp_bias, **more, **common)
            if feed_forward == "mlp"
            else None
        )
        self.moe = MoE(width, config.moe, **common) if feed_forward == "moe" and config.moe else None
        self.mlp_out_norm = norm_of(config, param_dtype) if after and feed_forward else None

    def __call__(
        self, x: jax.Array, ropes: Ropes, context: Any, cache: Any, layer: Any
    ) -> tuple[jax.Array, Any, Statistics | None]:
        """[..., D] and the cache to the same, and what a mixture of experts says of its load.

        Args:
            layer: which one of those that the cache has for this mixer, an int or a traced one.
        """
        rope = None if self.rope is None else ropes[self.rope]
        normed = x if self.attention_norm is None else self.attention_norm(x)
        mixed, cache = getattr(self, self.mixer)(inside(normed), rope, context, cache, layer, self.window)
        x = self._add(normed if self.norms_residual else x, between(mixed), self.attention_out_norm, self.mixer_scales)
        if self.mlp is None and self.moe is None:
            return x, cache, None
        normed, statistics = x if self.mlp_norm is None else self.mlp_norm(x), None
        if self.moe is not None:
            y, statistics = self.moe(normed, context.is_token)
        else:
            assert self.mlp is not None
            y = self.mlp(inside(normed))
        x = normed if self.norms_residual else x
        return self._add(x, between(y), self.mlp_out_norm, self.feed_forward_scales), cache, statistics

    def _add(self, x: jax.Array, y: jax.Array, norm: nnx.Module | None, scales: tuple[float, float]) -> jax.Array:
        y = y if norm is None else norm(y)
        return _times(x, scales[0]) + _times(y, scales[1] * self.residual_scale)


def _times(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def _mixer(config: DecoderConfig, name: str, common: dict[str, Any]) -> nnx.Module:
    width = config.hidden_size
    norm_options = {"epsilon": config.norm_eps, "offset": config.norm == "rms_offset"}
    if name == "latent_attention":
        assert config.latent is not None
        return LatentAttention(
            width,
            config.latent,
            num_heads=config.num_heads,
            bias=config.attention_bias,
            norm_options={**norm_options, "epsilon": config.latent.norm_eps},
            scale=config.latent_scale,
            **common,
        )
    if name == "mamba2":
        assert config.mamba2 is not None
        return Mamba2(width, config.mamba2, norm_options=norm_options, **common)
    if name == "lightning_attention":
        assert config.lightning is not None
        layers = config.layers_with(name)
        return LightningAttention(width, config.lightning, layers=layers, num_layers=config.num_layers, **common)
    return Attention(
        width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        out_bias=config.out_bias,
        norms=config.qk_norm,
        norm_options=norm_options,
        sinks=config.sinks,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        **common,
    )


def norm_of(config: DecoderConfig, param_dtype: jnp.dtype) -> RMSNorm | LayerNorm:
    """A norm of the model's kind over its width."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, epsilon=config.norm_eps, param_dtype=param_dtype)
    offset = config.norm == "rms_offset"
    return RMSNorm(config.hidden_size, epsilon=config.norm_eps, offset=offset, param_dtype=param_dtype)


def between(x: jax.Array) -> jax.Array:
    """Where the residual stream lives. A served batch [T, D] is flat and has no rows to spread over a mesh."""
    return constrain(x, ("batch", "sequence", "embed")) if x.ndim == 3 else x


def inside(x: jax.Array) -> jax.Array:
    """Where a layer wants its input: tensor parallelism cuts heads and widths there, not tokens."""
    return constrain(x, ("batch", "tokens", "embed")) if x.ndim == 3 else x


def name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a parameter."""
    return ".".join(str(part) for part in path).replace("unembed_table.", "unembed.")


def state_of(template: Any, params: Mapping[str, Any]) -> nnx.State:
    """A module's state in which parameters take the place of those that have their names."""
    return nnx.from_flat_state(
        [(path, leaf.replace(params.get(name_of(path), leaf.get_value()))) for path, leaf in template]
    )


@lru_cache(maxsize=256)
def _template(config: DecoderConfig, kind: LayerKind) -> tuple[Any, Any]:
    make = lambda: Block(config, kind, param_dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_flat_state(state)


def bind_block(config: DecoderConfig, kind: LayerKind, params: Mapping[str, jax.Array]) -> Block:
    """A block over the arrays of one layer, such as "mlp.up.weight" [F, D]."""
    graph, state = _template(config, kind)
    return nnx.merge(graph, state_of(state, params))


class Stacks(nnx.Module):
    """The blocks of all layers: each of their modules once, stacked [L, ...] over the layers that have it.

    That is `DecoderConfig.layers_with`, in order. Layers of the same modules are drawn together.
    """

    def __init__(self, config: DecoderConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        groups: dict[LayerKind, list[int]] = {}
        for layer, kind in enumerate(config.kinds):
            groups.setdefault(dataclasses.replace(kind, window=None, rope=None), []).append(layer)
        found: dict[str, list[tuple[list[int], nnx.Module]]] = {}
        for kind, layers in groups.items():
            one = partial(Block, config, kind, param_dtype=param_dtype)
            make = nnx.vmap(lambda rngs: one(rngs=rngs))  # noqa: B023 (called at once)
            for name, module in vars(make(rngs.split(len(layers)))).items():
                if isinstance(module, nnx.Module):
                    found.setdefault(name, []).append((layers, module))
        for name, parts in found.items():
            setattr(self, name, parts[0][1] if len(parts) == 1 else _in_order(parts))


def _in_order(parts: list[tuple[list[int], nnx.Module]]) -> nnx.Module:
    order = np.argsort([layer for layers, _ in parts for layer in layers])
    graph, first = nnx.split(parts[0][1])
    others = [nnx.state(module) for _, module in parts[1:]]
    return nnx.merge(graph, jax.tree.map(lambda *stacks: jnp.concatenate(stacks)[order], first, *others))
