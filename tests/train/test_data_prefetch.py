"""The thread that makes batches ahead."""

import gc
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.train.data import DataConfig, DataError, Part, Prefetch, batches, open_dataset


def wait_until_gone(thread: threading.Thread) -> None:
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_gives_the_batches_of_the_steps(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {n}"}) for n in range(50)))
    config = DataConfig(path=str(path), eval_fraction=0, cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(config, Tokenizer.bytes(), 16, 0)
    second = Part(np.array([2, 3]), 4, np.ones(2, dtype=bool))
    with batches(dataset, 3, 4) as whole, batches(dataset, 3, 4, second, depth=1) as half:
        for step in range(3, 40):
            assert next(whole).hash() == dataset.batch(step, 4).hash()
            assert next(half).hash() == dataset.batch(step, 4, second).hash()


def test_works_ahead_but_not_without_end():
    made: list[int] = []
    full = threading.Event()

    def make(step: int):
        made.append(step)
        if step == 3:
            full.set()
        return step

    with Prefetch(make, 0, depth=2) as ahead:  # type: ignore[arg-type]
        assert next(ahead) == 0
        assert full.wait(30)  # 1 and 2 wait in the queue, 3 in the thread's hand
        ahead.close()
        assert made == [0, 1, 2, 3]
        with pytest.raises(StopIteration):
            next(ahead)
        ahead.close()
    wait_until_gone(ahead._thread)


def test_an_error_comes_in_its_place_and_ends_the_iteration():
    def make(step: int):
        if step == 2:
            raise OSError("the disk went away")
        return step

    ahead = Prefetch(make, 0)  # type: ignore[arg-type]
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(ahead)
    wait_until_gone(ahead._thread)
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_dropped_iterator_ends_its_thread():
    ahead = Prefetch(lambda step: step, 0)  # type: ignore[arg-type, return-value]
    thread = ahead._thread
    next(ahead)
    del ahead
    gc.collect()
    wait_until_gone(thread)


def test_depth_must_be_positive():
    with pytest.raises(DataError, match="at least 1, not 0"):
        Prefetch(lambda step: step, 0, depth=0)  # type: ignore[arg-type, return-value]
