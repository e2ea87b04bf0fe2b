"""The tuner, with a compiler that is made up."""

import json

import pytest

from benchmarks import tune
from benchmarks.kernel_cases import Case, Kernel
from benchmarks.static import Static

SPACES = {"forward": [{"rows": 256}, {"rows": 512}, {"rows": 1024}], "backward": [{"rows": 128}, {"rows": 256}]}
CASES = [Case("op", name, Kernel(name, {}), {}) for name in ("short", "long")]


def compiler(times, spills=None, broken=()):
    """A case takes the sum over kernels of `times[kernel, rows]`; `short` has no backward kernel."""

    def compile(requests):
        found = []
        for request in requests:
            kernels = ["forward"] if request.builder.endswith("short") else ["forward", "backward"]
            rows = {key["kernel"]: blocks["rows"] for _, key, blocks in request.using}
            rows = {kernel: rows.get(kernel, SPACES[kernel][0]["rows"]) for kernel in kernels}
            if any(item in broken for item in rows.items()):
                found.append(Static(failed="does not fit"))
                continue
            time = sum(times[item] for item in rows.items())
            spilled = sum((spills or {}).get(item, 0) for item in rows.items())
            asked = tuple(("op", {"kernel": kernel}) for kernel in kernels)
            found.append(Static(microseconds=time, spills=spilled, asked=asked))
        return found

    return compile


TIMES = {
    ("forward", 256): 10.0,
    ("forward", 512): 8.0,
    ("forward", 1024): 6.0,
    ("backward", 128): 30.0,
    ("backward", 256): 29.8,
}


@pytest.fixture(autouse=True)
def spaces(monkeypatch):
    monkeypatch.setattr(tune, "tuning_space", lambda operation, chip, key: SPACES[key["kernel"]])


def test_the_fastest_wins_over_all_cases_that_ask():
    forward, backward = tune.tune(CASES, "v6e", compiler(TIMES))
    assert forward.blocks == {"rows": 1024} and forward.is_better
    assert (forward.closed_form, forward.microseconds) == (10 + 40, 6 + 36)  # of the short case and the long one
    assert backward.blocks == {"rows": 128} and not backward.is_better  # less than 2% faster
    assert backward.closed_form == 36  # beside the better forward kernel


def test_what_spills_more_or_does_not_compile_loses():
    spilling = compiler(TIMES, spills={("forward", 1024): 5})
    assert tune.tune(CASES, "v6e", spilling)[0].blocks == {"rows": 512}
    broken = compiler(TIMES, broken=[("forward", 1024), ("forward", 512)])
    assert tune.tune(CASES, "v6e", broken)[0].blocks == {"rows": 256}
    (alone,) = tune.tune(CASES, "v6e", compiler(TIMES, broken=[("backward", 128)]))  # the long case is none
    assert alone.key == {"kernel": "forward"} and alone.closed_form == 10


def test_files_hold_what_is_better_and_lose_what_is_not(tmp_path):
    file = tmp_path / "tuned" / "v6e.json"
    file.parent.mkdir()
    old = {"kernel=backward": {"blocks": {}}, "kernel=other": {"blocks": {"rows": 7}}}
    file.write_text(json.dumps(old))
    choices = tune.tune(CASES, "v6e", compiler(TIMES))
    assert tune.write(choices, "v6e", lambda operation, chip: file) == [file]
    found = json.loads(file.read_text())
    assert found == {
        "kernel=forward": {"blocks": {"rows": 1024}, "microseconds": 42.0, "closed_form": 50.0},
        "kernel=other": {"blocks": {"rows": 7}},
    }
    assert tune.write(choices, "v6e", lambda operation, chip: file) == []


def test_files_are_named_as_kernels_ask():
    assert [tune.tuned_name(name) for name in ("7x", "tpu7x", "v5litepod", "v6e")] == ["7x", "7x", "v5e", "v6e"]
