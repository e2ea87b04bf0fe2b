"""What deploy/ holds: well-formed, of the shape that each system wants, and telling `twinax train` what it needs."""

import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs import environment, free_port, running, wait
from tests.train.helpers import write_text
from twinax.cli import make_parser
from twinax.sharding.launch import PORT, Launch, find_launch
from twinax.train.metrics import read_metrics

# The parts of the schemas that we use: JobSet v1alpha2, batch/v1 Job, core/v1 Pod. Anything else is a slip of the pen.
ANNOTATION = r"metadata\.annotations\['jobset\.sigs\.k8s\.io/(.*)'\]"
VALUE_FROM = {"fieldRef": {"fieldPath": str}}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [{"name": str, "valueFrom": VALUE_FROM}],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int, "template": {"spec": POD}}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {"kueue.x-k8s.io/queue-name": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
SKY = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {"infra": str, "accelerators": str},
    "volumes": {"/shared": str},
    "setup": str,
    "run": str,
}


def misfits(value: Any, schema: Any, where: str = "") -> list[str]:
    """Where `value` has not exactly the keys and types of `schema`."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        found = [f"{where}.{key}" for key in value.keys() ^ schema.keys()]
        for key in value.keys() & schema.keys():
            found += misfits(value[key], schema[key], f"{where}.{key}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is no list"]
        return [m for index, item in enumerate(value) for m in misfits(item, schema[0], f"{where}[{index}]")]
    return [] if type(value) is schema else [f"{where} is {value!r}"]


def parsed(words: list[str]) -> Any:
    """The options of `twinax train WORDS`; UsageError for what it does not take."""
    return make_parser("train").parse(words)[0]


@pytest.fixture(scope="module")
def deploy(repository: Path) -> Path:
    return repository / "deploy"


def test_the_jobset(deploy: Path):
    jobset = yaml.safe_load((deploy / "jobset.yaml").read_text())
    assert misfits(jobset, JOBSET) == []
    assert misfits({**jobset, "spek": 1}, JOBSET) == [".spek"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (workers["replicas"], job["completionMode"], pod["restartPolicy"]) == (1, "Indexed", "Never")
    assert container["ports"] == [{"containerPort": PORT}]
    assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]

    # What the third pod sees: Kubernetes sets the index, JobSet the annotations.
    annotations = {"jobset-name": jobset["metadata"]["name"], "replicatedjob-name": workers["name"]}
    env = {"JOB_COMPLETION_INDEX": "2"}
    for entry in container["env"]:
        path = re.fullmatch(ANNOTATION, entry["valueFrom"]["fieldRef"]["fieldPath"])
        assert path
        env[entry["name"]] = annotations[path[1]]
    command, *words = container["args"]
    options = parsed(words)
    assert command == "train"
    assert int(options.processes) == job["parallelism"] == job["completions"]
    launch = find_launch(options.coordinator, options.processes, options.process, env)
    assert launch == Launch(f"twinax-workers-0-0.twinax:{PORT}", 4, 2, "flags and the JobSet")
    assert options.plan == f"fsdp={4 * container['resources']['limits']['nvidia.com/gpu']}"
    mount = container["volumeMounts"][0]["mountPath"]
    assert options.recipe.startswith(mount) and options.output.startswith(mount)


def test_the_skypilot_file(deploy: Path, tmp_path: Path):
    sky = yaml.safe_load((deploy / "sky.yaml").read_text())
    assert misfits(sky, SKY) == []
    variables = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1"}
    words = said_by(sky["run"], tmp_path, **{f"SKYPILOT_{name}": value for name, value in variables.items()})
    options = parsed(words[1:])
    launch = find_launch(options.coordinator, options.processes, options.process, {})
    assert words[0] == "train"
    assert launch == Launch(f"10.0.0.1:{PORT}", 2, 1)
    assert options.plan == f"fsdp={sky['num_nodes'] * int(sky['resources']['accelerators'].partition(':')[2])}"


def said_by(script: str, folder: Path, **env: str) -> list[str]:
    """What the script gives `twinax` as its arguments."""
    script_file(folder / "twinax", 'printf "%s\\n" "$@"')
    env["PATH"] = f"{folder}:{os.environ['PATH']}"
    run = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def script_file(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_dockerfile(deploy: Path, repository: Path):
    lines = [line for line in (deploy / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split()[0] for line in lines]
    assert names == ["FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"]
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[(.*?)\]", lines[4])[0].replace("${EXTRA}", lines[1].partition("=")[2]).split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert (repository / "constraints.txt").exists() and "-c constraints.txt" in lines[4]
    assert lines[5] == 'ENTRYPOINT ["twinax"]' and "twinax" in project["scripts"]


def test_the_sbatch_script_is_well_formed(deploy: Path):
    script = deploy / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= {name for name, _ in options}
    # SLURM stops reading at the first command.
    head = script.read_text().partition("set -")[0]
    assert head.count("#SBATCH") == len(options)


# Two tasks with the variables of two nodes. They meet on this machine, as the names of both nodes would.
SRUN = """
echo "$@" > {folder}/srun.words
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost,other SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_LOCALID=0
export SLURM_STEP_TASKS_PER_NODE='1(x2)'
for task in 0 1; do
    SLURM_PROCID=$task "$@" > {folder}/task-$task.out 2> {folder}/task-$task.err &
    pids[$task]=$!
done
while {terminate} && kill -0 ${{pids[1]}}; do
    if grep -q '"step": 3' {folder}/run/metrics.jsonl; then kill -TERM ${{pids[1]}}; break; fi
    sleep 0.5
done 2> /dev/null
worst=0
for task in 0 1; do wait ${{pids[$task]}} || worst=$?; done
exit $worst
"""
RECIPE = """
from tests.train.process_program import recipe_of
task = {{"folder": {folder!r}, "output": {folder!r} + "/run", "plan": "data=2,fsdp=2", "steps": {steps}}}
recipe = recipe_of(task, 0)
"""


def job_id() -> int:
    """A number of a job whose port, which follows from it, is free."""
    for number in range(70_000, 74_096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + number % 4096)):
                return number
    raise AssertionError("no free port")


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_sbatch_script_with_a_stand_in_for_srun(deploy: Path, tmp_path: Path, is_stopped: bool):
    write_text(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(folder=str(tmp_path), steps=10**6 if is_stopped else 2))
    tools = tmp_path / "tools"
    tools.mkdir()
    script_file(tools / "srun", SRUN.format(folder=tmp_path, terminate=str(is_stopped).lower()))
    script_file(tools / "scontrol", f'echo "$@" > {tmp_path}/scontrol.words')
    number = str(job_id())
    env = {**with_twinax(deploy.parent, tools), "SLURM_JOB_ID": number}
    settings = ["--checkpoint.every", "0", "--eval.every", "0"]
    with running([["bash", str(deploy / "train.sbatch"), str(recipe), *settings]], environment(2, **env)) as processes:
        (ended,) = wait(processes)
    out, err = ((tmp_path / f"task-0.{kind}").read_text() for kind in ("out", "err"))
    assert ended.status == (143 if is_stopped else 0), (out, err, ended)
    words = shlex.split((tmp_path / "srun.words").read_text())
    assert words == ["--kill-on-bad-exit=1", "twinax", "train", str(recipe), *settings]
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    if is_stopped:
        assert "SIGTERM at process 1: saving" in out
        assert (tmp_path / "scontrol.words").read_text() == f"requeue {number}\n"
        assert len(steps) >= 3
    else:
        assert "Trained 2 steps" in out
        assert steps == [1, 2]
        assert not (tmp_path / "scontrol.words").exists()


def with_twinax(repository: Path, *tools: Path) -> dict[str, str]:
    """Variables with which a shell finds the command `twinax` of this Python, and it the helpers of the tests."""
    folders = [*map(str, tools), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {"PATH": ":".join(folders), "PYTHONPATH": str(repository)}


@pytest.mark.slow
def test_the_ray_recipe_on_this_machine(deploy: Path, tmp_path: Path):
    pytest.importorskip("ray", reason="ray is not installed (pip install ray), so its recipe is not run")
    write_text(tmp_path)
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path), steps=2))
    command = [sys.executable, str(deploy / "ray_train.py"), "2", "0", str(tmp_path / "recipe.py"), "--eval.every", "0"]
    with running([command], environment(2, **with_twinax(deploy.parent))) as processes:
        (ended,) = wait(processes)
    assert ended.status == 0, ended
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_the_ray_recipe_gives_flags_that_exist(deploy: Path):
    flags = set(re.findall(r'"(--[a-z]+)"', (deploy / "ray_train.py").read_text()))
    assert flags == {"--coordinator", "--processes", "--process"}
    options = parsed(["recipe.py", "--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process", "1"])
    assert (options.processes, options.process) == ("2", 1)
