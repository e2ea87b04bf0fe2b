"""The decode engine: continuous batching over a paged cache.

A step is a sentence: plan = schedule(); batch = pack(plan); result = dispatch(batch); commit(result). The next step is
sent while this one runs: what it feeds that the host has not seen yet, it takes from the device.
"""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints.load import LoadedModel, load_model
from ..models.cache import page_bytes
from ..models.decoder import weight_dtype
from . import sampling
from .batch import TOKEN, HostBatch
from .compiles import CompileCounter, use_compile_cache
from .detokenizer import Detokenizer
from .fit import keeps_prefixes, mesh_of
from .request import InvalidRequest, Output, Request, SamplingParams, TokenLogprob
from .runner import Runner, StepResult
from .scheduler import Entry, Scheduler, SchedulerConfig, Sequence, StepPlan


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_running: requests decoded at once.
        page_size: tokens a page of the cache.
        max_model_len: tokens of prompt and output together, at most; None: what the model was made for.
        num_pages: pages of the cache; None: enough for max_running full contexts, within cache_bytes.
        cache_bytes: size of the cache, at most, when num_pages is None.
        chunk_tokens: prompt tokens a step, at most.
        max_waiting: requests that may wait.
        dtype: "float32" or "bfloat16"; None: float32 on a CPU, bfloat16 elsewhere.
        prefix_cache: what goes first from the cache of prompts that were computed before (`kv_policies`); "": no such
            cache. Models that keep a state, or whose rope hangs on the prompt's length, have none.
        plan: "tensor=4" cuts the model and its cache over four devices; empty: one device.
        compile_cache: folder for compiled programs; None: the user's cache folder; "": none.
    """

    max_running: int = 8
    page_size: int = 64
    max_model_len: int | None = None
    num_pages: int | None = None
    cache_bytes: int = 1 << 30
    chunk_tokens: int = 256
    max_waiting: int = 256
    dtype: str | None = None
    prefix_cache: str = "lru"
    plan: str = ""
    compile_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is there now. `host_seconds`: Python's share of the steps, without waiting."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    queried_tokens: int
    cached_tokens: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    compiles_after_warmup: int
    host_seconds: float


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request of `Engine.generate`."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclasses.dataclass(slots=True)
class _Live:
    """What the engine knows of a request beside the scheduler's state."""

    request: Request
    detokenizer: Detokenizer
    stops: frozenset[int]
    flags: int
    seed_high: int
    seed_low: int
    prompt_logprobs: list[TokenLogprob | None] | None
    prompt_sent: bool = False
    let_in: int = 0  # tokens that it had when its first chunk was sent, last time
    cached: int = 0  # of its prompt, found when it was let in for the first time


@dataclasses.dataclass(slots=True)
class _Flight:
    """A step on its way: request rows and token rows of the plan's entries, in the plan's order."""

    plan: StepPlan
    result: StepResult
    rows: list[tuple[Entry, int, int]]


def _dtype(config: EngineConfig) -> jnp.dtype:
    return jnp.dtype(config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


class Engine:
    """Serves one model. Not thread-safe: one thread calls `add`, `cancel` and `step`.

    Raises ValueError when the limits do not fit the model or each other.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None):
        config = config or EngineConfig()
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.source} has no tokenizer, which serving needs; copy its tokenizer.json there.")
        self.loaded, self.config, self.tokenizer = loaded, config, loaded.tokenizer
        model = loaded.config
        dtype = _dtype(config)
        self.max_model_len = config.max_model_len or model.max_position_embeddings
        if not 2 <= self.max_model_len <= model.max_position_embeddings:
            raise ValueError(
                f"max_model_len is from 2 to the model's context of {model.max_position_embeddings}; "
                f"got {self.max_model_len}."
            )
        use_compile_cache(config.compile_cache)
        pages_per_request = -(-self.max_model_len // config.page_size)
        num_pages = config.num_pages or self._pages_within(config, pages_per_request, dtype)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running=config.max_running,
                page_size=config.page_size,
                num_pages=num_pages,
                max_model_len=self.max_model_len,
                chunk_tokens=config.chunk_tokens,
                max_waiting=config.max_waiting,
                prefix_cache=config.prefix_cache if config.prefix_cache and keeps_prefixes(model) else None,
            )
        )
        self.runner = Runner(
            model,
            loaded.params,
            slots=config.max_running,
            num_pages=num_pages,
            page_size=config.page_size,
            pages_per_request=pages_per_request,
            chunk_tokens=config.chunk_tokens,
            dtype=dtype,
            mesh=mesh_of(config.plan, model),
        )
        self._live: dict[str, _Live] = {}
        self._flight: _Flight | None = None
        self._compiles = CompileCounter()
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._host_seconds = 0.0
        self._ids = itertools.count()

    @classmethod
    def from_path(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """An engine for a Twinax checkpoint or a Hugging Face folder, not warmed up yet.

        Parameters go from the files straight to their devices, in the dtype that they are served in.
        """
        config = config or EngineConfig()
        mesh, dtype = partial(mesh_of, config.plan), partial(weight_dtype, dtype=_dtype(config))
        return cls(load_model(path, dtype=dtype, mesh=mesh), config)

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles all programs; a compile after this is a bug, which `stats` counts."""
        self.runner.warmup(progress)
        self._compiles.reset()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def stats(self) -> EngineStats:
        now = self.scheduler.stats()
        return EngineStats(
            running=now.running,
            waiting=now.waiting,
            pages_used=now.pages_used,
            pages_total=now.pages_total,
            queried_tokens=now.queried_tokens,
            cached_tokens=now.cached_tokens,
            preemptions=now.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            compiles_after_warmup=self._compiles.count,
            host_seconds=self._host_seconds,
        )

    def add(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequest (names the field) or QueueFull."""
        params = request.params
        request.validate(self.loaded.config.vocab_size, self.max_model_len)
        if len(params.logit_bias) > sampling.MAX_BIAS:
            raise InvalidRequest(
                "logit_bias",
                f"logit_bias has at most {sampling.MAX_BIAS} entries, got {len(params.logit_bias)}; leave some out",
            )
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids())
        self.scheduler.add(request)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        self._live[request.id] = _Live(
            request=request,
            detokenizer=Detokenizer(self.tokenizer, list(params.stop)),
            stops=stops,
            flags=(sampling.LOGPROBS if params.logprobs is not None else 0)
            | (sampling.PENALTIES if penalties else 0)
            | (sampling.BIAS if params.logit_bias else 0),
            seed_high=_signed(seed >> 32),
            seed_low=_signed(seed),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        self._prompt_tokens += len(request.prompt_ids)

    def cancel(self, request_id: str) -> bool:
        """Ends a request at once and frees its pages; False if it is not live."""
        self._live.pop(request_id, None)
        return self.scheduler.cancel(request_id)

    def step(self) -> list[Output]:
        """Sends the next step and returns what the one before it produced (so the first call returns nothing)."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        flight = self._launch(plan) if plan else None
        previous, self._flight = self._flight, flight
        self._host_seconds += time.perf_counter() - start
        return self._collect(previous) if previous else []

    def generate(
        self,
        prompts: Collection[str | list[int]],
        params: SamplingParams | Collection[SamplingParams],
    ) -> list[Completion]:
        """Completes all prompts, batched; in their order. One set of parameters, or one a prompt."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests = []
        for prompt, own in zip(prompts, each, strict=True):
            ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos) if isinstance(prompt, str) else prompt
            requests.append(Request(f"generate-{next(self._ids)}", list(ids), own))
        outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
        queue = iter(requests)
        waiting = next(queue, None)
        try:
            while waiting or self.has_work:
                while waiting and len(self.scheduler.waiting) < self.config.max_waiting:
                    self.add(waiting)
                    waiting = next(queue, None)
                for output in self.step():
                    outputs.setdefault(output.request_id, []).append(output)
        finally:
            for request in requests:
                self.cancel(request.id)
        return [_completion(request, outputs[request.id]) for request in requests]

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> _Flight:
        for sequence in plan.admitted:
            self._prepare_slot(self._live[sequence.id].request, sequence.slot)
        bucket = self.runner.bucket_for(len(plan.decodes) + len(plan.chunks), plan.chunk_tokens)
        batch = self.runner.batch(bucket)
        rows: list[tuple[Entry, int, int]] = []
        free = bucket.rows
        for row, entry in enumerate(plan.entries):
            token_row = row if entry.length == 1 else free
            free += entry.length if entry.length > 1 else 0
            self._pack(batch, entry, row, token_row)
            rows.append((entry, row, token_row))
        self._steps += 1
        return _Flight(plan, self.runner.dispatch(bucket, batch), rows)

    def _pack(self, batch: HostBatch, entry: Entry, row: int, token_row: int) -> None:
        """Writes one entry's request row and token rows."""
        sequence, start, length = entry.sequence, entry.start, entry.length
        live = self._live[sequence.id]
        params, prompt, output = live.request.params, sequence.prompt_ids, sequence.output_ids
        end = start + length
        span = slice(token_row, token_row + length)
        known = prompt[start:end] + output[max(start - len(prompt), 0) : max(end - len(prompt), 0)]
        tokens = batch.tokens
        tokens[TOKEN["token"], span] = known + [-1] * (length - len(known))
        tokens[TOKEN["position"], span] = range(start, end)
        tokens[TOKEN["slot"], span] = entry.slot
        if end > len(prompt):
            tokens[TOKEN["generated"], token_row + max(len(prompt) - start, 0) : token_row + length] = 1
        if live.prompt_logprobs is not None:
            targets = prompt[start + 1 : end + 1]
            tokens[TOKEN["next"], token_row : token_row + len(targets)] = targets
        if start == sequence.num_cached:
            live.let_in = len(prompt) + len(output)
            live.cached = live.cached if sequence.preemptions else sequence.num_cached
        flags = live.flags | (sampling.RESET if start == sequence.num_cached else 0)
        if end - len(prompt) < params.min_tokens:
            flags |= sampling.HOLD_STOPS
        integers = (
            entry.slot, flags, end, live.seed_high, live.seed_low, params.top_k,
            end, token_row, length, live.let_in, token_row + length - 1,
        )  # fmt: skip
        batch.rows[: len(integers), row] = integers
        batch.floats[len(integers) :, row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        batch.page_table[row, : len(sequence.pages)] = sequence.pages

    def _collect(self, flight: _Flight) -> list[Output]:
        tokens = np.asarray(flight.result.token_R).tolist()  # waits for the device
        start = time.perf_counter()
        outputs: list[Output] = []
        self._collect_prompt_logprobs(flight)
        sampled = {entry.sequence.id: tokens[row] for entry, row, _ in flight.rows if entry.is_last_chunk}
        row_of = {entry.sequence.id: row for entry, row, _ in flight.rows}
        wanted = any(entry.is_last_chunk and self._flag(entry, sampling.LOGPROBS) for entry, _, _ in flight.rows)
        logprobs = [np.asarray(part) for part in flight.result.logprobs] if wanted else None
        for sequence in self.scheduler.commit(flight.plan, sampled):
            outputs.append(self._output(sequence, sampled[sequence.id], row_of[sequence.id], logprobs))
        self._host_seconds += time.perf_counter() - start
        return outputs

    def _output(self, sequence: Sequence, token: int, row: int, logprobs: list[np.ndarray] | None) -> Output:
        """What the sampled `token` means for the client; finishes the request if it ends here."""
        live = self._live[sequence.id]
        params = live.request.params
        output = Output(
            sequence.id,
            prompt_tokens=len(sequence.prompt_ids),
            completion_tokens=len(sequence.output_ids),
            cached_tokens=live.cached,
        )
        if token < 0:
            output.completion_tokens -= 1
            output.finish_reason = "error"
            output.error = (
                f"The model's logits are not finite at position {len(sequence.prompt_ids) + output.completion_tokens}: "
                f"its weights are damaged, or overflow in {self.runner.dtype}."
            )
        else:
            self._generated_tokens += 1
            output.token_ids = [token]
            if logprobs is not None and params.logprobs is not None:
                output.logprobs = [_token_logprob(token, logprobs, row, params.logprobs)]
            self._advance_text(live, output, token, sequence.length_reached)
        if live.prompt_logprobs is not None and not live.prompt_sent:
            output.prompt_logprobs, live.prompt_sent = live.prompt_logprobs, True
        if output.finish_reason:
            self.scheduler.finish(sequence.id)
            del self._live[sequence.id]
        return output

    def _advance_text(self, live: _Live, output: Output, token: int, length_reached: bool) -> None:
        held_back = output.completion_tokens <= live.request.params.min_tokens
        stop: str | int | None = None
        if token in live.stops and not held_back:
            output.finish_reason = "stop"
            stop = token if token in live.request.params.stop_token_ids else None
            output.text, _ = live.detokenizer.finish()
        else:
            output.text, stop = live.detokenizer.push(token)
            if stop is None and length_reached:
                rest, stop = live.detokenizer.finish()
                output.text += rest
                output.finish_reason = "length"
            if stop is not None:
                output.finish_reason = "stop"
        output.stop_reason = stop

    def _collect_prompt_logprobs(self, flight: _Flight) -> None:
        wanting = [
            (entry, token_row, live.prompt_logprobs)
            for entry, _, token_row in flight.rows
            if not entry.sequence.finished  # its id may belong to another request by now
            and (live := self._live.get(entry.sequence.id))
            and live.prompt_logprobs is not None
            and not live.prompt_sent
        ]
        if not wanting:
            return
        arrays = [np.asarray(part) for part in flight.result.prompt_logprobs()]
        for entry, token_row, collected in wanting:
            prompt, count = entry.sequence.prompt_ids, entry.sequence.request.params.prompt_logprobs or 0
            for offset in range(entry.length):
                position = entry.start + offset + 1
                # A preempted request computes its prompt again; what it has is not collected twice.
                if position == len(collected) and position < len(prompt):
                    collected.append(_token_logprob(prompt[position], arrays, token_row + offset, count))

    def _prepare_slot(self, request: Request, slot: int) -> None:
        params = request.params
        if params.logit_bias or params.min_tokens:
            stops = self._live[request.id].stops
            self.runner.setup_slot(slot, params.logit_bias, sorted(stops) if params.min_tokens else [])

    def _flag(self, entry: Entry, flag: int) -> bool:
        live = self._live.get(entry.sequence.id)
        return live is not None and bool(live.flags & flag)

    def _eos_ids(self) -> frozenset[int]:
        ids = self.loaded.generation.get("eos_token_id")
        own = {ids} if isinstance(ids, int) else set(ids or ())
        return frozenset(own | set(self.tokenizer.eos_ids))

    def _pages_within(self, config: EngineConfig, pages_per_request: int, dtype: Any) -> int:
        one = page_bytes(self.loaded.config, config.page_size, dtype)
        fitting = config.cache_bytes // one if one else config.max_running * pages_per_request
        if fitting < pages_per_request:
            raise ValueError(
                f"The cache must hold one request of max_model_len={self.max_model_len} tokens, which takes "
                f"{pages_per_request * one:,} bytes; cache_bytes is {config.cache_bytes:,}. Raise it or shorten "
                "max_model_len."
            )
        return min(config.max_running * pages_per_request, fitting)


def _signed(word: int) -> int:
    """The low 32 bits as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _token_logprob(token: int, arrays: list[np.ndarray], row: int, count: int) -> TokenLogprob:
    own, ids, top = arrays
    return TokenLogprob(
        token, float(own[row]), list(zip(ids[row, :count].tolist(), top[row, :count].tolist(), strict=True))
    )


def _completion(request: Request, outputs: list[Output]) -> Completion:
    errors = [output.error for output in outputs if output.error]
    if errors:
        raise FloatingPointError(errors[0])
    logprobs = None if request.params.logprobs is None else [one for o in outputs for one in o.logprobs or ()]
    return Completion(
        prompt_ids=request.prompt_ids,
        token_ids=[token for output in outputs for token in output.token_ids],
        text="".join(output.text for output in outputs),
        finish_reason=outputs[-1].finish_reason,
        logprobs=logprobs,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
    )
