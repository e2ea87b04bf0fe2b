"""Reads the metrics of steps that were sent off, keeps the time, and tells the log, the display and the caller."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ..models.config import DecoderConfig
from .display import Display
from .flops import flops_per_token, peak_flops
from .metrics import MetricsLog
from .recipe import Recipe


class NotFiniteError(ValueError):
    """A loss or gradient was NaN or infinite; the update was not made. The text names the step and the batch."""


@dataclasses.dataclass(frozen=True)
class _Sent:
    step: int
    batch_hash: Callable[[], str]
    metrics: dict[str, jax.Array]


class Meter:
    """Metrics of a run.

    Attributes:
        loss: of the last step that was read, None before it.
        eval_loss: the last one, None before it.
        peak_text: what MFU is a share of, in words.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: DecoderConfig,
        mesh: Mesh,
        dtype: Any,
        log: MetricsLog,
        show: Display,
        on_step: Callable[[dict[str, Any]], None] | None,
    ):
        self._recipe, self._log, self._show, self._on_step = recipe, log, show, on_step
        self._flops = flops_per_token(config, recipe.sequence_length)
        peak = peak_flops(list(mesh.devices.flat), dtype)
        self._peak = peak.flops
        size = f" ({peak.flops / 1e12:.3g} TFLOP/s)" if peak.flops else ""
        self.peak_text = f"MFU is of {peak.source}{size}."
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self._pending: _Sent | None = None
        self._since = time.perf_counter()
        self._steps, self._seconds, self._smooth = 0, 0.0, None

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps that were read; compiling, saving and evaluating do not count."""
        return self._steps * self._tokens / self._seconds if self._steps else None

    @property
    def mfu(self) -> float | None:
        """The same as a share of the devices' peak."""
        return self._share(self.tokens_per_second)

    @property
    def _tokens(self) -> int:
        return self._recipe.batch_size * self._recipe.sequence_length

    def _share(self, tokens_per_second: float | None) -> float | None:
        return tokens_per_second * self._flops / self._peak if tokens_per_second and self._peak else None

    def restart(self) -> None:
        """The time until now was not a step's."""
        self._since = time.perf_counter()

    def sent(self, step: int, batch_hash: Callable[[], str], metrics: dict[str, jax.Array]) -> None:
        """Remembers the step that was just sent off, to be read later, and how to have its batch's hash."""
        self._pending = _Sent(step, batch_hash, metrics)

    def read(self) -> None:
        """Waits for the remembered step, if any, and reports it. Raises NotFiniteError when its update was not made."""
        sent, self._pending = self._pending, None
        if sent is None:
            return
        values = {name: value.item() for name, value in jax.device_get(sent.metrics).items()}
        seconds = time.perf_counter() - self._since
        self.restart()
        if not values.pop("ok"):
            raise NotFiniteError(self._explain(sent, values))
        self.loss = values["loss"]
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._smooth = seconds if self._smooth is None else 0.9 * self._smooth + 0.1 * seconds
        done, rate = sent.step + 1, self._tokens / seconds
        line = {**values, "seconds": seconds, "tokens_per_second": rate, "mfu": self._share(rate)}
        line["batch"] = sent.batch_hash()
        self._log.write("train", done, line)
        smooth = self._tokens / self._smooth
        left = self._smooth * (self._recipe.steps - done)
        shown = {"tokens_per_second": smooth, "mfu": self._share(smooth), "seconds_left": left}
        self._show.update(done, {"loss": self.loss, "lr": values["lr"], **shown})
        if self._on_step is not None:
            self._on_step({"step": done, **line})

    def evaluated(self, done: int, loss: float) -> None:
        """Reports a held-out loss after `done` updates."""
        self.eval_loss = loss
        self._log.write("eval", done, {"loss": loss})
        self._show.update(done, {"eval_loss": loss})

    def _explain(self, sent: _Sent, values: dict[str, float]) -> str:
        first = sent.step * self._recipe.batch_size
        return (
            f"step {sent.step + 1}: the loss is {values['loss']} and the gradient's norm {values['grad_norm']}, so the "
            f"update was not made and nothing was saved after it. Its batch is rows {first} to "
            f"{first + self._recipe.batch_size - 1} of the data, hash {sent.batch_hash()}. "
            f"The learning rate was {values['lr']:.3g}: lower optimizer.lr or lengthen schedule.warmup_steps, and "
            "start again; it resumes from the last checkpoint."
        )
