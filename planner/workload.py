"""What is to be planned: a model, what it does, how much at once, and how it is laid out."""

import dataclasses
from typing import Any, Literal

from ..models.config import DecoderConfig
from ..sharding.plan import Plan
from .errors import PlannerError

Mode = Literal["train", "serve"]
PAGE = 64  # tokens of a page of the cache, as the engine has by default
CHUNK = 1024  # prompt tokens of a step when serving
ITEMSIZES = {"bfloat16": 2, "float32": 4}
SCALE = 4  # bytes, of a head's key or value in 8 bits


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attributes:
    model: its sizes.
    mode: "train": a step of the trainer; "serve": a step of the engine.
    rows: sequences of a batch, over all devices; when serving, requests that run at once.
    seq_len: tokens of a row; when serving, of a request, prompt and answer together.
    dtype: of the products; when serving also of weights and cache.
    cache_dtype: of the cache, where it is another, as the engine has it: "int8" or "float8".
    """

    model: DecoderConfig
    mode: Mode
    rows: int
    seq_len: int
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seq_len < 2:
            raise PlannerError(
                f"A workload has at least one row of two tokens; got {self.rows} rows of {self.seq_len}. A batch of "
                "--batch-tokens holds batch-tokens / seq-len rows."
            )
        if others := [mixer for mixer in self.model.mixers if mixer != "attention"]:
            raise PlannerError(
                f"The planner does not know yet what layers of {' and '.join(others)} take; it plans models that have "
                "plain attention alone."
            )
        if self.seq_len > self.model.max_position_embeddings:
            raise PlannerError(
                f"The model takes {self.model.max_position_embeddings} tokens of context; --seq-len {self.seq_len} is "
                "longer. Lower it."
            )

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype of the products."""
        return ITEMSIZES[self.dtype]

    @property
    def cached_head_bytes(self) -> int:
        """What the cache keeps of one head's key, or its value."""
        size = self.model.head_dim
        return size * self.itemsize if self.cache_dtype is None else size + SCALE

    @property
    def tokens(self) -> int:
        """Tokens of a training step, or those that a serving step makes, one for each request."""
        return self.rows * self.seq_len if self.mode == "train" else self.rows

    @property
    def dimensions(self) -> dict[str, int]:
        """What a plan must divide, in the words of `Plan.problems`, but the rows, which accumulation cuts first."""
        sizes = self.model.dimensions
        if self.mode == "train":
            sizes["tokens"] = self.seq_len
        return sizes


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a workload is laid out: the plan, and for training how a step saves memory."""

    plan: Plan
    accumulation: int = 1
    remat: str = "full"

    def problems(self, workload: Workload) -> list[str]:
        """Why the workload cannot be cut so; empty if it can."""
        sizes = dict(workload.dimensions)
        if workload.mode == "train":
            if workload.rows % self.accumulation:
                return [f"{workload.rows} rows cannot be cut into accumulation = {self.accumulation} micro-batches"]
            sizes["rows"] = workload.rows // self.accumulation
            return self.plan.problems(sizes)
        found = self.plan.problems(sizes)
        others = [f"{name}={size}" for name, size in self.plan.sizes.items() if size > 1 and name != "tensor"]
        if others:
            found.append(f"an engine is cut by tensor alone, not by {', '.join(others)}; run one for each replica")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"plan": str(self.plan), "accumulation": self.accumulation, "remat": self.remat}
