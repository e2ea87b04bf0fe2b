"""Runs steps on the device: compiles its programs ahead of time, and keeps cache and slot state there.

Shapes: T token rows, R request rows, S slots, V vocabulary, M pages a request, D width, L layers.

A step is a few programs: `begin` (unpack, embed), the blocks, `select` (the rows that sample) and `finish` (unembed,
sample), the last one for each number of request rows and not of tokens. On accelerators the blocks are one program, a
scan over stacked weights. On a CPU they are one program of a few layers, called for each group of them: XLA:CPU copies
each weight that a scan slices from a stack, which doubles the time of a decode step; all unrolled into one program they
run as fast, but compile L times as long.

Invariants: after `warmup`, no step compiles; cache and state are donated, so they are updated in place; results stay on
the device until someone asks, so that the next step can be sent while this one runs.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.config import DecoderConfig
from ..models.decoder import functional, split_layers, weight_dtype
from ..pallas_kernels.paged_attention import init_pages
from . import sampling
from .batch import Bucket, DeviceBatch, HostBatch, sampling_rows, unpack

# A chunk region of this and its multiples by four: short prompts need not pay for long ones.
SMALLEST_CHUNK = 64
# XLA:CPU rounds a row differently in batches of a few rows, and takes about as long for two rows as for eight. With no
# smaller batch, a request's numbers do not depend on how many run beside it. One row alone takes half as long, with a
# rounding of its own: it is used where there is never a neighbour.
FEWEST_ROWS = 8
# Layers of one program on a CPU, where that divides them: a call costs the host 0.07 ms, a layer 0.5 s to compile.
CPU_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device.

    Attributes:
        token_R: int32, the sampled tokens.
        logprobs: of the rows that ask for them, as `sampling.top_logprobs` returns them.
        prompt_logprobs: computes those of the prompt's next tokens, for all T rows.
    """

    token_R: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array]
    prompt_logprobs: Callable[[], tuple[jax.Array, jax.Array, jax.Array]]


def ladder(smallest: int, largest: int, factor: int) -> list[int]:
    """smallest, smallest * factor, ... and then `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return [*sizes, largest]


class Runner:
    """One model on its device.

    Args:
        params: by name, stacked [L, ...], as checkpoints hold them.
        slots: requests that may run at once. pages_per_request: M. chunk_tokens: prompt tokens a step, at most.
        dtype: of weights, compute and cache.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: dict[str, Any],
        *,
        slots: int,
        num_pages: int,
        page_size: int,
        pages_per_request: int,
        chunk_tokens: int,
        dtype: Any,
    ):
        self.config, self.slots, self.pages_per_request = config, slots, pages_per_request
        self.dtype = jnp.dtype(dtype)
        self._model = functional(config, dtype=self.dtype)
        if jax.default_backend() == "cpu":
            # Slices of a host array cost nothing; a compiled slice for each shape would.
            outside, layers = split_layers({name: np.asarray(array) for name, array in params.items()})
            group = math.gcd(CPU_LAYERS, config.num_layers)
            starts = range(0, config.num_layers, group)
            self._layers = [[self._place(layer) for layer in layers[start : start + group]] for start in starts]
            self._indices = [jnp.asarray(start, jnp.int32) for start in starts]
        else:
            outside = {name: array for name, array in params.items() if not name.startswith("blocks.")}
            self._layers = [self._place({name: array for name, array in params.items() if name not in outside})]
            self._indices = [jnp.zeros((), jnp.int32)]
        self._outside = self._place(outside)
        self._pages = init_pages(
            config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, jnp.dtype(dtype)
        )
        self._state = sampling.SlotState.empty(slots, config.vocab_size)
        self._programs: dict[tuple[str, Bucket | int | None], Any] = {}
        self._begun_shapes: dict[Bucket, Any] = {}
        rows = [1] if slots == 1 else ladder(FEWEST_ROWS, max(slots, FEWEST_ROWS), 4)
        chunks = ladder(SMALLEST_CHUNK, max(chunk_tokens, SMALLEST_CHUNK), 4)
        # A chunk dwarfs decode rows, so with one there is no gain from fewer of these.
        self.buckets = [Bucket(size, 0) for size in rows] + [Bucket(rows[-1], size) for size in chunks]

    def bucket_for(self, rows: int, chunk: int) -> Bucket:
        """The cheapest bucket that holds so many request rows and chunk tokens."""
        return next(b for b in self.buckets if b.rows >= rows and b.chunk >= chunk)

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program and runs each bucket once. `progress(done, total)` is called after each program."""
        wanted: list[tuple[str, Any]] = [("finish", rows) for rows in sorted({bucket.rows for bucket in self.buckets})]
        # The slowest to compile go first, so that the two threads end together.
        wanted += itertools.product(("blocks", "begin", "prompt", "select"), reversed(self.buckets))
        wanted.append(("setup", None))
        # Tracing holds the interpreter, compiling does not: two threads keep two cores busy.
        with ThreadPoolExecutor(2) as pool:
            pending = {
                pool.submit(getattr(self, f"_compile_{name}"), bucket): (name, bucket) for name, bucket in wanted
            }
            for done, future in enumerate(as_completed(pending), 1):
                self._programs[pending[future]] = future.result()
                if progress:
                    progress(done, len(wanted))
        for bucket in self.buckets:
            result = self.dispatch(bucket, self.batch(bucket))
            jax.block_until_ready((result.token_R, result.prompt_logprobs()))

    def batch(self, bucket: Bucket) -> HostBatch:
        """A fresh batch to fill. Never reused: the device may still be reading the last one."""
        return HostBatch(bucket, self.pages_per_request, self.slots)

    def dispatch(self, bucket: Bucket, batch: HostBatch) -> StepResult:
        """Sends a step and returns at once."""
        program = self._programs
        array = jax.device_put(batch.array)
        self._state, rows_FR, x, rope = program["begin", bucket](self._outside, self._state, array)
        blocks, pages = program["blocks", bucket], self._pages
        for layers, index in zip(self._layers, self._indices, strict=True):
            x, pages = blocks(layers, index, x, pages, rope, array)
        self._pages = pages
        x_RD = program["select", bucket](array, x)
        self._state, token_R, logprobs = program["finish", bucket.rows](self._outside, self._state, rows_FR, x_RD)
        return StepResult(token_R, logprobs, lambda: program["prompt", bucket](self._outside, array, x))

    def setup_slot(self, slot: int, bias: dict[int, float], stops: list[int]) -> None:
        """Prepares what is kept for a slot, ahead of the step that admits its request."""
        vocab_size = self.config.vocab_size
        ids = np.full((sampling.MAX_BIAS,), vocab_size, np.int32)
        values = np.zeros((sampling.MAX_BIAS,), np.float32)
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        held = np.full((sampling.MAX_STOPS,), vocab_size, np.int32)
        held[: len(stops)] = stops
        self._state = self._programs["setup", None](self._state, np.int32(slot), ids, values, held)

    def _place(self, params: dict[str, Any]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(jnp.asarray(array, weight_dtype(name, self.dtype))) for name, array in params.items()
        }

    # -- programs: what they compute, and the shapes they are compiled for --------------------------------------------

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
        self, bucket: Bucket, layers: Any, index: Any, x_TD: jax.Array, pages: Any, rope: Any, array: jax.Array
    ) -> Any:
        context = self._unpack(bucket, array).context
        if jax.default_backend() == "cpu":
            for nth, one in enumerate(layers):
                x_TD, pages, _ = self._model.block(one)(x_TD, rope, context, pages, index + nth)
            return x_TD, pages
        return self._model.bind(layers).run_blocks(x_TD, rope, context, pages)[:2]

    def _select(self, bucket: Bucket, array: jax.Array, x_TD: jax.Array) -> jax.Array:
        return x_TD[self._unpack(bucket, array).sample_row]

    def _finish(self, outside: Any, state: sampling.SlotState, rows_FR: jax.Array, x_RD: jax.Array) -> Any:
        model, rows = self._model.bind(outside), sampling_rows(rows_FR)
        logits_RV = model.unembed(model.final_norm(x_RD))
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
        logits_TV = model.unembed(model.final_norm(x_TD))
        return sampling.top_logprobs(logits_TV, self._unpack(bucket, array).tokens["next"])

    def _begun(self, bucket: Bucket) -> Any:
        """Shapes of what `begin` returns, without the state. Kept: tracing is most of a warm start."""
        if bucket not in self._begun_shapes:
            arguments = (*_abstract((self._outside, self._state)), self._array(bucket))
            self._begun_shapes[bucket] = jax.eval_shape(partial(self._begin, bucket), *arguments)[1:]
        return self._begun_shapes[bucket]

    def _array(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((bucket.size(self.pages_per_request),), jnp.int32)

    def _compile_begin(self, bucket: Bucket) -> Any:
        program = jax.jit(partial(self._begin, bucket), donate_argnums=1)
        return program.lower(*_abstract((self._outside, self._state)), self._array(bucket)).compile()

    def _compile_blocks(self, bucket: Bucket) -> Any:
        _, x_TD, rope = self._begun(bucket)
        program = jax.jit(partial(self._blocks, bucket), donate_argnums=(2, 3))
        layers, index, pages = _abstract((self._layers[0], self._indices[0], self._pages))
        return program.lower(layers, index, x_TD, pages, rope, self._array(bucket)).compile()

    def _compile_select(self, bucket: Bucket) -> Any:
        return jax.jit(partial(self._select, bucket)).lower(self._array(bucket), self._begun(bucket)[1]).compile()

    def _compile_finish(self, count: int) -> Any:
        rows_FR = self._begun(Bucket(count, 0))[0]
        x_RD = jax.ShapeDtypeStruct((count, self.config.hidden_size), self.dtype)
        program = jax.jit(self._finish, donate_argnums=1)
        return program.lower(*_abstract((self._outside, self._state)), rows_FR, x_RD).compile()

    def _compile_prompt(self, bucket: Bucket) -> Any:
        program = jax.jit(partial(self._prompt, bucket))
        return program.lower(_abstract(self._outside), self._array(bucket), self._begun(bucket)[1]).compile()

    def _compile_setup(self, _: None) -> Any:
        program = jax.jit(sampling.setup_slot, donate_argnums=0)
        ids = jax.ShapeDtypeStruct((sampling.MAX_BIAS,), jnp.int32)
        values = jax.ShapeDtypeStruct((sampling.MAX_BIAS,), jnp.float32)
        stops = jax.ShapeDtypeStruct((sampling.MAX_STOPS,), jnp.int32)
        return program.lower(_abstract(self._state), jax.ShapeDtypeStruct((), jnp.int32), ids, values, stops).compile()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
