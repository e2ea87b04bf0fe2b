"""Runs steps on the device: compiles its programs ahead of time, and keeps cache and slot state there.

Shapes: T token rows, R request rows, S slots, M pages a request, D width, L layers. The programs are in `programs.py`.

Invariants: after `warmup`, no step compiles; cache and state are donated, so they are updated in place; results stay on
the device until someone asks, so that the next step can be sent while this one runs.
"""

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..models.config import DecoderConfig
from ..models.decoder import BLOCKS, split_layers, weight_dtype
from ..sharding.rules import use
from . import sampling
from .batch import Bucket, HostBatch
from .programs import Programs

# A chunk region of this and its multiples by four: short prompts need not pay for long ones.
SMALLEST_CHUNK = 64
# XLA:CPU rounds a row differently in batches of a few rows, and takes about as long for two rows as for eight. With no
# smaller batch, a request's numbers do not depend on how many run beside it. One row alone takes half as long, with a
# rounding of its own: it is used where there is never a neighbour.
FEWEST_ROWS = 8

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
    """One model on its device, or on the devices of a mesh.

    Args:
        params: by name, stacked [L, ...], as checkpoints hold them.
        slots: requests that may run at once. pages_per_request: M. chunk_tokens: prompt tokens a step, at most.
        dtype: of weights, compute and cache.
        mesh: with an axis "tensor", over which heads, feed-forward, vocabulary and cache are cut; None: one device.
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
        mesh: Mesh | None = None,
    ):
        self.config, self.slots, self.pages_per_request = config, slots, pages_per_request
        self.dtype = jnp.dtype(dtype)
        sizes = {"slots": slots, "num_pages": num_pages, "page_size": page_size, "pages_per_request": pages_per_request}
        self._made = Programs(config, dtype=dtype, mesh=mesh, **sizes)
        group = self._made.group
        if group:
            # Slices of a host array cost nothing; a compiled slice for each shape would.
            outside, layers = split_layers(config, {name: np.asarray(array) for name, array in params.items()})
            starts = range(0, config.num_layers, group)
            self._layers = [[self._place(layer, BLOCKS) for layer in layers[start : start + group]] for start in starts]
        else:
            outside, stacks = self._made.split(params)
            self._layers = [self._place(stacks)]
        self._cache_layers = [self._put(places) for places in self._made.places_of_calls]
        self._outside = self._place(outside)
        like = self._made.like
        places = jax.tree.map(lambda x: x.sharding, (like.cache, like.state))
        with use(mesh):  # the layout of the pages is the platform's
            self._cache, self._state = jax.jit(
                lambda: (self._made.empty_cache(), sampling.SlotState.empty(slots, config.vocab_size)),
                out_shardings=None if mesh is None else places,
            )()
        self._programs: dict[tuple[str, Any], Any] = {}
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
        kinds = dict.fromkeys(self._made.kinds_of_calls)
        wanted += itertools.product(("blocks",), itertools.product(reversed(self.buckets), kinds))
        wanted += itertools.product(("begin", "prompt", "select"), reversed(self.buckets))
        wanted.append(("setup", None))
        # Tracing holds the interpreter, compiling does not: two threads keep two cores busy.
        with ThreadPoolExecutor(2) as pool:
            pending = {pool.submit(self._compile, name, bucket): (name, bucket) for name, bucket in wanted}
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
        array = self._put(batch.array)
        self._state, rows_FR, x, ropes = program["begin", bucket](self._outside, self._state, array)
        cache = self._cache
        for layers, places, kinds in zip(self._layers, self._cache_layers, self._made.kinds_of_calls, strict=True):
            x, cache = program["blocks", (bucket, kinds)](layers, places, x, cache, ropes, array)
        self._cache = cache
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

    def _compile(self, name: str, key: Any) -> Any:
        return self._made.lower(name, key).compile()

    def _put(self, array: Any) -> jax.Array:
        return jax.device_put(array, self._made.everywhere())

    def _place(self, params: dict[str, Any], prefix: str = "") -> dict[str, jax.Array]:
        """Parameters in their dtype and place; of one layer, their names lack the `prefix` of the stacks."""
        places = {name: self._made.place_of(prefix + name, bool(prefix)) for name in params}
        return {
            name: jax.device_put(jnp.asarray(array, weight_dtype(name, self.dtype, array.dtype)), places[name])
            for name, array in params.items()
        }
