"""The decoder: token embedding, a stack of blocks, a final norm and the unembedding.

Shapes: B rows, T tokens, D width, V vocabulary, L layers. Tokens are [B, T] in training and [T] in serving; every
layer works on [..., D] and the context alone knows the difference.

A mixture of experts also gives `Statistics`, which training needs to balance the load; a dense model gives None.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ..layers.attention import Attention
from ..layers.embedding import Embedding, PositionTable
from ..layers.linear import PRODUCT, matmul_precision
from ..layers.mlp import MLP
from ..layers.moe import MoE, Statistics
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.rope import angles
from ..sharding import pipeline
from ..sharding.plan import ONE_DEVICE, Plan
from ..sharding.rules import GATHERED, constrain, current, parameter_sharding
from .config import ROPES, DecoderConfig, LayerKind

Params = dict[str, jax.Array]
Ropes = dict[str, tuple[jax.Array, jax.Array]]  # cosines and sines by the config's field
BLOCK_INPUT = "block_input"
BLOCKS = "blocks."  # begins the name of every parameter that all layers have, stacked


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """What is kept without `remat`: all but weights, and tokens, as they were gathered.

    Said of the steps that gather as well as of the name: with the name alone, what goes into it would be kept.
    """
    if primitive.name == "name":
        return parameters["name"] != GATHERED
    return primitive.name not in ("sharding_constraint", "all_gather")


REMAT_POLICIES = {
    "none": _all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    # By name: they are made in a `custom_vjp`, where JAX's policies see no product.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    # What enters each block waits in the host's memory; all else is computed again.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    """One transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        # Two additions a layer: scaled so that the residual stream's variance does not grow with depth (GPT-2).
        out_scale = (2 * config.num_layers) ** -0.5
        self.residual_scale = config.residual_scale
        before, after = (config.norm_placement in (where, "both") for where in ("before", "after"))
        self.attention_norm = _norm(config, param_dtype) if before else None
        self.attention = Attention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            out_bias=config.out_bias,
            norms=config.qk_norm,
            norm_options={"epsilon": config.norm_eps, "offset": config.norm == "rms_offset"},
            sinks=config.sinks,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            out_scale=out_scale,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.attention_out_norm = _norm(config, param_dtype) if after else None
        self.mlp_norm = _norm(config, param_dtype) if before else None
        width, common = config.hidden_size, {"out_scale": out_scale, "param_dtype": param_dtype, "rngs": rngs}
        if config.moe is None:
            more = {"gated": config.gated, "activation": config.activation, "bias": config.mlp_bias}
            self.mlp = MLP(width, config.intermediate_size, **more, **common)
        else:
            self.mlp = MoE(width, config.moe, **common)
        self.mlp_out_norm = _norm(config, param_dtype) if after else None

    def __call__(
        self, x: jax.Array, ropes: Ropes, context: Any, cache: Any, layer: Any, kind: LayerKind
    ) -> tuple[jax.Array, Any, Statistics | None]:
        """[..., D] and the cache to the same, and what a mixture of experts says of its load.

        Args:
            layer: which one of the cache's, an int or a traced one; `kind` is that layer's.
        """
        rope = None if kind.rope is None else ropes[kind.rope]
        normed = x if self.attention_norm is None else self.attention_norm(x)
        mixed, cache = self.attention(_inside(normed), rope, context, cache, layer, kind.window)
        x = self._add(x, _between(mixed), self.attention_out_norm)
        normed, statistics = x if self.mlp_norm is None else self.mlp_norm(x), None
        if isinstance(self.mlp, MoE):
            y, statistics = self.mlp(normed, context.is_token)
        else:
            y = self.mlp(_inside(normed))
        return self._add(x, _between(y), self.mlp_out_norm), cache, statistics

    def _add(self, x: jax.Array, y: jax.Array, norm: nnx.Module | None) -> jax.Array:
        y = y if norm is None else norm(y)
        return x + (y if self.residual_scale == 1 else y * jnp.asarray(self.residual_scale, y.dtype))


def _norm(config: DecoderConfig, param_dtype: jnp.dtype) -> RMSNorm | LayerNorm:
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, epsilon=config.norm_eps, param_dtype=param_dtype)
    offset = config.norm == "rms_offset"
    return RMSNorm(config.hidden_size, epsilon=config.norm_eps, offset=offset, param_dtype=param_dtype)


def _between(x: jax.Array) -> jax.Array:
    """Where the residual stream lives. A served batch [T, D] is flat and has no rows to spread over a mesh."""
    return constrain(x, ("batch", "sequence", "embed")) if x.ndim == 3 else x


def _inside(x: jax.Array) -> jax.Array:
    """Where a layer wants its input: tensor parallelism cuts heads and widths there, not tokens."""
    return constrain(x, ("batch", "tokens", "embed")) if x.ndim == 3 else x


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
        # One stack [L, ...] of all blocks, run by `scan`: compile time does not grow with depth.
        make = partial(Block, config, param_dtype=param_dtype)
        self.blocks = nnx.vmap(lambda rngs: make(rngs=rngs))(rngs.split(config.num_layers))
        self.positions = (
            PositionTable(config.max_position_embeddings, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
            if config.learned_positions
            else None
        )
        self.final_norm = _norm(config, param_dtype)
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
        return _between(x), ropes_of(self.config, context)

    def run_blocks(self, x: jax.Array, ropes: Ropes, context: Any, cache: Any) -> tuple[jax.Array, Any, Any]:
        """All blocks in turn; the cache is a carry, so that it is updated in place. Statistics are stacked [L, ...]."""
        block_def, block_state = nnx.split(self.blocks)
        run = _Run(lambda state: nnx.merge(block_def, state), ropes, context, self.remat)
        (x, cache), statistics = run(block_state, self.config.kinds, x, cache, 0)
        return x, cache, statistics

    def unembedding_weight(self) -> jax.Array:
        """The output projection, [V, D]."""
        return (self.embed if self.unembed_table is None else self.unembed_table).weight[...]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], accumulated and returned in float32 or wider."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        weight_VD = self.unembedding_weight().astype(hidden.dtype)
        logits = jnp.einsum(
            "...d,vd->...v", hidden, weight_VD, preferred_element_type=wide, precision=matmul_precision(hidden.dtype)
        )
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def params(self) -> Params:
        """The parameters by dotted name, such as "blocks.attention.query.weight" [L, H * head_dim, D]."""
        return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))}

    def load_params(self, params: Mapping[str, jax.Array]) -> None:
        """Puts `params` in place of the module's own; raises ValueError unless names and shapes agree."""
        own = self.params()
        check_params(params, {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in own.items()})
        nnx.update(self, _state(nnx.to_flat_state(nnx.state(self, nnx.Param)), params))


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs stacked blocks in turn: `scan` over what repeats, so that compile time does not grow with depth.

    Attributes:
        block: the block over the parameters of one layer.
        ropes, context: as `Block` takes them. remat: as `Decoder` does.
    """

    block: Callable[[Any], Block]
    ropes: Ropes
    context: Any
    remat: str

    def __call__(
        self, stacked: Any, kinds: tuple[LayerKind, ...], x: jax.Array, cache: Any, first: Any
    ) -> tuple[tuple[jax.Array, Any], Statistics | None]:
        """`stacked` blocks of these kinds, of which the first is layer `first`: ((x, cache), their statistics)."""
        count = len(kinds)
        period = period_of(kinds)
        whole = count // period * period  # layers of whole periods; the last, broken one is not scanned
        layers = first + jnp.arange(count, dtype=jnp.int32)
        every = (stacked, layers)

        def body(carry: Any, scanned: Any) -> tuple[Any, Statistics | None]:
            return self._in_turn(carry, scanned, kinds[:period])

        if period == 1:
            return jax.lax.scan(lambda carry, one: self._one(kinds[0], carry, one), (x, cache), every)
        periods = jax.tree.map(lambda a: a[:whole].reshape(whole // period, period, *a.shape[1:]), every)
        carry, statistics = jax.lax.scan(body, (x, cache), periods)
        if statistics is not None:
            statistics = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), statistics)
        if whole < count:
            carry, last = self._in_turn(carry, jax.tree.map(lambda a: a[whole:], every), kinds[whole:])
            if statistics is not None:
                statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), statistics, last)
        return carry, statistics

    def _in_turn(self, carry: Any, several: Any, kinds: tuple[LayerKind, ...]) -> tuple[Any, Statistics | None]:
        found = []
        for nth, kind in enumerate(kinds):
            carry, statistics = self._one(kind, carry, jax.tree.map(lambda a, nth=nth: a[nth], several))
            found.append(statistics)
        return carry, None if found[0] is None else jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def _one(self, kind: LayerKind, carry: Any, one: Any) -> tuple[Any, Statistics | None]:
        def step(carry: Any, one: Any) -> tuple[Any, Statistics | None]:
            (x, cache), (state, layer) = carry, one
            x, cache, statistics = self.block(state)(
                checkpoint_name(x, BLOCK_INPUT), self.ropes, self.context, cache, layer, kind
            )
            return (_between(x), cache), statistics

        if self.remat != "none" or current() is not None:
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return step(carry, one)


def period_of(kinds: tuple[LayerKind, ...]) -> int:
    """After how many layers the kinds repeat; all of them if they never do."""
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))


def ropes_of(config: DecoderConfig, context: Any) -> Ropes:
    """Cosines and sines of the context's positions, of each rotary embedding that some layer takes."""
    ropes = {}
    for name in ROPES:
        if any(kind.rope == name for kind in config.pattern):
            rope = getattr(config, name)
            lengths = context.lengths if rope.by_length else None
            ropes[name] = angles(rope, config.head_dim, context.positions, lengths)
    return ropes


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path).replace("unembed_table.", "unembed.")


def _state(template: Any, params: Mapping[str, jax.Array]) -> nnx.State:
    return nnx.from_flat_state(
        [(path, leaf.replace(params.get(_name(path), leaf.get_value()))) for path, leaf in template]
    )


def _stacked(name: str) -> bool:
    return name.startswith(BLOCKS)


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
        self._block = nnx.split(nnx.eval_shape(lambda: Block(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0))))

    def bind(self, params: Mapping[str, jax.Array]) -> Decoder:
        """The module over these arrays; parameters left out stay abstract."""
        graph, state = self._model
        return nnx.merge(graph, _state(nnx.to_flat_state(state), params))

    def block(self, params: Mapping[str, jax.Array]) -> Block:
        """One block over the arrays of one layer, as `layer_params` gives them."""
        graph, state = self._block
        return nnx.merge(graph, _state(nnx.to_flat_state(state), params))

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
        return model.final_norm(_between(pipeline.join(x_M))), cache, statistics

    def stage(
        self, layers: Mapping[str, jax.Array], x: jax.Array, piece: Any, first: Any
    ) -> tuple[jax.Array, Statistics | None]:
        """Some consecutive layers [l, ...], from layer `first` on, over x [..., D]; `piece` is (ropes, context)."""
        ropes, context = piece
        count = len(jax.tree.leaves(layers)[0])
        kinds = self.config.kinds[:count]
        if any(self.config.kinds[start : start + count] != kinds for start in range(0, self.config.num_layers, count)):
            raise ValueError(
                f"A pipeline's stages run the same program, and this model's layers differ in a pattern of "
                f"{period_of(self.config.kinds)}; {count} layers a stage do not hold it whole. Use stages (and rounds) "
                "that do, or stage=1."
            )
        (x, _), statistics = _Run(self.block, ropes, context, self._remat)(layers, kinds, x, None, first)
        return x, statistics

    def ropes(self, context: Any) -> Ropes:
        """See `ropes_of`."""
        return ropes_of(self.config, context)

    @property
    def layer_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical axes of one layer's parameters."""
        return {name.removeprefix(BLOCKS): axes[1:] for name, axes in param_axes(self.config).items() if _stacked(name)}

    @staticmethod
    def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters outside of the blocks by their names, and the stacked ones, such as "mlp.up.weight"."""
        outside = {name: value for name, value in params.items() if not _stacked(name)}
        return outside, {name.removeprefix(BLOCKS): value for name, value in params.items() if _stacked(name)}

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


def _abstract(config: DecoderConfig, param_dtype: Any = jnp.float32) -> Any:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by name."""
    return {_name(path): jax.ShapeDtypeStruct(leaf.get_value().shape, dtype) for path, leaf in _abstract(config)}


def weight_dtype(name: str, dtype: Any) -> Any:
    """The dtype to keep the parameter `name` in when only products in `dtype` are to come: routers stay float32."""
    return jnp.promote_types(dtype, jnp.float32) if ".router." in f".{name}" else dtype


def param_axes(config: DecoderConfig) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every parameter, by name; stacked ones begin with "layers"."""
    axes = {}
    for path, leaf in _abstract(config):
        own = tuple(leaf.get_metadata()["axes"])
        axes[_name(path)] = ("layers", *own) if path[0] == "blocks" else own
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


def split_layers(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters outside of the blocks by their names, and those of each layer, such as "mlp.up.weight" [F, D]."""
    outside, stacks = FunctionalDecoder.split(params)
    count = len(next(iter(stacks.values())))
    return outside, [{name: stack[layer] for name, stack in stacks.items()} for layer in range(count)]


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
