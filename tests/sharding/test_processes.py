"""Jobs of real processes that join, agree, fail and are killed; nothing is computed in them."""

import signal
import socket
import sys
import time

import pytest

from tests.jobs import environment, free_port, run_job, running, wait

# Joins as process argv[3] of argv[2] at port argv[1], and does what stands in {body}.
PROGRAM = """
import os, signal, sys, time
from twinax.sharding import processes
from twinax.sharding.agreement import agree, from_first, index, once, problems
port, count, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with processes.join(f"localhost:{{port}}", count, me, timeout={timeout}, grace={grace}) as job:
    processes.advise(lambda: "Do it all again.")
    {body}
print("left", me)
"""


def program(body: str, timeout: float = 120, grace: float = 60) -> list[str]:
    return ["-c", PROGRAM.format(body="\n    ".join(body.strip().splitlines()), timeout=timeout, grace=grace)]


def test_they_agree_and_leave_together():
    body = """
assert (job.process, job.processes, job.is_first) == (me, 3, me == 0)
assert index() == me
assert from_first("number", lambda: f"from {me}") == "from 0"
assert from_first("nothing", str) == ""
assert once("order", lambda: time.time()) < time.time()
for turn in range(3):
    assert problems("turn") == {}
    assert problems("turn", f"odd {me}" if me % 2 else "") == {1: "odd 1"}
agree("the weather", "fine")
"""
    for me, ended in enumerate(run_job(program(body), 3, 1)):
        assert (ended.status, ended.out) == (0, f"left {me}\n"), ended.err


@pytest.mark.slow
def test_they_disagree():
    first, *others = run_job(program('agree("the weather", "fine" if me == 0 else "wet")'), 3, 1)
    said = "must agree on the weather, which is 'fine' in process 0 and 'wet' in process 1 (2 processes differ)"
    assert said in first.err
    assert [ended.status for ended in (first, *others)] == [1, 1, 1]
    # It befell them all; process 0 says it.
    assert [ended.err for ended in others] == ["", ""]


def test_a_failure_is_told_to_the_others():
    body = """
if me == 1:
    raise ValueError("the disk of process 1 is full")
time.sleep(300)
"""
    first, failing = run_job(program(body), 2, 1)
    assert (first.status, failing.status) == (1, 1)
    assert "ValueError: the disk of process 1 is full" in failing.err
    assert "process 1 of 2 has stopped: ValueError: the disk of process 1 is full." in first.err
    assert "Every process of the job stops. Do it all again." in first.err
    assert "left" not in first.out + failing.out


@pytest.mark.slow
def test_a_killed_process_ends_the_others():
    body = """
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
problems("never")
"""
    first, killed, third = run_job(program(body, grace=5), 3, 1)
    assert (first.status, killed.status, third.status) == (1, -signal.SIGKILL, 1)
    for ended in (first, third):
        assert "process 1 (" in ended.err
        assert "not been heard of for 5 seconds, out of 3 processes: killed, or the machine" in ended.err
        assert "Every process of the job stops. Do it all again." in ended.err


def test_without_process_0_the_others_end():
    body = """
problems("all here")
if me == 0:
    os.kill(os.getpid(), signal.SIGKILL)
problems("never")
"""
    first, second = run_job(program(body), 2, 1)
    assert (first.status, second.status) == (-signal.SIGKILL, 1)
    assert "process 0 at localhost:" in second.err
    assert second.err.rstrip().endswith("Do it all again.")


@pytest.mark.slow
def test_a_process_0_that_says_nothing_ends_the_others():
    body = """
problems("all here")
if me == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
problems("never")
"""
    port = str(free_port())
    commands = [[sys.executable, *program(body, grace=5), port, "2", str(index)] for index in range(2)]
    with running(commands, environment(1)) as processes:
        (second,) = wait(processes[1:])
    assert second.status == 1
    assert "process 0 at localhost:" in second.err
    assert "has not answered for 5 seconds" in second.err


@pytest.mark.slow
def test_a_paused_job_goes_on():
    body = """
problems("all here")
print("here", me)
time.sleep(4)
problems("all still here")
"""
    port = str(free_port())
    commands = [[sys.executable, *program(body, grace=2), port, "2", str(index)] for index in range(2)]
    with running(commands, environment(1)) as processes:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("here")
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(8)  # longer than the grace
        for process in processes:
            process.send_signal(signal.SIGCONT)
        assert [ended.status for ended in wait(processes)] == [0, 0]


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_coordinator_that_is_not_there(host):
    command = [sys.executable, *program("pass", timeout=2), str(free_port()), "2", "1"]
    command[2] = command[2].replace("localhost", host)
    with running([command], environment(1)) as processes:
        (ended,) = wait(processes)
    assert ended.status == 1
    assert f"ProcessError: Process 1 of 2 did not reach the coordinator at {host}:" in ended.err
    why = "nothing listens at that port" if host == "localhost" else f"the name {host} cannot be resolved"
    assert why in ended.err
    assert "Check that process 0 is started" in ended.err


def test_others_that_do_not_come():
    command = [sys.executable, *program("pass", timeout=3), str(free_port()), "2", "0"]
    with running([command], environment(1)) as processes:
        (ended,) = wait(processes)
    assert ended.status == 1
    assert "not all processes of the 2 at localhost:" in ended.err
    assert "came together in 3 seconds" in ended.err


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        command = [sys.executable, *program("pass"), str(taken.getsockname()[1]), "2", "0"]
        with running([command], environment(1)) as processes:
            (ended,) = wait(processes)
    assert "ProcessError: Process 0 cannot listen at port" in ended.err


@pytest.mark.slow
def test_different_numbers_of_processes():
    port = str(free_port())
    commands = [[sys.executable, *program("pass"), port, str(count), str(me)] for me, count in enumerate((2, 3))]
    with running(commands, environment(1)) as processes:
        ended = wait(processes)
    assert [one.status for one in ended] == [1, 1]
    assert "must agree on --processes, which is '2' in process 0 and '3' in process 1" in ended[0].err


@pytest.mark.slow
def test_a_process_too_many_is_refused_by_jax_and_explained():
    port = str(free_port())
    waiting = program("pass", timeout=10)
    commands = [[sys.executable, *waiting, port, count, me] for count, me in (("2", "0"), ("3", "2"))]
    with running(commands, environment(1)) as processes:
        first, many = wait(processes)
    assert (first.status, many.status) == (1, 1)
    assert "process 2 of 3 could not join the others" in many.err
    assert "Check that --processes is the same for all" in many.err


def test_one_process_needs_nothing():
    body = 'assert (job.process, job.processes) == (0, 1) and problems("x", "y") == {0: "y"}'
    (ended,) = run_job(program(body), 1, 1)
    assert (ended.status, ended.out) == (0, "left 0\n"), ended.err
