"""Full disks, folders without permission, processes killed while they save: what was committed is never lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.helpers import run_python
from tests.thorough import thorough
from twinax.checkpoints.store import CheckpointStore

# argv: the folder, and how the disk is made full: "mount" (a tmpfs of its own, in a namespace that only this process
# sees) or "limit" (no file may grow over a size: the same failing writes where mounting is not allowed).
FULL_DISK = """
import os, resource, signal, subprocess, sys
folder, way = sys.argv[1:]
if way == "mount":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
import numpy as np
from twinax.checkpoints.errors import SaveError
from twinax.checkpoints.store import CheckpointStore, Description

def fill():
    if way == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return
    with open(folder + "/filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(file.tell() - 65536)  # room for folders and small files, none for the arrays

def empty():
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        os.unlink(folder + "/filler")

state = lambda value: {"x": np.full((256, 256), value, np.float32)}
description = Description("llama", {}, {"tokenizer.json": b"{}"})
store = CheckpointStore(folder, keep_last=1)
store.save(1, state(1.0), description, wait=True)
fill()
for step in (2, 3):
    try:
        store.save(step, state(2.0), description)
        store.wait()
    except SaveError as error:
        print(error)
    else:
        sys.exit("the save must fail")
    assert store.steps() == [1], store.steps()
    assert store.restore(state(0.0)).state["x"].tobytes() == state(1.0)["x"].tobytes()
assert not [name for name in os.listdir(folder) if name.startswith(".")], os.listdir(folder)
empty()
store.save(4, state(4.0), description, wait=True)
assert store.steps() == [4]
assert store.restore(state(0.0)).state["x"].tobytes() == state(4.0)["x"].tobytes()
print("survived")
"""


def ways_to_fill_a_disk() -> list[tuple[str, tuple[str, ...]]]:
    ways: list[tuple[str, tuple[str, ...]]] = [("limit", ())]
    if shutil.which("unshare") and shutil.which("mount"):
        for flags in ("-m", "-rm"):  # as root, and as anybody where the system allows it
            trial = ["unshare", flags, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
            if subprocess.run(trial, capture_output=True).returncode == 0:
                ways.append(("mount", ("unshare", flags)))
                break
    return ways


@pytest.mark.parametrize(
    ("way", "prefix"), ways_to_fill_a_disk(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_full_disk_while_saving(tmp_path, way, prefix):
    result = run_python(FULL_DISK, str(tmp_path), way, prefix=prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "survived" in result.stdout
    assert "step 2 was not saved" in result.stdout
    assert "committed steps [1] are untouched" in result.stdout
    assert ("No space left" if way == "mount" else "File too large") in result.stdout
    assert "Traceback" not in result.stderr


NO_PERMISSION = """
import os, sys
import numpy as np
import orbax.checkpoint  # now: afterwards even Python's own folder may be out of reach
from twinax.checkpoints.errors import CheckpointError
from twinax.checkpoints.store import CheckpointStore, Description
folder = sys.argv[1]
store = CheckpointStore(folder + "/was_writable")
os.chmod(folder + "/was_writable", 0o555)
if os.geteuid() == 0:  # root may write anywhere: become nobody
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for attempt in (
    lambda: CheckpointStore(folder + "/read_only"),
    lambda: CheckpointStore(folder + "/read_only/new"),
    lambda: CheckpointStore(folder + "/closed/inside"),
    lambda: CheckpointStore(folder + "/a_file"),
    lambda: store.save(1, {"x": np.ones(3)}, Description("llama", {}), wait=True),
):
    try:
        attempt()
    except CheckpointError as error:
        print("refused:", error)
    else:
        sys.exit("must be refused")
"""


def test_folders_without_permission(tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:  # pytest's folders are private: let nobody walk down to this one
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest-", "popen-")):
            os.chmod(parent, 0o755)
    (tmp_path / "read_only").mkdir()
    os.chmod(tmp_path / "read_only", 0o555)
    (tmp_path / "closed").mkdir()
    os.chmod(tmp_path / "closed", 0o000)
    (tmp_path / "a_file").touch()
    result = run_python(NO_PERMISSION, str(tmp_path))
    for name in ("read_only", "closed", "was_writable"):
        os.chmod(tmp_path / name, 0o755)
    assert result.returncode == 0, result.stdout + result.stderr
    refused = [line for line in result.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 5
    assert all("Permission denied" in line for line in refused[:3] + refused[4:])
    assert "File exists" in refused[3]
    assert all("choose another folder" in line or "choose a folder you can write to" in line for line in refused)


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from twinax.checkpoints.store import CheckpointStore, Description
store = CheckpointStore(sys.argv[1], keep_last=2)
print("ready", flush=True)
for step in range(1, 100_000):
    store.save(step, {"params": {f"w{i}": jnp.full((64, 64), step + i) for i in range(8)}}, Description("llama", {}))
"""


def seen(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # renamed while we looked
        return False


def stop(process: subprocess.Popen) -> None:
    """Returns when no thread of it runs any more."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@pytest.mark.parametrize(
    "moment", thorough([".tmp_step_*/arrays*", ".tmp_step_*/arrays/_METADATA", ".tmp_step_*/twinax.json"])
)
def test_killed_in_the_midst_of_a_save(tmp_path, moment):
    like = {"params": {f"w{i}": jnp.zeros((64, 64), jnp.int32) for i in range(8)}}
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            if len(list(tmp_path.glob("step_*"))) >= 2 and seen(tmp_path, moment):
                stop(process)
                if seen(tmp_path, moment):
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    assert seen(tmp_path, moment)
    store = CheckpointStore(tmp_path, keep_last=2)
    assert not list(tmp_path.glob(".*"))  # what the killed process left is gone
    assert len(store.steps()) >= 2
    for step in store.steps():  # whatever is there is whole
        restored = store.restore(like, step)
        for i in range(8):
            assert np.all(np.asarray(restored.state["params"][f"w{i}"]) == step + i)
    assert store.restore(like).skipped == ()
