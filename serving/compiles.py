"""The compile cache on disk, and a count of compiles: after warm-up there must be none."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

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


def use_compile_cache(folder: str | None) -> Path | None:
    """Keeps compiled programs in `folder`. None: the user's cache folder, unless JAX has one set. "": no change.

    Returns the folder in which an engine's programs may be kept too (`program_store`), None for nowhere.
    """
    if folder == "":
        return None
    if folder is None and (used := jax.config.values["jax_compilation_cache_dir"]):
        return None if "://" in used else Path(used)  # JAX also writes to stores that are no file system
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder else base / "twinax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise ValueError(
                f"compile_cache can't be kept in {folder}: {error.strerror}; choose another folder, or '' for none"
            ) from None
        return None  # no home to write to: every start compiles, and nothing else changes
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@contextlib.contextmanager
def fresh_compiles() -> Iterator[None]:
    """What is compiled within, in any thread, neither comes from JAX's compile cache nor goes there.

    A CPU program that came from there can't be kept again: its machine code lacks functions (jaxlib 0.10.2).
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    _switch_compile_cache(False)
    try:
        yield
    finally:
        _switch_compile_cache(before)


def _switch_compile_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # it asks but once whether it is on
