"""Converting and loading a model that is much larger than its tensors takes memory for tensors, not for the model."""

import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints.helpers import run_python, small_config
from twinax.checkpoints.safetensors import SafetensorsWriter, TensorSpec, plan_shards, write_index
from twinax.checkpoints.stream import HELD_BYTES
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.models.decoder import param_shapes
from twinax.models.families import llama

CONFIG = small_config(
    vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_layers=12, num_heads=8, num_kv_heads=8, head_dim=128
)

# The kernel's own count of what the process had at once, mapped files included, over what it had after imports.
PROGRAM = """
import json, sys
import jax
from twinax.checkpoints import load, to_hugging_face, to_step
from twinax.checkpoints.convert import convert

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def growth(what):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = what()
    return status("VmHWM") - before

source, folder = sys.argv[1:]
jax.devices()
print(json.dumps({
    "there": growth(lambda: convert(source, folder + "/step", plan="fsdp=8")),
    "back": growth(lambda: convert(folder + "/step", folder + "/back", max_shard_bytes=100_000_000)),
    "load": growth(lambda: jax.block_until_ready(load.load_model(source).params)),
    "load a step": growth(lambda: jax.block_until_ready(load.load_model(folder + "/step").params)),
}))
"""


@pytest.mark.slow
def test_memory_is_of_tensors(tmp_path):
    dtype, rng = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    shapes = {name: tuple(like.shape) for name, like in param_shapes(CONFIG).items()}
    table = llama.tensor_table(CONFIG)
    specs = [TensorSpec(entry.hf_name, dtype, shapes[entry.name][len(entry.index) :]) for entry in table]
    size, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
    source = tmp_path / "hf"
    source.mkdir()
    shards = plan_shards(specs, 100_000_000)
    for name, own in shards.items():
        with SafetensorsWriter(source / name, own, {"format": "pt"}) as writer:
            for spec in own:
                writer.write(spec.name, np.frombuffer(rng.bytes(spec.nbytes), dtype).reshape(spec.shape))
    write_index(source, shards)
    (source / "config.json").write_text(json.dumps(llama.to_hf(CONFIG)))
    Tokenizer.bytes().save(source)

    ended = run_python(PROGRAM, str(source), str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    grew = json.loads(ended.stdout)
    bound = 2 * largest + HELD_BYTES
    assert size > 3 * bound  # else this shows nothing
    for way in ("there", "back"):
        assert grew[way] < bound, (way, grew)
    stacked = max(int(np.prod(shape)) * 2 for shape in shapes.values())
    for way in ("load", "load a step"):
        assert grew[way] < size + stacked + bound, (way, grew)
    for name in shards:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
