"""Topologies: what is accepted, where devices are, and what a mesh axis can send."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from twinax.planner.chips import CHIPS, find_chip
from twinax.planner.devices import TPU_SETTINGS
from twinax.planner.errors import PlannerError
from twinax.planner.topology import Topology
from twinax.train.flops import PEAKS

GB = 1e9


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5p:4x4x8", 128, 128),
        ("v5p:16x16x16", 4096, 4096),
        ("v4:2x2x1", 4, 4),
        ("v6e:16x16", 256, 256),
        ("v5e:1x1", 1, 1),
        ("tpu7x:4x4x4", 64, 128),
        ("ironwood:4x8x8", 256, 512),
        ("V5P:2x2x1", 4, 4),
        ("h100:64", 64, 64),
        ("b200:2", 2, 2),
    ],
)
def test_a_topology_is_read(text: str, chips: int, devices: int):
    topology = Topology.parse(text)
    assert (topology.chips, topology.devices) == (chips, devices)
    assert Topology.parse(str(topology)) == topology
    assert len(topology.coordinates()) == devices


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5q:4x4x4", "There is no chip 'v5q'; known are v4, v5e, v5p"),
        ("v5p", "as v5p:4x4x4; got 'v5p'"),
        ("v5p:4x4", "a torus of 3 dimensions"),
        ("v5p:4xfour", "got 'v5p:4xfour'"),
        ("v5p:0x4x4", "got 'v5p:0x4x4'"),
        ("v5p:3x4x4", "the first two sizes are even; got 'v5p:3x4x4'. The nearest is v5p:4x4x4."),
        ("v6e:32x32", "The largest slice of v6e is 16x16"),
        ("v5e:2x1", "The nearest is v5e:2x2."),
        ("h100:2x8", "write h100:16"),
        ("h100:12", "nodes of 8"),
    ],
)
def test_what_is_impossible_is_told_what_would_be(text: str, says: str):
    with pytest.raises(PlannerError) as error:
        Topology.parse(text)
    assert says in str(error.value)


def test_a_chip_s_peak_is_the_trainer_s():
    for chip in CHIPS.values():
        assert chip.flops == PEAKS[chip.kind]
        assert chip.peak("bfloat16") == chip.flops >= chip.peak("float32")
    assert find_chip("TRILLIUM") is CHIPS["v6e"]


def test_every_device_is_somewhere_else():
    for text in ("v5p:4x4x8", "v6e:8x16", "tpu7x:2x4x4", "a100:16"):
        places = Topology.parse(text).coordinates()
        assert len(np.unique(places, axis=0)) == len(places)


@pytest.mark.parametrize(
    ("text", "sizes", "axes", "speed"),
    [
        # The whole of a closed torus: three dimensions, two ways each.
        ("v5p:4x4x8", {"fsdp": 128}, ("fsdp",), 600),
        # Not whole cubes: nothing is closed.
        ("v5p:2x2x4", {"fsdp": 16}, ("fsdp",), 300),
        # A host's 2x2, and then every second chip along x and y (half the speed), but all along z.
        ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}, ("tensor",), 200),
        ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}, ("fsdp",), 400),
        ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}, ("fsdp", "tensor"), 600),
        ("v6e:16x16", {"fsdp": 256}, ("fsdp",), 400),
        ("v6e:8x8", {"fsdp": 64}, ("fsdp",), 200),
        # Both halves of each chip use its links as one; in two groups they share them.
        ("tpu7x:4x4x4", {"fsdp": 128}, ("fsdp",), 600),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}, ("fsdp",), 300),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}, ("tensor",), 600),
        # NVLink in a node; between nodes a card for each member.
        ("h100:64", {"fsdp": 8, "tensor": 8}, ("tensor",), 450),
        ("h100:64", {"fsdp": 8, "tensor": 8}, ("fsdp",), 50),
        ("h100:64", {"fsdp": 64}, ("fsdp",), 400),
    ],
)
def test_what_an_axis_can_send(text: str, sizes: dict[str, int], axes: tuple[str, ...], speed: float):
    assert Topology.parse(text).bandwidth(sizes, axes) == pytest.approx(speed * GB)


def test_an_axis_of_one_device_sends_nothing():
    assert Topology.parse("v5p:2x2x1").bandwidth({"data": 1, "fsdp": 4}, ("data",)) == float("inf")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_devices_are_where_libtpu_has_them():
    names = ["v5p:4x4x8", "v6e:8x16", "tpu7x:2x2x4", "v4:2x4x4", "v5e:1x1", "v5e:4x2"]
    code = f"""
import json
from twinax.planner.devices import find_devices
from twinax.planner.topology import Topology
found = {{}}
for name in {names!r}:
    devices = find_devices(Topology.parse(name))
    found[name] = [devices[0].device_kind, [[*d.coords, d.core_on_chip] for d in devices]]
print(json.dumps(found))
"""
    environment = {**os.environ, **TPU_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for name, (kind, places) in json.loads(done.stdout.splitlines()[-1]).items():
        topology = Topology.parse(name)
        ours = [[*place[:-1], *[0] * (4 - len(place)), place[-1]] for place in topology.coordinates().tolist()]
        assert ours == places, name
        match = max((key for key in PEAKS if kind.startswith(key)), key=len)
        assert PEAKS[match] == topology.chip.flops
