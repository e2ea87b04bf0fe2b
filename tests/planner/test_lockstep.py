"""Devices meet in collectives: all must run the same ones equally often, whatever their data, or they wait forever.

A mixture of experts has loops as long as the data wants; no collective may stand in one, nor under a condition.
"""

import re

import pytest

from tests.planner.helpers import SPARSE, compile_here
from twinax.planner.hlo import Instruction, Module
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan

COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute")


def below(module: Module, instruction: Instruction) -> list[Instruction]:
    """All that an instruction runs."""
    found = []
    for name in instruction.called:
        for inner in module[name]:
            found += [inner, *below(module, inner)]
    return found


def met_by_chance(module: Module) -> tuple[int, list[str]]:
    """How many loops and conditions depend on data, and the collectives that they hold."""
    depending = [
        instruction
        for computation in module.computations.values()
        for instruction in computation
        # What is left of a choice between platforms has one branch.
        if (instruction.opcode == "conditional" and len(instruction.called) > 1)
        or (instruction.opcode == "while" and "known_trip_count" not in instruction.attributes)
    ]
    inside = [inner for instruction in depending for inner in below(module, instruction)]
    return len(depending), [inner.name for inner in inside if COLLECTIVE.match(inner.opcode)]


@pytest.mark.parametrize("plan", ["fsdp=4,stage=2", "stage=2,expert=2,tensor=2,schedule=1f1b"])
@pytest.mark.slow
def test_no_collective_depends_on_data(plan: str):
    layout = Layout(Plan.parse(plan), 2, "full")
    module = Module.parse(compile_here(Workload(SPARSE, "train", 32, 64, "float32"), layout).as_text())
    loops, collectives = met_by_chance(module)
    assert loops > 0
    assert not collectives


def test_one_that_does_is_found():
    module = Module.parse(
        """HloModule test

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
}

%condition (q: f32[4]) -> pred[] {
  %q = f32[4]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %loop = f32[4]{0} while(%x), condition=%condition, body=%body
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
    )
    assert met_by_chance(module) == (1, ["sum"])
