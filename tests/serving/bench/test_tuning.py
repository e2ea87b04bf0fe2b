"""Tuning: which settings are tried, what is foreseen, that the best is found and read by the server."""

import json
from pathlib import Path
from typing import Any

import pytest

from twinax.cli import main
from twinax.overrides import UsageError
from twinax.parser import read_settings
from twinax.serving.bench.config import BenchConfig
from twinax.serving.bench.foresee import KNOWN, Machine, foresee, timed
from twinax.serving.bench.local import ServerFailed, local_server
from twinax.serving.bench.summary import Distribution, Summary
from twinax.serving.bench.traces import Arrival, Trace
from twinax.serving.bench.tuning import Trial, TuneConfig, best_of, candidates, halve, rounds, score, space_of
from twinax.serving.engine_config import EngineConfig
from twinax.serving.http.config import ServeConfig
from twinax.serving.step_model import StepModel

SPACE = {"max_running": [4, 8, 16], "chunk_tokens": [64, 256], "page_size": [16]}
LOAD = BenchConfig(url="http://x", rate="1", max_ttft_ms=1000, max_itl_ms=100)


def summary(good: int = 10, rate: float = 100.0, ttft: float = 0.5, token: float = 0.05) -> Summary:
    def of(seconds: float) -> Distribution:
        return Distribution(10, *[seconds] * 5)

    tokens = round(rate * 10)
    return Summary(10, 10, 0, 0, {}, {}, 10.0, 99, 0, tokens, of(ttft), of(token), of(token), of(1.0), good)


def test_candidates_are_the_defaults_and_others_each_once():
    found = candidates(SPACE, 5, seed=0)
    assert found[0] == {}
    assert len({json.dumps(one) for one in found}) == 5
    assert all(one[name] in values for one in found[1:] for name, values in SPACE.items())
    whole = candidates(SPACE, 100, seed=1)
    assert len(whole) == 1 + 6
    assert {(one["max_running"], one["chunk_tokens"]) for one in whole[1:]} == {
        (running, chunk) for running in (4, 8, 16) for chunk in (64, 256)
    }


@pytest.mark.parametrize(
    ("count", "requests", "wanted"),
    [
        (12, 180, [(12, 20), (4, 60), (2, 180)]),
        (2, 50, [(2, 50)]),
        (9, 27, [(9, 8), (3, 9), (2, 27)]),
        (5, 3, [(5, 3), (2, 3)]),
    ],
)
def test_rounds_drop_candidates_and_add_requests(count: int, requests: int, wanted: list[tuple[int, int]]):
    assert rounds(count, requests) == wanted


def test_the_best_is_found_and_the_defaults_stay():
    def quality(settings: dict[str, Any]) -> float:
        return 50.0 if not settings else settings["max_running"] * 10 - abs(settings["chunk_tokens"] - 256) / 10

    def try_out(settings: dict[str, Any], requests: int) -> Trial:
        # Small rounds are noisy: each is off by up to 3.
        noise = (hash((requests, *settings.values())) % 7 - 3) / requests * 8
        return Trial(settings, requests, summary(rate=max(quality(settings) + noise, 1.0)))

    found = halve(candidates(SPACE, 7, 0), 72, try_out, lambda trial: score(trial, LOAD, "throughput"))
    assert [len(trials) for trials in found] == [7, 2]
    assert found[-1][0].settings == {"max_running": 16, "chunk_tokens": 256, "page_size": 16}
    assert all({} in [trial.settings for trial in trials] for trials in found)
    assert {trial.requests for trial in found[-1]} == {72}


def machine(**changes: Any) -> Machine:
    """Each step takes 10 ms and 1 ms for each row of tokens."""
    lines = {size: (0.01 + 0.001 * sum(size), 0.0, 0.0) for size in ((8, 0), (40, 0), (40, 64), (40, 1024))}
    return Machine(**{"steps": StepModel(lines), "max_model_len": 1024, "token_bytes": 100.0, **changes})


def test_what_is_foreseen_is_what_the_scheduler_would_do():
    """Two prompts of 20 tokens share a step of 8 rows and 64 prompt tokens, and each of the other steps takes 18 ms."""
    known, two = machine(keeps_prefixes=True), Trace("two", (Arrival(0.0, 20, 3), Arrival(0.0, 20, 2)))
    found = foresee(known, two, LOAD, {"max_running": 8})
    assert (found.sent, found.completed, found.output_tokens, found.good) == (2, 2, 5, 2)
    first = 0.01 + 0.04 + 0.064  # as the smallest size that was timed
    assert found.ttft.p50 == pytest.approx(first) and found.seconds == pytest.approx(first + 2 * 0.018)
    alone = foresee(known, two, LOAD, {"max_running": 2, "max_waiting": 1})
    assert (alone.completed, alone.errors) == (1, {"status 429": 1})
    in_turn = foresee(known, two, BenchConfig(url="http://x", concurrency=1), {})
    assert in_turn.seconds == pytest.approx(2 * first + 3 * 0.018)
    with pytest.raises(ValueError, match="There is no scheduler 'best'"):
        foresee(known, two, LOAD, {"scheduler": "best"})


def test_only_what_shares_prefixes_is_foreseen_to_share_them():
    alike = Trace("alike", tuple(Arrival(9.0 * n, 600, 2, (1, 2)) for n in range(4)), block_tokens=512)
    shared = foresee(machine(keeps_prefixes=True), alike, LOAD, {})
    whole = foresee(machine(keeps_prefixes=False), alike, LOAD, {})
    off = foresee(machine(keeps_prefixes=True), alike, LOAD, {"prefix_cache": ""})
    assert shared.ttft.p50 < 0.5 * whole.ttft.p50 and whole.ttft == off.ttft
    plain = Trace("plain", tuple(Arrival(9.0 * n, 600, 2) for n in range(4)))
    assert foresee(machine(keeps_prefixes=True), plain, LOAD, {}).ttft == whole.ttft


def test_the_best_foreseen_are_measured_and_the_defaults():
    def trial(settings: dict[str, Any], rate: float | None) -> Trial:
        return Trial(settings, 9, None if rate is None else summary(rate=rate))

    foreseen = [trial({}, 1.0), trial({"a": 1}, 5.0), trial({"a": 2}, 5.0), trial({"a": 3}, None), trial({"a": 4}, 9.0)]
    best = best_of(foreseen, 3, lambda trial: score(trial, LOAD, "throughput"))
    assert [one.settings for one in best] == [{}, {"a": 4}, {"a": 1}]
    assert len(best_of(foreseen, 9, lambda trial: score(trial, LOAD, "throughput"))) == 3


def test_the_simulator_knows_every_setting_that_is_tried_by_default():
    assert set(space_of(TuneConfig(), shares_prefixes=True)) <= KNOWN <= set(EngineConfig.__dataclass_fields__)


@pytest.mark.slow
def test_a_model_that_can_not_be_timed_says_why(tmp_path: Path):
    with pytest.raises(ServerFailed, match=r"config\.json"):
        timed(str(tmp_path), {"max_running": 4})


def test_goodput_counts_first_and_latency_second():
    def of(**changes: Any):
        return score(Trial({}, 10, summary(**changes)), LOAD, "goodput")

    assert of(good=9, rate=500.0) < of(good=10, rate=5.0)
    assert of(ttft=0.6) < of(ttft=0.4)
    assert of(token=0.06) < of(token=0.05)
    assert score(Trial({}, 10, None, "no memory"), LOAD, "goodput") < of(good=0, ttft=99.0)


def test_the_space_has_the_policies_that_need_no_field_of_the_request():
    space = space_of(TuneConfig(space='{"page_size": [32]}'), shares_prefixes=True)
    assert {"first_come", "sarathi"} <= set(space["scheduler"])
    assert not {"priority", "deadline"} & set(space["scheduler"])
    assert space["page_size"] == [32] and set(space["prefix_cache"]) == {"lru", "cost_aware"}
    assert "prefix_cache" not in space_of(TuneConfig(), shares_prefixes=False)
    assert set(space) <= set(ServeConfig.__dataclass_fields__)


def test_settings_are_read_as_on_the_command_line(tmp_path: Path):
    file = tmp_path / "serve.json"
    file.write_text('{"max_running": 16, "scheduler": "sarathi", "drain_seconds": 5, "max_token_ms": 20.5}')
    assert read_settings(str(file), ServeConfig, skip=("model",)) == {
        "max_running": 16,
        "scheduler": "sarathi",
        "drain_seconds": 5.0,
        "max_token_ms": 20.5,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"max_runing": 16}', "unknown setting 'max_runing'. Did you mean max_running"),
        ('{"max_running": "many"}', "max_running takes a whole number, or null; got 'many'"),
        ('{"max_running": 1.5}', "max_running takes a whole number"),
        ('{"model": "x"}', "unknown setting 'model'"),
        ('{"host": null}', "host takes a text; got None"),
        ('{"dtype": ["float32"]}', "dtype takes a text, or null; got ['float32']"),
        (f'{{"num_pages": {10**20}}}', "num_pages takes a whole number, or null, and no more than 64 bits"),
        (f'{{"drain_seconds": {10**400}}}', "drain_seconds takes a number, and no more than 64 bits"),
        (f'{{"port": "{"a" * 999}"}}', "... (1001 characters)"),
        ('{"a":' * 100_000, "is not JSON"),
        ("[1]", "holds a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_file_of_settings_is_explained(tmp_path: Path, text: str, says: str):
    file = tmp_path / "serve.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"serve\.json") as error:
        read_settings(str(file), ServeConfig, skip=("model",))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rate", "1", "--goal", "speed"], "goal is one of goodput, throughput"),
        (["--rate", "1", "--candidates", "1"], "candidates is a number from 2"),
        (["--rate", "1", "--simulated", "3"], "simulated is 0, or at least the number of candidates, 4; got 3"),
        (["--rate", "1", "--space", '{"page_size": 16}'], "space has a list"),
        (["--rate", "1", "--fixed", "5"], "fixed is a JSON object"),
        ([], "without a trace"),
        (["--rate", "1", "--out", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_wrong_words_are_explained(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "serve", str(tmp_path), *words]) in (1, 2)
    assert says in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(tmp_path: Path):
    with (
        pytest.raises(ServerFailed, match="max-running takes a whole number"),
        local_server(str(tmp_path), {"max_running": "many"}),
    ):
        pass
