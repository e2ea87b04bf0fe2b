"""`twinax plan` from its command line to what it prints and writes. In this process, by the analytic model alone."""

import importlib.util
import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from twinax.cli import main
from twinax.planner import devices
from twinax.train.recipe import recipe_from_dict

HUGGING_FACE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
RECIPE = """
from twinax import Recipe
from twinax.train.recipe import ModelConfig
recipe = Recipe(model=ModelConfig(hidden_size=512, intermediate_size=2048, num_layers=8), batch_size=64,
                sequence_length=1024, remat="dots")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["plan", *words, "--compile", "0"]) == status
    return capsys.readouterr().out


def wrong(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    assert main(["plan", *words]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err.partition("error: ")[2]


def test_a_named_plan(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["config.json", "--topology", "v5p:4x4x4", "--plan", "fsdp=64", "--batch-tokens", "1048576"]
    text = run(capsys, *words, "--seq-len", "4096", "--remat", "full")
    assert "6.74B parameters, 32 layers: train, 256 rows of 4,096 tokens" in text
    for expected in ("fits", "parameters", "optimizer", "all-gather over fsdp", "tokens/s a chip", "MFU", "Assumed:"):
        assert expected in text
    assert "--plan fsdp=64 --remat full --accumulation 1 --batch_size 256 --sequence_length 4096" in text


def test_the_search_names_a_command_that_train_takes(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = run(capsys, "recipe.py", "--topology", "v5e:2x2")
    assert "layouts of v5e:2x2, best first" in text
    command = next(line for line in text.splitlines() if line.startswith("use twinax train"))
    words = shlex.split(command.removeprefix("use "))
    assert words[:3] == ["twinax", "train", "recipe.py"]
    settings = dict(zip((name.removeprefix("--") for name in words[3::2]), words[4::2], strict=True))
    kinds = {"accumulation": int, "batch_size": int, "sequence_length": int}
    recipe = recipe_from_dict({name: kinds.get(name, str)(value) for name, value in settings.items()})
    assert recipe.batch_size == 64
    assert recipe.sequence_length == 1024


def test_json_and_picture(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["config.json", "--batch-tokens", "1048576", "--topology", "v5p:4x4x4", "--topology", "h100:64"]
    run(capsys, *words, "--plan", "fsdp=64", "--json", "plan.json", "--picture", "plan.svg")
    found = json.loads((folder / "plan.json").read_text())
    assert [v["topology"] for v in found["verdicts"]] == ["v5p:4x4x4", "h100:64"]
    for verdict in found["verdicts"]:
        memory = verdict["estimated"]["memory"]
        assert sum(memory.values()) == pytest.approx(verdict["memory_available"] - verdict["memory_free"])
        assert memory["optimizer"] == 2 * memory["parameters"]
        assert 0 < verdict["mfu"] < 1
        seconds = verdict["estimated"]["seconds"]
        assert seconds["least"] <= seconds["expected"] <= seconds["most"]
        assert verdict["command"].startswith("twinax train RECIPE --plan fsdp=64")
    picture = ElementTree.parse(folder / "plan.svg").getroot()
    words = [node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert any("v5p:4x4x4, fsdp=64" in word for word in words)
    assert any("h100:64, fsdp=64" in word for word in words)


def test_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = run(capsys, "config.json", "--topology", "v6e:2x4", "--mode", "serve", "--seq-len", "4096", "--json", "-")
    verdict = json.loads(text)["verdicts"][0]
    assert verdict["requests"] == verdict["rows"] > 0
    assert verdict["estimated"]["memory"]["cache"] > verdict["estimated"]["memory"]["parameters"]
    assert f"--max-running {verdict['requests']}" in verdict["command"]


def test_a_cache_of_8_bits_holds_more_requests(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["config.json", "--topology", "v6e:2x4", "--mode", "serve", "--seq-len", "4096", "--compile", "0"]
    plain, narrow = (
        json.loads(run(capsys, *words, *more, "--json", "-"))["verdicts"][0] for more in ([], ["--cache-dtype", "int8"])
    )
    # 128 numbers of two bytes, and of one beside a scale of four.
    assert narrow["requests"] == pytest.approx(plain["requests"] * 256 / 132, rel=0.02)
    assert "--cache-dtype int8" in narrow["command"] and "cache" not in plain["command"]


def test_what_does_not_fit_says_by_how_much(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["config.json", "--topology", "v5e:2x2", "--plan", "fsdp=4", "--batch-tokens", "16384", "--remat", "full"]
    text = run(capsys, *words, "--seq-len", "4096", status=1)
    assert "does not fit: " in text
    assert "GiB too much" in text
    assert "use twinax" not in text


def test_our_own_config_and_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    from twinax.models.families.llama import from_hf

    (folder / "own.json").write_text(json.dumps(from_hf(HUGGING_FACE).to_dict()))
    words = ["--topology", "v5p:2x2x2", "--plan", "fsdp=8", "--batch-tokens", "32768"]
    assert run(capsys, "own.json", *words) == run(capsys, ".", *words) == run(capsys, "config.json", *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["config.json", "--topology", "v7p:4x4x4"], "There is no chip 'v7p'"),
        (["config.json", "--topology", "v5p:3x3x3"], "The nearest is v5p:4x4x3."),
        (["config.json", "--topology", "v5p:2x2x2", "--plan", "fdsp=8"], "Did you mean 'fsdp'?"),
        (["config.json", "--topology", "v5p:2x2x2", "--plan", "fsdp=16"], "takes 16 devices and v5p:2x2x2 has 8"),
        (
            ["config.json", "--topology", "v5p:2x2x2", "--plan", "fsdp=6", "--batch-tokens", "24576"],
            "embed of 4096 cannot be cut over fsdp x expert x sequence = 6",
        ),
        (["config.json", "--topology", "v5p:2x2x2", "--batch-tokens", "5000"], "The nearest is 4096."),
        (["config.json", "--topology", "v5p:2x2x2", "--seq-len", "8192"], "takes 4096 tokens of context"),
        (["nowhere.json", "--topology", "v5p:2x2x2"], "There is no file nowhere.json"),
        (["config.json", "--topology", "v5e:2x2", "--mode", "serve", "--plan", "fsdp=4"], "cut by tensor alone"),
        (["config.json", "--topology", "v5e:2x2", "--cache-dtype", "int8"], "add --mode serve, or leave it out"),
    ],
)
def test_errors_say_what_to_do(words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert says in wrong(capsys, *words, "--compile", "0")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recipe", "--topology", "v5e:2x2"], "There is no recipe 'recipe'; the nearest is 'recipe.py'."),
        (["config.json"], "--topology must be given."),
        (["config.json", "--topology", "v5e:2x2", "--compile", "-1"], "--compile is a number of layouts from 0 up"),
        (["config.json", "--topology", "v5e:2x2", "--remta", "full"], "Did you mean --remat?"),
        (["config.json", "--topology", "v5e:2x2", "--mode", "trian"], "Did you mean train?"),
    ],
)
def test_a_wrong_command_line(words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert says in wrong(capsys, *words, status=2)


def test_a_config_that_is_not_understood(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "odd.json").write_text(json.dumps({**HUGGING_FACE, "sliding_thing": 3}))
    (folder / "text.json").write_text("no JSON")
    assert "sliding_thing=3 (unknown key)" in wrong(capsys, "odd.json", "--topology", "v5e:2x2", "--compile", "0")
    assert "is not JSON" in wrong(capsys, "text.json", "--topology", "v5e:2x2", "--compile", "0")


def test_without_libtpu_it_is_said_what_to_install(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a))
    assert "pip install 'twinax[tpu]'" in wrong(capsys, "config.json", "--topology", "v5e:2x2", "--plan", "fsdp=4")


def test_without_the_cuda_plug_in_gpus_are_estimated_and_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "has_cuda_plugin", lambda: False)
    assert main(["plan", "config.json", "--topology", "h100:8", "--plan", "fsdp=8", "--batch-tokens", "32768"]) == 0
    text = capsys.readouterr().out
    assert "not compiled:" in text
    assert "pip install 'twinax[cuda13]'" in text
