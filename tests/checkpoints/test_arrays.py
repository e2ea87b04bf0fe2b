"""Slices of stored arrays, over every way they may be cut into chunks."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.checkpoints.arrays import StoredArray, open_array
from twinax.checkpoints.errors import DamagedCheckpoint


def write(folder, array, chunks, **changes):
    """A Zarr array; chunks at the edges are padded, as the format wants."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "zarr_format": 2, "shape": array.shape, "chunks": chunks, "dtype": array.dtype.str, "order": "C",
        "compressor": None, "filters": None, "fill_value": None, "dimension_separator": ".",
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps({**meta, **changes}))
    for place in np.ndindex(*[-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True)]):
        part = array[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks, strict=True))]
        padded = np.full(chunks, 99, array.dtype)
        padded[tuple(slice(0, size) for size in part.shape)] = part
        (folder / (".".join(map(str, place)) or "0")).write_bytes(padded.tobytes())
    return open_array(folder)


@st.composite
def cuts(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
    chunks = [draw(st.integers(1, size + 1)) for size in shape]
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        low = draw(st.integers(0, size - 1))
        index.append(slice(low, draw(st.integers(low + 1, size))))
    return tuple(shape), tuple(chunks), tuple(index)


@given(cuts())
def test_any_slice_of_any_chunks(tmp_path_factory, cut):
    shape, chunks, index = cut
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    stored = write(tmp_path_factory.mktemp("zarr"), array, chunks)
    assert stored.shape == shape
    assert stored.dtype == np.int32
    np.testing.assert_array_equal(stored.read(index), array[index])


def test_one_chunk_is_a_read_only_view(tmp_path):
    stored = write(tmp_path / "a", np.arange(12.0).reshape(3, 4), (3, 4))
    view = stored.read((slice(1, 2),))
    assert view.base is not None
    assert not view.flags.writeable
    assert isinstance(stored, StoredArray)


def test_missing_and_truncated_chunks(tmp_path):
    stored = write(tmp_path / "a", np.arange(12.0).reshape(3, 4), (1, 4))
    (tmp_path / "a" / "1.0").write_bytes(bytes(31))
    with pytest.raises(DamagedCheckpoint, match=r"1\.0 is truncated or changed: 31 bytes, expected 32"):
        stored.read()
    (tmp_path / "a" / "1.0").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"1\.0 is missing"):
        stored.read()
    assert stored.read((slice(2, 3),)).tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize(
    "changes", [{"compressor": {"id": "zstd"}}, {"order": "F"}, {"filters": [{}]}, {"dtype": ">f8"}, {"zarr_format": 3}]
)
def test_layouts_that_twinax_does_not_write(tmp_path, changes):
    with pytest.raises(DamagedCheckpoint, match="does not write"):
        write(tmp_path / "a", np.ones((2, 2)), (2, 2), **changes)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"zarr_format": 2'])
def test_broken_descriptions(tmp_path, text):
    (tmp_path / ".zarray").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="does not describe an array"):
        open_array(tmp_path)
