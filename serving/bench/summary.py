"""What a run's records say: percentiles, throughput, goodput, errors by kind; as JSON and as tables."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .config import BenchConfig
from .load import ClientHealth
from .target import Record

PERCENTILES = (50, 90, 99)
# The client is too slow when it uses nearly a core, or its own delays are this share of the server's and can be felt.
_BUSY, _SHARE, _SMALL_SECONDS = 0.8, 0.1, 0.002


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Of seconds. All 0 when there were none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Distribution":
        values = np.fromiter(seconds, float)
        if not len(values):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p90, p99 = map(float, np.percentile(values, PERCENTILES))
        return cls(len(values), float(values.mean()), p50, p90, p99, float(values.max()))


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run. Times in seconds, from when a request was due.

    Attributes:
        sent, completed: requests.
        ended_early: completed with fewer tokens than asked for.
        silent: completed without any text, so that the first token was seen at the end only.
        errors: how many requests failed, by kind.
        error_seconds: how long those waited, by kind.
        seconds: from the first request to the last answer's end.
        prompt_tokens, cached_tokens, output_tokens: of what completed, as the server counted.
        ttft: until the first token. gap: between pieces of text, all requests together. per_token: a request's mean
            time a token after the first. end_to_end: until the last token.
        good: completed requests within both bounds.
    """

    sent: int
    completed: int
    ended_early: int
    silent: int
    errors: dict[str, int]
    error_seconds: dict[str, Distribution]
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Distribution
    gap: Distribution
    per_token: Distribution
    end_to_end: Distribution
    good: int

    @property
    def output_rate(self) -> float:
        """Generated tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def request_rate(self) -> float:
        return self.completed / self.seconds if self.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Requests a second that were answered within the bounds."""
        return self.good / self.seconds if self.seconds else 0.0


def ttft(record: Record) -> float | None:
    """Seconds until the first token."""
    return None if record.first is None else record.first - record.due


def per_token(record: Record) -> float | None:
    """Mean seconds a token after the first; None with fewer than two."""
    if record.first is None or record.last is None or record.silent or record.output_tokens < 2:
        return None
    return (record.last - record.first) / (record.output_tokens - 1)


def is_good(record: Record, config: BenchConfig) -> bool:
    """Answered within both bounds."""
    if record.error is not None:
        return False
    first, each = ttft(record), per_token(record)
    return (first or 0) * 1e3 <= config.max_ttft_ms and (each or 0) * 1e3 <= config.max_itl_ms


def summarize(records: Sequence[Record], config: BenchConfig) -> Summary:
    """Of a run's records."""
    done = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    kinds = Counter(record.error or "" for record in failed)
    begin = min((record.due for record in records), default=0.0)

    def each(of: Callable[[Record], float | None]) -> Distribution:
        return Distribution.of(value for record in done if (value := of(record)) is not None)

    return Summary(
        sent=len(records),
        completed=len(done),
        ended_early=sum(record.output_tokens < record.asked_output for record in done),
        silent=sum(record.silent for record in done),
        errors=dict(kinds.most_common()),
        error_seconds={kind: Distribution.of(r.done - r.due for r in failed if r.error == kind) for kind in kinds},
        seconds=max((record.done for record in records), default=0.0) - begin,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=sum(record.output_tokens for record in done),
        ttft=each(ttft),
        gap=Distribution.of(gap for record in done for gap in record.gaps),
        per_token=each(per_token),
        end_to_end=each(lambda record: (record.done if record.last is None else record.last) - record.due),
        good=sum(is_good(record, config) for record in records),
    )


def verdict(summary: Summary, health: ClientHealth) -> str | None:
    """None, or why the numbers are the client's as much as the server's."""
    why = []
    if health.busy > _BUSY:
        why.append(f"it used {health.busy:.0%} of a core")
    if health.sent_late_p99 > max(_SHARE * summary.ttft.p50, _SMALL_SECONDS):
        why.append(f"it sent requests {health.sent_late_p99 * 1e3:,.0f} ms late (p99)")
    if summary.gap.count and health.loop_late_p99 > max(_SHARE * summary.gap.p50, _SMALL_SECONDS):
        why.append(f"it noticed events {health.loop_late_p99 * 1e3:,.0f} ms late (p99)")
    return f"the client itself was too slow, or short of processor time: {', '.join(why)}" if why else None


def to_json(summary: Summary, health: ClientHealth, records: Sequence[Record], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, for programs."""
    rates = {"output_rate": summary.output_rate, "request_rate": summary.request_rate, "goodput": summary.goodput}
    rows = []
    for record in records:
        row = dataclasses.asdict(record)
        gaps = row.pop("gaps")
        rows.append(
            {**row, "longest_gap": max(gaps, default=0.0), "ttft": ttft(record), "per_token": per_token(record)}
        )
    return {
        **facts,
        "summary": dataclasses.asdict(summary) | rates,
        "client": dataclasses.asdict(health) | {"verdict": verdict(summary, health)},
        "requests": rows,
    }


def show(summary: Summary, health: ClientHealth, config: BenchConfig, console: Console) -> None:
    """The tables."""
    times = Table(title=None)
    for name in ("milliseconds", "mean", *(f"p{p}" for p in PERCENTILES), "max", "of"):
        times.add_column(name, justify="left" if name == "milliseconds" else "right")
    for name, one, of in (
        ("until the first token", summary.ttft, "requests"),
        ("between pieces of text", summary.gap, "gaps"),
        ("a token after the first", summary.per_token, "requests"),
        ("until the last token", summary.end_to_end, "requests"),
    ):
        cells = [f"{value * 1e3:,.1f}" for value in (one.mean, one.p50, one.p90, one.p99, one.max)]
        times.add_row(name, *cells, f"{one.count:,} {of}")
    console.print(times)
    cached = f", {summary.cached_tokens / summary.prompt_tokens:.0%} of them cached" if summary.cached_tokens else ""
    lines = [
        f"completed   {summary.completed:,} of {summary.sent:,} requests in {summary.seconds:,.1f} s, "
        f"{summary.request_rate:,.2f} a second",
        f"tokens      {summary.output_tokens:,} generated, {summary.output_rate:,.1f} a second; "
        f"{summary.prompt_tokens:,} of prompts{cached}",
        f"goodput     {summary.goodput:,.2f} requests a second, {summary.good / max(summary.sent, 1):.1%} of all, had "
        f"their first token within {config.max_ttft_ms:g} ms and {config.max_itl_ms:g} ms a token after it",
    ]
    if summary.ended_early:
        lines.append(f"shorter     {summary.ended_early:,} answers ended before the tokens that were asked for")
    if summary.silent:
        lines.append(
            f"silent      {summary.silent:,} answers had no text at all; their first token counts as their last"
        )
    for kind, count in summary.errors.items():
        waited = summary.error_seconds[kind]
        lines.append(
            f"failed      {count:,} times {kind}, after {waited.p50 * 1e3:,.1f} ms (p50), {waited.p99 * 1e3:,.1f} (p99)"
        )
    lines.append(
        f"client      {health.busy:.0%} of a core, requests {health.sent_late_p99 * 1e3:.1f} ms late and events "
        f"{health.loop_late_p99 * 1e3:.1f} ms late (p99), {health.connections:,} connections"
    )
    console.print("\n".join(lines), highlight=False)
    if problem := verdict(summary, health):
        console.print(f"Do not trust these numbers: {problem}.", style="bold red")
