"""The decoder: token embedding, a stack of blocks, a final norm and the unembedding.

Shapes: B rows, T tokens, D width, V vocabulary, L layers. Tokens are [B, T] in training and [T] in serving; every
layer works on [..., D] and the context alone knows the difference.

A mixture of experts also gives `Statistics`, which training needs to balance the load; a dense model gives None.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..layers.embedding import Embedding, PositionTable
from ..layers.linear import product
from ..layers.moe import Statistics
from ..layers.rope import angles
from ..sharding import pipeline
from ..sharding.plan import ONE_DEVICE, Plan
from ..sharding.rules import parameter_sharding
from .block import Block, Ropes, Stacks, between, bind_block, name_of, norm_of, state_of
from .config import ROPES, DecoderConfig, LayerKind
from .parameters import BLOCKS, Params, module_of, param_shapes, split, split_layers, weight_dtype
from .stack import REMAT_POLICIES, Run, segments


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: sizes.
        rngs: source of the initial weights.
        dtype: compute dtype; parameters are cast to it where they are used.
        param_dtype: dtype of the parameters.
        remat: what the backward pass recomputes: "none", "full" (whole blocks), "dots" (all but matrix products) or
            "offload" (whole blocks, from inputs kept in the host's memory).
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat is one of {', '.join(REMAT_POLICIES)}; got {remat!r}.")
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.embed = Embedding(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        self.blocks = Stacks(config, param_dtype=param_dtype, rngs=rngs)
        self.positions = (
            PositionTable(config.max_position_embeddings, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
            if config.learned_positions
            else None
        )
        self.final_norm = norm_of(config, param_dtype)
        self.unembed_table = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(self, tokens: jax.Array, context: Any, cache: Any = None) -> tuple[jax.Array, Any, Statistics | None]:
        """Tokens [...] int32 to final hidden states [..., D] in the compute dtype, the cache after them, statistics."""
        x, ropes = self.begin(tokens, context)
        x, cache, statistics = self.run_blocks(x, ropes, context, cache)
        return self.final_norm(x), cache, statistics

    def begin(self, tokens: jax.Array, context: Any) -> tuple[jax.Array, Ropes]:
        """What the blocks start from: embeddings [..., D], and the cosines and sines of the positions."""
        x = self.embed(tokens, self.dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(context.positions, self.dtype)
        return between(x), ropes_of(self.config, context)

    def run_blocks(self, x: jax.Array, ropes: Ropes, context: Any, cache: Any) -> tuple[jax.Array, Any, Any]:
        """All blocks in turn; the cache is a carry, so that it is updated in place. Statistics are stacked [L, ...]."""
        stacks = {name_of(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(self.blocks))}
        run = Run(self.config, ropes, context, self.remat)
        (x, cache), statistics = run(stacks, self.config.kinds, x, cache)
        return x, cache, statistics

    def unembedding_weight(self) -> jax.Array:
        """The output projection, [V, D]."""
        return (self.embed if self.unembed_table is None else self.unembed_table).weight[...]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], accumulated and returned in float32 or wider."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        weight_VD = self.unembedding_weight().astype(hidden.dtype)
        logits = product(hidden, weight_VD, wide)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def params(self) -> Params:
        """The parameters by dotted name, such as "blocks.attention.query.weight" [L, H * head_dim, D]."""
        return {name_of(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))}

    def load_params(self, params: Mapping[str, jax.Array]) -> None:
        """Puts `params` in place of the module's own; raises ValueError unless names and shapes agree."""
        own = self.params()
        check_params(params, {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in own.items()})
        nnx.update(self, state_of(nnx.to_flat_state(nnx.state(self, nnx.Param)), params))


def ropes_of(config: DecoderConfig, context: Any) -> Ropes:
    """Cosines and sines of the context's positions, of each rotary embedding that some layer takes."""
    ropes = {}
    for name in ROPES:
        if any(kind.rope == name for kind in config.pattern):
            rope = getattr(config, name)
            lengths = context.lengths if rope.by_length else None
            ropes[name] = angles(rope, config.head_dim, context.positions, lengths)
    return ropes


def check_params(params: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError that lists every missing, unknown or wrongly shaped parameter."""
    wrong = [f"missing {name}" for name in expected if name not in params]
    wrong += [f"unknown {name}" for name in params if name not in expected]
    wrong += [
        f"{name} has shape {tuple(params[name].shape)}, the model wants {tuple(expected[name].shape)}"
        for name in expected
        if name in params and tuple(params[name].shape) != tuple(expected[name].shape)
    ]
    if wrong:
        raise ValueError("The parameters do not fit the model: " + "; ".join(wrong) + ".")


class FunctionalDecoder:
    """The decoder as pure functions of a flat dict of parameters: what training differentiates and serving compiles.

    A function that uses a part of the model takes a dict with that part.
    """

    def __init__(self, config: DecoderConfig, *, remat: str = "none", **options: Any):
        self.config, self._remat = config, remat
        options["remat"] = remat
        self._model = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))

    def bind(self, params: Mapping[str, jax.Array]) -> Decoder:
        """The module over these arrays; parameters left out stay abstract."""
        graph, state = self._model
        return nnx.merge(graph, state_of(nnx.to_flat_state(state), params))

    def block(self, params: Mapping[str, jax.Array], kind: LayerKind) -> Block:
        """One block over the arrays of one layer, as `split_layers` gives them."""
        return bind_block(self.config, kind, params)

    def hidden(
        self,
        params: Mapping[str, jax.Array],
        tokens: jax.Array,
        context: Any,
        cache: Any = None,
        *,
        plan: Plan = ONE_DEVICE,
    ) -> tuple[jax.Array, Any, Statistics | None]:
        """See `Decoder.__call__`; through a pipeline where `plan` has stages (training only: nothing is cached)."""
        if plan.stage == 1:
            return self.bind(params)(tokens, context, cache)
        outside, layers = self.split(params)
        model = self.bind(outside)
        x, ropes = model.begin(tokens, context)
        x_M, pieces = pipeline.cut((x, (ropes, context)), plan.pieces)
        x_M, statistics = pipeline.run(
            self.stage, layers, self.layer_axes, x_M, pieces, stages=plan.stage, rounds=plan.rounds
        )
        return model.final_norm(between(pipeline.join(x_M))), cache, statistics

    def stage(self, layers: Mapping[str, jax.Array], x: jax.Array, piece: Any) -> tuple[jax.Array, Statistics | None]:
        """The consecutive layers of one stage (of one round), over x [..., D]; `piece` is (ropes, context)."""
        ropes, context = piece
        config = self.config
        if config.lightning is not None:
            raise ValueError(
                "The decays of lightning attention hang on the layer's number, which a pipeline's stages do not know; "
                "use stage=1."
            )
        name, stack = next(iter(layers.items()))
        count = len(stack) * config.num_layers // len(config.layers_with(module_of(name)))
        kinds = config.kinds[:count]
        if any(config.kinds[start : start + count] != kinds for start in range(0, config.num_layers, count)):
            raise ValueError(
                f"A pipeline's stages run the same program, and {count} layers a stage of this model are not alike: "
                f"its layers are {_words(config.kinds)}. Use stages (and rounds) that hold the same kinds in the same "
                "order, or stage=1."
            )
        (x, _), statistics = Run(config, ropes, context, self._remat)(layers, kinds, x)
        return x, statistics

    def ropes(self, context: Any) -> Ropes:
        """See `ropes_of`."""
        return ropes_of(self.config, context)

    @property
    def layer_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical axes of one layer's parameters."""
        return {name: axes[1:] for name, axes in split(param_axes(self.config))[1].items()}

    split = staticmethod(split)

    @staticmethod
    def join(outside: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
        """What `split` took apart."""
        return {**outside, **{BLOCKS + name: value for name, value in layers.items()}}

    def unembed(self, params: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
        """See `Decoder.unembed`."""
        return self.bind(params).unembed(hidden)

    def unembedding_weight(self, params: Mapping[str, jax.Array]) -> jax.Array:
        """[V, D]."""
        return params["embed.weight" if self.config.tie_embeddings else "unembed.weight"]


@lru_cache(maxsize=32)
def functional(
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> FunctionalDecoder:
    """The decoder of `config` as pure functions; options as in `Decoder`."""
    return FunctionalDecoder(config, dtype=dtype, remat=remat)


@lru_cache(maxsize=32)
def _abstract(config: DecoderConfig) -> Any:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32))
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def abstract_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter as its module makes it, in float32 where it may have any dtype, by name."""
    return {name_of(path): leaf.get_value() for path, leaf in _abstract(config)}


def param_axes(config: DecoderConfig) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every parameter, by name; stacked ones begin with "layers"."""
    axes = {}
    for path, leaf in _abstract(config):
        own = tuple(leaf.get_metadata()["axes"])
        axes[name_of(path)] = ("layers", *own) if path[0] == "blocks" else own
    return axes


def param_shardings(config: DecoderConfig, mesh: Mesh) -> dict[str, jax.sharding.NamedSharding]:
    """Where every parameter lives on `mesh`; raises ValueError where a size does not divide."""
    shapes = param_shapes(config)
    return {name: parameter_sharding(axes, mesh, shapes[name].shape) for name, axes in param_axes(config).items()}


def init_params(config: DecoderConfig, seed: int, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Fresh parameters, created in their place on `mesh`; the values depend on the seed alone, not on the mesh."""

    def make() -> Params:
        return Decoder(config, rngs=nnx.Rngs(seed), param_dtype=dtype).params()

    shardings = None if mesh is None else param_shardings(config, mesh)
    return jax.jit(make, out_shardings=shardings)()


def _words(kinds: tuple[LayerKind, ...]) -> str:
    parts = [f"{part.repeats} times {kinds[part.start : part.start + part.period]}" for part in segments(kinds)]
    return ", then ".join(parts)


__all__ = [
    "Block",
    "Decoder",
    "DecoderConfig",
    "FunctionalDecoder",
    "Params",
    "check_params",
    "functional",
    "init_params",
    "param_axes",
    "param_shapes",
    "param_shardings",
    "split_layers",
    "weight_dtype",
]
