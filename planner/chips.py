"""Facts about accelerators: what they compute, hold and send. Bytes are bytes and seconds are seconds.

All numbers are of one JAX device: a whole chip, but for TPU7x, whose chip is two devices.

Sources:
- TPU peaks, HBM bandwidth, links: the pages of Cloud TPU's documentation for v4, v5e, v5p, v6e and TPU7x. They give the
  interconnect in both directions together for the whole chip; a link's one direction is that over twice the links.
- TPU memory: what libtpu 0.0.42 says a program may use ("exceeds available HBM"); a little less than is built in.
- GPU memory: nine tenths of what is built in, as with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (JAX's default is 0.75).
- TPU clocks: the peak over the matrix units' width.
- GPUs: NVIDIA's data sheets (SXM modules, dense). Between nodes: one network card for each GPU, 400 Gb/s (A100: 200).
- Attention: of a flash attention kernel, forward and backward together. v6e, TPU7x: from measured forward times of
  splash attention at 8,192 tokens (36% and 34% of the peak if that was one head of 128), and 1.6 times that time for
  the backward pass, as its program for a tile is 1.6 times as long (v5p, v6e). v4, v5e, v5p: as products. GPUs:
  FlashAttention-2 and 3 (arXiv:2307.08691, 2407.08608).
"""

import dataclasses
import difflib
from typing import Any

from ..train.flops import PEAKS
from .errors import PlannerError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as `--topology` writes it.
        kind: key of `train.flops.PEAKS`.
        platform: "tpu" or "cuda".
        built_in: bytes of memory.
        memory: bytes that a program may use.
        memory_bandwidth: bytes/s.
        attention: share of the bfloat16 peak that a flash attention kernel reaches.
        narrow: peak of int8 and float8 over that of bfloat16; 1 where they are no faster.
        link: bytes/s of one interconnect link in one direction; for GPUs, of all of NVLink together.
        dimensions: of the torus that the links make; 0: any GPU of a node reaches any other at full speed.
        devices_per_chip: JAX devices in one chip.
        clock: cycles/s that the compiler's estimates count in; 0: it makes none.
        largest: chips along each dimension of the torus, at most.
        node: GPUs that NVLink joins.
        network: bytes/s between nodes in one direction, for each GPU.
    """

    name: str
    kind: str
    platform: str
    built_in: float
    memory: float
    memory_bandwidth: float
    attention: float
    narrow: float
    link: float
    dimensions: int = 0
    devices_per_chip: int = 1
    clock: float = 0.0
    largest: tuple[int, ...] = ()
    node: int = 0
    network: float = 0.0

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAKS[self.kind]

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`: bfloat16, int8, float8, or float32 (six bfloat16 passes on a TPU)."""
        if dtype == "float32":
            return self.flops / (6 if self.platform == "tpu" else 16)
        return self.flops * (1 if dtype == "bfloat16" else self.narrow)


def _tpu(
    name: str, kind: str, memory: float, bandwidth: float, link: float, clock: float, attention: float, **more: Any
) -> Chip:
    return Chip(name, kind, "tpu", memory * GIB, memory * GIB, bandwidth, attention, link=link, clock=clock, **more)


def _gpu(name: str, kind: str, memory: float, bandwidth: float, nvlink: float, network: float) -> Chip:
    return Chip(name, kind, "cuda", memory, 0.9 * memory, bandwidth, 0.6, 2, nvlink, node=8, network=network)


CUBE = (16, 16, 24)  # the largest job that can be scheduled on v5p: 6,144 chips
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 30.75, 1200e9, 50e9, 1.05e9, 0.8, narrow=1, dimensions=3, largest=(16, 16, 16)),
        _tpu("v5e", "TPU v5e", 15.75, 819e9, 50e9, 1.5e9, 0.8, narrow=2, dimensions=2, largest=(16, 16)),
        _tpu("v5p", "TPU v5p", 95.74, 2765e9, 100e9, 1.75e9, 0.8, narrow=2, dimensions=3, largest=CUBE),
        _tpu("v6e", "TPU v6e", 31.25, 1638e9, 100e9, 1.75e9, 0.45, narrow=2, dimensions=2, largest=(16, 16)),
        _tpu(
            "tpu7x", "TPU7x", 94.75, 7380e9 / 2, 100e9, 2.2e9, 0.42,
            narrow=2, dimensions=3, devices_per_chip=2, largest=(16, 24, 24),
        ),
        _gpu("a100", "NVIDIA A100", 84942979072, 2039e9, 300e9, 25e9),
        _gpu("h100", "NVIDIA H100", 84942979072, 3352e9, 450e9, 50e9),
        _gpu("h200", "NVIDIA H200", 151397597184, 4800e9, 450e9, 50e9),
        _gpu("b200", "NVIDIA B200", 191514411008, 7672e9, 900e9, 50e9),
    )
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x"}

# What the two halves of a TPU7x chip exchange, one direction: six times a link, says its documentation.
HALVES = 6.0


def find_chip(name: str) -> Chip:
    """The chip of a name, in any case; PlannerError names the nearest right one."""
    key = ALIASES.get(name.lower(), name.lower())
    if key in CHIPS:
        return CHIPS[key]
    near = difflib.get_close_matches(key, [*CHIPS, *ALIASES], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise PlannerError(f"There is no chip {name!r}; known are {', '.join(CHIPS)}.{hint}")
