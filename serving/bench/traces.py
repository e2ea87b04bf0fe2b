"""Traces of real traffic: when requests came, how long they were, which beginnings they shared. Or traffic made up.

Three public formats, told apart by their first line:
- Azure's CSV (Patel et al. 2024, arXiv:2311.18677): TIMESTAMP,ContextTokens,GeneratedTokens;
- BurstGPT's CSV (Wang et al. 2024, arXiv:2401.17644): Timestamp,...,Request tokens,Response tokens,...; requests that
  failed have no response tokens and are left out;
- Mooncake's JSON lines (Qin et al. 2024, arXiv:2407.00079): `hash_ids` name the blocks of 512 tokens of each prompt.
"""

import csv
import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOONCAKE_BLOCK = 512
MOST_TOKENS = 10_000_000  # of a prompt or an answer


class TraceError(ValueError):
    """The file is not a trace in a known format; the message names the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        at: seconds after the first request.
        prompt_tokens, output_tokens: lengths, from 1.
        blocks: what the prompt is made of, `Trace.block_tokens` tokens each; equal numbers are equal tokens. Empty:
            it shares nothing.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """Arrivals, in their order.

    Attributes:
        source: where they come from, in words.
        block_tokens: tokens a block.
        skipped: requests of the file that had failed where it was recorded.
    """

    source: str
    arrivals: tuple[Arrival, ...]
    block_tokens: int = MOONCAKE_BLOCK
    skipped: int = 0

    @property
    def seconds(self) -> float:
        return self.arrivals[-1].at if self.arrivals else 0.0

    @property
    def rate(self) -> float:
        """Mean requests a second; infinite when all come at once."""
        return (len(self.arrivals) - 1) / self.seconds if self.seconds else math.inf

    def first(self, requests: int | None) -> "Trace":
        """The first so many requests; None: all."""
        return dataclasses.replace(self, arrivals=self.arrivals[:requests])

    def lengths_times(self, factor: float) -> "Trace":
        """All lengths times `factor`, blocks too; nothing gets shorter than one token."""
        if factor == 1:
            return self

        def times(tokens: int) -> int:
            return max(1, round(tokens * factor))

        arrivals = (
            dataclasses.replace(one, prompt_tokens=times(one.prompt_tokens), output_tokens=times(one.output_tokens))
            for one in self.arrivals
        )
        return dataclasses.replace(self, arrivals=tuple(arrivals), block_tokens=times(self.block_tokens))

    def at_rate(self, rate: float) -> "Trace":
        """Stretched or pressed in time to a mean of `rate` requests a second; infinite: all at once."""
        if not self.seconds and not math.isinf(rate):
            raise TraceError(f"all requests of {self.source} come at once: there is no rate to change to {rate:g}")
        return self.faster(rate / self.rate if self.seconds else 1.0)

    def faster(self, factor: float) -> "Trace":
        """The clock runs `factor` times as fast."""
        arrivals = tuple(dataclasses.replace(one, at=one.at / factor) for one in self.arrivals)
        return dataclasses.replace(self, arrivals=arrivals)


def read_trace(path: str | Path, requests: int | None = None) -> Trace:
    """The first `requests` of a trace file. Raises TraceError, OSError."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            rows = _rows(path, head, file)
            found, skipped = [], 0
            for row in rows:
                if row is None:
                    skipped += 1
                elif requests is None or len(found) < requests:
                    found.append(row)
                else:
                    break
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not text: {error}") from None
    if not found:
        raise TraceError(f"{path} holds no request; a trace has one a line")
    start = min(one.at for one in found)
    found = [dataclasses.replace(one, at=one.at - start) for one in found]
    return Trace(path.name, tuple(sorted(found, key=lambda one: one.at)), skipped=skipped)


def poisson(
    requests: int, rate: float, prompt: tuple[int, int], output: tuple[int, int], seed: int, shared: int = 0
) -> Trace:
    """Requests at random: exponential gaps of mean 1 / rate, lengths log-uniform between two bounds.

    The first `shared` tokens of all prompts are the same.
    """
    rng = np.random.default_rng([seed, 0])
    at = np.zeros(requests) if math.isinf(rate) else np.concatenate([[0], rng.exponential(1 / rate, requests - 1)])
    drawn = [
        np.exp(rng.uniform(math.log(low), math.log(high), requests)).round().astype(int)
        for low, high in (prompt, output)
    ]
    blocks = (0,) if shared else ()
    arrivals = [
        Arrival(float(t), int(p) + shared, int(o), blocks) for t, p, o in zip(np.cumsum(at), *drawn, strict=True)
    ]
    return Trace(f"{requests} random requests", tuple(arrivals), block_tokens=shared or MOONCAKE_BLOCK)


def _rows(path: Path, head: str, file: Iterable[str]) -> Iterator[Arrival | None]:
    names = [name.strip() for name in head.split(",")]
    if head.lstrip().startswith("{"):
        parse, rows = _mooncake, (json.loads(line) for line in file if line.strip())
    elif {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(names):
        parse, rows = _azure, csv.DictReader(file)
    elif {"Timestamp", "Request tokens", "Response tokens"} <= set(names):
        parse, rows = _burstgpt, csv.DictReader(file)
    else:
        raise TraceError(
            f"{path} begins with {head.strip()[:80]!r}; a trace is Azure's CSV (TIMESTAMP,ContextTokens,"
            "GeneratedTokens), BurstGPT's CSV (Timestamp, Request tokens, Response tokens) or Mooncake's JSON lines "
            "(timestamp, input_length, output_length, hash_ids)"
        )
    number = 1 if parse is _mooncake else 2
    try:
        for row in rows:
            yield parse(row)
            number += 1
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{path}, line {number}, is not a request of the trace's format: {reason[:200]}") from None


def _azure(row: dict[str, Any]) -> Arrival:
    at = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    seconds = at.replace(tzinfo=at.tzinfo or datetime.UTC).timestamp()
    return _arrival(seconds, row["ContextTokens"], row["GeneratedTokens"])


def _burstgpt(row: dict[str, Any]) -> Arrival | None:
    if _whole("a length", row["Response tokens"], MOST_TOKENS) == 0:
        return None
    return _arrival(float(row["Timestamp"]), row["Request tokens"], row["Response tokens"])


def _mooncake(row: dict[str, Any]) -> Arrival:
    if not isinstance(row["hash_ids"], list):
        raise ValueError("hash_ids is a list of numbers")
    blocks = tuple(_whole("a block's number", block, 1 << 63) for block in row["hash_ids"])
    return _arrival(row["timestamp"] / 1000, row["input_length"], row["output_length"], blocks)


def _arrival(at: float, prompt: Any, output: Any, blocks: tuple[int, ...] = ()) -> Arrival:
    if not math.isfinite(at):
        raise ValueError(f"a time is a finite number, got {at}")
    lengths = [_whole("a length", length, MOST_TOKENS) for length in (prompt, output)]
    return Arrival(at, max(lengths[0], 1), max(lengths[1], 1), blocks)


def _whole(name: str, value: Any, most: int) -> int:
    number = int(value)
    if isinstance(value, bool) or not 0 <= number <= most or (isinstance(value, float) and number != value):
        raise ValueError(f"{name} is a whole number from 0 to {most:,}, got {repr(value)[:40]}")
    return number
