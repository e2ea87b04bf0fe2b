"""Settings of quantised weights. No JAX here: configs are read where JAX is not wanted."""

import dataclasses
from typing import Any

from . import plain

FORMATS = ("mxfp4", "fp8_e4m3")
PARTS = ("experts", "linear")


def keeps_dtype(name: str) -> bool:
    """Whether the parameter of this name is part of a quantised weight, whose dtypes are its meaning."""
    return name.endswith((".values", ".scales"))


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which weights of the blocks are kept quantised, and how (see `quantized_matmul.QuantizedWeight`).

    Attributes:
        format: "mxfp4" (OCP Microscaling) or "fp8_e4m3".
        block: outputs and inputs that share a scale.
        parts: of "experts" (those of a mixture) and "linear" (all other products of the blocks but the router's).
        inputs_first: whole bytes are kept [I, O] (`quantized_matmul.with_inputs_first`): in a server, never in files.
    """

    format: str
    block: tuple[int, int]
    parts: tuple[str, ...]
    inputs_first: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"Weights are quantised as one of {', '.join(FORMATS)}; got {self.format!r}.")
        if len(self.block) != 2 or any(not isinstance(size, int) or size < 1 for size in self.block):
            raise ValueError(f"A block of weights is (outputs, inputs), whole numbers from 1 up; got {self.block!r}.")
        if self.format == "mxfp4" and self.block != (1, 32):
            raise ValueError(f"mxfp4 has blocks of (1, 32); got {self.block!r}.")
        if self.inputs_first and self.format == "mxfp4":
            raise ValueError("Weights in mxfp4 have one order, which has inputs first; leave out inputs_first.")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"The parts that are quantised are some of {', '.join(PARTS)}; got {self.parts!r}.")

    def of(self, part: str) -> "Quantization | None":
        """Itself if it is about this part."""
        return self if part in self.parts else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Quantization":
        """Reads back `dataclasses.asdict`, whose tuples JSON makes lists."""
        return plain.read(cls, values, "quantization")
