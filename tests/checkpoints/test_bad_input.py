"""Whatever is wrong with a folder, each way in refuses it: quickly, in little memory, leaving nothing behind.

The cases are made here and tried in one other process, which has loaded and converted a good folder before. For each
way in the kernel says how much its memory grew at most and what processor time it took, and ends a process that hangs.
A virtual machine that is stopped counts what it missed as the time of whoever ran: what takes a second is tried again,
twice at most, and the least counts.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.checkpoints.helpers import random_params, run_python, small_config, write_hugging_face
from tests.checkpoints.test_damage import sign
from twinax.checkpoints.convert import convert
from twinax.checkpoints.files import checksum_file
from twinax.checkpoints.limits import INDEX_BYTES, VALUES
from twinax.checkpoints.safetensors import INDEX_NAME

CONFIG = small_config()
GROWTH = 200e6  # bytes
SECONDS = 1.0
MIB = 1 << 20

# Tries each folder of argv[1] in each way; says what was raised, by how many bytes the memory grew, and the seconds.
PROGRAM = """
import gc, json, pathlib, resource, shutil, sys
from twinax.checkpoints.convert import convert
from twinax.checkpoints.inspect import inspect, render
from twinax.checkpoints.load import load_model

root, limit = pathlib.Path(sys.argv[1]), float(sys.argv[2])

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

def allow(seconds):
    resource.setrlimit(resource.RLIMIT_CPU, (int(used() + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]))

def odd(folder):
    found = inspect(folder)
    render(found)
    json.dumps(found)
    if found["odd"]:
        raise ValueError("\\n".join(found["odd"]))

def out(folder):
    convert(folder, root / "out")

ways = {"load": load_model, "convert": out, "inspect": odd}
ways = {name: ways[name] for name in sys.argv[3:]}
for way in ways.values():  # what is imported and compiled once
    way(root / "good")
shutil.rmtree(root / "out", ignore_errors=True)
for folder in sorted(root.glob("bad-*")):
    for name, way in ways.items():
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        print("begin", folder.name, name, file=sys.stderr, flush=True)
        seconds = float("inf")
        for _ in range(3):
            allow(30)
            start = used()
            try:
                way(folder)
                said = None
            except ValueError as error:
                said = str(error)
            seconds = min(seconds, used() - start)
            if seconds < limit:
                break
        print(json.dumps([folder.name, name, said, status("VmHWM") - before, seconds]))
# What Python does at its end is no case's.
resource.setrlimit(resource.RLIMIT_CPU, [resource.getrlimit(resource.RLIMIT_CPU)[1]] * 2)
"""


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def header(folder: Path, raw: bytes, data: bytes = b"", announced: int | None = None) -> None:
    length = struct.pack("<Q", len(raw) if announced is None else announced)
    (folder / "model.safetensors").write_bytes(length + raw + data)


def shards(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def reorder(folder: Path) -> None:
    """Two tensors' offsets exchanged, of different sizes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    a, b = entries["model.norm.weight"], entries["lm_head.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    header(folder, json.dumps(entries).encode(), data[8 + length :])


def many_entries(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"t{i}": entry for i in range(count)}, separators=(",", ":")).encode()


ENTRY = b'{"dtype":"F32","shape":%s,"data_offsets":[0,8]}'
CASES = {
    "truncated": (truncate, "is truncated"),
    "reordered": (reorder, "spans? "),
    "a header of exabytes": (lambda f: header(f, b"{}", announced=2**63), "announces a header"),
    "a header of 31 MB that is not there": (lambda f: header(f, b"{}", announced=31 * MIB), "is truncated"),
    "a header of 90 MB": (lambda f: header(f, b'{"a":"' + b"x" * 90 * MIB + b'"}'), "announces a header"),
    "a header of lists": (lambda f: header(f, b'{"a":[' + b"[]," * 8 * MIB + b"[]]}"), "holds about"),
    "a header of numbers": (lambda f: header(f, b'{"a":[' + b"9," * 15 * MIB + b"9]}"), "holds about"),
    "a header of names": (lambda f: header(f, many_entries(400_000)), "holds about"),
    "a header nested deep": (lambda f: header(f, b'{"a":' * 300_000), "not valid JSON"),
    "a header of one name": (lambda f: header(f, b'{"' + b"n" * 30 * MIB + b'":{"dtype":7}}'), "must have just"),
    "a name that comes twice": (
        lambda f: header(f, many_entries(48_000)[:-1] + b',"t47999":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "appears twice",
    ),
    "overlapping tensors": (
        lambda f: header(f, b'{"a":%s,"b":%s}' % (ENTRY % b"[2]", ENTRY % b"[2]"), bytes(8)),
        "overlaps",
    ),
    "a huge shape": (lambda f: header(f, b'{"a":%s}' % (ENTRY % b"[4611686018427387904]"), bytes(8)), "data_offsets"),
    "a huge empty shape": (
        lambda f: header(f, b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'),
        "no array can have",
    ),
    "a million dimensions": (
        lambda f: header(f, b'{"a":%s}' % (ENTRY % (b"[" + b"1," * 300_000 + b"2]")), bytes(8)),
        "at most 32 sizes",
    ),
    "a size of a thousand digits": (lambda f: header(f, b'{"a":%s}' % (ENTRY % (b"[" + b"9" * 1000 + b"]"))), "shape"),
    "another dtype": (lambda f: retype(f, "I32"), "wrong dtype"),
    "an unknown dtype": (lambda f: retype(f, "F4"), "dtype 'F4'"),
    "an index that leaves the folder": (lambda f: shards(f, {"a": "../good/model.safetensors"}), "refused"),
    "an index with an absolute name": (lambda f: shards(f, {"a": "/etc/passwd"}), "refused"),
    "an index of shards that are not there": (lambda f: shards(f, {"a": "model-00001-of-00002.safetensors"}), "not th"),
    "an index of many shards": (lambda f: shards(f, {f"t{i}": f"s{i}" for i in range(250_000)}), "250,000 shards"),
    "an index of lists": (
        lambda f: (f / INDEX_NAME).write_bytes(b'{"weight_map":[' + b"[]," * 10 * MIB + b"[]]}"),
        "holds about",
    ),
    "an index of 10 GB": (lambda f: sparse(f / INDEX_NAME, 10 << 30), "the limit for such a file"),
    "weights in a pipe": (lambda f: pipe(f / "model.safetensors"), "not a regular file"),
    "a config of 10 GB": (lambda f: sparse(f / "config.json", 10 << 30), "the limit for such a file"),
    "a config of lists": (lambda f: (f / "config.json").write_bytes(b'{"a":[' + b"[]," * MIB + b"[]]}"), "holds about"),
    "a billion layers": (lambda f: change_json(f / "config.json", num_hidden_layers=10**9), "1000000000 layers"),
    "more layers than tensors": (lambda f: change_json(f / "config.json", num_hidden_layers=9_000), "30 tensors"),
    "a vocabulary of 10**15": (lambda f: change_json(f / "config.json", vocab_size=10**15), "wrong shape"),
    "another width": (lambda f: change_json(f / "config.json", hidden_size=32), "wrong shape"),
    "a layer too many": (lambda f: change_json(f / "config.json", num_hidden_layers=2), "unknown: model.layers.2"),
    "another family": (lambda f: change_json(f / "config.json", model_type="../llama"), "no model family"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"refused.*save_pretrained"),
    "a tokenizer too large": (lambda f: change_json(f / "config.json", vocab_size=200), "needs vocab_size >= 259"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_bytes(b"{" * MIB), "tokenizer.json"),
}
STEPS = {
    "a manifest of 10 GB": (lambda f: sparse(f / "twinax.json", 10 << 30), "the limit for such a file"),
    "a manifest of a billion layers": (
        lambda f: sign(f, lambda c: c["model"].update(num_layers=10**9)),
        "1000000000 layers",
    ),
    "a chunk of each number": (lambda f: zarray(f, chunks=[1, 1]), "is cut into"),
    "chunks of nothing": (lambda f: zarray(f, chunks=[0, 16]), "does not describe an array"),
    "a stored array of objects": (lambda f: zarray(f, dtype="|O"), "does not write"),
    "another shape": (lambda f: zarray(f, shape=[10**12, 10**6]), "that twinax.json describes"),
}


def retype(folder: Path, code: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries["model.norm.weight"]["dtype"] = code
    header(folder, json.dumps(entries).encode(), data[8 + length :])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zarray(folder: Path, **changes: object) -> None:
    """Changes one `.zarray`, and the manifest's checksum of it, as a stranger would."""
    name = "arrays/params.embed.weight/.zarray"
    change_json(folder / name, **changes)
    size, checksum = checksum_file(folder / name)
    sign(folder, lambda content: content["files"].update({name: {"bytes": size, "blake2b": checksum}}))


# Tried on every run, and only by loading; all others, and the other ways in, with the slow tests.
QUICK = (
    "a header of lists", "a header of one name", "a name that comes twice", "an index of many shards",
    "weights in a pipe", "a billion layers", "more layers than tensors", "a chunk of each number", "pickles",
)  # fmt: skip
ALL = {**CASES, **STEPS}


def try_all(root: Path, titles: Sequence[str], ways: Sequence[str]) -> None:
    """Makes the cases in `root`, tries them there, and asserts what is to be said of each."""
    good = write_hugging_face(root / "good", CONFIG, random_params(CONFIG))
    step = convert(good, root / "step").target
    for title in titles:
        ALL[title][0](shutil.copytree(good if title in CASES else step, root / f"bad-{title}"))
    before = sorted(os.listdir(root))
    ended = run_python(PROGRAM, str(root), str(SECONDS), *ways)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert sorted(os.listdir(root)) == before, "something was left behind"
    seen = set()
    for line in ended.stdout.splitlines():
        folder, way, said, growth, seconds = json.loads(line)
        title = folder.removeprefix("bad-")
        assert said is not None, (title, way)
        assert re.search(rf"(?s){ALL[title][1]}", said), (title, way, said)
        assert len(said) < 5000, (title, way)
        assert growth < GROWTH, (title, way, growth)
        assert seconds < SECONDS, (title, way, seconds)
        seen.add((title, way))
    assert seen == {(title, way) for title in titles for way in ways}


def test_the_worst_are_refused_by_loading(tmp_path):
    try_all(tmp_path, QUICK, ("load",))


@pytest.mark.slow
def test_each_is_refused_on_every_way_in(tmp_path):
    try_all(tmp_path, tuple(ALL), ("load", "convert", "inspect"))


def test_the_limits_are_far_from_models():
    """An index as of a trillion parameters, each weight in three tensors: 207,360 tensors."""
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{kind}": f"model-{layer:05d}-of-00062.safetensors"
        for layer in range(60)
        for expert in range(384)
        for part in ("gate", "up", "down")
        for kind in ("weight_packed", "weight_scale", "weight_shape")
    }
    text = json.dumps({"metadata": {"total_size": 10**12}, "weight_map": names}, indent=2)
    assert sum(map(text.count, ",:[{")) < VALUES
    assert len(text) < INDEX_BYTES
