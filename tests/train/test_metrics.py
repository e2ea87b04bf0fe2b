"""The file of metrics: whole lines, at once, without a step twice."""

import json
import sys

import pytest

from twinax.train.metrics import MetricsLog, read_metrics


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("train", 1, {"loss": 2.5, "batch": "ab"})
        assert json.loads(path.read_text()) == {"kind": "train", "step": 1, "loss": 2.5, "batch": "ab"}


def test_a_resumed_run_cuts_what_is_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            log.write("train", step, {"loss": float(step)})
        log.write("eval", 7, {"loss": 0.5})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    with MetricsLog(path, resume_step=5) as log:
        log.write("train", 6, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, -1.0)
    ]  # fmt: skip
    with MetricsLog(path):
        assert read_metrics(path) == []


def test_numbers_that_json_has_not_become_null(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write("eval", 1, {"loss": float("nan"), "other": float("inf")})
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "eval", "step": 1, "loss": None, "other": None}]


def test_tensorboard_events_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.event_file_writer import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the package that wrote them is really there

    board = tmp_path / "tensorboard"
    with MetricsLog(tmp_path / "m.jsonl", tensorboard_dir=board) as log:
        assert log.notice is None
        log.write("train", 3, {"loss": 1.25, "batch": "not a number"})
    (events,) = board.glob("events.*")
    data, found = events.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the record, its checksum
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[12 + length + 4 :]
    assert found == [(3, "train/loss", 1.25)]


def test_without_tensorboardx_it_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsLog(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "tb") as log:
        assert "tensorboardX is not installed" in (log.notice or "")
        log.write("train", 1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
