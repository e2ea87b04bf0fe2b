"""A conversion that is killed at any moment leaves nothing under the target's name, and goes on when called again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.helpers import flip_bit, make_run, random_params, small_config, write_hugging_face
from twinax.checkpoints import manifest
from twinax.checkpoints.convert import convert
from twinax.checkpoints.errors import CheckpointError, SaveError
from twinax.checkpoints.files import CONTENT, list_files, unfinished
from twinax.checkpoints.stream import Copy
from twinax.cli import main

CONFIG = small_config()

# Kills itself, as kill -9 would, before its nth write to a file, or when it comes to the step of that name.
PROGRAM = """
import os, signal, sys
from twinax.checkpoints import convert, files, manifest, stream

source, target, moment, overwrite = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment.isdigit():
    left, write = int(moment), os.pwrite
    def pwrite(*given):
        global left
        left -= 1
        if left < 0:
            write(given[0], bytes(given[1])[: len(given[1]) // 2], given[2])  # half a block
            die()
        return write(*given)
    os.pwrite = pwrite
else:
    home, name = {"verify": (stream.Copy, "verify"), "sync": (files, "settle"), "name": (files, "commit"),
                  "manifest": (manifest, "write")}[moment]
    setattr(home, name, die)
convert.convert(source, target, overwrite=overwrite == "True", max_shard_bytes=9000)
"""


def content(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, what does not tell the time."""
    found = {name: (folder / name).read_bytes() for name in list_files(folder)}
    if manifest.NAME in found:
        parsed = json.loads(found.pop(manifest.NAME))
        del parsed["created"], parsed["digest"]
        found[manifest.NAME] = json.dumps(parsed, sort_keys=True).encode()
    return found


def killed(source: Path, target: Path, moment: str, overwrite: bool = False) -> None:
    """Converts in a process that kills itself at that moment."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), moment, str(overwrite)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    step = make_run(folder / "run", 1, config=CONFIG) / "checkpoints" / "step_00000001"
    return {"to_twinax": write_hugging_face(folder / "hf", CONFIG, random_params(CONFIG)), "to_hugging_face": step}


@pytest.mark.parametrize(
    ("direction", "moments"),
    [
        ("to_twinax", ["0"]),
        pytest.param("to_twinax", ["5", "12", "sync", "verify", "manifest", "name"], marks=pytest.mark.slow),
        pytest.param("to_hugging_face", ["0", "17", "sync", "verify", "name"], marks=pytest.mark.slow),
    ],
)
def test_killed_at_many_moments(tmp_path, sources, direction, moments):
    """Again and again in one folder: each call goes on where the last one died."""
    source, target = sources[direction], tmp_path / "target"
    whole = content(convert(source, tmp_path / "whole", max_shard_bytes=9000).target)
    for moment in moments:
        killed(source, target, moment)
        assert not target.exists()
        assert unfinished(target).exists()
    convert(source, target, max_shard_bytes=9000)
    assert content(target) == whole
    assert sorted(os.listdir(tmp_path)) == ["target", "whole"]


def interrupted(source: Path, target: Path, **options) -> Path:
    """Converts until all is written and nothing verified; gives the unfinished folder."""

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copy, "verify", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, **options)
    return unfinished(target)


@pytest.fixture
def writes(monkeypatch) -> list[int]:
    """The sizes of all writes of numbers from now on."""
    seen, write = [], os.pwrite

    def pwrite(file, data, at):
        seen.append(len(data))
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return seen


@pytest.mark.parametrize("direction", ["to_twinax", "to_hugging_face"])
def test_what_stands_there_is_kept_and_what_is_damaged_is_not(tmp_path, sources, direction, writes):
    source, target = sources[direction], tmp_path / "target"
    whole = content(convert(source, tmp_path / "whole").target)
    left = interrupted(source, target)
    writes.clear()
    flip_bit(left / ("arrays/params.embed.weight/0.0" if direction == "to_twinax" else "model.safetensors"), -1)
    convert(source, target)
    assert len(writes) == 1
    assert content(target) == whole
    left = interrupted(source, target, overwrite=True)
    writes.clear()
    convert(source, target, overwrite=True)
    assert writes == []
    assert content(target) == whole


def test_other_arguments_start_anew(tmp_path, sources, writes):
    source, target = sources["to_twinax"], tmp_path / "target"
    for options in ({"plan": "fsdp=2"}, {"dtype": "bfloat16"}, {}):
        interrupted(source, target, overwrite=True, **options)
        (unfinished(target) / "leftover").touch()
        writes.clear()
        convert(source, target, dtype="float16", overwrite=True)
        assert len(writes) > 5
        assert not (target / "leftover").exists()


def test_a_source_that_changed_starts_anew(tmp_path, writes):
    source, target = write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG)), tmp_path / "target"
    interrupted(source, target)
    (unfinished(target) / "leftover").touch()
    write_hugging_face(source, CONFIG, random_params(CONFIG, seed=1))
    convert(source, target)
    assert not (target / "leftover").exists()
    assert content(target) == content(convert(source, tmp_path / "again").target)


def test_two_at_once(tmp_path, sources):
    """While one process writes, another with the same arguments is told so, and disturbs nothing."""
    source, target = sources["to_twinax"], tmp_path / "target"
    told = []

    def second(*_):
        if not told:
            told.append(True)
            with pytest.raises(SaveError, match="being written by another process"):
                convert(source, target)

    convert(source, target, progress=second)
    assert told
    assert CONTENT not in list_files(target)


def test_what_was_to_be_replaced_comes_back(tmp_path, sources):
    """Killed between the two renames of a replacement: the old folder is away, and the next call puts it back."""
    source, target = sources["to_twinax"], tmp_path / "target"
    convert(source, target)
    (target / "mark").touch()
    os.rename(target, tmp_path / ".replaced_target")
    with pytest.raises(CheckpointError, match="exists; overwrite=True"):
        convert(source, target)
    assert (target / "mark").exists()
    assert os.listdir(tmp_path) == ["target"]


def test_the_command_says_how_to_go_on(tmp_path, sources, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Copy, "verify", interrupt)
    words = ["convert", str(sources["to_twinax"]), str(tmp_path / "target"), "--quiet"]
    assert main(words) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(words) == 0
    assert os.listdir(tmp_path) == ["target"]
