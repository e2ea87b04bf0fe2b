"""The commands on one another's results: train, resume, inspect, convert, generate, serve."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from twinax.cli import main

RECIPE = """
from twinax.train.recipe import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, Recipe
recipe = Recipe(
    model=ModelConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2),
    data=DataConfig(path="text.txt", cache_dir="cache"),
    checkpoint=CheckpointConfig(every=2),
    eval=EvalConfig(every=0),
    steps=4, batch_size=2, sequence_length=64, output="runs/tiny",
)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and the run that `twinax train` made of it in two parts."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "recipe.py", "--quiet", "--steps", "2"]) == 0
        assert main(["train", "recipe.py", "--quiet", "--resume", "must"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def test_train_resumes_and_keeps_its_metrics(work: Path):
    steps = [json.loads(line) for line in (work / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4]
    kept = sorted(path.name for path in (work / "runs/tiny/checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


def test_inspect_says_what_is_there(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "runs/tiny", "--verify"]) == 0
    text = capsys.readouterr().out
    assert "2 layers, width 32" in text
    assert "verified" in text
    assert main(["inspect", "runs/tiny", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_inspect_tells_a_flipped_bit(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    step = tmp_path / "step_00000004"
    shutil.copytree(work / "runs/tiny/checkpoints/step_00000004", step)
    victim = max((p for p in (step / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert main(["inspect", str(step), "--verify"]) == 1
    assert f"{victim.relative_to(step)}: its bytes have changed" in capsys.readouterr().out


def test_convert_there_and_back_keeps_the_numbers_and_the_text(capsys: pytest.CaptureFixture[str]):
    import twinax

    assert main(["convert", "runs/tiny", "exported", "--quiet"]) == 0
    assert main(["convert", "exported", "imported", "--quiet"]) == 0
    assert "wrote" in capsys.readouterr().out
    # A second time would overwrite: refused, unless asked for.
    assert main(["convert", "runs/tiny", "exported", "--quiet"]) == 1
    assert "overwrite" in capsys.readouterr().err
    own, back = twinax.load("runs/tiny"), twinax.load("imported")
    assert own.params.keys() == back.params.keys()
    assert all(np.array_equal(own.params[name], back.params[name]) for name in own.params)
    texts = []
    for folder in ("runs/tiny", "exported", "imported"):
        assert main(["generate", folder, "12 times", "--max-tokens", "8", "--seed", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].startswith("12 times")


def test_generate_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "runs/tiny", "x" * 64]) == 1
    assert "shorter than the model's context of 64 tokens" in capsys.readouterr().err
    assert main(["generate", "runs/tiny", "x", "--max-tokens", "0"]) == 1
    assert "max_tokens must be a whole number from 1 to 64, got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")
def test_a_file_of_requests_is_answered_and_gone_on_with(work: Path, repository: Path, capsys):
    import twinax

    prompts = {f"r{n}": f"{n % 3} times {n}" for n in range(7)}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions",
         "body": {"model": "any", "prompt": prompt, "max_tokens": 6, "temperature": 0}}
        for name, prompt in prompts.items()
    ]  # fmt: skip
    (work / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "runs/tiny", "--input", "requests.jsonl", "--output", "answers.jsonl", "--max-running", "4"]
    command += ["--compile-cache", str(repository / ".cache" / "serving")]
    assert main(command) == 0
    assert "7 answers in answers.jsonl" in capsys.readouterr().err
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    model = twinax.load("runs/tiny")
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
    assert texts == {name: model.generate(prompt, max_tokens=6, temperature=0) for name, prompt in prompts.items()}

    # Killed while it wrote: two whole lines and a part of the third are there. And one more request has come.
    whole = (work / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (work / "answers.jsonl").write_bytes(whole[0] + whole[1] + whole[2][:50])
    bad = {**lines[0], "custom_id": "bad", "body": {"model": "any", "prompt": "x", "temperature": -1}}
    with (work / "requests.jsonl").open("a") as file:
        file.write(json.dumps(bad) + "\n")
    assert main(command) == 1
    assert "8 answers in answers.jsonl, 1 of them errors" in capsys.readouterr().err
    again = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    assert again[:2] == answers[:2] and len(again) == 8
    found = {answer["custom_id"]: answer["response"] for answer in again}
    assert found["bad"]["status_code"] == 400 and found["bad"]["body"]["error"]["param"] == "temperature"
    assert all(found[name]["body"]["choices"][0]["text"] == text for name, text in texts.items())
    # Nothing left to do starts no engine.
    assert main(command) == 1


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ('{"custom_id": "a", "method": "POST", "url": "/v1/nowhere", "body": {}}', [], "line 1: 'url' must be"),
        ("nonsense", [], "line 1:"),
        ("", [], "has no requests"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n' * 2, [], "line 2: 'custom_id'"),
        ("", ["--temperature", "1"], "--temperature is said in the body of each request"),
        ("", ["a prompt"], "leave these out"),
    ],
)
def test_a_file_that_is_no_file_of_requests_runs_nothing(lines, words, message, tmp_path, capsys):
    (tmp_path / "requests.jsonl").write_text(lines)
    command = ["generate", "runs/tiny", *words, "--input", str(tmp_path / "requests.jsonl")]
    assert main([*command, "--output", str(tmp_path / "out.jsonl")]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_flags_that_go_together(capsys):
    assert main(["generate", "runs/tiny", "--input", "x"]) == 2
    assert main(["generate", "runs/tiny"]) == 2
    assert main(["generate", "runs/tiny", "x", "--max-running", "3"]) == 2
    said = capsys.readouterr().err
    assert "go together" in said and "PROMPT must be given" in said and "--max-running goes with --input" in said


def test_a_run_that_does_not_fit_its_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "recipe.py", "--quiet", "--model.hidden_size", "64"]) == 1
    assert "model.hidden_size is 32 in the checkpoint and 64 here" in capsys.readouterr().err


@pytest.mark.usefixtures("full_compile")
def test_serve_answers_and_stops_on_sigterm(work: Path, repository: Path):
    command = [sys.executable, "-m", "twinax", "serve", "runs/tiny", "--port", "0", "--max-running", "2"]
    command += ["--compile-cache", str(repository / ".cache" / "serving")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, **pipes) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if "ready at " not in line:
            server.kill()
            pytest.fail(f"the server did not start: {line}{server.communicate()[1]}")
        url = line.partition("ready at ")[2].split()[0]
        body = json.dumps({"model": "tiny", "prompt": "3 times", "max_tokens": 4, "seed": 5}).encode()
        request = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
        server.send_signal(signal.SIGTERM)
        err = server.communicate(timeout=60)[1]
    assert server.returncode == 0, err
    assert "stopped" in err
