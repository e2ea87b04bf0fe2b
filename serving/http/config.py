"""Settings of the server. Imports next to nothing, so that the command line can show them at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `serve` serves, where, and within which limits. None leaves a limit to the engine's default.

    Attributes:
      model: a Twinax step or run folder, or a Hugging Face folder.
      host: the address to listen on; only this machine can reach the default.
      port: 0 picks a free one, which the ready line names.
      api_key: demanded on every route but /health; default: the environment variable TWINAX_API_KEY, if set.
      served_model_name: the name that requests give as `model`; default: the folder's name.
      max_running: requests decoded together.
      max_waiting: requests that may queue; more are answered 429.
      max_model_len: tokens of prompt and completion together; at most, and by default, the model's own context.
      dtype: of weights and compute, "float32" or "bfloat16".
      page_size, num_pages, cache_bytes: the paged cache; `num_pages` pages of `page_size` tokens, or a size in bytes.
      chunk_tokens: prompt tokens computed per step.
      prefix_cache: what goes first from the cache of prompts that were computed before, when room is needed: "lru" or
        "cost_aware" (what is cheap to compute again and seldom asked for); "" keeps none.
      plan: "tensor=4" cuts the model and its cache over four devices.
      compile_cache: folder that keeps compiled programs between starts.
      max_body_bytes: larger request bodies are answered 413.
      drain_seconds: how long requests in flight may go on after SIGTERM or Ctrl-C.
      log_level: one of critical, error, warning, info, debug, trace; requests are logged from info on.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    page_size: int | None = None
    num_pages: int | None = None
    cache_bytes: int | None = None
    chunk_tokens: int | None = None
    prefix_cache: str | None = None
    plan: str | None = None
    compile_cache: str | None = None
    max_body_bytes: int = 32 << 20
    drain_seconds: float = 30.0
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535 (0 picks a free one), got {self.port}")
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(_LOG_LEVELS)}, got {self.log_level!r}")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        if not 0 <= self.drain_seconds <= 3600:
            raise ValueError(f"drain_seconds must be between 0 and 3600, got {self.drain_seconds}")
        key = self.resolved_api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError("api_key must be printable ASCII without spaces around it, and not empty; choose another")

    @property
    def resolved_api_key(self) -> str | None:
        return self.api_key if self.api_key is not None else os.environ.get("TWINAX_API_KEY")

    @property
    def model_id(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        folder = Path(self.model).expanduser().resolve()
        if re.fullmatch(r"step_\d+", folder.name):
            return f"{folder.parent.name}-{folder.name}"
        return folder.name or "model"
