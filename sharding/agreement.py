"""What the processes of a job say to each other: short texts, through JAX's coordination service.

All processes call these functions alike, each name in the same order; with one process they do nothing, or return what
it says itself. They may be called from any thread. A process that is gone ends the others (see `watch`), so nothing
here waits for ever.
"""

import collections
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .launch import ProcessError

T = TypeVar("T")
_FOREVER_MS = 10**9  # eleven days
_uses: collections.Counter[str] = collections.Counter()
_counting = threading.Lock()


def state() -> Any:
    """What JAX knows of the job, without making its devices, which `jax.process_count()` would."""
    from jax._src import distributed  # there is no public way

    return distributed.global_state


def count() -> int:
    """How many processes there are."""
    return state().num_processes


def index() -> int:
    """Which of them this is, from 0."""
    return state().process_id


def problems(name: str, problem: str = "", timeout_ms: int = _FOREVER_MS) -> dict[int, str]:
    """Waits for all processes. Gives what is wrong, by process, where something is; no text is no problem.

    Raises RuntimeError when not all have come by the timeout.
    """
    if count() == 1:
        return {0: problem} if problem else {}
    client, folder = state().client, unique(name)
    if problem:
        client.key_value_set(f"{folder}/{index()}", problem)
    client.wait_at_barrier(folder, timeout_ms)
    said = client.key_value_dir_get(f"{folder}/")
    return {int(key.rpartition("/")[2]): text for key, text in sorted(said)}


def from_first(name: str, make: Callable[[], str]) -> str:
    """What `make` gives in process 0, which alone calls it."""
    if count() == 1:
        return make()
    client, key = state().client, unique(name)
    if index() == 0:
        text = make()
        client.key_value_set(key, f"={text}")
        return text
    return client.blocking_key_value_get(key, _FOREVER_MS)[1:]


def once(name: str, make: Callable[[], T]) -> T:
    """What `make` gives, called in process 0 first and then in the others: they find what it left on a shared disk."""
    if index() == 0:
        made = make()
        from_first(name, str)
        return made
    from_first(name, str)
    return make()


def agree(name: str, text: str) -> None:
    """Raises ProcessError unless all processes say the same; `name` is what they should agree on, in words."""
    wanted = from_first(f"agree/{name}", lambda: text)
    others = problems(f"agree/{name}", "" if text == wanted else f"={text}")
    if others:
        other, said = min(others.items())
        more = f" ({len(others)} processes differ)" if len(others) > 1 else ""
        raise ProcessError(
            f"All processes of a job must agree on {name}, which is {wanted!r} in process 0 and {said[1:]!r} in "
            f"process {other}{more}. Start all of them with the same command, the same files and the same version of "
            "Twinax."
        )


def unique(name: str) -> str:
    """A name that was not used before, the same one in all processes."""
    with _counting:
        _uses[name] += 1
        return f"twinax/say/{name}/{_uses[name]}"
