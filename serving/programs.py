"""The programs that a step of the engine is made of: what they compute, and the shapes they are compiled for.

Shapes: T token rows, R request rows, S slots, V vocabulary, M pages a request, D width, L layers.

A step is a few programs: `begin` (unpack, embed), the blocks, `select` (the rows that sample) and `finish` (unembed,
sample), the last one for each number of request rows and not of tokens. On accelerators the blocks are one program, a
scan over stacked weights. On a CPU they are one program of a few layers, called for each group of them: XLA:CPU copies
each weight that a scan slices from a stack, which doubles the time of a decode step; all unrolled into one program they
run as fast, but compile L times as long.

No array is needed to compile: `like` holds their shapes and places, so a program can be lowered for a machine that is
not there. On a mesh heads, feed-forward, vocabulary and the cache's heads are cut over its axis "tensor" (Shoeybi et
al. 2019, arXiv:1909.08053); all else is on every device.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers.cache import Cache
from ..models.cache import init_cache
from ..models.config import MIXERS, DecoderConfig, LayerKind
from ..models.decoder import BLOCKS, functional, param_axes, param_shapes, weight_dtype
from ..models.stack import module_of
from ..sharding.rules import PARAMETER_RULES, mesh_axes, parameter_sharding, use
from . import sampling
from .batch import Bucket, DeviceBatch, sampling_rows, unpack

# Layers of one program on a CPU, where that divides them: a call costs the host 0.07 ms, a layer 0.5 s to compile.
CPU_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Like:
    """Shapes, dtypes and, on a mesh, places of what the programs take.

    Attributes:
        outside: the parameters outside of the blocks, by name.
        state: what is kept for the slots.
        cache: what the blocks keep.
    """

    outside: Any
    state: Any
    cache: Any


class Programs:
    """One model's programs.

    Args:
        slots, num_pages, page_size, pages_per_request: sizes of the state and of the cache.
        dtype: of weights, compute and cache.
        mesh: with an axis "tensor"; None is one device.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        slots: int,
        num_pages: int,
        page_size: int,
        pages_per_request: int,
        dtype: Any,
        mesh: Mesh | None = None,
    ):
        self.config, self.slots, self.pages_per_request, self.mesh = config, slots, pages_per_request, mesh
        self._pool = {"num_pages": num_pages, "page_size": page_size, "slots": slots}
        self.dtype = jnp.dtype(dtype)
        self._model = functional(config, dtype=self.dtype)
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        # Layers of one call of the blocks; 0: all, stacked.
        self.group = math.gcd(CPU_LAYERS, config.num_layers) if CPU_LAYERS and platform == "cpu" else 0
        starts = range(0, config.num_layers, self.group or config.num_layers)
        # The kinds of the layers of each call: calls whose kinds are the same share a program.
        self.kinds_of_calls = [config.kinds[start : start + (self.group or config.num_layers)] for start in starts]
        # Which layer of the cache's each layer of a call has.
        at = {layer: n for mixer in MIXERS for n, layer in enumerate(config.layers_with(mixer))}
        self.places_of_calls = [
            np.asarray([at[start + nth] for nth in range(len(kinds))], np.int32)
            for start, kinds in zip(starts, self.kinds_of_calls, strict=True)
        ]
        outside, stacks = self.split(param_shapes(config))
        self._stacks = stacks
        with use(mesh):  # the layout of the pages is the platform's
            cache = jax.eval_shape(self.empty_cache)
        state = jax.eval_shape(lambda: sampling.SlotState.empty(slots, config.vocab_size))
        self.like = Like(
            {name: self._parameter(name, like, like.shape) for name, like in outside.items()},
            self._placed(state),
            self._placed(cache, self.cache_place()),
        )
        self._begun_shapes: dict[Bucket, Any] = {}

    @staticmethod
    def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters outside of the blocks, and the stacks [L, ...] of those within, both by name."""
        outside = {name: array for name, array in params.items() if not name.startswith(BLOCKS)}
        return outside, {name: array for name, array in params.items() if name not in outside}

    def place_of(self, name: str, one_layer: bool = False) -> NamedSharding | None:
        """Where a parameter lives, or `one_layer` of a stack; None without a mesh."""
        if self.mesh is None:
            return None
        return parameter_sharding(param_axes(self.config)[name][one_layer:], self.mesh)

    def empty_cache(self) -> Cache:
        """What there is before the first step."""
        return init_cache(self.config, dtype=self.dtype, **self._pool)

    def cache_place(self) -> NamedSharding | None:
        """Where the pages live: [L, P, K, ...], their heads cut. On a mesh models keep nothing but pages."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, None, mesh_axes("kv_heads", self.mesh, PARAMETER_RULES)))

    def everywhere(self) -> NamedSharding | None:
        """On every device whole; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def lower(self, name: str, key: Any) -> Any:
        """The program `name`, ready to be compiled.

        Its key is a bucket; for "blocks" a bucket and the kinds of the layers, for "finish" a number of rows, for
        "setup" None.
        """
        with use(self.mesh):
            return getattr(self, f"_lower_{name}")(key)

    # -- what they compute -----------------------------------------------------------------------------------------

    def _unpack(self, bucket: Bucket, array: jax.Array) -> DeviceBatch:
        return unpack(array, bucket, self.pages_per_request)

    def _begin(self, bucket: Bucket, outside: Any, state: sampling.SlotState, array: jax.Array) -> Any:
        batch = self._unpack(bucket, array)
        rows = sampling_rows(batch.rows_FR)
        slot_T, given_T = batch.tokens["slot"], batch.tokens["token"]
        token_T = jnp.where(given_T < 0, state.last_token_S[jnp.minimum(slot_T, self.slots - 1)], given_T)
        # A request whose logits were not finite "sampled" -1; it ends when the host sees that, and must not crash here.
        token_T = jnp.maximum(token_T, 0)
        state = sampling.record_tokens(state, rows, token_T, slot_T, batch.tokens["generated"] == 1)
        return state, batch.rows_FR, *self._model.bind(outside).begin(token_T, batch.context)

    def _blocks(
        self,
        bucket: Bucket,
        kinds: tuple[LayerKind, ...],
        layers: Any,
        place_N: jax.Array,
        x_TD: jax.Array,
        cache: Cache,
        ropes: Any,
        array: jax.Array,
    ) -> Any:
        context = self._unpack(bucket, array).context
        if self.group:
            for nth, (one, kind) in enumerate(zip(layers, kinds, strict=True)):
                x_TD, cache, _ = self._model.block(one, kind)(x_TD, ropes, context, cache, place_N[nth])
            return x_TD, cache
        return self._model.bind(layers).run_blocks(x_TD, ropes, context, cache)[:2]

    def _select(self, bucket: Bucket, array: jax.Array, x_TD: jax.Array) -> jax.Array:
        return x_TD[self._unpack(bucket, array).sample_row]

    def _finish(self, outside: Any, state: sampling.SlotState, rows_FR: jax.Array, x_RD: jax.Array) -> Any:
        model, rows = self._model.bind(outside), sampling_rows(rows_FR)
        logits_RV = self._whole(model.unembed(model.final_norm(x_RD)))
        token_R = sampling.sample(logits_RV, rows, state)
        last = state.last_token_S.at[rows.slot].set(token_R, mode="drop")
        top = min(sampling.MAX_TOP, self.config.vocab_size)
        count = len(x_RD)
        nothing = (jnp.zeros(count), jnp.zeros((count, top), jnp.int32), jnp.zeros((count, top)))
        logprobs = jax.lax.cond(
            jnp.any(rows.has(sampling.LOGPROBS)),
            lambda: sampling.top_logprobs(logits_RV, token_R),
            lambda: nothing,
        )
        return dataclasses.replace(state, last_token_S=last), token_R, logprobs

    def _prompt(self, bucket: Bucket, outside: Any, array: jax.Array, x_TD: jax.Array) -> Any:
        model = self._model.bind(outside)
        logits_TV = self._whole(model.unembed(model.final_norm(x_TD)))
        return sampling.top_logprobs(logits_TV, self._unpack(bucket, array).tokens["next"])

    def _whole(self, x: jax.Array) -> jax.Array:
        place = self.everywhere()
        return x if place is None else jax.lax.with_sharding_constraint(x, place)

    # -- the shapes they are compiled for --------------------------------------------------------------------------

    def _parameter(self, name: str, like: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        one_layer = name.startswith(BLOCKS) and bool(self.group)
        own = name.removeprefix(BLOCKS) if one_layer else name
        dtype = weight_dtype(own, self.dtype, like.dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.place_of(name, one_layer))

    def _placed(self, tree: Any, place: NamedSharding | None = None) -> Any:
        place = self.everywhere() if place is None else place
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def _jit(self, function: Any, donated: tuple[int, ...] = (), out: Any = None) -> Any:
        """On a mesh results have fixed places (default: everywhere), as the next program is compiled for these."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donated)
        return jax.jit(function, donate_argnums=donated, out_shardings=self.everywhere() if out is None else out)

    def _begun(self, bucket: Bucket) -> Any:
        """Shapes of what `begin` returns, without the state. Kept: tracing is most of a warm start."""
        if bucket not in self._begun_shapes:
            arguments = (self.like.outside, self.like.state, self._array(bucket))
            found = jax.eval_shape(partial(self._begin, bucket), *arguments)[1:]
            self._begun_shapes[bucket] = self._placed(found)
        return self._begun_shapes[bucket]

    def _array(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        return self._scalars((bucket.size(self.pages_per_request),), jnp.int32)

    def _scalars(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere())

    def _lower_begin(self, bucket: Bucket) -> Any:
        program = self._jit(partial(self._begin, bucket), (1,))
        return program.lower(self.like.outside, self.like.state, self._array(bucket))

    def _lower_blocks(self, key: tuple[Bucket, tuple[LayerKind, ...]]) -> Any:
        bucket, kinds = key
        _, x_TD, ropes = self._begun(bucket)
        program = self._jit(partial(self._blocks, bucket, kinds), (2, 3), (self.everywhere(), self.cache_place()))
        place_N = self._scalars((len(kinds),), jnp.int32)
        layers = [self._layer(kind) for kind in kinds] if self.group else self._all_layers()
        return program.lower(layers, place_N, x_TD, self.like.cache, ropes, self._array(bucket))

    def _all_layers(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: self._parameter(name, like, like.shape) for name, like in self._stacks.items()}

    def _layer(self, kind: LayerKind) -> dict[str, jax.ShapeDtypeStruct]:
        own = {name.removeprefix(BLOCKS): (name, like, like.shape[1:]) for name, like in self._stacks.items()}
        return {
            short: self._parameter(*named) for short, named in own.items() if self.config.has(kind, module_of(short))
        }

    def _lower_select(self, bucket: Bucket) -> Any:
        return self._jit(partial(self._select, bucket)).lower(self._array(bucket), self._begun(bucket)[1])

    def _lower_finish(self, count: int) -> Any:
        rows_FR = self._begun(Bucket(count, 0))[0]
        x_RD = self._scalars((count, self.config.hidden_size), self.dtype)
        return self._jit(self._finish, (1,)).lower(self.like.outside, self.like.state, rows_FR, x_RD)

    def _lower_prompt(self, bucket: Bucket) -> Any:
        program = self._jit(partial(self._prompt, bucket))
        return program.lower(self.like.outside, self._array(bucket), self._begun(bucket)[1])

    def _lower_setup(self, _: None) -> Any:
        ids = self._scalars((sampling.MAX_BIAS,), jnp.int32)
        values = self._scalars((sampling.MAX_BIAS,), jnp.float32)
        stops = self._scalars((sampling.MAX_STOPS,), jnp.int32)
        slot = self._scalars((), jnp.int32)
        return self._jit(sampling.setup_slot, (0,)).lower(self.like.state, slot, ids, values, stops)
