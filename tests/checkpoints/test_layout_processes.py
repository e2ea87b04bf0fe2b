"""Two real processes load a step that was cut for them, each from a disk that lacks the files of the other."""

import hashlib
import json
import shutil

import pytest

from tests.checkpoints.helpers import random_params, small_config, write_hugging_face
from tests.jobs import run_job
from twinax.checkpoints.arrays import open_array
from twinax.checkpoints.convert import convert
from twinax.models.decoder import param_shardings
from twinax.sharding.plan import Plan

PLAN = "fsdp=4"
PROGRAM = """
import hashlib, json, sys
from twinax.sharding import processes
port, count, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with processes.join(f"localhost:{port}", count, me):
    import jax
    import numpy as np
    from twinax.checkpoints.load import load_model
    params = load_model(FOLDER[me], plan="fsdp=4").params
    found = {}
    for name, array in params.items():
        for shard in array.addressable_shards:
            data = np.asarray(shard.data).tobytes()
            found[f"{name} {jax.devices().index(shard.device)}"] = hashlib.sha256(data).hexdigest()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_each_process_needs_only_its_own_files(tmp_path):
    config = small_config()
    params = random_params(config)
    write_hugging_face(tmp_path / "hf", config, params)
    step = convert(tmp_path / "hf", tmp_path / "step", plan=PLAN).target
    mesh = Plan.parse(PLAN).mesh()
    expected, folders = {}, []
    for me in range(2):
        folders.append(str(shutil.copytree(step, tmp_path / f"disk{me}" / "step")))
        for name, sharding in param_shardings(config, mesh).items():
            stored = open_array(tmp_path / f"disk{me}" / "step" / "arrays" / f"params.{name}")
            boxes = {d: box for d, box in sharding.devices_indices_map(stored.shape).items() if d.id // 2 == me}
            own = {file for box in boxes.values() for file in stored.file_names(box)}
            others = set(stored.file_names()) - own
            assert len(own) == len(others)
            for file in others:
                (stored.folder / file).unlink()
            for device, box in boxes.items():
                expected[f"{name} {device.id}"] = hashlib.sha256(params[name][box].tobytes()).hexdigest()
    program = ["-c", PROGRAM.replace("FOLDER", repr(folders))]
    found = {}
    for ended in run_job(program, 2, 2):
        assert ended.status == 0, ended.err
        found |= json.loads(ended.out.splitlines()[-1])
    assert found == expected
    assert len(expected) == 4 * len(params)
