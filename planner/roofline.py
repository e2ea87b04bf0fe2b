"""From FLOPs, bytes and what is sent to seconds: a roofline of compute, memory and each interconnect axis.

Three step times are given, as nobody knows from outside how well things overlap:
- `least`: everything at its peak and beside everything else, so the longest of all;
- `expected`: products at EFFICIENCY of the peak, and attention at what flash attention reaches on the chip. Weights,
  gradients and what goes round a ring travel beside them; what tensor parallelism, exchanges and pipelines send is
  waited for;
- `most`: the same, and nothing overlaps.
"""

import dataclasses
from collections.abc import Mapping

from .chips import Chip
from .costs import Key, Traffic
from .topology import Topology

# What products reach of the peak, by the cycles that libtpu's compiler estimates for the fusions that hold an 8B's
# products; see docs/plan-accuracy.md.
EFFICIENCY = 0.8
OVERLAP = (
    f"products run at {EFFICIENCY:.0%} of the peak, and attention at {{attention:.0%}}; "
    "weights and gradients over data and fsdp, and what goes round a ring, travel beside them; "
    "what tensor, expert, stage and all-to-all send is waited for"
)
HIDDEN_AXES = {"data", "fsdp", "sequence", "expert"}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device.

    Attributes:
        compute, memory: at their peaks.
        busy: of computing, at the rates that are expected.
        axes: of each set of mesh axes, at the full speed of the links they run along.
        hidden, exposed: seconds of sending beside the products, and of waiting.
        least, expected, most: of the step, as above.
    """

    compute: float
    busy: float
    memory: float
    axes: dict[tuple[str, ...], float]
    hidden: float
    exposed: float

    @property
    def least(self) -> float:
        return max(self.compute, self.memory, *self.axes.values())

    @property
    def expected(self) -> float:
        return max(self.busy, self.memory, self.hidden) + self.exposed

    @property
    def most(self) -> float:
        return self.busy + self.memory + self.hidden + self.exposed

    @property
    def bound(self) -> str:
        """What the expected time is made of, mostly."""
        if self.exposed > max(self.busy, self.memory, self.hidden):
            return "waiting for other devices"
        if self.hidden > max(self.busy, self.memory):
            return "weights and gradients on their way"
        return "compute" if self.busy >= self.memory else "memory"


def roofline(
    topology: Topology,
    sizes: Mapping[str, int],
    dtype: str,
    flops: tuple[float, float],
    hbm_bytes: float,
    collectives: Mapping[Key, Traffic],
) -> Roofline:
    """The seconds for these totals of one device on a mesh of `sizes`; `flops` are all, and those of attention."""
    chip, peak = topology.chip, topology.chip.peak(dtype)
    everything, attention = flops
    busy = (everything - attention) / peak / EFFICIENCY + attention_seconds(chip, dtype, attention)
    axes: dict[tuple[str, ...], float] = {}
    hidden = exposed = 0.0
    for (kind, over), traffic in collectives.items():
        if not traffic.sent:
            continue
        known = tuple(name for name in over if name in sizes)
        seconds = traffic.sent / topology.bandwidth(sizes, known) if known else 0.0
        axes[over] = axes.get(over, 0.0) + seconds
        if set(over) <= HIDDEN_AXES and kind not in ("all-to-all", "ragged-all-to-all"):
            hidden += seconds
        else:
            exposed += seconds
    return Roofline(everything / peak, busy, hbm_bytes / chip.memory_bandwidth, axes, hidden, exposed)


def attention_seconds(chip: Chip, dtype: str, flops: float) -> float:
    """What attention is expected to take."""
    return flops / chip.peak(dtype) / chip.attention


def assumption(chip: Chip) -> str:
    """What `expected` assumes, in words."""
    return OVERLAP.format(attention=chip.attention)
