"""The programs that a step of the engine is made of: what they compute, and the shapes they are compiled for.

Shapes: T token rows, R request rows, S slots, V vocabulary, W words of its bits, M pages a request, D width, L layers.

A step is a few programs: `begin` (unpack, embed), the blocks, `select` (the rows that sample, where there are others)
and `finish` (unembed, sample), the last one for each number of request rows and not of tokens. Who asks for more than
the sampled tokens has token rows taken in pieces, for `hidden` (final states) or `prompt` (log-probabilities of the
tokens that followed). On accelerators the blocks are one program, a
scan over stacked weights. On a CPU they are one program of a few layers, called for each group of them: XLA:CPU copies
each weight that a scan slices from a stack, which doubles the time of a decode step; all unrolled into one program they
run as fast, but compile L times as long.

No array is needed to compile: `like` holds their shapes and places, so a program can be lowered for a machine that is
not there. On a mesh heads, feed-forward, vocabulary and the cache's heads are cut over its axis "tensor" (Shoeybi et
al. 2019, arXiv:1909.08053); all else is on every device.
"""

import dataclasses
import math
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers.cache import Cache
from ..models.cache import init_cache
from ..models.config import MIXERS, DecoderConfig, LayerKind
from ..models.parameters import BLOCKS, module_of, param_shapes, weight_dtype
from ..sharding.rules import PARAMETER_RULES, mesh_axes, parameter_sharding, use
from . import sampling
from .batch import Bucket, DeviceBatch, sampling_rows, unpack
from .step_sizes import PIECE

if TYPE_CHECKING:
    from ..models.decoder import FunctionalDecoder

# Layers of one program on a CPU in a step without a chunk, where that divides them: a call costs the host 0.07 ms, a
# layer 0.5 s to compile.
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
        dtype: of weights and compute. cache_dtype: of what is kept of each token; None: the same.
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
        cache_dtype: Any = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.slots, self.pages_per_request, self.mesh = config, slots, pages_per_request, mesh
        self._pool = {"num_pages": num_pages, "page_size": page_size, "slots": slots}
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = self.dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        self.weights_first = False  # how products are computed, in what is lowered from now on
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        # Layers of one call of the blocks; 0: all, stacked.
        self.group = math.gcd(CPU_LAYERS, config.num_layers) if CPU_LAYERS and platform == "cpu" else 0
        self.is_on_cpu = platform == "cpu"
        # Which layer of the cache's each layer has.
        self._places = {layer: n for mixer in MIXERS for n, layer in enumerate(config.layers_with(mixer))}
        self._begun_shapes: dict[Bucket, Any] = {}

    # Made when something is lowered: an engine whose programs are on disk traces nothing, and imports no Flax.
    @cached_property
    def _model(self) -> "FunctionalDecoder":
        from ..models.decoder import functional

        return functional(self.config, dtype=self.dtype)

    @cached_property
    def like(self) -> Like:
        with use(self.mesh):  # the layout of the pages is the platform's
            cache, state = jax.eval_shape(self._empty)
        outside, _ = self.split(param_shapes(self.config))
        return Like(
            {name: self._parameter(name, like, like.shape) for name, like in outside.items()},
            self._placed(state),
            self._placed(cache, self.cache_place()),
        )

    @staticmethod
    def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters outside of the blocks, and the stacks [L, ...] of those within, both by name."""
        outside = {name: array for name, array in params.items() if not name.startswith(BLOCKS)}
        return outside, {name: array for name, array in params.items() if name not in outside}

    def calls_of(self, bucket: Bucket) -> list[range]:
        """The layers of each call of the blocks in a step. Calls whose layers have the same kinds share a program."""
        # A chunk takes so long that calls cost nothing, and a program of one layer compiles in half the time.
        group = (1 if bucket.chunk else self.group) if self.group else self.config.num_layers
        return [range(start, start + group) for start in range(0, self.config.num_layers, group)]

    def kinds_of(self, layers: range) -> tuple[LayerKind, ...]:
        return self.config.kinds[layers.start : layers.stop]

    def places_of(self, layers: range) -> np.ndarray:
        """Which of the cache's layers they have, int32."""
        return np.asarray([self._places[layer] for layer in layers], np.int32)

    def place_of(self, name: str, one_layer: bool = False) -> NamedSharding | None:
        """Where a parameter lives, or `one_layer` of a stack; None without a mesh."""
        if self.mesh is None:
            return None
        from ..models.decoder import param_axes

        return parameter_sharding(param_axes(self.config)[name][one_layer:], self.mesh)

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

        Its key is a bucket; for "blocks" a bucket and the kinds of the layers, for "finish", "prompt" and "hidden" a
        number of rows, for "copy", "read" and "write" a number of pages, for "empty" and "setup" None.
        """
        from ..layers.linear import weights_first

        with use(self.mesh), weights_first(self.weights_first):
            return getattr(self, f"_lower_{name}")(key)

    def compiler_options(self, name: str) -> dict[str, int | bool]:
        """What the compiler is told of the program `name`.

        XLA leaves out a rounding to a narrow float where the next operation that it fuses widens it again. What it
        fuses is another matter in each program, and a request's numbers would depend on the size of its step.

        All but the layers are as quick by LLVM's first level, and compiled in two thirds of the time. The layers' sums
        came out less exact by it (mxfp4: log-probabilities off by 4e-5).
        """
        options: dict[str, int | bool] = {}
        if min(self.dtype.itemsize, self.cache_dtype.itemsize) < 4:
            options["xla_allow_excess_precision"] = False
        if self.is_on_cpu and name != "blocks":
            options["xla_backend_optimization_level"] = 1
        return options

    # -- what they compute -----------------------------------------------------------------------------------------

    def _empty(self) -> tuple[Cache, sampling.SlotState]:
        """What there is before the first step."""
        cache = init_cache(self.config, dtype=self.cache_dtype, **self._pool)
        return cache, sampling.SlotState.empty(self.slots, self.config.vocab_size)

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
        # The array itself too: all programs of the step want it, and a call brings it to the device in a quarter of the
        # time that `jax.device_put` takes.
        return state, array, batch.rows_FR, *self._model.bind(outside).begin(token_T, batch.context)

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

    def _finish(
        self, outside: Any, state: sampling.SlotState, rows_FR: jax.Array, x_RD: jax.Array, allowed_RW: jax.Array
    ) -> Any:
        model, rows = self._model.bind(outside), sampling_rows(rows_FR)
        logits_RV = self._whole(model.unembed(model.final_norm(x_RD)))
        token_R = sampling.sample(logits_RV, rows, state, allowed_RW)
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

    @staticmethod
    def _take(x_TD: jax.Array, row_N: jax.Array) -> jax.Array:
        return x_TD[row_N]

    def _prompt(self, outside: Any, x_ND: jax.Array, next_N: jax.Array) -> Any:
        model = self._model.bind(outside)
        logits_NV = self._whole(model.unembed(model.final_norm(x_ND)))
        return sampling.top_logprobs(logits_NV, next_N)

    def _hidden(self, outside: Any, x_ND: jax.Array) -> jax.Array:
        return self._whole(self._model.bind(outside).final_norm(x_ND).astype(jnp.float32))

    @staticmethod
    def _copy(cache: Cache, from_N: jax.Array, to_N: jax.Array) -> Cache:
        """Copies pages, of all layers; where `to_N` is the number of pages nothing is written."""
        assert cache.pages is not None
        return cache.with_pages(
            jax.tree.map(lambda x_LP: x_LP.at[:, to_N].set(x_LP[:, from_N], mode="drop"), cache.pages)
        )

    @staticmethod
    def _read(cache: Cache, from_N: jax.Array) -> list[Any]:
        """Pages of all layers, each as a pool of one page."""
        return [
            jax.tree.map(lambda x_LP, at=page: jax.lax.dynamic_slice_in_dim(x_LP, at, 1, 1), cache.pages)
            for page in from_N
        ]

    @staticmethod
    def _write(cache: Cache, pages: list[Any], to_N: jax.Array) -> Cache:
        """Puts back what `_read` gave; where `to_N` is the number of pages nothing is written."""
        assert cache.pages is not None

        def put(x_LP: jax.Array, *one_N: jax.Array) -> jax.Array:
            return x_LP.at[:, to_N].set(jnp.concatenate(one_N, 1), mode="drop")

        return cache.with_pages(jax.tree.map(put, cache.pages, *pages))

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
        """Shapes of what `begin` returns, without the state and the array. Kept: tracing is most of a warm start."""
        if bucket not in self._begun_shapes:
            arguments = (self.like.outside, self.like.state, self._array(bucket))
            found = jax.eval_shape(partial(self._begin, bucket), *arguments)[2:]
            self._begun_shapes[bucket] = self._placed(found)
        return self._begun_shapes[bucket]

    def _array(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        return self._scalars((bucket.size(self.pages_per_request),), jnp.int32)

    def _scalars(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere())

    def _states(self, count: int) -> jax.ShapeDtypeStruct:
        return self._scalars((count, self.config.hidden_size), self.dtype)

    def _lower_empty(self, _: None) -> Any:
        places = jax.tree.map(lambda x: x.sharding, (self.like.cache, self.like.state))
        return self._jit(self._empty, (), places).lower()

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
        _, stacks = self.split(param_shapes(self.config))
        return {name: self._parameter(name, like, like.shape) for name, like in stacks.items()}

    def _layer(self, kind: LayerKind) -> dict[str, jax.ShapeDtypeStruct]:
        _, stacks = self.split(param_shapes(self.config))
        own = {name.removeprefix(BLOCKS): (name, like, like.shape[1:]) for name, like in stacks.items()}
        return {
            short: self._parameter(*named) for short, named in own.items() if self.config.has(kind, module_of(short))
        }

    def _lower_select(self, bucket: Bucket) -> Any:
        return self._jit(partial(self._select, bucket)).lower(self._array(bucket), self._begun(bucket)[1])

    def _lower_finish(self, count: int) -> Any:
        rows_FR = self._begun(Bucket(count, 0))[0]
        x_RD = self._states(count)
        allowed_RW = self._scalars((count, sampling.mask_words(self.config.vocab_size)), jnp.int32)
        return self._jit(self._finish, (1,)).lower(self.like.outside, self.like.state, rows_FR, x_RD, allowed_RW)

    def _lower_take(self, bucket: Bucket) -> Any:
        return self._jit(self._take).lower(self._begun(bucket)[1], self._scalars((PIECE,), jnp.int32))

    def _lower_prompt(self, count: int) -> Any:
        next_N = self._scalars((count,), jnp.int32)
        return self._jit(self._prompt).lower(self.like.outside, self._states(count), next_N)

    def _lower_hidden(self, count: int) -> Any:
        return self._jit(self._hidden).lower(self.like.outside, self._states(count))

    def _lower_copy(self, count: int) -> Any:
        pages_N = self._scalars((count,), jnp.int32)
        return self._jit(self._copy, (0,), self.cache_place()).lower(self.like.cache, pages_N, pages_N)

    def _lower_read(self, count: int) -> Any:
        return self._jit(self._read, (), self.cache_place()).lower(self.like.cache, self._scalars((count,), jnp.int32))

    def _lower_write(self, count: int) -> Any:
        pages_N = self._scalars((count,), jnp.int32)
        pages = self._placed(jax.eval_shape(self._read, self.like.cache, pages_N), self.cache_place())
        return self._jit(self._write, (0,), self.cache_place()).lower(self.like.cache, pages, pages_N)

    def _lower_setup(self, _: None) -> Any:
        ids = self._scalars((sampling.MAX_BIAS,), jnp.int32)
        values = self._scalars((sampling.MAX_BIAS,), jnp.float32)
        stops = self._scalars((sampling.MAX_STOPS,), jnp.int32)
        slot = self._scalars((), jnp.int32)
        seen = self._scalars((self.config.vocab_size,), jnp.bool_)
        return self._jit(sampling.setup_slot, (0,)).lower(self.like.state, slot, ids, values, stops, seen)
