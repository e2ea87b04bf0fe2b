"""Runs of two real processes, against the same run in one; what goes wrong in one of them, and what all do then."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import TIMEOUT, Ended, environment, free_port, run_job, running, wait
from tests.train.helpers import write_text
from twinax.checkpoints import manifest
from twinax.checkpoints.load import load_model
from twinax.checkpoints.step import open_stored
from twinax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

TENSOR, RING = "fsdp=4,tensor=2", "sequence=4,data=2"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that ended, and what each of its processes wrote down."""

    ended: list[Ended]
    output: Path

    def outcome(self, process: int = 0) -> dict:
        return json.loads((Path(f"{self.output}.said") / f"{process}.json").read_text())

    def state(self, name: str, count: int) -> dict[str, np.ndarray]:
        """The arrays that the processes kept the shares of, put together; copies of a share must be equal."""
        whole: dict[str, np.ndarray] = {}
        seen: dict[str, np.ndarray] = {}
        parts = [np.load(Path(f"{self.output}.said") / f"{name}-{process}.npz") for process in range(count)]
        for part in parts:
            for key in part.files:
                array_name, where, _ = key.split("|")
                spans = json.loads(where)
                everywhere = [json.loads(other.split("|")[1]) for other in _of(parts, array_name)]
                shape = tuple(max(where[axis][1] for where in everywhere) for axis in range(len(spans)))
                whole.setdefault(array_name, np.zeros(shape, part[key].dtype))
                seen.setdefault(array_name, np.zeros(shape, bool))
                place = tuple(slice(*span) for span in spans)
                if seen[array_name][place].any():
                    assert np.array_equal(whole[array_name][place], part[key]), key
                whole[array_name][place], seen[array_name][place] = part[key], True
        assert all(array.all() for array in seen.values())
        return whole


def _of(parts, array_name: str) -> list[str]:
    return [key for part in parts for key in part.files if key.startswith(f"{array_name}|")]


def stored_state(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a step folder, verified, read without JAX."""
    found = manifest.read(folder)
    found.verify()
    return {name: np.array(open_stored(found, name).read()) for name in found.arrays}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_text(folder)
    return folder


def run(folder: Path, output: str, count: int, devices: int = 8, **task) -> Run:
    whole = {"folder": str(folder), "output": str(folder / output), **task}
    program = ["-m", "tests.train.process_program", json.dumps(whole)]
    return Run(run_job(program, count, devices // count), folder / output)


@pytest.fixture(scope="module")
def pair(folder) -> Callable[[str], tuple[Run, Run]]:
    """By plan: the run of one process with eight devices, and that of two with four each."""

    @functools.cache
    def runs(plan: str) -> tuple[Run, Run]:
        name, task = plan.split("=")[0], {"plan": plan, "accumulation": 2 if plan == TENSOR else 1}
        return run(folder, f"{name}-1", 1, **task), run(folder, f"{name}-2", 2, **task)

    def pair(plan: str) -> tuple[Run, Run]:
        for ended in (end for one in runs(plan) for end in one.ended):
            assert ended.status == 0, ended.err
        return runs(plan)

    return pair


@pytest.mark.parametrize("plan", [TENSOR, RING])
def test_two_processes_train_as_one(pair, plan):
    one, two = pair(plan)
    want, got = one.outcome(), two.outcome()
    assert facts(two.outcome(1)) == facts(got)
    assert [step["batch"] for step in got["steps"]] == [step["batch"] for step in want["steps"]]
    assert len(got["steps"]) == 5
    # The sums over devices are the same ones in another order of additions: float32, no more than that.
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in got["steps"]] == pytest.approx([step[key] for step in want["steps"]], rel=1e-6)
    assert got["eval"] == pytest.approx(want["eval"], rel=1e-6)
    first, second = (stored_state(each.output / "checkpoints" / "step_00000005") for each in (one, two))
    for name, array in first.items():
        assert np.max(np.abs(second[name] - array)) <= 1e-6 * max(np.max(np.abs(array)), 1e-30), name


def facts(outcome: dict) -> dict:
    timed = ("seconds", "tokens_per_second", "mfu")
    steps = [{key: value for key, value in step.items() if key not in timed} for step in outcome["steps"]]
    return {"steps": steps, "eval": outcome["eval"]}


@pytest.mark.parametrize("plan", [TENSOR, RING])
def test_process_0_alone_speaks_and_writes(pair, plan):
    _, two = pair(plan)
    first, second = two.ended
    assert "Trained 5 steps" in first.out
    assert (second.out, second.err) == ("", "")
    lines = read_metrics(two.output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [5]
    assert sorted(path.name for path in two.output.iterdir()) == ["checkpoints", "loss.svg", "metrics.jsonl"]
    kept = two.output / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step_00000003", "step_00000005"]


@pytest.mark.parametrize("plan", [TENSOR, RING])
def test_what_two_processes_save_has_their_bits(pair, plan):
    _, two = pair(plan)
    folder = two.output / "checkpoints" / "step_00000005"
    in_memory = two.state("saved", 2)
    assert len(in_memory) > 20
    assert same_bits(in_memory, stored_state(folder))
    # One process, one device, by the public door.
    params = {name.removeprefix("params."): a for name, a in in_memory.items() if name.startswith("params.")}
    assert same_bits(params, {name: np.asarray(array) for name, array in load_model(folder).params.items()})
    # No process wrote all of it: the embedding is cut over devices of both.
    if plan == TENSOR:
        assert len(list((folder / "arrays" / "params.embed.weight").glob("*.*"))) > 4


def test_two_processes_go_on_with_another_plan_from_the_newest_good_step(pair, folder):
    _, two = pair(TENSOR)
    shutil.copytree(two.output, folder / "on")
    arrays = folder / "on" / "checkpoints" / "step_00000005" / "arrays"
    damaged = arrays / "params.blocks.mlp.up.weight" / "0.0.0"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    on = run(folder, "on", 2, plan=RING, every=1, mishap="full disk")
    assert [ended.status for ended in on.ended] == [0, 0], on.ended
    assert "Step 5 is damaged and was passed over" in on.ended[0].out
    assert "mlp.up.weight/0.0.0: its bytes have changed" in on.ended[0].out
    assert same_bits(on.state("restored", 2), stored_state(two.output / "checkpoints" / "step_00000003"))
    steps = on.outcome()["steps"]
    want = pair(TENSOR)[0].outcome()["steps"][3:]
    assert [step["step"] for step in steps] == [4, 5]
    assert [step["batch"] for step in steps] == [step["batch"] for step in want]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in want], rel=1e-6)
    # Process 1 had no room for the first save: that is a warning of both, and the run goes on and saves again.
    assert "WARNING: step 4 was not saved" in on.ended[0].out
    assert "process 1: OSError: [Errno 28] No space left on device" in on.ended[0].out
    kept = sorted(path.name for path in (folder / "on" / "checkpoints").iterdir())
    assert kept == ["step_00000003", "step_00000005"]
    assert same_bits(on.state("saved", 2), stored_state(folder / "on" / "checkpoints" / "step_00000005"))


def test_one_process_goes_on_from_two(pair, folder):
    _, two = pair(RING)
    shutil.copytree(two.output, folder / "alone")
    alone = run(folder, "alone", 1, plan="data=2,fsdp=2", steps=6)
    assert [ended.status for ended in alone.ended] == [0], alone.ended
    assert same_bits(alone.state("restored", 1), stored_state(two.output / "checkpoints" / "step_00000005"))


def test_nan_in_one_process_stops_all_alike(folder):
    bad = run(folder, "nan", 2, devices=4, plan="data=2,fsdp=2", every=1, mishap="nan")
    first, second = bad.ended
    assert (first.status, second.status) == (1, 1)
    assert "NotFiniteError: step 3: the loss is nan" in first.err
    assert second.err == ""  # said once
    kept = sorted(path.name for path in (bad.output / "checkpoints").iterdir())
    assert kept == ["step_00000001", "step_00000002"]


def test_processes_with_other_settings_are_refused(folder):
    other = run(folder, "other", 2, devices=4, plan="data=4", mishap="other settings")
    assert [ended.status for ended in other.ended] == [1, 1]
    assert "must agree on the setting steps, which is '5' in process 0 and '6' in process 1" in other.ended[0].err
    assert not other.output.exists()


def test_an_output_that_is_not_shared_is_refused(folder):
    blind = run(folder, "blind", 2, devices=4, plan="data=4", mishap="blind")
    assert [ended.status for ended in blind.ended] == [1, 1]
    assert "of 2 processes, [1] do not see what process 0 writes there" in blind.ended[0].err
    assert "on a disk that all machines share" in blind.ended[0].err


def test_a_plan_takes_all_devices_of_all_processes(folder):
    small = run(folder, "small", 2, devices=4, plan="data=2")
    assert [ended.status for ended in small.ended] == [1, 1]
    assert "plan='data=2' takes 2, and the 2 processes have 4" in small.ended[0].err


RECIPE = """
import dataclasses
from tests.train.process_program import recipe_of
recipe = dataclasses.replace(recipe_of({task}, 0), steps=10**6)
"""


def test_sigterm_to_one_stops_all_and_a_kill_of_one_ends_the_others(folder, tmp_path):
    """By the command line, as a cluster does it; the second run resumes the first."""
    recipe = tmp_path / "recipe.py"
    task = {"folder": str(folder), "output": str(tmp_path / "run"), "plan": "data=2,fsdp=2", "every": 10**7}
    recipe.write_text(RECIPE.format(task=task))
    metrics = tmp_path / "run" / "metrics.jsonl"

    @contextlib.contextmanager
    def job(more: int):
        """Two processes, once they have made so many steps more."""
        begun = len(read_metrics(metrics))
        flags = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--eval.every", "0"]
        train = [sys.executable, "-m", "twinax", "train", str(recipe), *flags]
        with running([[*train, "--process", str(process)] for process in range(2)], environment(2)) as processes:
            for _ in range(TIMEOUT):
                if len(read_metrics(metrics)) >= begun + more or any(p.poll() is not None for p in processes):
                    break
                time.sleep(1)
            yield processes

    with job(3) as processes:
        processes[1].send_signal(signal.SIGTERM)
        first, second = wait(processes)
    assert [first.status, second.status] == [143, 143], (first.err, second.err)
    said = re.search(r"SIGTERM at process 1: saving step (\d+) before leaving", first.out)
    assert said, first.out
    step = int(said[1])
    assert f"Stopped by SIGTERM after {step} steps" in first.out
    assert (second.out, second.err) == ("", "")
    assert load_model(tmp_path / "run").step == step
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, step + 1))

    with job(3) as processes:
        processes[1].kill()
        first, second = wait(processes)
        gone = processes[1].pid
    assert f"Resuming after step {step}" in first.out
    assert [first.status, second.status] == [1, -signal.SIGKILL]
    assert f"process 1 (pid {gone} on " in first.err
    # 10 where the sum over devices that was going on says that the other end is gone, 30 where it waits.
    assert re.search("not been heard of for (10|30) seconds, out of 2 processes", first.err)
    assert f"with the same command: the run goes on after step {step}, the newest that is saved." in first.err


def test_flags_that_do_not_fit(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from twinax.train.recipe import Recipe\nrecipe = Recipe()\n")
    commands = [
        [sys.executable, "-m", "twinax", "train", str(recipe), *flags]
        for flags in (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            ["--processes", "2", "--process", "1"],
            ["--processes", "several"],
        )
    ]
    with running(commands, environment(1)) as processes:
        ended = wait(processes)
    assert [one.status for one in ended] == [1, 1, 1]
    messages = ["the last is 1; this one is said to be 2", "--coordinator is missing", "takes a whole number, or auto"]
    for one, message in zip(ended, messages, strict=True):
        assert one.err.startswith("twinax train: error: ")
        assert message in one.err
        assert "Traceback" not in one.err
