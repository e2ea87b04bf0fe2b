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
      api_keys: a file of more keys, with a line `NAME KEY` for each tenant; what is cached is shared within one only.
      served_model_name: the name that requests give as `model`; default: the folder's name.
      max_running: requests decoded together.
      max_waiting: requests that may queue; more are answered 429.
      max_model_len: tokens of prompt and completion together; at most, and by default, the model's own context.
      dtype: of weights and compute, "float32" (the default on a CPU) or "bfloat16" (elsewhere; half of the memory).
      cache_dtype: "int8" or "float8" keeps keys and values in 8 bits, a quarter or half of the memory, with a scale for
        each token and head; by default in the dtype of the weights.
      page_size, num_pages, cache_bytes: the paged cache; `num_pages` pages of `page_size` tokens, or a size in bytes.
      chunk_tokens: prompt tokens computed per step.
      prefix_cache: what goes first from the cache of prompts that were computed before, when room is needed:
        "cost_aware" (what is least likely to be asked for again, as far as can be learned: the default) or "lru"; ""
        keeps none.
      scheduler: who goes first: "first_come" (the default), "sarathi" (the same, and prompts never stall those that
        generate), "prepacking" (short prompts fill steps up), "priority" (a field of requests, as is the next one's),
        "deadline" (jobs of several requests), "fair" (by tokens, between API keys), "shortest_predicted".
      max_token_ms: while requests generate, prompts are cut so that a token takes no longer, as far as is possible.
      host_cache_bytes: of the host's memory, at most, for what of the prefix cache the device has no more room for, and
        of requests that had to give up their places, where copying is quicker than computing again; default: none.
      plan: "tensor=4" cuts the model and its cache over four devices.
      compile_cache: folder that keeps compiled programs between starts.
      files: folder for uploaded files and batches; without one there are none.
      max_file_bytes: larger files are answered 413.
      max_files: files that each tenant may have uploaded.
      max_body_bytes: larger request bodies are answered 413.
      drain_seconds: how long requests in flight may go on after SIGTERM or Ctrl-C.
      stall_seconds: a client that sends nothing of its request, or takes nothing of its answer, for so long is cut
        off.
      max_restarts: how often within ten minutes an engine that died is started again, before the server gives up.
      hang_seconds: an engine with work that says nothing for so long is killed and started again.
      admin_socket: Unix socket (for this user alone) on which to pause, resume, drain, reload, profile.
      log_level: one of critical, error, warning, info, debug, trace; requests are logged from info on.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    api_keys: str | None = None
    served_model_name: str | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    cache_dtype: str | None = None
    page_size: int | None = None
    num_pages: int | None = None
    cache_bytes: int | None = None
    chunk_tokens: int | None = None
    prefix_cache: str | None = None
    scheduler: str | None = None
    max_token_ms: float | None = None
    host_cache_bytes: int | None = None
    plan: str | None = None
    compile_cache: str | None = None
    files: str | None = None
    max_file_bytes: int = 200 << 20
    max_files: int = 1000
    max_body_bytes: int = 32 << 20
    drain_seconds: float = 30.0
    stall_seconds: float = 60.0
    max_restarts: int = 5
    hang_seconds: float = 120.0
    admin_socket: str | None = None
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535 (0 picks a free one), got {self.port}")
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(_LOG_LEVELS)}, got {self.log_level!r}")
        if not self.host:
            raise ValueError("host must be an address to listen on, got ''; all of this machine's are 0.0.0.0 or ::")
        if self.served_model_name is not None and not (self.served_model_name and self.served_model_name.isprintable()):
            raise ValueError(
                f"served_model_name must be a name that can be printed, got {self.served_model_name!r}; choose another"
            )
        for name in ("max_body_bytes", "max_file_bytes", "max_files"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.drain_seconds <= 3600:
            raise ValueError(f"drain_seconds must be between 0 and 3600, got {self.drain_seconds}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0 (never again), got {self.max_restarts}")
        for name in ("hang_seconds", "stall_seconds"):
            if not 1 <= getattr(self, name) <= 86400:
                raise ValueError(f"{name} must be between 1 and 86400, got {getattr(self, name)}")
        self.tenants()

    def tenants(self) -> dict[str, str]:
        """API keys by tenant, "" for the one without a name; none: the server is open. Raises ValueError."""
        from .keys import check_key, read_keys

        keys = {} if self.api_keys is None else read_keys(self.api_keys)
        key = self.api_key if self.api_key is not None else os.environ.get("TWINAX_API_KEY")
        if key is not None:
            check_key("api_key", key)
            if key in keys.values():
                raise ValueError(f"api_key must differ from those in {self.api_keys}, where it is too; leave one out")
            keys[""] = key
        return keys

    @property
    def model_id(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        folder = Path(self.model).expanduser().resolve()
        if re.fullmatch(r"step_\d+", folder.name):
            folder = folder.with_name(f"{folder.parent.name}-{folder.name}")
        # Not all names of folders are UTF-8.
        return folder.name.encode("utf-8", "replace").decode() or "model"
