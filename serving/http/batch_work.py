"""Runs the requests of batches, in an order that suits the prefix cache and keeps the engine full to the end."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import offline
from ..request import MAX_PRIORITY
from .batch_lines import Place, read_body
from .chat import chat_job
from .completions import completion_job
from .embeddings import embeddings
from .errors import ApiError, bad
from .jobs import JobMaker, run_job
from .responses import response_job
from .service import Answer, Caller, Service

Done = Callable[[str, int, dict[str, Any]], None]

JOBS: dict[str, JobMaker] = {
    "/v1/completions": completion_job,
    "/v1/chat/completions": chat_job,
    "/v1/responses": response_job,
}
OTHERS: dict[str, Answer] = {"/v1/embeddings": embeddings}
ENDPOINTS = (*JOBS, *OTHERS)

# Prompts are put in order in parts of so many tokens, which bounds the memory that it takes.
_PART_TOKENS = 2_000_000
_RETRY_SECONDS = 1.0
_MOST_FAILURES = 3


async def run_lines(
    service: Service, endpoint: str, path: Path, places: Iterable[Place], tenant: str, done: Done
) -> None:
    """Answers the requests at `places` of a file, and calls `done(custom_id, status, body)` for each as it ends."""
    window = asyncio.Semaphore(2 * service.engine.info.max_running)

    async def one(place: Place) -> None:
        try:
            body = await asyncio.to_thread(read_body, path, place)
            status, answer = await _answer(service, endpoint, body, tenant)
        finally:
            window.release()
        done(place.custom_id, status, answer)

    async with asyncio.TaskGroup() as group:
        for place in await _in_order(service, endpoint, path, list(places)):
            await window.acquire()
            group.create_task(one(place))


async def _answer(service: Service, endpoint: str, body: dict[str, Any], tenant: str) -> tuple[int, dict[str, Any]]:
    """The status and the body that the endpoint would send, tried again where that can help."""
    failures = 0
    while True:
        # Behind all that somebody waits for, unless it says otherwise.
        caller = Caller(tenant, offline=True, priority=MAX_PRIORITY if body.get("priority") is None else None)
        try:
            if endpoint in OTHERS:
                return 200, await OTHERS[endpoint](service, body, caller)
            job = await JOBS[endpoint](service, body, caller.arrival)
            if job.stream:
                raise bad("stream", "'stream' must be false in a batch: its answers are written to a file.")
            return 200, await run_job(service, job, caller)
        except ApiError as error:
            # Those pass, or the server is leaving; other failures may be the request's own doing.
            passes = error.status in (429, 503)
            failures += not passes
            if (error.status < 500 and not passes) or failures >= _MOST_FAILURES:
                return error.status, error.body()
        await asyncio.sleep(_RETRY_SECONDS)


async def _in_order(service: Service, endpoint: str, path: Path, places: list[Place]) -> list[Place]:
    """Those that generate by their prefix tree and their lengths; others as they came."""
    if endpoint not in JOBS:
        return places
    found: list[Place] = []
    part: list[Place] = []
    prompts: list[array[int]] = []
    new_tokens: list[int] = []

    async def close() -> None:
        found.extend(part[index] for index in await asyncio.to_thread(offline.order, prompts, new_tokens))
        for one in (part, prompts, new_tokens):
            one.clear()

    tokens = 0
    for place in places:
        prompt, count = await _length(service, endpoint, await asyncio.to_thread(read_body, path, place))
        part.append(place)
        prompts.append(prompt)
        new_tokens.append(count)
        tokens += len(prompt)
        if tokens >= _PART_TOKENS:
            await close()
            tokens = 0
    await close()
    return found


async def _length(service: Service, endpoint: str, body: dict[str, Any]) -> tuple[array[int], int]:
    """The first prompt and all new tokens of a request; nothing for one that will be refused."""
    try:
        requests = (await JOBS[endpoint](service, body, 0.0)).requests
    except ApiError:
        return array("i"), 0
    return array("i", requests[0].prompt_ids), sum(request.params.max_tokens for request in requests)
