"""Prometheus metrics, under the names (`vllm:...`) that dashboards for LLM servers already plot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import wire
from ..request import Output, Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_LENGTH = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_LATEST = 2000  # samples of which /live tells the percentiles


@dataclass
class Track:
    """A request in flight, by the numbers."""

    arrival: float
    tenant: str
    prompt: int
    cached: int = 0
    generated: int = 0
    last: float | None = None


class Metrics:
    """What is measured in the HTTP process (times as clients see them) and what the engine reports (`stats`)."""

    def __init__(self) -> None:
        self.stats = wire.Stats()
        self.restarts = self.replays = 0  # engines started again, requests given to them
        self.mean_seconds = 0.0  # of the latest requests, exponentially weighted
        self.model = ""
        self.registry = CollectorRegistry()
        self.tracks: dict[str, Track] = {}
        self.generated_tokens = 0
        self.latest_first: deque[float] = deque(maxlen=_LATEST)  # seconds to the first token
        self.latest_between: deque[float] = deque(maxlen=_LATEST)  # seconds between two tokens
        names = ["model_name", "engine"]

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, names, buckets=buckets, registry=self.registry)

        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._inter = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of finished requests.", _LENGTH)
        self._output = histogram("vllm:request_generation_tokens", "Generated tokens of finished requests.", _LENGTH)
        self._prompt_total = Counter("vllm:prompt_tokens", "Prompt tokens computed.", names, registry=self.registry)
        self._output_total = Counter("vllm:generation_tokens", "Tokens generated.", names, registry=self.registry)
        self._success = Counter(
            "vllm:request_success", "Requests ended, by reason.", [*names, "finished_reason"], registry=self.registry
        )
        self.registry.register(_EngineCollector(self))

    def set_model(self, name: str) -> None:
        """Name the model in the labels, and make every series present from the start."""
        self.model = name
        for metric in (self._first, self._inter, self._whole, self._prompt, self._output):
            metric.labels(name, "0")
        for metric in (self._prompt_total, self._output_total):
            metric.labels(name, "0")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(name, "0", reason)

    def start(self, request: Request) -> None:
        self.tracks[request.id] = Track(request.arrival, request.tenant, len(request.prompt_ids))

    def forget(self, request_id: str) -> None:
        self.tracks.pop(request_id, None)

    def aborted(self, request_id: str) -> None:
        if self.tracks.pop(request_id, None) is not None:
            self._success.labels(self.model, "0", "abort").inc()

    def output(self, output: Output) -> None:
        track = self.tracks.get(output.request_id)
        if track is None:
            return
        now, labels = time.monotonic(), (self.model, "0")
        count = len(output.token_ids)
        if count:
            track.cached = output.cached_tokens
            track.generated += count
            self.generated_tokens += count
            if track.last is None:
                self.latest_first.append(now - track.arrival)
                self._first.labels(*labels).observe(now - track.arrival)
                self._prompt_total.labels(*labels).inc(output.prompt_tokens)
                count_after_first = count - 1
                start = now
            else:
                count_after_first = count
                start = track.last
            for _ in range(count_after_first):
                self._inter.labels(*labels).observe((now - start) / count_after_first)
                self.latest_between.append((now - start) / count_after_first)
            self._output_total.labels(*labels).inc(count)
            track.last = now
        if output.finish_reason is not None:
            if track.last is None:  # it wanted none
                self._prompt_total.labels(*labels).inc(output.prompt_tokens)
            del self.tracks[output.request_id]
            seconds = now - track.arrival
            self.mean_seconds = seconds if not self.mean_seconds else 0.9 * self.mean_seconds + 0.1 * seconds
            self._whole.labels(*labels).observe(seconds)
            self._prompt.labels(*labels).observe(output.prompt_tokens)
            self._output.labels(*labels).observe(output.completion_tokens)
            reason = "abort" if output.finish_reason == "cancelled" else output.finish_reason
            self._success.labels(*labels, reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, labels = self._metrics.stats, (self._metrics.model, "0")
        gauges = {
            "vllm:num_requests_running": (stats.running, "Requests in the running batch."),
            "vllm:num_requests_waiting": (stats.waiting, "Requests in the queue."),
            "vllm:kv_cache_usage_perc": (
                stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
                "Part of the cache's pages in use; 1 is all of them.",
            ),
            "vllm:cpu_cache_usage_perc": (
                stats.host_pages_used / stats.host_pages_total if stats.host_pages_total else 0.0,
                "Part of the pages in the host's memory in use, by requests that were preempted.",
            ),
        }
        counters = {
            "vllm:prefix_cache_queries": (stats.queried_tokens, "Tokens that the prefix cache was asked for."),
            "vllm:prefix_cache_hits": (stats.cached_tokens, "Tokens that the prefix cache had."),
            "vllm:num_preemptions": (stats.preemptions, "Requests put back into the queue for want of pages."),
            "twinax_pages_copied_out": (stats.pages_copied_out, "Pages copied to the host's memory."),
            "twinax_pages_copied_back": (stats.pages_copied_back, "Pages copied back from the host's memory."),
            "twinax_engine_steps": (stats.steps, "Engine steps."),
            "twinax_engine_host_seconds": (
                stats.host_seconds,
                "Python time of the engine's steps, the device's not included.",
            ),
            "twinax_engine_restarts": (self._metrics.restarts, "Engines that died and were started again."),
            "twinax_replayed_requests": (self._metrics.replays, "Requests of dead engines that another one was given."),
            "twinax_compiles_after_warmup": (stats.compiles_after_warmup, "Compilations after warm-up; each is a bug."),
        }
        for name, (value, help) in gauges.items():
            gauge = GaugeMetricFamily(name, help, labels=["model_name", "engine"])
            gauge.add_metric(labels, value)
            yield gauge
        for name, (value, help) in counters.items():
            counter = CounterMetricFamily(name, help, labels=["model_name", "engine"])
            counter.add_metric(labels, value)
            yield counter
