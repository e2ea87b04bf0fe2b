"""Replica groups in every spelling that XLA has, against the axes they lie along."""

import pytest

from twinax.planner.groups import UNKNOWN, Group, first_group, group_of
from twinax.planner.hlo import Module

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def group(attributes: str) -> Group:
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %c = f32[8]{{0}} all-reduce(%p), {attributes}\n}}"
    return group_of(Module.parse(text).entry["c"], SIZES)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("{{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",)),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",)),
        ("{{0,1,8,9},{2,3,10,11},{4,5,12,13},{6,7,14,15}}", ("data", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("[8,2]<=[16]", ("tensor",)),
        ("[2,8]<=[16]", ("fsdp", "tensor")),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[2,8]T(1,0)", ("data",)),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_1'}", ("fsdp",)),
        ("mesh['axis_0'=1,'axis_1'=16] {'axis_1'}", ("data", "fsdp", "tensor")),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}", ("data", "fsdp")),
        # A part of an axis: [16] as [2, 4, 2], the middle.
        ("mesh['a'=16] {'a':(2)4}", ("fsdp",)),
    ],
)
def test_groups_are_axes(groups: str, axes: tuple[str, ...]):
    found = group(f"channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add")
    assert found.axes == axes
    size = 1
    for name in axes:
        size *= SIZES[name]
    assert found.size == size


def test_what_is_not_understood_is_said():
    assert group("replica_groups=strange(3)").axes == (UNKNOWN,)


def test_permutations():
    ring = "source_target_pairs={" + ",".join(f"{{{d},{d - d % 8 + (d + 2) % 8}}}" for d in range(16)) + "}"
    assert group(ring) == Group(4, ("fsdp",), 1.0)
    half = "source_target_pairs={" + ",".join(f"{{{d},{d + 1}}}" for d in range(0, 16, 2)) + "}"
    assert group(half) == Group(2, ("tensor",), 0.5)
    assert group("source_target_pairs={{0,0},{1,1}}").size == 1


def test_a_program_without_groups_means_all():
    assert list(first_group("channel_id=1", 3)) == [0, 1, 2]  # type: ignore[arg-type]
