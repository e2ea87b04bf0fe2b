"""Runs steps on the device: compiles its programs ahead of time, and keeps cache and slot state there.

Shapes: T token rows, R request rows, S slots, M pages a request, D width, L layers, W words of 32 tokens' bits. The
programs are in `programs.py`.

Invariants: after `warmup`, no step compiles; cache and state are donated, so they are updated in place; results stay on
the device until someone asks, so that the next step can be sent while this one runs.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..models.config import RECURRENT, DecoderConfig
from ..models.parameters import BLOCKS, split_layers, weight_dtype
from . import sampling
from .batch import Bucket, HostBatch
from .compiles import fresh_compiles
from .program_store import ProgramStore
from .programs import Programs
from .step_sizes import PIECE, step_sizes

COPIES = 8  # pages of one call of a program that copies them
MOST_COPIED = 4 * COPIES  # pages on their way between device and host
PRODUCTS = ("blocks", "finish", "prompt")  # programs with products of weights


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device.

    Attributes:
        token_R: int32, the sampled tokens.
        logprobs: of the rows that ask for them, as `sampling.top_logprobs` returns them.
    """

    token_R: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class SentStep:
    """A step of which all but the last program is on its way. Steps are finished in the order they were sent.

    Attributes:
        rows_FR, x_RD: the fields and the hidden states of the rows that sample.
        x_TD: the hidden states of all token rows, before the final norm.
    """

    bucket: Bucket
    rows_FR: jax.Array
    x_RD: jax.Array
    x_TD: jax.Array


class Runner:
    """One model on its device, or on the devices of a mesh. It has no weights before `use_params`.

    Args:
        slots: requests that may run at once. pages_per_request: M. chunk_tokens: prompt tokens a step, at most.
        dtype: of weights and compute. cache_dtype: of what is kept of each token; None: the same.
        mesh: with an axis "tensor", over which heads, feed-forward, vocabulary and cache are cut; None: one device.
        host_cache: whether pages are ever copied to the host's memory and back.
        kept: folder in which compiled programs are looked for and kept; None: nowhere.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        slots: int,
        num_pages: int,
        page_size: int,
        pages_per_request: int,
        chunk_tokens: int,
        dtype: Any,
        cache_dtype: Any = None,
        mesh: Mesh | None = None,
        host_cache: bool = False,
        kept: Path | None = None,
    ):
        self.config, self.slots, self.pages_per_request = config, slots, pages_per_request
        self._num_pages, self._host_cache = num_pages, host_cache
        self.dtype = jnp.dtype(dtype)
        sizes = {"slots": slots, "num_pages": num_pages, "page_size": page_size, "pages_per_request": pages_per_request}
        self._made = made = Programs(config, dtype=dtype, cache_dtype=cache_dtype, mesh=mesh, **sizes)
        self._cache: Any = None
        self._state: Any = None
        self._programs: dict[tuple[str, Any], Any] = {}
        self.buckets = [Bucket(*size) for size in step_sizes(slots, chunk_tokens)]
        words, rows = sampling.mask_words(config.vocab_size), {bucket.rows for bucket in self.buckets}
        self._nothing = {size: self._put(np.zeros((size, words), np.int32)) for size in rows}
        self._store: ProgramStore | None = None
        self._making: Future[dict[tuple[str, Any], Any]] | None = None
        self._given_up = False
        self._progress: Callable[[int, int], None] | None = None
        # JAX's own cache is off where machine code that was kept may compute something else (`sharding/platform.py`).
        if kept is not None and jax.config.values["jax_enable_compilation_cache"]:
            devices = self._nothing[self.buckets[0].rows].sharding.device_set if mesh is None else mesh.devices.flat
            identity = (config, self.dtype, made.cache_dtype, mesh, *sizes.items(), self._wanted())
            self._store = ProgramStore(kept, devices, identity)

    def use_params(self, params: dict[str, Any]) -> None:
        """Serves these from the next step on, by name, stacked [L, ...], as checkpoints hold them.

        With the same names and shapes as before, nothing compiles.
        """
        made = self._made
        if made.group:
            # Slices of a host array cost nothing; a compiled slice for each shape would.
            outside, layers = split_layers(self.config, {name: np.asarray(array) for name, array in params.items()})
            placed = [self._place(layer, BLOCKS) for layer in layers]
        else:
            outside, stacks = made.split(params)
            placed = self._place(stacks)
        self._outside = self._place(outside)

        def call(bucket: Bucket, layers: range) -> tuple[Any, Any, jax.Array]:
            own = placed[layers.start : layers.stop] if isinstance(placed, list) else placed
            return self._blocks(bucket, layers), own, self._put(made.places_of(layers))

        # The calls of the blocks in a step: program, its layers' parameters, and which of the cache's they have.
        self._calls = {bucket: [call(bucket, layers) for layers in made.calls_of(bucket)] for bucket in self.buckets}

    def bucket_for(self, rows: int, chunk: int) -> Bucket:
        """The cheapest bucket that holds so many request rows and chunk tokens."""
        return next(b for b in self.buckets if b.rows >= rows and b.chunk >= chunk)

    def begin(self) -> None:
        """Begins to make every program, in threads: weights may be loaded meanwhile. `warmup` waits for them."""
        pool = ThreadPoolExecutor(1)
        self._making = pool.submit(self._make)
        pool.shutdown(wait=False)

    def give_up(self) -> None:
        """Ends what was begun, but for programs that are being compiled."""
        self._given_up = True

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Makes every program, and runs them. `progress(done, total)` is called after each that is compiled.

        On a CPU the cheapest bucket alone is run: the others would take a second, and the first run prepares nothing.
        """
        self._progress = progress
        if self._making is None:
            self.begin()
        assert self._making is not None
        self._programs, self._making = self._making.result(), None
        for bucket in self.buckets[:1] if self._made.group else self.buckets:
            sent = self.send(bucket, self.batch(bucket))
            more = self.logprobs_of(sent, [0], [0]), self.hidden_of(sent, [0])
            jax.block_until_ready((self.finish(sent).token_R, more))

    def batch(self, bucket: Bucket) -> HostBatch:
        """A fresh batch to fill. Never reused: the device may still be reading the last one."""
        return HostBatch(bucket, self.pages_per_request, self.slots)

    def dispatch(self, bucket: Bucket, batch: HostBatch) -> StepResult:
        """Sends a whole step and returns at once."""
        return self.finish(self.send(bucket, batch))

    def send(self, bucket: Bucket, batch: HostBatch) -> SentStep:
        """Sends a step but for its sampling, and returns at once: what may be sampled need not be known yet."""
        program = self._programs
        self._state, array, rows_FR, x, ropes = program["begin", bucket](self._outside, self._state, batch.array)
        cache = self._cache
        for blocks, layers, places in self._calls[bucket]:
            x, cache = program[blocks](layers, places, x, cache, ropes, array)
        self._cache = cache
        # Where all rows are of requests, each samples.
        x_RD = program["select", bucket](array, x) if bucket.chunk else x
        return SentStep(bucket, rows_FR, x_RD, x)

    def logprobs_of(self, sent: SentStep, rows: Sequence[int], next_ids: Sequence[int]) -> list[Any]:
        """Begins to compute how likely the tokens `next_ids` are after these token rows of a step.

        As `sampling.top_logprobs` has them, in pieces: `joined` waits for them.
        """
        next_N = np.zeros(-(-len(rows) // PIECE) * PIECE, np.int32)
        next_N[: len(rows)] = next_ids
        pieces = self._taken(sent, rows)
        prompt = self._programs["prompt", PIECE]
        return [prompt(self._outside, x_ND, own) for x_ND, own in zip(pieces, next_N.reshape(-1, PIECE), strict=True)]

    def hidden_of(self, sent: SentStep, rows: Sequence[int]) -> list[Any]:
        """Begins to compute the final hidden states of these token rows of a step, [N, D] in float32, in pieces."""
        return [self._programs["hidden", PIECE](self._outside, x_ND) for x_ND in self._taken(sent, rows)]

    def _taken(self, sent: SentStep, rows: Sequence[int]) -> Iterator[jax.Array]:
        take = self._programs["take", sent.bucket]
        for start in range(0, len(rows), PIECE):
            row_N = np.zeros(PIECE, np.int32)
            part = rows[start : start + PIECE]
            row_N[: len(part)] = part
            yield take(sent.x_TD, row_N)

    @staticmethod
    def joined(pieces: list[Any]) -> Any:
        """Waits for pieces, and joins them. What is past the rows that were asked for means nothing."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(pieces))

    def finish(self, sent: SentStep, allowed_RW: np.ndarray | None = None) -> StepResult:
        """Sends the sampling of the step that was sent last. `allowed_RW`: for its rows with GRAMMAR."""
        rows = sent.bucket.rows
        allowed = self._nothing[rows] if allowed_RW is None else self._put(allowed_RW)
        finish = self._programs["finish", rows]
        self._state, token_R, logprobs = finish(self._outside, self._state, sent.rows_FR, sent.x_RD, allowed)
        return StepResult(token_R, logprobs)

    def setup_slot(self, slot: int, bias: dict[int, float], stops: list[int], seen: list[int]) -> None:
        """Prepares what is kept for a slot, ahead of the step that admits its request."""
        vocab_size = self.config.vocab_size
        ids = np.full((sampling.MAX_BIAS,), vocab_size, np.int32)
        values = np.zeros((sampling.MAX_BIAS,), np.float32)
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        held = np.full((sampling.MAX_STOPS,), vocab_size, np.int32)
        held[: len(stops)] = stops
        seen_V = np.zeros((vocab_size,), bool)
        seen_V[seen] = True
        self._state = self._programs["setup", None](self._state, np.int32(slot), ids, values, held, seen_V)

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies whole pages, (from, to), after all steps that were sent."""
        for start in range(0, len(copies), COPIES):
            pages = np.zeros((2, COPIES), np.int32)
            pages[1] = self._num_pages  # past the end: not written
            part = copies[start : start + COPIES]
            pages[:, : len(part)] = np.transpose(part)
            self._cache = self._programs["copy", COPIES](self._cache, *map(self._put, pages))

    def read_pages(self, pages: Sequence[int]) -> list[Any]:
        """Copies of pages as they are after all steps that were sent, one each. The last few may still be on the
        device: `to_host` has them."""
        found: list[Any] = []
        for start in range(0, len(pages), COPIES):
            if start >= MOST_COPIED:  # what waits on the device takes room there
                done = slice(start - MOST_COPIED, start - MOST_COPIED + COPIES)
                found[done] = self.to_host(found[done])
            part = pages[start : start + COPIES]
            page_N = np.asarray([*part, *[0] * (COPIES - len(part))], np.int32)
            copies = self._programs["read", COPIES](self._cache, self._put(page_N))[: len(part)]
            jax.tree.map(lambda x: x.copy_to_host_async(), copies)
            found += copies
        return found

    @staticmethod
    def to_host(copies: Sequence[Any]) -> list[Any]:
        """Waits for copies of `read_pages`; what they take on the device is free then."""
        return jax.device_get(list(copies))

    def write_pages(self, copies: Sequence[Any], pages: Sequence[int]) -> None:
        """What `read_pages` gave is written to these pages, after all steps that were sent."""
        for start in range(0, len(pages), COPIES):
            if start and start % MOST_COPIED == 0:
                jax.block_until_ready(self._cache)
            part = list(copies[start : start + COPIES])
            to_N = np.full(COPIES, self._num_pages, np.int32)  # past the end: not written
            to_N[: len(part)] = pages[start : start + COPIES]
            part = jax.device_put(part + part[-1:] * (COPIES - len(part)), self._made.cache_place())
            self._cache = self._programs["write", COPIES](self._cache, part, self._put(to_N))

    def page_seconds(self) -> float:
        """That a page takes to be copied to the host or back, on an idle device."""
        for _ in range(2):  # the first touches new memory
            start = time.perf_counter()
            copies = self.to_host(self.read_pages([0] * COPIES))
            self.write_pages(copies, [self._num_pages] * COPIES)
            jax.block_until_ready(self._cache)
            seconds = time.perf_counter() - start
        return seconds / (2 * COPIES)

    def _decide_weights_first(self) -> None:
        """They are read first on a CPU, if rows are rounded alike then in all steps."""
        if self._made.group == 0 or self._made.mesh is not None or self.dtype != jnp.float32:
            return
        from .rounding import products_of, rounds_alike

        counts = {count for bucket in self.buckets for count in (bucket.rows, bucket.tokens)} | {PIECE}
        self._made.weights_first = rounds_alike(counts, products_of(self.config))

    def _start_empty(self, program: Any) -> None:
        self._cache = self._state = None  # never two
        self._cache, self._state = program()

    def _wanted(self) -> list[tuple[str, Any]]:
        """Names and keys of all programs, that of `_start_empty` first.

        Then come those without products, which need not wait for `_decide_weights_first`; of the others the slowest
        to compile, so that the two threads end together.
        """
        wanted: list[tuple[str, Any]] = [("empty", None)]
        wanted += [("begin", bucket) for bucket in self.buckets]
        wanted += [("finish", rows) for rows in sorted({bucket.rows for bucket in self.buckets})]
        wanted += dict.fromkeys(
            self._blocks(bucket, layers) for bucket in reversed(self.buckets) for layers in self._made.calls_of(bucket)
        )
        wanted += [("prompt", PIECE), ("hidden", PIECE), ("setup", None)]
        wanted += [("select", bucket) for bucket in self.buckets if bucket.chunk]
        wanted += [("take", bucket) for bucket in self.buckets]
        if not all(mixer in RECURRENT for mixer in self.config.mixers):
            wanted.append(("copy", COPIES))
        if self._host_cache:
            wanted += [("read", COPIES), ("write", COPIES)]
        return wanted

    def _blocks(self, bucket: Bucket, layers: range) -> tuple[str, Any]:
        """Name and key of the program of these layers."""
        return "blocks", (bucket, self._made.kinds_of(layers))

    def _make(self) -> dict[tuple[str, Any], Any]:
        """Every program by name and key, as an earlier start kept it or compiled; and the empty cache."""
        wanted = self._wanted()
        # The cache is made while the other programs are loaded or compiled: writing it takes as long as to load them.
        programs = None if self._store is None else self._store.load(self._start_empty)
        if programs is not None:
            self._say(len(wanted), len(wanted))
        elif self._store is None:
            programs = self._compile(wanted)
        else:
            with fresh_compiles():
                programs = self._compile(wanted)
            self._store.keep(programs)
        return dict(zip(wanted, programs, strict=True))

    def _compile(self, wanted: list[tuple[str, Any]]) -> list[Any]:
        # Tracing holds the interpreter, compiling does not: two threads keep two cores busy.
        with ThreadPoolExecutor(2) as pool:
            decided = pool.submit(self._decide_weights_first)

            def compiled(name: str, key: Any) -> Any:
                if self._given_up:
                    raise RuntimeError("nobody waits for the programs any more")
                if name in PRODUCTS:
                    decided.result()
                program = self._made.lower(name, key).compile(self._made.compiler_options(name))
                if name == "empty":
                    self._start_empty(program)
                return program

            pending = [pool.submit(compiled, *one) for one in wanted]
            for done, future in enumerate(as_completed(pending), 1):
                future.result()
                self._say(done, len(wanted))
        return [future.result() for future in pending]

    def _say(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    def _put(self, array: Any) -> jax.Array:
        return jax.device_put(array, self._made.everywhere())

    def _place(self, params: dict[str, Any], prefix: str = "") -> dict[str, jax.Array]:
        """Parameters in their dtype and place; of one layer, their names lack the `prefix` of the stacks."""
        places = {name: self._made.place_of(prefix + name, bool(prefix)) for name in params}
        return {
            name: jax.device_put(jnp.asarray(array, weight_dtype(name, self.dtype, array.dtype)), places[name])
            for name, array in params.items()
        }
