"""What a model needs of a chip: against sums by hand for Llama 3.1 8B, and the planner's own estimate."""

import dataclasses
import json

import pytest

from tests.checkpoints.helpers import random_params, small_config, write_hugging_face
from twinax.cli import main
from twinax.models.config import DecoderConfig
from twinax.planner.chips import CHIPS
from twinax.planner.errors import PlannerError
from twinax.planner.memory import serve_memory, train_memory
from twinax.planner.needs import needs
from twinax.planner.workload import Layout, Workload
from twinax.sharding.plan import Plan

EIGHT = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
PARAMETERS = 8_030_261_248


def test_llama_8b():
    found = needs(EIGHT, "V5E")
    assert found.chip is CHIPS["v5e"]
    assert found.weights == 2 * PARAMETERS
    assert found.training == 16 * PARAMETERS
    assert found.cache_per_token == 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, sizes, bytes
    assert found.state_per_request == 0
    assert found.serve_devices == 4  # 16.06 + 17.18 GB on 16.9 GB each
    text = "\n".join(found.lines())
    assert "128.00 KiB a token, 16.00 GiB at 131,072 tokens" in text
    assert "4 chips at least" in text
    assert needs(EIGHT, "h200").serve_devices == 1


@pytest.mark.parametrize("chip", ["v5e", "v6e", "h200"])
def test_training_is_as_the_planner_says(chip):
    """The number found fits by the planner's estimate, and half of it does not."""
    found = needs(EIGHT, chip)
    count, memory = found.train_devices, CHIPS[chip].memory

    def takes(devices: int) -> float:
        workload = Workload(EIGHT, "train", devices, found.train_tokens)
        return sum(train_memory(workload, Layout(Plan(fsdp=devices))).values())

    assert count is not None
    assert takes(count) <= memory
    assert count == 1 or takes(count // 2) > 0.95 * memory


def test_serving_is_no_more_than_the_planner_says():
    """Its engine holds what is counted here, and a little more."""
    config = dataclasses.replace(EIGHT, max_position_embeddings=8192)
    found = needs(config, "h200")
    own = found.weights + found.cache_per_token * 8192
    planned = sum(serve_memory(Workload(config, "serve", 1, 8192), Layout(Plan(), remat="none")).values())
    assert own <= planned <= 1.02 * own


def test_unknown_chip_and_models_too_large():
    with pytest.raises(PlannerError, match="Did you mean 'v5p'"):
        needs(EIGHT, "v5f")
    assert needs(dataclasses.replace(EIGHT, num_kv_heads=1, num_layers=500), "v5e").serve_devices is None


def test_the_command(tmp_path, capsys):
    folder = write_hugging_face(tmp_path / "hf", small_config(), random_params(small_config()))
    assert main(["inspect", str(folder), "--chip", "v6e"]) == 0
    shown = capsys.readouterr().out
    assert "on v6e, 31.25 GiB a chip:" in shown
    assert "to serve      1 chip at least" in shown
    assert main(["inspect", str(folder), "--chip", "tpu7x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs"]["chip"] == "tpu7x"
    assert main(["inspect", str(folder), "--chip", "v5f"]) == 1
    assert "Did you mean" in capsys.readouterr().err
