"""`twinax bench serve` and `tune serve` with our own server: shared prefixes are found, overload is seen as that."""

import json
from pathlib import Path

import pytest

from tests.serving.http.conftest import MAX_RUNNING, MAX_WAITING, MODEL, Server
from twinax.cli import main
from twinax.parser import read_settings
from twinax.serving.bench.config import BenchConfig
from twinax.serving.bench.local import local_server
from twinax.serving.bench.main import measure
from twinax.serving.http.config import ServeConfig


def test_a_trace_with_shared_prefixes_is_replayed(server: Server, tmp_path: Path):
    lengths = [(1024, 96), (1100, 64), (1024, 32)]
    hashes = [[1, 2], [1, 2, 3], [4, 5]]
    rows = [
        {"timestamp": 1000 * i, "input_length": prompt, "output_length": output, "hash_ids": blocks}
        for i, ((prompt, output), blocks) in enumerate(zip(lengths, hashes, strict=True))
    ]
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = measure(BenchConfig(url=server.url, trace=str(trace), scale="1/16", concurrency=1))
    assert result.summary.errors == {}
    assert [record.prompt_tokens for record in result.records] == [64, 69, 64]
    assert [record.output_tokens for record in result.records] == [6, 4, 2]
    # Two blocks of 512 / 16 tokens, in pages of 16.
    assert [record.cached_tokens for record in result.records] == [0, 64, 0]
    assert f"{MODEL} at {server.url}" in result.notes[0]
    server.wait_idle()


def test_more_than_the_server_takes_is_refused_and_counted(server: Server):
    count = 3 * (MAX_RUNNING + MAX_WAITING)
    result = measure(BenchConfig(url=server.url, requests=count, rate="inf", prompt_tokens="8", output_tokens="64"))
    summary = result.summary
    assert set(summary.errors) == {"HTTP 429"}
    assert summary.completed + summary.errors["HTTP 429"] == count
    assert summary.completed >= MAX_RUNNING + MAX_WAITING
    assert summary.output_tokens == 64 * summary.completed
    server.wait_idle()


@pytest.mark.slow
def test_a_server_is_tuned_and_reads_what_was_written(
    model_folder: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, cache = tmp_path / "serve.json", str(repository / ".cache" / "serving")
    words = ["--requests", "8", "--concurrency", "4", "--prompt-tokens", "20", "--output-tokens", "5", "--seed", "0"]
    space, fixed = '{"chunk_tokens": [64]}', json.dumps({"compile_cache": cache, "page_size": 16, "max_running": 4})
    only = {"max_running": [4], "page_size": [16], "scheduler": ["sarathi"]} | json.loads(space)
    tuned = ["--candidates", "2", "--space", json.dumps(only), "--fixed", fixed, "--out", str(out)]
    assert main(["tune", "serve", str(model_folder), *words, *tuned, "--goal", "throughput"]) == 0
    said = capsys.readouterr().out
    assert "defaults: 8 requests" in said and "scheduler sarathi" in said and f"--config {out}" in said
    settings = read_settings(str(out), ServeConfig, skip=("model",))
    assert settings["max_running"] == 4
    with local_server(str(model_folder), {"config": str(out)}) as url:
        load = BenchConfig(url=url, concurrency=2, requests=2, prompt_tokens="9", output_tokens="3")
        assert measure(load).summary.output_tokens == 6
