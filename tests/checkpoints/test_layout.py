"""How arrays are cut into files: evenly, as a plan cuts them, and where each number of a part stands."""

import itertools
import math

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.helpers import flip_bit, random_params, small_config, write_hugging_face
from twinax.checkpoints import layout, manifest
from twinax.checkpoints.arrays import open_array
from twinax.checkpoints.convert import convert
from twinax.checkpoints.errors import CheckpointError, DamagedCheckpoint
from twinax.checkpoints.load import load_model
from twinax.checkpoints.stream import blocks
from twinax.layers.moe_config import MoEConfig
from twinax.models.decoder import param_shapes
from twinax.sharding.plan import Plan, PlanError

CONFIG = small_config()
MIXTURE = small_config(
    family="mixtral", intermediate_size=8, moe=MoEConfig(num_experts=4, experts_per_token=2, expert_size=8)
)


def test_chunks_divide_and_are_small_enough():
    assert layout.chunk_shape((32, 100, 100), 4, 10**9) == (32, 100, 100)
    assert layout.chunk_shape((32, 100, 100), 4, 160_000) == (4, 100, 100)
    assert layout.chunk_shape((33, 100, 100), 4, 160_000) == (3, 100, 100)
    assert layout.chunk_shape((2, 100, 100), 4, 20_000) == (1, 50, 100)
    assert layout.chunk_shape((50257, 768), 4, 50_000_000) == (50257, 192)  # a prime: its rows would be files
    assert layout.chunk_shape((), 4, 1) == ()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 2000))
def test_any_chunk_divides_its_array(shape, limit):
    chunk = layout.chunk_shape(shape, 4, limit)
    assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(1, 200))
def test_blocks_are_the_array_in_order(shape, limit):
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = [array[box] for box in blocks(shape, 4, limit)]
    assert np.concatenate([part.reshape(-1) for part in found]).tolist() == list(range(array.size))
    assert all(part.nbytes <= max(limit, 4) for part in found)


@st.composite
def cut_arrays(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    chunk = [draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in shape]
    return tuple(shape), tuple(chunk), draw(st.integers(0, len(shape)))


@settings(max_examples=50)
@given(cut_arrays())
def test_regions_are_where_the_reader_looks(tmp_path_factory, cut):
    """Written part by part to their regions, the numbers come back through the reader of Zarr chunks."""
    shape, chunk, depth = cut
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    folder = tmp_path_factory.mktemp("zarr")
    layout.describe(folder / "a", shape, chunk, array.dtype)
    for name in layout.chunk_files(shape, chunk):
        (folder / "a" / name).write_bytes(bytes(math.prod(chunk) * 4))
    for place in itertools.product(*map(range, shape[:depth])):
        for region in layout.regions("a", place, shape, chunk, 4):
            with open(folder / region.file, "r+b") as file:
                file.seek(region.start)
                file.write(array[place][region.box].tobytes())
    np.testing.assert_array_equal(open_array(folder / "a").read(), array)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(one, marks=pytest.mark.slow) for one in ("float32", "float16"))]
)
def test_plain_orbax_reads_a_converted_step(tmp_path, dtype):
    params = random_params(CONFIG, dtype)
    write_hugging_face(tmp_path / "hf", CONFIG, params)
    convert(tmp_path / "hf", tmp_path / "step", plan="fsdp=2,tensor=2")
    read = ocp.PyTreeCheckpointer().restore(tmp_path / "step" / "arrays")
    assert {name: np.asarray(array).tobytes() for name, array in read.items()} == {
        f"params.{name}": array.tobytes() for name, array in params.items()
    }


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (CONFIG, "fsdp=8"),
        (MIXTURE, "expert=4,fsdp=2"),
        pytest.param(CONFIG, "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param(CONFIG, "stage=3", marks=pytest.mark.slow),
    ],
)
def test_each_device_reads_only_its_own_files(tmp_path, config, plan):
    """No file is of two devices' parts, and each part is read with all other files gone."""
    params = random_params(config)
    write_hugging_face(tmp_path / "hf", config, params)
    step = convert(tmp_path / "hf", tmp_path / "step", plan=plan).target
    loaded = load_model(step, plan=plan)
    for name, array in loaded.params.items():
        assert np.asarray(array).tobytes() == params[name].tobytes()
        stored = open_array(step / "arrays" / f"params.{name}")
        parts = {str(shard.index): shard for shard in array.addressable_shards}
        files = [stored.file_names(shard.index) for shard in parts.values()]
        assert sorted(itertools.chain(*files)) == sorted(stored.file_names())
        (last,) = list(parts.values())[-1:]
        for file in set(stored.file_names()) - set(stored.file_names(last.index)):
            (stored.folder / file).unlink()
        np.testing.assert_array_equal(stored.read(last.index), last.data)


def test_a_layout_is_read_by_any_plan_and_by_none(tmp_path):
    params = random_params(CONFIG)
    write_hugging_face(tmp_path / "hf", CONFIG, params)
    step = convert(tmp_path / "hf", tmp_path / "step", plan="fsdp=4").target
    for plan in (None, "fsdp=2", "tensor=2,fsdp=4"):
        loaded = load_model(step, plan=plan)
        assert {n: np.asarray(a).tobytes() for n, a in loaded.params.items()} == {
            n: a.tobytes() for n, a in params.items()
        }
    back = convert(step, tmp_path / "back").target
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_plans_that_do_not_fit(tmp_path):
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    with pytest.raises(PlanError, match="kv_heads of 2 cannot be cut over tensor = 4"):
        convert(tmp_path / "hf", tmp_path / "step", plan="tensor=4")
    with pytest.raises(PlanError, match="Did you mean 'fsdp'"):
        convert(tmp_path / "hf", tmp_path / "step", plan="fspd=4")
    convert(tmp_path / "hf", tmp_path / "step")
    with pytest.raises(CheckpointError, match=r"cuts the files of a Twinax step.*leave it out"):
        convert(tmp_path / "step", tmp_path / "back", plan="fsdp=2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "step"]


def test_a_plan_needs_no_devices(tmp_path):
    """A laptop writes what 512 devices will read."""
    config = small_config(hidden_size=1024, num_layers=1)
    shapes = layout.device_shapes(config, Plan(fsdp=512))
    assert shapes["embed.weight"] == (264, 2)
    assert set(shapes) == set(param_shapes(config))


def test_files_are_verified_by_name(tmp_path):
    """Files are verified by their names: 0.1 is not 0.10. (`test_layout_processes.py` has processes that need it.)"""
    count = 16
    write_hugging_face(tmp_path / "hf", CONFIG, random_params(CONFIG))
    step = convert(tmp_path / "hf", tmp_path / "step", plan=f"fsdp={count}").target
    flip_bit(step / "arrays/params.embed.weight" / f"0.{count - 1}", 3)
    with pytest.raises(DamagedCheckpoint, match=rf"params.embed.weight/0\.{count - 1}"):
        load_model(step, plan="fsdp=2")
    found = manifest.read(step)
    found.verify([f"arrays/params.embed.weight/0.{i}" for i in range(count - 1)])
    with pytest.raises(DamagedCheckpoint):
        found.verify([f"arrays/params.embed.weight/0.{count - 1}"])
    with pytest.raises(DamagedCheckpoint):
        found.verify(["arrays/params.embed."])
