"""What the load generator counts and times, against a server that does exactly what is written here."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.serving.bench.scripted import ScriptedServer, echo, events, text, usage
from twinax.cli import main
from twinax.serving.bench.config import BenchConfig
from twinax.serving.bench.load import ClientHealth, run_load
from twinax.serving.bench.main import Result, measure
from twinax.serving.bench.plot import draw
from twinax.serving.bench.summary import Summary, summarize, verdict
from twinax.serving.bench.target import Record, Target, TargetError
from twinax.serving.bench.traces import Arrival


def run(server: ScriptedServer, **settings: Any) -> Result:
    defaults = {"concurrency": 2, "requests": 4, "prompt_tokens": "20", "output_tokens": "9", "seed": 0, "timeout": 20}
    if {"rate", "speed"} & set(settings):
        del defaults["concurrency"]
    return measure(BenchConfig(url=server.url, **(defaults | settings)))


def probed(body: dict[str, Any]) -> bool:
    """Whether this is the question before the run."""
    return body["max_tokens"] == 4


def test_tokens_are_those_of_the_usage_and_not_of_the_pieces():
    with ScriptedServer() as server:
        result = run(server)
    summary = result.summary
    assert (summary.sent, summary.completed, summary.errors) == (4, 4, {})
    assert (summary.prompt_tokens, summary.output_tokens) == (80, 36)
    assert summary.gap.count == 4 * 4  # five pieces a request
    assert summary.per_token.count == summary.ttft.count == 4
    sent = server.bodies[1:]
    assert all(len(body["prompt"]) == 20 and body["max_tokens"] == 9 and body["ignore_eos"] for body in sent)
    assert all(body["stream_options"] == {"include_usage": True} and body["temperature"] == 0 for body in sent)
    assert len({tuple(body["prompt"]) for body in sent}) == 4
    assert server.connections <= 3  # two clients' and the one of the questions, all kept


def test_times_are_those_of_the_events():
    def slowly(body: dict[str, Any]):
        if not probed(body):
            time.sleep(0.05)
        return echo(body)

    with ScriptedServer(slowly) as server:
        record = run(server, requests=1).records[0]
    assert record.first is not None and record.last is not None
    assert 0.05 <= record.first - record.sent <= record.last - record.sent <= record.done - record.sent
    assert len(record.gaps) == 4
    assert sum(record.gaps) == pytest.approx(record.last - record.first)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ((429, [b'{"error": {"message": "the queue is full"}}']), "HTTP 429", "the queue is full"),
        ((500, [b"<html>"]), "HTTP 500", "<html>"),
        ((200, [*events(text("a"), done=False), None]), "connection lost", ""),
        ((200, events(text("a"), {"error": {"message": "the engine died"}})), "error in the stream", "engine died"),
        ((200, events(text("a"), usage(20, 1), done=False)), "stream without an end", ""),
        ((200, events(text("a"))), "stream without usage", ""),
        ((200, [b"data: {nonsense}\n\n"]), "an event is not the API's JSON", ""),
    ],
)
def test_errors_are_counted_by_kind(answer: tuple, error: str, says: str):
    with ScriptedServer(lambda body: echo(body) if probed(body) else answer) as server:
        result = run(server)
    assert result.summary.errors == {error: 4}
    assert result.summary.completed == result.summary.output_tokens == result.summary.good == 0
    assert says in result.records[0].detail
    assert result.summary.error_seconds[error].count == 4


def test_a_server_that_never_answers_is_a_timeout_and_a_dead_one_is_said():
    over = threading.Event()

    def hang(body: dict[str, Any]):
        if not probed(body):
            over.wait(timeout=120)
        return echo(body)

    with ScriptedServer(hang) as server:
        assert run(server, requests=1, timeout=0.2).summary.errors == {"timeout": 1}
        over.set()
    with pytest.raises(TargetError, match="connection refused"):
        run(server)


def test_a_connection_that_the_server_closes_is_opened_again():
    with ScriptedServer(keep_alive=False) as server:
        result = run(server, concurrency=1)
    assert result.summary.completed == 4
    assert result.health.connections == 4


def test_pieces_may_be_cut_anywhere():
    def torn(body: dict[str, Any]):
        status, pieces = echo(body)
        whole = b"".join(piece for piece in pieces if piece)
        return status, [whole[i : i + 7] for i in range(0, len(whole), 7)]

    with ScriptedServer(torn) as server:
        summary = run(server).summary
    assert (summary.completed, summary.output_tokens, summary.gap.count) == (4, 36, 16)


def test_answers_that_are_short_silent_or_cached_are_counted():
    def short(body: dict[str, Any]):
        return 200, events(text("", "stop"), usage(len(body["prompt"]), 2, cached=16))

    with ScriptedServer(short) as server:
        summary = run(server).summary
    assert (summary.ended_early, summary.silent, summary.cached_tokens) == (4, 4, 64)
    assert summary.ttft.count == 4 and summary.per_token.count == 0


def test_a_server_without_ids_or_ignore_eos_gets_words():
    def plain(body: dict[str, Any]):
        if "ignore_eos" in body:
            return 400, [b'{"error": {"message": "unknown field ignore_eos"}}']
        # Two tokens a word, and five that the server adds.
        return 200, events(text("a", "stop"), usage(5 + 2 * len(body["prompt"].split()), 1))

    with ScriptedServer(plain, tokenize=False) as server:
        result = run(server, prompt_tokens="105")
    assert [len(body["prompt"].split()) for body in server.bodies[-4:]] == [50] * 4
    assert result.summary.prompt_tokens == 4 * 105
    assert "does not take ignore_eos" in " ".join(result.notes) and "2.00 tokens each" in " ".join(result.notes)


def test_chat_asks_in_messages_and_reads_deltas():
    def chat(body: dict[str, Any]):
        words = len(body["messages"][0]["content"].split())
        delta = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
        return 200, events({"choices": [{"delta": {"role": "assistant"}}]}, delta, delta, usage(words, 2))

    with ScriptedServer(chat) as server:
        result = run(server, chat=True, extra_body='{"top_k": 5}', api_key="secret")
    assert result.summary.completed == 4 and result.summary.gap.count == 4
    assert server.bodies[-1]["top_k"] == 5
    assert "authorization: bearer secret" in server.headers[-1].lower()


@pytest.mark.parametrize(
    ("settings", "script", "says"),
    [
        ({"model": "other"}, echo, "no model 'other'; it has scripted"),
        ({}, lambda body: (200, events(text("a"))), "no usage"),
        ({}, lambda body: (401, [b'{"error": {"message": "wrong key"}}']), "HTTP 401. wrong key"),
        ({}, lambda body: (200, events(text("", "stop"), usage(3, 0))), "no token"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(settings: dict, script: Any, says: str):
    with ScriptedServer(script) as server, pytest.raises(TargetError, match=says):
        run(server, **settings)


def test_requests_too_long_for_the_model_are_cut_and_said():
    with ScriptedServer(model={"max_model_len": 24}) as server:
        result = run(server)
    assert all(len(body["prompt"]) + body["max_tokens"] < 24 for body in server.bodies[1:])
    assert "4 requests were shortened" in " ".join(result.notes)


def test_the_open_loop_does_not_wait_for_answers():
    def slowly(body: dict[str, Any]):
        if not probed(body):
            time.sleep(0.02)  # the whole server stands still: one answer at a time
        return echo(body)

    with ScriptedServer(slowly) as server:
        result = run(server, rate="inf", requests=10)
    assert result.summary.completed == 10
    assert {record.due for record in result.records} == {0.0}
    # What the last one waited for is the server's, though it was answered at once when its turn came.
    assert result.summary.ttft.max >= 10 * 0.02


def test_a_client_that_is_too_slow_says_so():
    def sleepy(record: Record) -> None:
        time.sleep(0.1)

    async def go(config: BenchConfig) -> tuple[Summary, ClientHealth]:
        target = Target(config)
        prompts = await target.prepare("some words " * 50, 512)
        arrivals = [Arrival(i / 100, 8, 3) for i in range(5)]
        requests = [target.encode(prompts.make(i, one), 3) for i, one in enumerate(arrivals)]
        records, health = await run_load(target, arrivals, requests, on_done=sleepy)
        target.client.close()
        return summarize(records, config), health

    with ScriptedServer() as server:
        summary, health = asyncio.run(go(BenchConfig(url=server.url, rate="1")))
    assert health.loop_late_p99 >= 0.05 or health.sent_late_p99 >= 0.05
    assert "too slow" in (verdict(summary, health) or "")
    assert verdict(summary, ClientHealth(0.1, 1e-6, 1e-6, 1)) is None


def test_goodput_counts_what_is_within_both_bounds():
    def record(first: float, last: float, error: str | None = None) -> Record:
        return Record(0, 1.0, 5, 11, 1.0, first, last, last, [last - first], error=error, output_tokens=11)

    config = BenchConfig(url="http://x", rate="1", max_ttft_ms=500, max_itl_ms=20)
    good, late, slow = record(1.4, 1.59), record(1.6, 1.7), record(1.4, 1.7)
    summary = summarize([good, late, slow, record(1.1, 1.2, "HTTP 500")], config)
    assert summary.good == 1 and summary.completed == 3
    assert summary.goodput == pytest.approx(1 / 0.7)
    assert summary.ttft.p50 == pytest.approx(0.4)
    assert summary.per_token.max == pytest.approx(0.03)


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,480,96\n2023-11-16 18:17:04.0319600,320,80\n"
    )
    words = ["--trace", str(trace), "--scale", "1/16", "--speed", "10", "--seed", "1"]
    written = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    with ScriptedServer() as server:
        assert main(["bench", "serve", server.url, *words, *written]) == 0
    said = capsys.readouterr().out
    assert "completed   2 of 2 requests" in said and "11 generated" in said
    run = json.loads((tmp_path / "run.json").read_text())
    assert [one["asked_prompt"] for one in run["requests"]] == [30, 20]
    assert run["summary"]["output_tokens"] == 6 + 5
    assert run["config"]["scale"] == "1/16" and "api_key" not in run["config"]
    picture = ElementTree.parse(tmp_path / "run.svg").getroot()
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 2


def test_a_picture_of_failures_only_is_drawn():
    failed = [Record(i, float(i), 5, 5, float(i), done=i + 0.5, error="HTTP 429") for i in range(3)]
    config = BenchConfig(url="http://x", rate="1")
    for records in (failed, []):
        ElementTree.fromstring(draw(records, config, "a < b"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["http://x"], "without a trace"),
        (["http://x", "--rate", "1", "--concurrency", "2"], "give one of them"),
        (["http://x", "--rate", "-1"], "rate is a number of requests a second"),
        (["http://x", "--rate", "1", "--scale", "1/0"], "scale is a number or a fraction"),
        (["http://x", "--rate", "1", "--prompt-tokens", "9-3"], "prompt_tokens is a number"),
        (["http://x", "--rate", "1", "--extra-body", "[]"], "extra_body is a JSON object"),
        (["http://x", "--rate", "1", "--plot", "a.png"], "plot is an .svg file"),
        (["ftp://x", "--rate", "1"], "a server's URL is"),
        (["http://x", "--rate", "1", "--json", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_wrong_words_are_explained(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "serve", *words]) in (1, 2)
    assert says in capsys.readouterr().err
