"""Settings of rotary embedding. No JAX here: configs are read where JAX is not wanted."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Stretches the low frequencies so that a model trained on short contexts reads long ones (Llama 3.1).

    Attributes:
        factor: by how much the slowest frequencies are slowed.
        low_frequency_factor: wavelengths above original_context / this are slowed in full.
        high_frequency_factor: wavelengths below original_context / this are left alone; between, a blend.
        original_context: tokens of context before the stretch.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 1 or self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                "Llama 3 rope scaling needs factor >= 1, a positive original context and high_freq_factor > "
                f"low_freq_factor; got {self}."
            )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Attributes: theta, the base of the wavelengths; scaling, None or Llama 3's."""

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ValueError(f"rope theta is a positive number; got {self.theta!r}.")
