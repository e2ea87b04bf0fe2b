"""The table of policies: on a trace that is made up, by the times that are kept."""

import json
import sys

import pytest

from benchmarks import schedulers


def test_the_policies_are_compared(tmp_path, monkeypatch, capsys):
    trace, rows = tmp_path / "azure.csv", tmp_path / "rows.jsonl"
    lines = [f"2024-01-01 00:00:{second:02d}.5,{500 + 40 * second},{20 + second}" for second in range(30)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    words = f"schedulers {trace} --requests 60 --policies first_come fair --json {rows}"
    monkeypatch.setattr(sys, "argv", words.split())
    schedulers.main()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    cases = {row["case"] for row in found}
    assert {f"azure.csv, {name}: goodput" for name in ("first_come", "fair")} <= cases
    assert all(row["ours"] > 0 for row in found if row["case"].endswith("throughput"))
    assert any(row["case"].startswith("error, ") for row in found)
    assert "60 requests" in capsys.readouterr().out


def test_it_says_how_to_use_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["schedulers", "--help"])
    with pytest.raises(SystemExit) as ended:
        schedulers.main()
    assert ended.value.code == 0
    assert "--load" in capsys.readouterr().out
