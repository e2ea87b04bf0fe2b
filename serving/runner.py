"""Runs steps on the device: compiles one program a bucket, ahead of time, and keeps cache and slot state there.

Shapes: T token rows, R request rows, S slots, V vocabulary, M pages a request.

Invariants: after `warmup`, no step compiles; cache and state are donated, so they are updated in place; results stay on
the device until someone asks, so that the next step can be sent while this one runs.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.config import DecoderConfig
from ..models.decoder import functional, unstack_params
from ..pallas_kernels.paged_attention import init_pages
from . import sampling
from .batch import Bucket, HostBatch, unpack

# A chunk region of this and its multiples by four: short prompts need not pay for long ones.
SMALLEST_CHUNK = 16
# From two rows up XLA:CPU gives a row the same bits at any batch size; one row takes another path.
FEWEST_ROWS = 2


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device: shapes as in `sampling.top_logprobs`, for rows and for tokens."""

    token_R: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array]
    prompt_logprobs: tuple[jax.Array, jax.Array, jax.Array]


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
        stacked = jax.default_backend() != "cpu"  # see Decoder
        self._model = functional(config, dtype=jnp.dtype(dtype), stacked=stacked)
        held = {name: np.asarray(array) if not stacked else array for name, array in params.items()}
        self._params = {
            name: jax.device_put(jnp.asarray(array, dtype=dtype))
            for name, array in (held if stacked else unstack_params(held)).items()
        }
        self._pages = init_pages(
            config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, jnp.dtype(dtype)
        )
        self._state = sampling.SlotState.empty(slots, config.vocab_size)
        self._compiled: dict[Bucket, Any] = {}
        self._setup: Any = None
        rows = ladder(FEWEST_ROWS, max(slots, FEWEST_ROWS), 4)
        chunks = ladder(SMALLEST_CHUNK, max(chunk_tokens, SMALLEST_CHUNK), 4)
        # A chunk dwarfs decode rows, so with one there is no gain from fewer of these.
        self.buckets = [Bucket(size, 0) for size in rows] + [Bucket(rows[-1], size) for size in chunks]

    def bucket_for(self, rows: int, chunk: int) -> Bucket:
        """The cheapest bucket that holds so many request rows and chunk tokens."""
        return next(b for b in self.buckets if b.rows >= rows and b.chunk >= chunk)

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program and runs each once. `progress(done, total)` is called after each."""
        total = len(self.buckets) + 1
        with ThreadPoolExecutor(2) as pool:
            pending = {pool.submit(self._compile, bucket): bucket for bucket in self.buckets}
            pending[pool.submit(self._compile_setup)] = None
            for done, future in enumerate(as_completed(pending), 1):
                bucket, compiled = pending[future], future.result()
                if bucket is None:
                    self._setup = compiled
                else:
                    self._compiled[bucket] = compiled
                if progress:
                    progress(done, total)
        for bucket in self.buckets:
            jax.block_until_ready(self.dispatch(bucket, self.batch(bucket)).token_R)

    def batch(self, bucket: Bucket) -> HostBatch:
        """A fresh batch to fill. Never reused: the device may still be reading the last one."""
        return HostBatch(bucket, self.pages_per_request, self.slots)

    def dispatch(self, bucket: Bucket, batch: HostBatch) -> StepResult:
        """Sends a step and returns at once."""
        self._pages, self._state, result = self._compiled[bucket](self._params, self._pages, self._state, batch.array)
        return StepResult(*result)

    def setup_slot(self, slot: int, bias: dict[int, float], stops: list[int]) -> None:
        """Prepares what is kept for a slot, ahead of the step that admits its request."""
        vocab_size = self.config.vocab_size
        ids = np.full((sampling.MAX_BIAS,), vocab_size, np.int32)
        values = np.zeros((sampling.MAX_BIAS,), np.float32)
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        held = np.full((sampling.MAX_STOPS,), vocab_size, np.int32)
        held[: len(stops)] = stops
        self._state = self._setup(self._state, np.int32(slot), ids, values, held)

    def _compile(self, bucket: Bucket) -> Any:
        array = jax.ShapeDtypeStruct((bucket.size(self.pages_per_request),), jnp.int32)
        step = jax.jit(self._step(bucket), donate_argnums=(1, 2))
        return step.lower(*jax.tree.map(_abstract, (self._params, self._pages, self._state)), array).compile()

    def _compile_setup(self) -> Any:
        shapes = (
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((sampling.MAX_BIAS,), jnp.int32),
            jax.ShapeDtypeStruct((sampling.MAX_BIAS,), jnp.float32),
            jax.ShapeDtypeStruct((sampling.MAX_STOPS,), jnp.int32),
        )
        setup = jax.jit(sampling.setup_slot, donate_argnums=0)
        return setup.lower(jax.tree.map(_abstract, self._state), *shapes).compile()

    def _step(self, bucket: Bucket) -> Callable[..., Any]:
        model, slots = self._model, self.slots
        top = min(sampling.MAX_TOP, self.config.vocab_size)

        def nothing(rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            return jnp.zeros((rows,)), jnp.zeros((rows, top), jnp.int32), jnp.zeros((rows, top))

        def step(params: Any, pages: Any, state: sampling.SlotState, array: jax.Array) -> Any:
            batch = unpack(array, bucket, self.pages_per_request)
            slot_T, next_T = batch.tokens["slot"], batch.tokens["next"]
            given_T = batch.tokens["token"]
            token_T = jnp.where(given_T < 0, state.last_token_S[jnp.minimum(slot_T, slots - 1)], given_T)
            # Not a number that any row could read: a row whose logits were not finite ends before it is fed again.
            token_T = jnp.maximum(token_T, 0)
            state = sampling.record_tokens(state, batch.rows, token_T, slot_T, batch.tokens["generated"] == 1)
            hidden_TD, pages = model.hidden(params, token_T, batch.context, pages)
            logits_RV = model.unembed(params, hidden_TD[batch.sample_row])
            token_R = sampling.sample(logits_RV, batch.rows, state)
            last = state.last_token_S.at[batch.rows.slot].set(token_R, mode="drop")
            state = dataclasses.replace(state, last_token_S=last)
            logprobs = jax.lax.cond(
                jnp.any(batch.rows.has(sampling.LOGPROBS)),
                lambda: sampling.top_logprobs(logits_RV, token_R),
                lambda: nothing(bucket.rows),
            )
            prompt_logprobs = jax.lax.cond(
                jnp.any(next_T >= 0),
                lambda: sampling.top_logprobs(model.unembed(params, hidden_TD), next_T),
                lambda: nothing(bucket.tokens),
            )
            return pages, state, (token_R, logprobs, prompt_logprobs)

        return step


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
