"""The compile cache on disk, and a count of compiles: after warm-up there must be none."""

import os
from pathlib import Path

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_total = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _total
    if event == _COMPILE_EVENT:
        _total += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileCounter:
    """Programs that XLA compiled in this process since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._start = _total

    @property
    def count(self) -> int:
        return _total - self._start


def use_compile_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`. None: the user's cache folder, unless JAX has one set. "": no change."""
    if folder == "" or (folder is None and jax.config.values["jax_compilation_cache_dir"]):
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder else base / "twinax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if folder:
            raise
        return  # no home to write to: every start compiles, and nothing else changes
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
