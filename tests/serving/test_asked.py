"""What is asked of a step's token rows, which a device computes in pieces: however many rows, steps and askers."""

import numpy as np
import pytest

from tests.serving.engines import engine_of, greedy, twin
from tests.serving.test_engine_pooling import CONFIG, NOTHING_NEW
from twinax.serving.request import Request
from twinax.serving.step_sizes import PIECE

SCORED, POOLED = (120, 1, 73, 2, 99), (PIECE, 127, PIECE + 1)  # lengths of prompts


@pytest.fixture(scope="module")
def engine():
    return engine_of(CONFIG, chunk_tokens=512, max_running=8, max_waiting=16, prefix_cache=None)


def answers(engine, requests):
    """What every request has of its prompt, by id, all of them asked for at once; and rows in the fullest step."""
    for request in requests:
        engine.add(request)
    found, most = {}, 0
    while engine.has_work:
        for output in engine.step():
            own = found.setdefault(output.request_id, [])
            own += [(one.id, one.logprob, one.top) for one in (output.prompt_logprobs or ())[1:]]
            own += [output.embedding] if output.embedding else []
        most = max(most, 0 if engine._flight is None else len(engine._flight.asked.scored))
    return found, most


def test_pieces_say_what_one_row_at_a_time_does(engine):
    rng = np.random.default_rng(0)
    scored = [
        Request(f"s{n}", rng.integers(0, 256, n).tolist(), greedy(max_tokens=1, prompt_logprobs=2)) for n in SCORED
    ]
    pooled = [
        Request(f"{kind}{n}", rng.integers(0, 256, n).tolist(), NOTHING_NEW, pooling=kind)
        for n in POOLED
        for kind in ("mean", "last")
    ]
    together, most = answers(engine, [one for pair in zip(scored, pooled[::-1], strict=False) for one in pair])
    assert most > 2 * PIECE, "several pieces of one step were scored"
    slow = twin(engine, chunk_tokens=3, max_running=1)
    for request in scored:
        (alone,) = answers(slow, [request])[0].values()
        assert len(alone) == len(request.prompt_ids) - 1
        assert together[request.id] == alone
    for request in pooled[::-1][: len(SCORED)]:
        assert together[request.id] == answers(slow, [request])[0][request.id] != []
