"""Every file of a checkpoint, damaged in every way: each is noticed."""

import json
import shutil

import pytest

from tests.checkpoints.helpers import flip_bit, make_run
from twinax.checkpoints import manifest
from twinax.checkpoints.errors import DamagedCheckpoint
from twinax.checkpoints.files import checksum_bytes, list_files


@pytest.fixture(scope="module")
def step_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("damage") / "run", 3) / "checkpoints" / "step_00000003"


@pytest.fixture
def copy(step_folder, tmp_path):
    return shutil.copytree(step_folder, tmp_path / step_folder.name)


def verify(folder):
    manifest.read(folder).verify()


def test_undamaged(copy):
    verify(copy)


def test_flipped_bits_in_every_file(copy):
    names = list_files(copy)
    assert len(names) > 50
    for name in names:
        path = copy / name
        size = path.stat().st_size
        for byte, bit in {(0, 0), (size // 2, 3), (size - 1, 7)}:
            flip_bit(path, byte, bit)
            with pytest.raises(DamagedCheckpoint) as caught:
                verify(copy)
            assert name.split("/")[-1] in str(caught.value)
            flip_bit(path, byte, bit)
    verify(copy)


def test_flipped_bit_in_every_byte_of_the_manifest(copy):
    raw = bytearray((copy / manifest.NAME).read_bytes())
    for byte in range(len(raw)):
        raw[byte] ^= 1 << byte % 8
        with pytest.raises(DamagedCheckpoint, match=manifest.NAME):
            manifest.parse(copy, bytes(raw))
        raw[byte] ^= 1 << byte % 8
    assert manifest.parse(copy, bytes(raw)).step == 3


def test_every_file_truncated_or_missing(copy):
    for name in list_files(copy):
        path = copy / name
        whole = path.read_bytes()
        for length in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedCheckpoint) as caught:
                verify(copy)
            assert name == manifest.NAME or f"{name}: {length} bytes, written as {len(whole)}" in str(caught.value)
        path.unlink()
        with pytest.raises(DamagedCheckpoint, match=r"missing|no twinax\.json"):
            verify(copy)
        path.write_bytes(whole)
    verify(copy)


def test_manifest_with_something_after_it(copy):
    with open(copy / manifest.NAME, "a") as file:
        file.write("\n")
    with pytest.raises(DamagedCheckpoint):
        verify(copy)


def test_step_folder_under_another_steps_name(copy):
    with pytest.raises(DamagedCheckpoint, match="renamed"):
        verify(copy.rename(copy.with_name("step_00000004")))


def sign(folder, change):
    """Change the manifest and give it the right digest: what a stranger's folder may hold."""
    content = json.loads((folder / manifest.NAME).read_bytes())
    del content["digest"]
    change(content)
    body = json.dumps(content, indent=1).encode().removesuffix(b"\n}")
    (folder / manifest.NAME).write_bytes(body + f',\n "digest": "{checksum_bytes(body)}"\n}}\n'.encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["files"].update({"tokenizer/../../secret": {"bytes": 1, "blake2b": ""}}), "outside of its folder"),
        (lambda c: c["files"].update({"/etc/passwd": {"bytes": 1, "blake2b": ""}}), "outside of its folder"),
        (lambda c: c["arrays"].update({"../x": {"shape": [1], "dtype": "float32"}}), "outside of its folder"),
        (lambda c: c.update(format=2), "upgrade twinax"),
        (lambda c: c.pop("arrays"), "not written by Twinax"),
        (lambda c: c.update(files=[]), "not written by Twinax"),
    ],
)
def test_signed_but_hostile_manifest(copy, change, message):
    sign(copy, change)
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(copy)
