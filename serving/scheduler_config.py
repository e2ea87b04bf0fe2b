"""Limits of a scheduler, and what it says of itself."""

from dataclasses import dataclass

# A chunk of one token travels in a decode row, so the chunk region is only of use from two tokens up. Pages and
# positions are int32 on the device; what a step computes is padded to these sizes, and compiled for them.
_BOUNDS = {
    "max_running": (1, 1 << 14),
    "page_size": (1, 1 << 20),
    "num_pages": (1, (1 << 31) - 1),
    "max_model_len": (2, (1 << 31) - 1),
    "chunk_tokens": (2, 1 << 20),
    "max_waiting": (1, (1 << 31) - 1),
}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits: `max_running` slots, `num_pages` pages of `page_size` tokens, `max_model_len` tokens of prompt and
    output together, `chunk_tokens` prompt tokens a step, `max_waiting` requests in the queue. `prefix_cache`: the
    eviction policy of a prefix cache (`kv_policies`), None for none. `policy`: who goes first (`schedulers`).
    `max_token_ms`: while requests generate, prompts are cut so that a step stays within so many milliseconds, by what
    `observe` was told. `host_pages`: pages of the prefix cache that the host's memory holds beside the device's."""

    max_running: int
    page_size: int
    num_pages: int
    max_model_len: int
    chunk_tokens: int
    max_waiting: int
    prefix_cache: str | None = None
    policy: str = "first_come"
    max_token_ms: float | None = None
    host_pages: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"least {least}, got {value}; raise" if value < least else f"most {most}, got {value}; lower"
                raise ValueError(f"{name} must be at {bound} it")
        if self.host_pages < 0:
            raise ValueError(f"host_pages must be at least 0, got {self.host_pages}; 0 is for none")
        if self.host_pages and self.prefix_cache is None:
            raise ValueError(f"host_pages are the prefix cache's, got {self.host_pages} without one; ask for both")
        if self.max_token_ms is not None and not self.max_token_ms > 0:
            raise ValueError(f"max_token_ms must be above 0, got {self.max_token_ms}; leave it out for no bound")


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    waiting: int
    running: int
    preemptions: int
    pages_used: int
    pages_total: int
    queried_tokens: int
    cached_tokens: int
