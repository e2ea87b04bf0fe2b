"""The trainer's and the engine's programs take our kernels on a TPU. Skipped where libtpu is not installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.planner.helpers import DENSE, SPARSE
from twinax.layers.quantization_config import Quantization
from twinax.models.config import DecoderConfig
from twinax.planner.devices import settings
from twinax.planner.topology import Topology

# Each program's kernels, by lowering it alone: nothing is compiled.
LOWER = """
import json, re, sys
from twinax.planner.devices import find_devices
from twinax.planner.programs import programs
from twinax.planner.topology import Topology
from twinax.sharding.plan import Plan

request, kernels = json.loads(sys.argv[1]), {}
plan = Plan.parse(request["plan"])
mesh = plan.mesh(devices=find_devices(Topology.parse(request["topology"])))
for name, lower, _ in programs(request, plan, mesh):
    kernels[name] = sorted(set(re.findall(r'kernel_name = "([^"]+)"', lower().as_text())))
print(json.dumps(kernels))
"""
FLASH = ["flash_attention_backward", "flash_attention_forward"]
RING = ["ring_attention_backward", "ring_attention_forward"]
EXPERTS = ["grouped_matmul", "grouped_matmul_dweight", "grouped_matmul_dx"]
FLOAT8 = dataclasses.replace(DENSE, quantization=Quantization("fp8_e4m3", (128, 128), ("linear",)))
DECODES = ["paged_decode", "paged_prefix"]


def kernels(model: DecoderConfig, mode: str, plan: str, cache_dtype: str | None) -> dict[str, list[str]]:
    topology = "v6e:2x2" if plan == "sequence=4" else "v6e:1x1"
    request = {"model": model.to_dict(), "mode": mode, "plan": plan, "topology": topology, "rows": 4, "seq_len": 1024}
    request |= {"dtype": "bfloat16", "cache_dtype": cache_dtype, "accumulation": 1, "remat": "none"}
    done = subprocess.run(
        [sys.executable, "-c", LOWER, json.dumps(request)],
        env={**os.environ, **settings(Topology.parse(topology))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("model", "mode", "plan", "cache_dtype", "wanted"),
    [
        (SPARSE, "train", "data=1", None, {"step": [*FLASH, *EXPERTS]}),
        (DENSE, "train", "sequence=4", None, {"step": RING}),
        (SPARSE, "serve", "data=1", None, {
            "decode": ["grouped_matmul", *DECODES],
            "chunk": ["grouped_matmul", "paged_chunk", *DECODES],
            "finish": [],
            "prompt": [],
        }),
        (FLOAT8, "serve", "data=1", "int8", {
            "decode": [*DECODES, "quantized_matmul_fp8_e4m3"],
            "chunk": ["paged_chunk", *DECODES, "quantized_matmul_fp8_e4m3"],
            "finish": [],
            "prompt": [],
        }),
    ],
    ids=["training", "training on a ring", "serving", "serving float8 with a cache of int8"],
)  # fmt: skip
def test_what_is_lowered_for_a_tpu_has_our_kernels(model, mode, plan, cache_dtype, wanted):
    assert kernels(dataclasses.replace(model, head_dim=64), mode, plan, cache_dtype) == wanted
