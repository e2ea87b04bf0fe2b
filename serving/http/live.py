"""GET /live: what the server does at this moment, for people who watch (the page at `/` asks once a second).

A snapshot is made at most four times a second, however many ask. Requests are shown by their sizes and ages, without
what they say, and only to the key that sent them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from .service import Service

_FRESH_SECONDS = 0.25
_MOST_REQUESTS = 50


class Live:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._at = 0.0
        self._shared: dict[str, Any] = {}
        self._by_tenant: dict[str, dict[str, Any]] = {}

    def snapshot(self, tenant: str) -> dict[str, Any]:
        now = time.monotonic()
        if not self._shared or now - self._at >= _FRESH_SECONDS:
            self._at, self._shared, self._by_tenant = now, self._describe(now), {}
        if tenant not in self._by_tenant:
            self._by_tenant[tenant] = self._shared | self._requests(tenant, self._at)
        return self._by_tenant[tenant]

    def _describe(self, now: float) -> dict[str, Any]:
        service, metrics = self._service, self._service.metrics
        state, stage = status(service)
        stats = metrics.stats
        return {
            "state": state,
            "stage": stage,
            "started": service.created,
            "time": now,
            "model": self._model(),
            "running": stats.running,
            "waiting": stats.waiting,
            "pages_used": stats.pages_used,
            "pages_total": stats.pages_total,
            "prompt_tokens": stats.queried_tokens,
            "cached_tokens": stats.cached_tokens,
            "generated_tokens": metrics.generated_tokens,
            "preemptions": stats.preemptions,
            "host_pages_used": stats.host_pages_used,
            "host_pages_total": stats.host_pages_total,
            "first_token_seconds": percentiles(metrics.latest_first),
            "between_tokens_seconds": percentiles(metrics.latest_between),
        }

    def _model(self) -> dict[str, Any] | None:
        """Name and limits; None until the engine has said them."""
        service, ready = self._service, self._service.engine.ready
        if ready is None or service.engine.failure is not None:
            return None
        return {
            "id": service.model_id,
            "family": ready.family,
            "chat": service.tokenizer.chat_template is not None,
            "vocab_size": ready.vocab_size,
            "max_model_len": service.context,
            "max_running": ready.max_running,
            "max_waiting": ready.max_waiting,
            "cache_tokens": ready.cache_tokens,
        }

    def _requests(self, tenant: str, now: float) -> dict[str, Any]:
        tracks = [track for track in self._service.metrics.tracks.values() if track.tenant == tenant]
        rows = [
            {
                "seconds": now - track.arrival,
                "prompt_tokens": track.prompt,
                "cached_tokens": track.cached,
                "generated_tokens": track.generated,
            }
            for track in tracks[:_MOST_REQUESTS]
        ]
        return {"requests": rows, "requests_left_out": len(tracks) - len(rows)}


def status(service: Service) -> tuple[str, str | None]:
    """`EngineClient.state`."""
    return service.engine.state


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """The median and the 95th percentile; None of nothing."""
    ranked = sorted(values)
    if not ranked:
        return None
    return {"p50": ranked[len(ranked) // 2], "p95": ranked[min(len(ranked) * 95 // 100, len(ranked) - 1)]}
