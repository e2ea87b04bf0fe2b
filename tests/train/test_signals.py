"""Ctrl-C and SIGTERM, to a real process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.thorough import thorough
from tests.train.helpers import small_recipe
from twinax.checkpoints.load import load_model
from twinax.train.loop import train
from twinax.train.metrics import read_metrics
from twinax.train.recipe import CheckpointConfig, EvalConfig
from twinax.train.signals import StopSignals

# Trains the recipe of `small_recipe(argv[1])` for very long, telling each step; the result is its last word.
PROGRAM = """
import sys, dataclasses
from pathlib import Path
from tests.train.helpers import small_recipe
from twinax.train.loop import train
from twinax.train.recipe import CheckpointConfig, EvalConfig
recipe = small_recipe(Path(sys.argv[1]), steps=10**6, checkpoint=CheckpointConfig(every=0), eval=EvalConfig(every=0))
result = train(recipe, on_step=lambda metrics: print("step", metrics["step"], flush=True))
print("result", result.step, result.interrupted)
"""


@pytest.mark.parametrize("name", thorough(["SIGTERM", "SIGINT"]))
def test_a_signal_finishes_the_step_saves_and_leaves(name, tmp_path, repository):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(repository / ".cache" / "jax")},
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 5\n"):
            process.send_signal(getattr(signal, name))
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    words = rest.split()
    step, interrupted = int(words[-2]), words[-1]
    assert interrupted == name
    assert step >= 5
    assert f"{name}: saving step {step} before leaving" in rest
    assert f"Stopped by {name} after {step} steps" in rest
    output = Path(tmp_path / "run")
    assert load_model(output).step == step
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, step + 1))


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        assert [signal.getsignal(number) for number in StopSignals.SIGNALS] != before
    assert [signal.getsignal(number) for number in StopSignals.SIGNALS] == before


def test_a_second_control_c_ends_it_at_once():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_training_in_a_thread_takes_no_signals(tmp_path):
    recipe = small_recipe(tmp_path, steps=2, checkpoint=CheckpointConfig(every=0), eval=EvalConfig(every=0))
    found = []
    thread = threading.Thread(target=lambda: found.append(train(recipe, display=False)))
    thread.start()
    thread.join()
    assert [result.step for result in found] == [2]
