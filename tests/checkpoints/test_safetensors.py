"""Our reader and writer against the safetensors library, and against files that break each rule of the format."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from twinax.checkpoints.errors import CheckpointError, DamagedCheckpoint
from twinax.checkpoints.safetensors import (
    DTYPES,
    INDEX_NAME,
    SafetensorsFile,
    SafetensorsFolder,
    SafetensorsWriter,
    TensorSpec,
    plan_shards,
    write_index,
)

CODES = [code for code in DTYPES if code not in ("C64", "F8_E8M0")]  # those that both sides can hold in NumPy


def tensors_of_every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        code: (rng.integers(0, 2, (3, 5)) if code == "BOOL" else rng.integers(0, 100, (3, 5))).astype(DTYPES[code])
        for code in CODES
    } | {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32), "näme 漢": np.ones(2, np.int8)}


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(path, specs, metadata or {}) as writer:
        for name, array in reversed(tensors.items()):  # any order
            writer.write(name, array)
    return path


def write_raw(path: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_library_reads_what_we_write(tmp_path):
    tensors = tensors_of_every_dtype()
    path = write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        assert bytes(read[name]["data"]) == array.tobytes()
        assert read[name]["shape"] == list(array.shape)
        assert DTYPES[read[name]["dtype"]] == array.dtype


def test_we_read_what_the_library_writes(tmp_path):
    tensors = tensors_of_every_dtype()
    (tmp_path / "a.safetensors").write_bytes(safetensors.numpy.save(tensors, {"who": "library"}))
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"who": "library"}
        assert set(file.specs()) == set(tensors)
        for name, array in tensors.items():
            assert file.read(name).dtype == array.dtype
            assert file.read(name).shape == array.shape
            assert file.read(name).tobytes() == array.tobytes()


def test_views_are_read_only_and_outlive_the_file(tmp_path):
    file = SafetensorsFile(write(tmp_path / "a.safetensors", {"x": np.arange(4.0)}))
    view = file.read("x")
    file.close()
    assert view.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_file_cut_anywhere_says_what_is_missing(tmp_path):
    whole = write(tmp_path / "whole.safetensors", {"x": np.arange(20.0), "y": np.ones(3, np.int8)}).read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint) as caught:
            SafetensorsFile(cut)
        text = str(caught.value)
        expected = 8 if length < 8 else header_end if length < header_end else len(whole)
        assert "truncated" in text
        assert "cut.safetensors" in text
        assert str(expected) in text
        assert str(length) in text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "header is no object": ([], "must begin with"),
    "header is no JSON": (b'{"x": ', "not valid JSON"),
    "header is not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "header has NaN": (b'{"x": NaN}', "NaN is not JSON"),
    "header is nested too deep": (b'{"x":' * 100_000 + b"}" * 100_000, "not valid JSON"),
    "tensor twice": (b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2), "appears twice"),
    "metadata is no text": ({"__metadata__": {"a": 1}, "x": ENTRY}, "__metadata__"),
    "dtype unknown": ({"x": ENTRY | {"dtype": "F4"}}, "dtype 'F4'"),
    "dtype is no text": ({"x": ENTRY | {"dtype": ["F32"]}}, "dtype"),
    "shape negative": ({"x": ENTRY | {"shape": [-2]}}, "shape"),
    "shape is true": ({"x": ENTRY | {"shape": [True, 2]}}, "shape"),
    "shape is a number": ({"x": ENTRY | {"shape": 2}}, "shape"),
    "shape is huge": ({"x": ENTRY | {"shape": [2**62, 2**62]}}, "data_offsets"),
    "offsets too many": ({"x": ENTRY | {"data_offsets": [0, 4, 8]}}, "data_offsets"),
    "offsets backwards": ({"x": ENTRY | {"data_offsets": [8, 0]}}, "data_offsets"),
    "offsets and size disagree": ({"x": ENTRY | {"data_offsets": [0, 4]}}, "takes 8 bytes"),
    "key missing": ({"x": {"dtype": "F32", "shape": [2]}}, "exactly|just"),
    "key unknown": ({"x": ENTRY | {"crc": 1}}, "exactly|just"),
    "entry is no object": ({"x": 3}, "exactly|just"),
    "tensors overlap": ({"x": ENTRY, "y": ENTRY}, "overlaps"),
    "hole at the start": ({"x": ENTRY | {"data_offsets": [8, 16]}}, "hole"),
    "bytes at the end": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_header_is_refused(tmp_path, case):
    header, message = BROKEN[case]
    path = write_raw(tmp_path / "broken.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert "broken.safetensors" in str(caught.value)


def test_announced_header_of_exabytes_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DamagedCheckpoint, match="the limit is"):
        SafetensorsFile(tmp_path / "a.safetensors")


SAMPLE = json.dumps({"x": ENTRY, "y": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}).encode()


@settings(max_examples=250)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) + 7), st.integers(0, 255)), min_size=1, max_size=3))
def test_we_accept_no_file_that_the_library_refuses(tmp_path_factory, changes):
    raw = bytearray(struct.pack("<Q", len(SAMPLE)) + SAMPLE + bytes(16))
    for place, value in changes:
        raw[place] = value
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(raw)
    try:
        SafetensorsFile(path)
    except CheckpointError:
        return
    safetensors.deserialize(bytes(raw))  # raises when the library refuses it


def sharded(folder: Path, max_shard_bytes: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tensors = {f"t{i}": rng.standard_normal(n).astype(ml_dtypes.bfloat16) for i, n in enumerate((20, 60, 5, 5, 5))}
    shards = plan_shards([TensorSpec(n, a.dtype, a.shape) for n, a in tensors.items()], max_shard_bytes)
    for name, specs in shards.items():
        write(folder / name, {spec.name: tensors[spec.name] for spec in specs})
    write_index(folder, shards)
    return tensors


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_sharded_folder(tmp_path):
    tensors = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with SafetensorsFolder(tmp_path) as folder:
        assert set(folder.specs()) == set(tensors)
        assert all(folder.read(name).tobytes() == array.tobytes() for name, array in tensors.items())


def test_one_shard_has_no_index(tmp_path):
    sharded(tmp_path, 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b"])
def test_index_cannot_leave_the_folder(tmp_path, name):
    sharded(tmp_path)
    change_index(tmp_path, lambda weights: weights.update(t0=name))
    with pytest.raises(DamagedCheckpoint, match="refused"):
        SafetensorsFolder(tmp_path)


def test_missing_shards_are_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="model-00002-of-00003"):
        SafetensorsFolder(tmp_path)


def test_tensor_elsewhere_than_the_index_says(tmp_path):
    sharded(tmp_path)
    change_index(tmp_path, lambda weights: weights.update(t0=weights["t1"]))
    with pytest.raises(DamagedCheckpoint, match=r"t0 .should be in model-00002"):
        SafetensorsFolder(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    write(tmp_path / "model-00002-of-00003.safetensors", {"t0": np.ones(2), "t1": np.ones(2)})
    with pytest.raises(DamagedCheckpoint, match="'t0' is also in"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("weights", [[], {"t0": 3}, None])
def test_index_without_a_map(tmp_path, weights):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(DamagedCheckpoint, match="weight_map"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("z", np.ones(2, np.float32), "unknown"),
        ("x", np.ones(3, np.float32), "announced"),
        ("x", np.ones(2, np.float64), "announced"),
    ],
)
def test_writer_keeps_to_its_specs_and_leaves_nothing(tmp_path, name, array, message):
    writer = SafetensorsWriter(tmp_path / "a.safetensors", [TensorSpec("x", np.dtype("f4"), (2,))])
    with pytest.raises(ValueError, match=message), writer:
        writer.write(name, array)
    assert list(tmp_path.iterdir()) == []


def test_writer_wants_every_tensor_once(tmp_path):
    specs = [TensorSpec(name, np.dtype("f4"), (2,)) for name in "xy"]
    one = np.ones(2, np.float32)
    writer = SafetensorsWriter(tmp_path / "a.safetensors", specs)
    with pytest.raises(ValueError, match="never written:\n  y"), writer:
        writer.write("x", one)
    writer = SafetensorsWriter(tmp_path / "a.safetensors", specs[:1])
    writer.write("x", one)
    with pytest.raises(ValueError, match="already"), writer:
        writer.write("x", one)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_what_the_format_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="complex128"):
        SafetensorsWriter(tmp_path / "a", [TensorSpec("x", np.dtype("c16"), (2,))])
    with pytest.raises(ValueError, match="taken"):
        SafetensorsWriter(tmp_path / "a", [TensorSpec("x", np.dtype("f4"), (2,))] * 2)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        plan_shards([], 0)
