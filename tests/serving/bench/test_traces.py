"""Traces: the three formats as their publishers write them, scaling, and traffic made up."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinax.serving.bench.prompts import Prompts
from twinax.serving.bench.traces import Arrival, Trace, TraceError, poisson, read_trace

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:04.0319600,110,27
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,API log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_SESSIONS = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
7,a1,3,ChatGPT,100,20,120,Conversation log
7.5,a1,2,ChatGPT,130,4,134,Conversation log
"""
MOONCAKE = """\
{"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 30535, "input_length": 1500, "output_length": 26, "hash_ids": [46, 47, 2366]}
"""


def write(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "arrivals", "skipped"),
    [
        (AZURE, [(0, 4808, 10), (0.052, 3180, 8), (60.052, 110, 27)], 0),
        (BURSTGPT, [(0, 472, 18), (113, 417, 276)], 1),
        (BURSTGPT_SESSIONS, [(0, 100, 20), (0.5, 130, 4)], 0),
        (MOONCAKE, [(0, 1200, 52), (3.053, 1500, 26)], 0),
    ],
)
def test_each_format_is_read(tmp_path: Path, text: str, arrivals: list[tuple], skipped: int):
    trace = read_trace(write(tmp_path, text))
    found = [(one.at, one.prompt_tokens, one.output_tokens) for one in trace.arrivals]
    np.testing.assert_allclose(found, arrivals, atol=1e-6)
    assert trace.skipped == skipped


def test_mooncake_keeps_its_blocks_and_only_so_many_requests_are_read(tmp_path: Path):
    path = write(tmp_path, MOONCAKE)
    assert [one.blocks for one in read_trace(path).arrivals] == [(46, 47, 48), (46, 47, 2366)]
    assert len(read_trace(path, requests=1).arrivals) == 1


def mooncake(**changed: Any) -> str:
    return json.dumps({"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [0]} | changed) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time,in,out\n1,2,3\n", "begins with 'time,in,out'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        (AZURE + "yesterday,1,2\n", "line 5"),
        (AZURE + "2023-11-16 18:17:05,1\n", "line 5"),
        (AZURE + "2023-11-16 18:17:05,-1,3\n", "line 5.*from 0 to 10,000,000, got '-1'"),
        (AZURE + f"2023-11-16 18:17:05,{10**12},3\n", "line 5.*from 0 to 10,000,000"),
        (AZURE + f'2023-11-16 18:17:05,"{"1" * 200_000}",3\n', "line 5.*field larger than"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 2, "output_length": 3}\n', "line 3.*hash_ids"),
        (MOONCAKE + "nonsense\n", "line 3"),
        (MOONCAKE + mooncake(timestamp=10**400), "line 3.*too large"),
        (MOONCAKE + mooncake(timestamp=float("inf")), "line 3.*a time is a finite number"),
        (MOONCAKE + mooncake(input_length=1.5), "line 3.*a length is a whole number.*got 1.5"),
        (MOONCAKE + mooncake(output_length=True), "line 3.*a length is a whole number.*got True"),
        (MOONCAKE + mooncake(hash_ids="12"), "line 3.*hash_ids is a list"),
        (MOONCAKE + mooncake(hash_ids=[-1]), "line 3.*a block's number.*got -1"),
        (MOONCAKE + "[" * 100_000, "line 3.*recursion"),
    ],
)
def test_what_is_no_trace_is_said_with_its_line(tmp_path: Path, text: str, says: str):
    with pytest.raises(TraceError, match=says):
        read_trace(write(tmp_path, text))


def test_lengths_rate_and_clock_are_scaled():
    arrivals = tuple(Arrival(float(t), 1600, 8, (t,)) for t in range(11))
    trace = Trace("ten seconds", arrivals)
    small = trace.lengths_times(1 / 16)
    assert {(one.prompt_tokens, one.output_tokens) for one in small.arrivals} == {(100, 1)}
    assert small.block_tokens == 32
    assert trace.rate == 1
    fast = trace.at_rate(4)
    assert fast.rate == pytest.approx(4)
    assert [one.at for one in fast.arrivals] == pytest.approx([t / 4 for t in range(11)])
    assert trace.faster(10).seconds == pytest.approx(1)
    assert {one.at for one in trace.at_rate(math.inf).arrivals} == {0}
    assert trace.first(3).seconds == 2


def test_random_traffic_has_the_rate_and_the_lengths_asked_for():
    trace = poisson(4000, 5.0, (16, 256), (8, 8), seed=3)
    gaps = np.diff([one.at for one in trace.arrivals])
    # Of exponential gaps mean and deviation are equal; their errors are about 1 in the root of their number.
    assert np.mean(gaps) == pytest.approx(0.2, rel=4 / math.sqrt(4000))
    assert np.std(gaps) == pytest.approx(0.2, rel=8 / math.sqrt(4000))
    lengths = np.array([one.prompt_tokens for one in trace.arrivals])
    assert lengths.min() >= 16 and lengths.max() <= 256
    assert np.median(lengths) == pytest.approx(64, rel=0.1)  # log-uniform: the geometric mean of its bounds
    assert {one.output_tokens for one in trace.arrivals} == {8}
    assert poisson(5, math.inf, (9, 9), (1, 1), seed=0).seconds == 0


def shared(a: list, b: list) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_prompts_share_what_the_trace_says_and_nothing_else(tmp_path: Path):
    trace = read_trace(write(tmp_path, MOONCAKE)).lengths_times(1 / 8)
    prompts = Prompts(range(1000), 7, trace.block_tokens)
    a, b = [prompts.make(number, one) for number, one in enumerate(trace.arrivals)]
    assert [len(a), len(b)] == [150, 188]
    assert shared(a, b) == 2 * 512 // 8
    again = Prompts(range(1000), 7, trace.block_tokens)
    assert again.make(0, trace.arrivals[0]) == a
    assert shared(Prompts(range(1000), 8, trace.block_tokens).make(0, trace.arrivals[0]), a) < 3
    one = Arrival(0.0, 40, 1)
    assert shared(prompts.make(0, one), prompts.make(1, one)) < 3
    assert shared(prompts.make(0, one), prompts.probe(0, 40)) < 3


def test_made_up_prompts_share_their_beginning():
    trace = poisson(3, 1.0, (20, 30), (1, 1), seed=0, shared=50)
    prompts = Prompts(range(1000), 0, trace.block_tokens)
    a, b, c = [prompts.make(number, one) for number, one in enumerate(trace.arrivals)]
    assert [len(x) for x in (a, b, c)] == [one.prompt_tokens for one in trace.arrivals]
    assert min(map(len, (a, b, c))) >= 70
    assert 50 <= shared(a, b) < 53 and 50 <= shared(a, c) < 53


def test_texts_have_the_words_that_make_the_tokens():
    words = [f"w{i}" for i in range(1000)]
    prompts = Prompts(words, 0, block_tokens=64, per_token=0.5, overhead=10)
    made = prompts.make(0, Arrival(0.0, 210, 1, (1, 2)))
    assert isinstance(made, str) and len(made.split()) == (210 - 10) / 2
    other = prompts.make(1, Arrival(0.0, 210, 1, (1, 3)))
    assert isinstance(other, str)
    assert 32 <= shared(made.split(), other.split()) < 35
