"""Where a process finds its job: flags, SLURM, JobSet, TPU pods. The variables are those of real clusters."""

import pytest

from twinax.sharding.launch import AUTO, Launch, ProcessError, find_launch, first_host

# As `srun --nodes 2 --ntasks-per-node 4` sets them in the second task of the second node.
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_JOB_NODELIST": "gpu[11-12]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[11-12]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
JOBSET = {"JOB_COMPLETION_INDEX": "3", "JOBSET_NAME": "run-7", "REPLICATED_JOB_NAME": "workers"}


def test_without_a_word_there_is_one_process():
    assert find_launch(None, None, None, {}) is None
    assert find_launch(None, 1, None, {}) is None
    assert find_launch("here:1", 1, 0, {}) is None
    # An Indexed Job that says no number is not ours to join.
    assert find_launch(None, None, None, {"JOB_COMPLETION_INDEX": "3"}) is None
    # The batch script itself is no task of a step.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_launch(None, None, None, batch) is None


def test_flags():
    assert find_launch("node1:900", "4", 2, {}) == Launch("node1:900", 4, 2)
    assert find_launch("[fd00::1]:900", 4, 2, {}) == Launch("[fd00::1]:900", 4, 2)


def test_slurm():
    want = Launch("gpu11:61809", 8, 5, "SLURM", local_device=1)
    assert find_launch(None, None, None, SLURM) == want
    alone = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}
    assert find_launch(None, None, None, alone) == Launch("gpu11:61809", 8, 5, "SLURM")
    # With --gpus-per-task a task sees its own only, and it is the first that it sees.
    bound = {**SLURM, "CUDA_VISIBLE_DEVICES": "3"}
    assert find_launch(None, None, None, bound) == Launch("gpu11:61809", 8, 5, "SLURM")
    assert find_launch(None, None, None, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    flagged = find_launch("10.0.0.1:5", None, None, SLURM)
    assert isinstance(flagged, Launch)
    assert (flagged.coordinator, flagged.process, flagged.found_in) == ("10.0.0.1:5", 5, "flags and SLURM")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-010,014],login", "node003"),
        ("node[7,9-10]", "node7"),
        ("rack[1-2]node[3-4],x", "rack1node3"),
        ("a-b.c[1-2].d", "a-b.c1.d"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


def test_jobset():
    want = Launch("run-7-workers-0-0.run-7:8476", 4, 3, "flags and the JobSet")
    assert find_launch(None, "4", None, JOBSET) == want
    plain = find_launch("svc:1", "4", None, {"JOB_COMPLETION_INDEX": "3"})
    assert isinstance(plain, Launch)
    assert (plain.coordinator, plain.process) == ("svc:1", 3)
    with pytest.raises(ProcessError, match=r"--coordinator is missing. Given: --processes 4, and from the JobSet: p"):
        find_launch(None, "4", None, {"JOB_COMPLETION_INDEX": "3"})


def test_tpu_pods_are_left_to_jax():
    assert find_launch(None, None, None, {"TPU_WORKER_HOSTNAMES": "a,b", **JOBSET}) == AUTO
    assert find_launch(None, None, None, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == AUTO
    assert find_launch(None, None, None, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find_launch(None, AUTO, None, {}) == AUTO
    assert find_launch("a:1", "2", 0, {"TPU_WORKER_HOSTNAMES": "a,b"}) == Launch("a:1", 2, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), r"--processes and --process are missing. Given: --coordinator a:1. Give the rest, or"),
        ((None, 2, None), r"--coordinator and --process are missing"),
        (("a:1", 2, None), r"--process is missing"),
        (("a:1", 2, 2), r"numbered from 0, so of 2 the last is 1; this one is said to be 2 \(flags\)"),
        (("a:1", 2, -1), r"said to be -1"),
        (("a:1", 0, 0), r"at least one process; --processes is 0"),
        (("a:1", 1, 1), r"of 1 the last is 0; this one is said to be 1"),
        (("a", 2, 0), r"HOST:PORT, such as node1:8476, with a port from 1 to 65535; got 'a'"),
        (("a:70000", 2, 0), r"HOST:PORT"),
        ((":1", 2, 0), r"HOST:PORT"),
        (("a:1", "two", 0), r"--processes takes a whole number, or auto; got 'two'"),
        (("a:1", AUTO, None), r"--processes auto leaves everything to JAX"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ProcessError, match=message):
        find_launch(*flags, {})


def test_an_environment_that_does_not_fit():
    with pytest.raises(ProcessError, match=r"SLURM_PROCID='x', which is not a number"):
        find_launch(None, None, None, {**SLURM, "SLURM_PROCID": "x"})
    with pytest.raises(ProcessError, match=r"said to be 5 \(flags and SLURM\)"):
        find_launch(None, 4, None, SLURM)
