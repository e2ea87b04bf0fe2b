"""What a run came to, in words and as a picture."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..models.config import DecoderConfig
from ..models.decoder import param_shapes
from ..sharding.plan import Plan
from .curve import write_curve
from .data import Dataset
from .display import clock
from .metrics import read_metrics
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: updates made in all.
        loss: of the last step, nats per token; None when no step was made.
        eval_loss: the last one on held-out text, or None.
        unigram_entropy: of the text, nats per token: what a model without context comes to.
        interrupted: the signal that ended the run early, such as "SIGTERM", or None.
        tokens_per_second: over this process's steps, without compiling, saving and evaluating; None without steps.
        mfu: the same as a share of the devices' peak, or None when that is unknown.
        compile_seconds: time to compile the step.
        seconds: time of the whole call.
        output: the run's folder.
        checkpoint: the last step's folder.
        metrics: the file of metrics.
        curve: the picture of the loss.
    """

    step: int
    loss: float | None
    eval_loss: float | None
    unigram_entropy: float
    interrupted: str | None
    tokens_per_second: float | None
    mfu: float | None
    compile_seconds: float
    seconds: float
    output: Path
    checkpoint: Path
    metrics: Path
    curve: Path


def headline(recipe: Recipe, config: DecoderConfig, dataset: Dataset, plan: Plan, dtype: Any, entropy: float) -> str:
    """What is about to be trained, in a line or two."""
    count = sum(math.prod(shape.shape) for shape in param_shapes(config).values())
    tokens = recipe.batch_size * recipe.sequence_length
    epochs = recipe.steps * tokens / dataset.num_tokens
    return (
        f"{config.family}, {count / 1e6:.1f}M parameters, {dtype.name} on {plan}. "
        f"{dataset.num_tokens:,} training tokens; {recipe.steps:,} steps of {tokens:,} are {epochs:.2f} epochs. "
        f"Unigram entropy {entropy:.4f}."
    )


def draw(result: TrainResult) -> None:
    """Draws the curve of the whole run, steps before a resume included."""
    lines = read_metrics(result.metrics)
    points = {
        kind: [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and line["loss"] is not None]
        for kind in ("train", "eval")
    }
    write_curve(result.curve, points["train"], points["eval"], result.unigram_entropy, f"Loss of {result.output.name}")


def summary(result: TrainResult) -> str:
    """How it went, in a few lines."""
    how = f"Stopped by {result.interrupted} after" if result.interrupted else "Trained"
    numbers = [f"loss {result.loss:.4f}"] if result.loss is not None else []
    numbers += [f"held-out loss {result.eval_loss:.4f}"] if result.eval_loss is not None else []
    numbers += [f"unigram entropy {result.unigram_entropy:.4f}"]
    numbers += [f"{result.tokens_per_second:,.0f} tokens/s"] if result.tokens_per_second else []
    resume = " Run the same command again to go on." if result.interrupted else ""
    return (
        f"{how} {result.step} steps in {clock(result.seconds)}: {', '.join(numbers)}.{resume}\n"
        f"Checkpoint {result.checkpoint}\nMetrics {result.metrics}\nLoss curve {result.curve}"
    )
