"""The analytic model: what a layout takes on a topology, in about a millisecond and without a compiler."""

import dataclasses
import math

from .costs import Key, Traffic
from .memory import serve_memory, train_memory
from .roofline import Roofline, roofline
from .serving import serve_work
from .topology import Topology
from .traffic import Work, train_work
from .workload import Layout, Workload


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step.

    Attributes:
        memory: bytes by class.
        work: FLOPs, traffic, collectives.
        roofline: the seconds that these take.
    """

    workload: Workload
    topology: Topology
    layout: Layout
    memory: dict[str, float]
    work: Work
    roofline: Roofline

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def free(self) -> float:
        """Bytes that are left on a device; negative when it does not fit."""
        return self.topology.chip.memory - self.total_memory

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def seconds(self) -> float:
        return self.roofline.expected

    def rates(self, seconds: float | None = None) -> dict[str, float]:
        """Tokens per second of the whole machine and of a chip, and MFU, for steps of so many seconds."""
        return rates(self.workload, self.topology, self.layout, self.work.model_flops, seconds or self.seconds)


def estimate(workload: Workload, topology: Topology, layout: Layout) -> Estimate:
    """What the layout takes; it must be one without `problems`."""
    if workload.mode == "train":
        memory, work = train_memory(workload, layout), train_work(workload, layout)
    else:
        memory, work = serve_memory(workload, layout), serve_work(workload, layout)
    sizes = layout.plan.sizes
    flops = work.flops, work.attention_flops
    times = roofline(topology, sizes, workload.dtype, flops, work.hbm_bytes, work.collectives)
    return Estimate(workload, topology, layout, memory, work, times)


def fits(workload: Workload, topology: Topology, layout: Layout, share: float = 1.0) -> bool:
    """Whether the layout takes no more than a share of a device's memory."""
    memory = train_memory if workload.mode == "train" else serve_memory
    return sum(memory(workload, layout).values()) <= share * topology.chip.memory


def rates(
    workload: Workload, topology: Topology, layout: Layout, model_flops: float, seconds: float
) -> dict[str, float]:
    """`tokens_per_second` of all devices of the plan, `tokens_per_second_per_chip`, and `mfu`."""
    chips = layout.plan.devices / topology.chip.devices_per_chip
    tokens = workload.tokens / seconds if seconds else math.inf
    mfu = model_flops / seconds / topology.chip.flops if seconds else 0.0
    return {"tokens_per_second": tokens, "tokens_per_second_per_chip": tokens / chips, "mfu": mfu}


def axis_bytes(collectives: dict[Key, Traffic]) -> dict[tuple[str, ...], float]:
    """Bytes sent over each set of mesh axes."""
    found: dict[tuple[str, ...], float] = {}
    for (_, axes), traffic in collectives.items():
        found[axes] = found.get(axes, 0.0) + traffic.sent
    return found
