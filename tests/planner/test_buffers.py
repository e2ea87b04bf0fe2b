"""Memory by class from XLA's buffer assignment, against sizes that are known beforehand."""

from pathlib import Path

import pytest

from tests.planner.helpers import DENSE, compile_here, memory_of
from twinax.planner.buffers import CLASSES, Names, read_memory
from twinax.planner.sizes import resting
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan


@pytest.mark.parametrize("plan", [Plan(fsdp=4), Plan(fsdp=2, tensor=2)])
def test_a_step_s_memory_is_all_accounted_for(plan: Plan, tmp_path: Path):
    workload, layout = Workload(DENSE, "train", 8, 128, "float32"), Layout(plan, 1, "full")
    sizes = compile_here(workload, layout, tmp_path).memory_analysis()
    memory = memory_of(workload, layout, tmp_path)
    at_rest = resting(DENSE, plan)
    # Arrays of less than a device's share are whole everywhere, and sizes are rounded up a little.
    assert memory.by_class["parameters"] == pytest.approx(4 * at_rest, rel=0.01)
    assert memory.by_class["optimizer"] == pytest.approx(8 * at_rest, rel=0.01)
    arguments = sum(memory.by_class[name] for name in ("parameters", "optimizer", "inputs"))
    assert arguments == pytest.approx(sizes.argument_size_in_bytes, rel=0.01)
    assert memory.total == pytest.approx(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes, rel=0.03)
    assert set(memory.by_class) == set(CLASSES)
    assert memory.total == sum(memory.by_class.values())
    assert min(memory.by_class.values()) >= 0


def test_what_is_kept_is_found(tmp_path: Path):
    """Without remat much more of the heap is activations, and about as many bytes as the heap grows by."""
    workload = Workload(DENSE, "train", 8, 256, "float32")
    found = {}
    for remat in ("none", "full"):
        (tmp_path / remat).mkdir()
        layout = Layout(Plan(fsdp=2), 1, remat)
        compile_here(workload, layout, tmp_path / remat)
        found[remat] = memory_of(workload, layout, tmp_path / remat)
    kept = {remat: memory.by_class["activations"] for remat, memory in found.items()}
    tokens = workload.tokens / 2
    assert kept["full"] >= 4 * tokens * DENSE.hidden_size * DENSE.num_layers
    assert kept["none"] > 3 * kept["full"]


def test_a_dump_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="left no"):
        read_memory(tmp_path, Names({}, (), 1))
