"""What the processes of a run tell each other in every step: whether one was asked to stop, and the batch's hash.

A tiny sum over all devices is sent off behind the step and read when the step's metrics are, so nobody waits for it.
All processes read the same numbers in the same step, and so stop after the same one.
"""

import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..sharding.agreement import count
from .data import Batch, hash_text
from .signals import StopSignals

_PROCESS_BITS = 20  # the stop word is the signal's number and, below it, the process that got it


class Votes:
    """Votes of the processes on `mesh`; with one process, no vote is needed.

    Attributes:
        stop: the name of the signal that ends the run, None until the processes agree on one.
        asked: the same with the process that got it, for people.
    """

    def __init__(self, mesh: Mesh, signals: StopSignals):
        self._signals, self._alone = signals, count() == 1
        self._cast: jax.Array | None = None
        self._stop = 0
        if self._alone:
            return
        flat = Mesh(mesh.devices.reshape(-1), ("device",))
        self._place = NamedSharding(flat, PartitionSpec("device"))
        mine = [device for device in flat.devices.flat if device.process_index == jax.process_index()]
        self._speaks = int(np.flatnonzero(flat.devices == mine[0])[0])  # one device of each process has its words
        everywhere = NamedSharding(flat, PartitionSpec())
        self._count = jax.jit(_sum, out_shardings=everywhere).lower(self._put(np.zeros(5, np.uint32))).compile()

    def cast(self, batch: Batch) -> Callable[[], str]:
        """Votes, behind the step with `batch` that was just sent off. Gives how to read the whole batch's hash.

        What was cast before is read first: its step is over, or nearly so.
        """
        if self._alone:
            return batch.hash
        if self._cast is not None:
            self._stop = max(self._stop, int(np.asarray(self._cast)[0]))
        words = np.zeros(5, dtype=np.uint32)
        if self._signals.received is not None:
            words[0] = signal.Signals[self._signals.received] << _PROCESS_BITS | jax.process_index()
        words[1:] = batch.hash_words()
        cast = self._cast = self._count(self._put(words))
        return lambda: hash_text(np.asarray(cast)[1:])

    @property
    def stop(self) -> str | None:
        if self._alone:
            return self._signals.received
        return signal.Signals(self._stop >> _PROCESS_BITS).name if self._stop else None

    @property
    def asked(self) -> str:
        return f"{self.stop}" if self._alone else f"{self.stop} at process {self._stop & (1 << _PROCESS_BITS) - 1}"

    def _put(self, words_W: np.ndarray) -> jax.Array:
        def share(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            speaks = index[0].start == self._speaks
            return words_W[None] if speaks else np.zeros_like(words_W)[None]

        return jax.make_array_from_callback((self._place.mesh.size, len(words_W)), self._place, share)


def _sum(words_DW: jax.Array) -> jax.Array:
    stop = jnp.max(words_DW[:, :1], axis=0)
    return jnp.concatenate([stop, jnp.sum(words_DW[:, 1:], axis=0, dtype=jnp.uint32)])
