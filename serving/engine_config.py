"""Limits of an engine, and what it says of itself and of requests that are done."""

import dataclasses

from . import kv_policies, schedulers
from .request import TokenLogprob
from .scheduler_config import SchedulerConfig
from .step_times import StepTimes

DTYPES = ("float32", "bfloat16")
# What a cache may be kept in beside the engine's own dtype, and the dtype's name.
CACHE_DTYPES = {"int8": "int8", "float8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. Raises ValueError, before anything is loaded, for those that no model could be served with.

    Attributes:
        max_running: requests decoded at once.
        page_size: tokens a page of the cache.
        max_model_len: tokens of prompt and output together, at most; None: what the model was made for.
        num_pages: pages of the cache; None: enough for max_running full contexts, within cache_bytes.
        cache_bytes: size of the cache, at most, when num_pages is None.
        chunk_tokens: prompt tokens a step, at most.
        max_waiting: requests that may wait.
        dtype: "float32" or "bfloat16"; None: float32 on a CPU, bfloat16 elsewhere.
        cache_dtype: "int8" or "float8" (e4m3fn) keeps keys and values in 8 bits, with a scale for each token and head;
            None: as `dtype`. Numbers are rounded once, when a token is computed, whoever is beside it.
        prefix_cache: what goes first from the cache of prompts that were computed before (`kv_policies`); "": no such
            cache. Models that keep a state, or whose rope hangs on the prompt's length, have none.
        scheduler: who goes first, who is preempted, and how many prompt tokens a step takes (`schedulers`).
        max_token_ms: while requests generate, prompts are cut so that a step stays within so many milliseconds, as far
            as can be told from the steps before; None: no bound but the scheduler's own.
        host_cache_bytes: of the host's memory, at most, for pages of the prefix cache that have to go from the device,
            those of preempted requests among them, where copying them is quicker than computing them again.
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
    cache_dtype: str | None = None
    prefix_cache: str = "cost_aware"
    scheduler: str = "first_come"
    max_token_ms: float | None = None
    host_cache_bytes: int = 0
    plan: str = ""
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        SchedulerConfig(
            max_running=self.max_running,
            page_size=self.page_size,
            num_pages=1 if self.num_pages is None else self.num_pages,
            max_model_len=2 if self.max_model_len is None else self.max_model_len,
            chunk_tokens=self.chunk_tokens,
            max_waiting=self.max_waiting,
            max_token_ms=self.max_token_ms,
        )
        if self.host_cache_bytes < 0:
            raise ValueError(f"host_cache_bytes must be at least 0, got {self.host_cache_bytes}; 0 is for none")
        if self.host_cache_bytes and not self.prefix_cache:
            raise ValueError(
                f"host_cache_bytes is for pages of the prefix cache, got {self.host_cache_bytes:,} without one; leave "
                "it out, or name a prefix_cache"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            names = " or ".join(CACHE_DTYPES)
            raise ValueError(f"cache_dtype must be {names}, got {self.cache_dtype!r}; leave it out for that of dtype")
        schedulers.load(self.scheduler, StepTimes([]))
        if self.prefix_cache:
            kv_policies.load(self.prefix_cache, 1)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is there now.

    Attributes:
        host_pages_used, pages_copied_out, pages_copied_back: of the host's memory, there and back (`host_pages`).
        host_seconds: Python's share of the steps, without waiting.
    """

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    queried_tokens: int
    cached_tokens: int
    preemptions: int
    host_pages_used: int
    host_pages_total: int
    pages_copied_out: int
    pages_copied_back: int
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
