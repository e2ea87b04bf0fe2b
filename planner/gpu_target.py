"""Describes an NVIDIA GPU to XLA, so that programs can be compiled for it where there is none."""

import dataclasses

from .chips import Chip

# XLA's GpuTargetConfigProto in text form.
_TEMPLATE = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {capability} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """What XLA asks of a GPU beyond the facts of `chips`: multiprocessors, caches, clock, compute capability."""

    name: str
    cores: int
    fpus: int
    l2: int
    clock: float
    capability: int
    shared: int
    optin: int


TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", 108, 64, 41943040, 1.41, 8, 167936, 166912),
    "h100": Target("NVIDIA H100 80GB HBM3", 132, 128, 52428800, 1.98, 9, 233472, 232448),
    "h200": Target("NVIDIA H200", 132, 128, 62914560, 1.98, 9, 233472, 232448),
    "b200": Target("NVIDIA B200", 148, 128, 132644864, 1.965, 10, 233472, 232448),
}


def target_config(chip: Chip) -> str:
    """The text that `topologies.get_topology_desc(platform="cuda", target_config=...)` takes."""
    target = TARGETS[chip.name]
    features = "feature_extension: ACCELERATED_FEATURES" if target.capability >= 9 else ""
    return _TEMPLATE.format(
        bandwidth=int(chip.memory_bandwidth), memory=int(chip.built_in), features=features, **dataclasses.asdict(target)
    )
