"""Settings of rotary embedding. No JAX here: configs are read where JAX is not wanted.

A stretch makes a model read longer contexts than it was trained on; their names are Hugging Face's `rope_type`.
"""

import dataclasses
import math
from typing import Any, ClassVar

from . import plain


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor >= 1", self)


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with the sequence beyond `original_context` ("dynamic NTK").

    Every position's angle then hangs on how long its sequence is: see `rope.angles`.
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check(self.factor >= 1 and self.original_context >= 1, "factor >= 1 and a positive original context", self)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Stretches the low frequencies so that a model trained on short contexts reads long ones (Llama 3.1).

    Attributes:
        factor: by how much the slowest frequencies are slowed.
        low_frequency_factor: wavelengths above original_context / this are slowed in full.
        high_frequency_factor: wavelengths below original_context / this are left alone; between, a blend.
        original_context: tokens of context before the stretch.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    def __post_init__(self) -> None:
        right = self.factor >= 1 and self.original_context >= 1
        _check(
            right and self.high_frequency_factor > self.low_frequency_factor,
            "factor >= 1, a positive original context and high_freq_factor > low_freq_factor",
            self,
        )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow frequencies divided by `factor`, fast ones kept, a ramp between.

    Attributes:
        factor: by how much.
        original_context: tokens of context before the stretch.
        beta_fast, beta_slow: full turns within the original context where the ramp ends and begins.
        truncate: the ramp's ends are whole pairs.
        attention_factor: cosines and sines are multiplied by it.
        mscale_all_dim: latent attention's scores are multiplied by `score_factor`, which hangs on it (DeepSeek-V2).
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def score_factor(self) -> float:
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1) ** 2

    def __post_init__(self) -> None:
        right = self.factor >= 1 and self.original_context >= 1 and self.attention_factor > 0
        _check(
            right and self.beta_fast > self.beta_slow > 0,
            "factor >= 1, a positive original context and attention factor, and beta_fast > beta_slow > 0",
            self,
        )


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for each pair, another set for long sequences.

    Attributes:
        short, long: divisors, one for each pair of rotated numbers.
        original_context: sequences longer than this take `long`, all their positions.
        attention_factor: cosines and sines are multiplied by it.
    """

    kind: ClassVar[str] = "longrope"
    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        right = len(self.short) == len(self.long) and min((*self.short, *self.long), default=0) > 0
        _check(
            right and self.original_context >= 1 and self.attention_factor > 0,
            "as many short factors as long ones, all positive, a positive original context and attention factor",
            self,
        )


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
SCALINGS: dict[str, type] = {
    x.kind: x for x in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling, LongRopeScaling)
}


def _check(right: bool, rule: str, scaling: Any) -> None:
    if not right:
        raise ValueError(f"Rope scaling of type {scaling.kind!r} needs {rule}; got {scaling}.")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Attributes: theta, the base of the wavelengths; scaling, a stretch or None; size, how many numbers of a head
    are turned, from the first on (None: all)."""

    theta: float = 10000.0
    scaling: Scaling | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ValueError(f"rope theta is a positive number; got {self.theta!r}.")
        if self.size is not None and (self.size < 2 or self.size % 2):
            raise ValueError(f"rope turns an even count of numbers from 2 up; got size={self.size!r}.")

    @property
    def by_length(self) -> bool:
        """Whether angles depend on the length of the sequence too, and not on the position alone."""
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        scaling = self.scaling and {"kind": self.scaling.kind, **dataclasses.asdict(self.scaling)}
        return {"theta": self.theta, "scaling": scaling, "size": self.size}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RopeConfig":
        """Raises ValueError on an unknown kind of scaling, unknown or missing keys, and values of another type."""
        values = plain.keys(values, "rope")
        if values.get("scaling") is None:
            return plain.read(cls, values, "rope")
        given = plain.keys(values["scaling"], "scaling of rope")
        kind = given.pop("kind", "llama3")  # the only one that there was before kinds were written
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise ValueError(f"Rope scaling is one of {', '.join(SCALINGS)}; got {kind!r}.")
        values["scaling"] = plain.read(SCALINGS[kind], given, f"scaling of rope ({kind})")
        return plain.read(cls, values, "rope")
