"""Block sizes that were found better than an operation's closed form: `<operation>/tuned/<chip>.json`, in the wheel.

A kernel asks `best(operation, chip, key)` with a key of what its choice depends on, as coarse as it likes ({"D": 128,
"T": 4096, "causal": True}), and takes its closed form when the answer is None. `python -m benchmarks.tune` writes the
files; it tries candidates by `using` them and learns by `asked` which keys a program asks for.

A file is a JSON object, its names the keys as `name_of` writes them: {"D=128 T=4096 causal=true": {"blocks": {...},
"microseconds": 90.1, "closed_form": 101.5}}; only `blocks` is read here.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

Key = Mapping[str, int | str | bool]
Blocks = dict[str, Any]

_using: ContextVar[Mapping[tuple[str, str], Blocks] | None] = ContextVar("using", default=None)
_asked: ContextVar[list[tuple[str, dict[str, Any]]] | None] = ContextVar("asked", default=None)


def best(operation: str, chip: str | None, key: Key) -> Blocks | None:
    """The best known block sizes on `chip` (`chips.target_chip()`), or None: the caller's closed form is as good."""
    name = name_of(key)
    recorder = _asked.get()
    if recorder is not None and (operation, dict(key)) not in recorder:
        recorder.append((operation, dict(key)))
    chosen = (_using.get() or {}).get((operation, name))
    if chosen is not None:
        return dict(chosen)
    entry = None if chip is None else _read(operation, chip).get(name)
    return None if entry is None else dict(entry["blocks"])


def name_of(key: Key) -> str:
    """A key as files write it: by name in alphabetical order."""
    return " ".join(f"{name}={str(x).lower() if isinstance(x, bool) else x}" for name, x in sorted(key.items()))


@contextlib.contextmanager
def using(operation: str, key: Key, blocks: Blocks) -> Iterator[None]:
    """Within it, `best` answers `blocks` for this key, whatever the chip. Only for what is traced within it."""
    token = _using.set({**(_using.get() or {}), (operation, name_of(key)): blocks})
    try:
        yield
    finally:
        _using.reset(token)


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The list fills with each (operation, key) that is asked for within it."""
    recorder: list[tuple[str, dict[str, Any]]] = []
    token = _asked.set(recorder)
    try:
        yield recorder
    finally:
        _asked.reset(token)


def file_of(operation: str, chip: str) -> Path:
    return Path(__file__).parent / operation / "tuned" / f"{chip}.json"


@functools.lru_cache(maxsize=64)
def _read(operation: str, chip: str) -> dict[str, Any]:
    try:
        return json.loads(file_of(operation, chip).read_text())
    except FileNotFoundError:
        return {}
