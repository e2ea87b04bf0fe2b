"""The decode engine: continuous batching over a paged cache.

A step is a sentence: plan = schedule(); batch = pack(plan); result = dispatch(batch); commit(result). The next step is
sent while this one runs: what it feeds that the host has not seen yet, it takes from the device. Where a grammar's next
mask hangs on a token that the host has not seen, the next step is sent but for its sampling, which follows the token.
"""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.load import LoadedModel, load_model
from ..models.config import DecoderConfig
from ..models.parameters import weight_dtype
from . import sampling, shared_prefixes
from .asked import Asked, token_logprob
from .batch import ROW, TOKEN, HostBatch
from .compiles import CompileCounter, use_compile_cache
from .detokenizer import Detokenizer
from .engine_config import Completion, EngineConfig, EngineStats
from .engine_sizes import EngineSizes, dtype_of, runner_of
from .fit import keeps_prefixes, mesh_of
from .grammar import GrammarError, Grammars, fill_masks, leave_out
from .host_pages import Moves
from .live import Live
from .program_store import know_kept_shapes
from .request import InvalidRequest, Output, Request, SamplingParams
from .runner import Runner, SentStep, StepResult
from .scheduler import Entry, Scheduler, SchedulerConfig, Sequence, StepPlan
from .weight_order import config_in_order, in_order


@dataclasses.dataclass(slots=True)
class _Flight:
    """A step on its way: request rows and token rows of the plan's entries, in the plan's order.

    `asked`: what is computed beside the sampled tokens. `sent_at`: time.perf_counter(). `result`: None until its
    sampling is sent too.
    """

    plan: StepPlan
    sent: SentStep
    rows: list[tuple[Entry, int, int]]
    asked: Asked
    sent_at: float
    result: StepResult | None


class Engine:
    """Serves one model. Not thread-safe: one thread calls `add`, `cancel` and `step`.

    Args:
        runner: as `runner_of` makes it for this model and config, which is done by default.

    Raises ValueError when the limits do not fit the model or each other.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None, runner: Runner | None = None):
        config = config or EngineConfig()
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.source} has no tokenizer, which serving needs; copy its tokenizer.json there.")
        self.loaded, self.config, self.tokenizer = loaded, config, loaded.tokenizer
        model = loaded.config
        sizes = EngineSizes.of(model, config)
        self.runner = runner or runner_of(model, config)
        self.max_model_len = sizes.max_model_len
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running=config.max_running,
                page_size=config.page_size,
                num_pages=sizes.num_pages,
                max_model_len=self.max_model_len,
                chunk_tokens=config.chunk_tokens,
                max_waiting=config.max_waiting,
                prefix_cache=config.prefix_cache if config.prefix_cache and keeps_prefixes(model) else None,
                policy=config.scheduler,
                max_token_ms=config.max_token_ms,
                host_pages=sizes.host_pages,
            )
        )
        self.runner.use_params(loaded.params)
        self.grammars = Grammars(self.tokenizer, model.vocab_size, self._eos_ids())
        self._live: dict[str, Live] = {}
        self._readers: dict[str, deque[Output]] = {}  # outputs for `stream` that are not read yet, by request
        self._host_copies: dict[int, Any] = {}  # pages in the host's memory, or on their way there
        self._flight: _Flight | None = None
        self._compiles = CompileCounter()
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._host_seconds = self._ended_at = 0.0
        self._ids = itertools.count()

    @classmethod
    def from_path(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """An engine for a Twinax checkpoint or a Hugging Face folder, not warmed up yet.

        Parameters go from the files straight to their devices, in the dtype that they are served in. Meanwhile the
        programs are made.
        """
        config = config or EngineConfig()
        runners: list[Runner] = []

        def begin(model: DecoderConfig) -> None:
            folder = use_compile_cache(config.compile_cache)
            if folder is not None:
                know_kept_shapes(folder, model)
            runners.append(runner_of(config_in_order(model), config))
            runners[0].begin()

        mesh, dtype = partial(mesh_of, config.plan), partial(weight_dtype, dtype=dtype_of(config))
        try:
            return cls(in_order(load_model(path, dtype=dtype, mesh=mesh, begin=begin)), config, runners[0])
        except BaseException:
            for runner in runners:
                runner.give_up()
            raise

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles all programs; a compile after this is a bug, which `stats` counts."""
        self.runner.warmup(progress)
        if self.scheduler.host_pages.most:
            self.scheduler.host_pages.page_seconds = self.runner.page_seconds()
        self._compiles.reset()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def stats(self) -> EngineStats:
        now, host = self.scheduler.stats(), self.scheduler.host_pages
        return EngineStats(
            running=now.running,
            waiting=now.waiting,
            pages_used=now.pages_used,
            pages_total=now.pages_total,
            queried_tokens=now.queried_tokens,
            cached_tokens=now.cached_tokens,
            preemptions=now.preemptions,
            host_pages_used=host.used,
            host_pages_total=host.most,
            pages_copied_out=host.copied_out,
            pages_copied_back=host.copied_back,
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
        matcher = None
        if params.grammar is not None:
            if request.pooling:
                raise InvalidRequest("grammar", "grammar says what is generated, and with pooling nothing is")
            try:
                matcher = self.grammars.matcher(params.grammar, ends=not params.ignore_eos)
            except GrammarError as error:
                raise InvalidRequest("grammar", f"grammar can't be used: {error}") from None
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids())
        self.scheduler.add(request)
        self._live[request.id] = Live.begin(request, stops, matcher)
        self._prompt_tokens += len(request.prompt_ids)

    def cancel(self, request_id: str) -> bool:
        """Ends a request at once and frees its pages; False if it is not live."""
        self._live.pop(request_id, None)
        return self.scheduler.cancel(request_id)

    def finish(self, request_id: str) -> bool:
        """As `cancel`, for a request that is complete by what its text says (a stop string)."""
        if self._live.pop(request_id, None) is None:
            return False
        self.scheduler.finish(request_id)
        return True

    def step(self) -> list[Output]:
        """Sends the next step and returns what the one before it produced (so the first call returns nothing)."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        flight = self._launch(plan) if plan else None
        previous, self._flight = self._flight, flight
        self._host_seconds += time.perf_counter() - start
        outputs = self._collect(previous) if previous else []
        return outputs if flight is None or flight.result is not None else outputs + self._finish(flight)

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
        for output in self.stream(requests):
            outputs[output.request_id].append(output)
        return [_completion(request, outputs[request.id]) for request in requests]

    def stream(self, requests: Collection[Request]) -> Iterator[Output]:
        """Adds requests as there is room, and yields what comes of them, with its text, until all have ended.

        Several streams of one engine go on side by side. Leaving one early cancels what has not ended.
        """
        texts = {request.id: Detokenizer(self.tokenizer, request.params) for request in requests}
        own: deque[Output] = deque()
        queue = deque(requests)
        try:
            while texts:
                while queue and self.scheduler.num_waiting < self.config.max_waiting:
                    self.add(queue[0])
                    self._readers[queue.popleft().id] = own
                if not own:
                    for output in self.step():
                        if output.request_id in self._readers:
                            self._readers[output.request_id].append(output)
                    continue
                output = own.popleft()
                text = texts.get(output.request_id)
                if text is None:
                    continue  # a stop string ended it
                if text.fill(output):
                    self.finish(output.request_id)
                if output.finish_reason:
                    del texts[output.request_id], self._readers[output.request_id]
                yield output
        finally:
            for request in requests:
                if self._readers.pop(request.id, None) is not None:
                    self.cancel(request.id)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> _Flight:
        if plan.moves:
            self._move(plan.moves)
        for sequence in plan.admitted:
            self._prepare_slot(sequence)
        if plan.copies:
            self.runner.copy_pages(plan.copies)
        bucket = self.runner.bucket_for(len(plan.decodes) + len(plan.chunks), plan.chunk_tokens)
        batch = self.runner.batch(bucket)
        rows: list[tuple[Entry, int, int]] = []
        free = bucket.rows
        for row, entry in enumerate(plan.entries):
            token_row = row if entry.length == 1 else free
            free += entry.length if entry.length > 1 else 0
            self._pack(batch, entry, row, token_row)
            rows.append((entry, row, token_row))
        shared = shared_prefixes.groups([entry.sequence.nodes for entry in plan.decodes])
        batch.rows[ROW["leader"] : ROW["shared_pages"] + 1, : len(shared)] = np.reshape(shared, (-1, 2)).T
        self._steps += 1
        sent = self.runner.send(bucket, batch)
        masked = any(entry.is_last_chunk and self._live[entry.sequence.id].matcher for entry, _, _ in rows)
        asked, sent_at = Asked.of(sent, rows, self._live, self.runner), time.perf_counter()
        return _Flight(plan, sent, rows, asked, sent_at, None if masked else self.runner.finish(sent))

    def _move(self, moves: Moves) -> None:
        """To the host's memory and back, by copies' numbers."""
        copies = self._host_copies
        copies.update(zip(moves.out, self.runner.read_pages(list(moves.out.values())), strict=True))
        self.runner.write_pages([copies.pop(copy) for copy in moves.back], list(moves.back.values()))
        for copy in moves.gone:
            del copies[copy]

    def _finish(self, flight: _Flight) -> list[Output]:
        """Sends the sampling of a step, now that the tokens before it are known; ends what its grammar ends."""
        start = time.perf_counter()
        outputs: list[Output] = []
        allowed_RW = np.full(
            (flight.sent.bucket.rows, sampling.mask_words(self.runner.config.vocab_size)), -1, np.int32
        )
        rows = [
            (entry.sequence, row, live, live.matcher)
            for entry, row, _ in flight.rows
            if entry.is_last_chunk
            and not entry.sequence.finished
            and (live := self._live[entry.sequence.id]).matcher is not None
        ]
        errors = fill_masks([(matcher, row) for _, row, _, matcher in rows], allowed_RW)
        for sequence, row, live, _ in rows:
            held = live.stops if len(sequence.output_ids) < live.request.params.min_tokens else ()
            if row in errors or not leave_out(allowed_RW[row], held):
                output = self._empty_output(sequence, live)
                live.end(output, errors.get(row))
                self._end(output)
                outputs.append(output)
                allowed_RW[row] = -1
        flight.result = self.runner.finish(flight.sent, allowed_RW)
        self._host_seconds += time.perf_counter() - start
        return outputs

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
        if start == sequence.num_cached:
            live.let_in = len(prompt) + len(output)
            live.cached = live.cached if sequence.preemptions else sequence.num_cached
        flags = live.flags
        if end - len(prompt) < params.min_tokens:
            flags |= sampling.HOLD_STOPS
        if live.matcher is not None and entry.is_last_chunk:
            flags |= sampling.GRAMMAR
        integers = (
            entry.slot, flags, end, live.seed_high, live.seed_low, params.top_k,
            end, token_row, length, live.let_in, token_row + length - 1,
        )  # fmt: skip
        batch.rows[: len(integers), row] = integers
        batch.floats[ROW["temperature"] :, row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        batch.page_table[row, : len(sequence.pages)] = sequence.pages

    def _collect(self, flight: _Flight) -> list[Output]:
        assert flight.result is not None
        tokens = np.asarray(flight.result.token_R).tolist()  # waits for the device
        start = time.perf_counter()
        self.scheduler.observe(flight.plan, start - max(self._ended_at, flight.sent_at))
        self._ended_at = start
        on_way = [copy for copy in flight.plan.moves.out if copy in self._host_copies]
        copies = self.runner.to_host([self._host_copies[copy] for copy in on_way])
        self._host_copies.update(zip(on_way, copies, strict=True))
        outputs: list[Output] = []
        flight.asked.collect(self._live, self.runner)
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
        output = self._empty_output(sequence, live)
        if token < 0:
            output.completion_tokens -= 1
            output.finish_reason = "error"
            output.error = (
                f"The model's logits are not finite at position {len(sequence.prompt_ids) + output.completion_tokens}: "
                f"its weights are damaged, or overflow in {self.runner.dtype}."
            )
            output.error_kind = "not_finite"
        elif live.pooled is not None:
            output.completion_tokens, output.finish_reason = 0, "stop"
            output.embedding = live.pooled.result()
        else:
            self._generated_tokens += 1
            output.token_ids = [token]
            if logprobs is not None and params.logprobs is not None:
                output.logprobs = [token_logprob(token, logprobs, row, params.logprobs)]
            live.advance(output, token, sequence.length_reached)
        if live.prompt_logprobs is not None and not live.prompt_sent:
            output.prompt_logprobs, live.prompt_sent = live.prompt_logprobs, True
        if output.finish_reason:
            self._end(output)
        return output

    def _empty_output(self, sequence: Sequence, live: Live) -> Output:
        return Output(
            sequence.id,
            prompt_tokens=len(sequence.prompt_ids),
            completion_tokens=len(sequence.output_ids),
            cached_tokens=live.cached,
        )

    def _end(self, output: Output) -> None:
        self.scheduler.finish(output.request_id)
        del self._live[output.request_id]

    def _prepare_slot(self, sequence: Sequence) -> None:
        params, live = sequence.request.params, self._live[sequence.id]
        if not (params.logit_bias or params.min_tokens or live.flags & sampling.PENALTIES):
            return
        # What is computed is counted then. To a repetition penalty it is all the same whether a token was the prompt's
        # or generated; a request that `counts_output` too has none of that cached.
        seen: list[int] = []
        if params.repetition_penalty != 1.0:
            seen = (sequence.prompt_ids + sequence.output_ids)[: sequence.num_cached]
        stops = sorted(live.stops) if params.min_tokens else []
        self.runner.setup_slot(sequence.slot, params.logit_bias, stops, seen)

    def _flag(self, entry: Entry, flag: int) -> bool:
        live = self._live.get(entry.sequence.id)
        return live is not None and bool(live.flags & flag)

    def _eos_ids(self) -> frozenset[int]:
        ids = self.loaded.generation.get("eos_token_id")
        own = {ids} if isinstance(ids, int) else set(ids or ())
        return frozenset(own | set(self.tokenizer.eos_ids))


def failure(output: Output) -> Exception:
    """What an output's error is, as an exception of its kind."""
    kinds = {"grammar": GrammarError, "not_finite": FloatingPointError, "engine": RuntimeError}
    return kinds[output.error_kind](output.error)


def _completion(request: Request, outputs: list[Output]) -> Completion:
    for output in outputs:
        if output.error:
            raise failure(output)
    logprobs = None if request.params.logprobs is None else [one for o in outputs for one in o.logprobs or ()]
    return Completion(
        prompt_ids=request.prompt_ids,
        token_ids=[token for output in outputs for token in output.token_ids],
        text="".join(output.text for output in outputs),
        finish_reason=outputs[-1].finish_reason,
        logprobs=logprobs,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
    )
