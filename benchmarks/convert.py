"""Converting a made 3 GB model both ways, and loading it: peak memory and speed, in processes of their own.

Memory is what the kernel says of the process. "held" is the peak of RssAnon (read every few milliseconds), what the
process holds and nobody can take; "with mapped files" is VmHWM, which also counts pages of files that the kernel may
drop at any time. Both include Python and JAX. The peer reads each file into memory and writes it again, with neither
conversion nor verification; ours forces the result to the disk, reads it back and compares it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from twinax.checkpoints import safetensors
from twinax.checkpoints.tokenizer import Tokenizer
from twinax.models.config import DecoderConfig
from twinax.models.decoder import param_shapes
from twinax.models.families import llama

from . import report

SHARD_BYTES = 1_000_000_000
SAMPLE_SECONDS = 0.005
# Llama 3.2's widths and vocabulary; with 16 layers and an output projection of its own, 3.0 GB in bfloat16.
WIDTHS = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "max_position_embeddings": 2048}

CONVERT = """
import json, sys
from twinax.checkpoints.convert import convert
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""
LOAD = """
import sys, jax
from twinax.checkpoints.load import load_model
jax.block_until_ready(load_model(sys.argv[1]).params)
"""
ENGINE = """
import sys
from twinax.serving.engine import Engine, EngineConfig
Engine.from_path(sys.argv[1], EngineConfig(max_running=1, max_model_len=256, dtype="bfloat16"))
"""
PEER = """
import pathlib, sys
import ml_dtypes
from safetensors.numpy import load_file, save_file
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for path in sorted(source.glob("*.safetensors")):
    save_file(load_file(path), target / path.name)
"""


def make(folder: Path, layers: int) -> tuple[int, int]:
    """A sharded Hugging Face folder in bfloat16 with random numbers: (bytes of its tensors, of the largest)."""
    config = DecoderConfig(num_layers=layers, **WIDTHS, **HEADS)
    shapes = {name: tuple(like.shape) for name, like in param_shapes(config).items()}
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [
        safetensors.TensorSpec(entry.hf_name, dtype, shapes[entry.name][len(entry.index) :])
        for entry in llama.tensor_table(config)
    ]
    folder.mkdir()
    shards = safetensors.plan_shards(specs, SHARD_BYTES)
    rng = np.random.default_rng(0)
    for name, own in shards.items():
        with safetensors.SafetensorsWriter(folder / name, own, {"format": "pt"}) as writer:
            for spec in own:
                writer.write(spec.name, rng.standard_normal(spec.shape, np.float32).astype(dtype))
    safetensors.write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(llama.to_hf(config)))
    Tokenizer.bytes().save(folder)
    return sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)


def measure(code: str, *arguments: object) -> tuple[float, float, float]:
    """(seconds, most bytes held, most bytes with mapped files) of a Python program."""
    start, held, mapped = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])
    while process.poll() is None:
        seen = _memory(process.pid)
        held, mapped = max(held, seen.get("RssAnon", 0)), max(mapped, seen.get("VmHWM", 0))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"The program ended with status {process.returncode}.")
    return time.perf_counter() - start, held, mapped


def _memory(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--layers", type=int, default=16, help="of the model; each has 122 MB")
    parser.add_argument("--folder", type=Path, help="where there is room for 10 GB, which are removed at the end")
    options = parser.parse_args()
    rows = []

    def row(case: str, ours: float, unit: str, goal: float, peer: float | None = None, more: bool = False) -> None:
        name = "safetensors load_file, save_file" if peer is not None else ""
        rows.append(report.Row("convert", case, ours, peer, name, unit, goal, more))

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        source, step, back, copy = (Path(place) / name for name in ("hf", "step", "back", "copy"))
        size, largest = make(source, options.layers)
        goal = (2 * largest + 200e6) / 1e6
        print(f"{size / 1e9:.2f} GB, the largest tensor {largest / 1e6:,.0f} MB: the goal is {goal:,.0f} MB")
        seconds, held, mapped = measure(PEER, source, copy)
        speed = size / 1e9 / seconds
        row("safetensors load_file, save_file, held", held / 1e6, "MB", goal)
        for case, given in {
            "Hugging Face to Twinax": (source, step, {}),
            "Twinax to Hugging Face": (step, back, {"max_shard_bytes": SHARD_BYTES}),
            "Hugging Face to Twinax, plan fsdp=8": (source, copy, {"plan": "fsdp=8"}),
        }.items():
            shutil.rmtree(given[1], ignore_errors=True)
            seconds, held, mapped = measure(CONVERT, *given[:2], json.dumps(given[2]))
            row(f"{case}, held", held / 1e6, "MB", goal)
            row(f"{case}, with mapped files", mapped / 1e6, "MB", goal)
            row(case, size / 1e9 / seconds, "GB/s", 0.5, speed, True)
        for name in sorted(path.name for path in source.glob("*.safetensors")):
            if (back / name).read_bytes() != (source / name).read_bytes():
                raise RuntimeError(f"{name} did not come back as it was.")
        shutil.rmtree(back)
        shutil.rmtree(copy)
        most = 2 * size / 1e6
        for case, code in {"load_model": LOAD, "the server's engine": ENGINE}.items():
            for kind, folder in {"Hugging Face folder": source, "step": step}.items():
                seconds, held, mapped = measure(code, folder)
                row(f"{case}, {kind}, held", held / 1e6, "MB", most)
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
