"""The ASGI application: routes, the API key, errors as JSON, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics, tokenize
from .body import ClientGone, read_json
from .chat import chat_job
from .completions import completion_job
from .engine_client import describe
from .errors import ApiError
from .jobs import Job
from .service import Service

JobMaker = Callable[[Service, dict[str, Any], float], Awaitable[Job]]
_json = msgspec.json.Encoder()


def create_app(service: Service, api_key: str | None) -> ASGIApp:
    """The application; with an `api_key`, every route but /health demands it."""
    routes = [
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{model:path}", _model(service), methods=["GET"]),
        Route("/v1/completions", Generate(service, completion_job), methods=["POST"]),
        Route("/v1/chat/completions", Generate(service, chat_job), methods=["POST"]),
        Route("/tokenize", Call(service, tokenize.tokenize), methods=["POST"]),
        Route("/detokenize", Call(service, tokenize.detokenize), methods=["POST"]),
    ]
    # A bare router: Starlette's own layers would answer errors in their way before they reach the gate.
    return Gate(Router(routes, redirect_slashes=False), api_key)


def json_response(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(_json.encode(body), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.status, error.body(), error.headers())


class Gate:
    """The outermost layer: request ids, the API key, and the last resort for errors."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        request_id = secrets.token_hex(16).encode()

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            self._check_key(scope)
            # With an "app" in the scope the router raises what it can't route, instead of answering in plain text.
            await self._app({**scope, "app": self}, receive, send_with_id)
        except ClientGone:
            return
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
        except HTTPException as error:
            await _http_error(scope, error)(scope, receive, send_with_id)
        except Exception:
            print(
                f"error in {scope['method']} {scope['path']!r}:\n{traceback.format_exc()}", file=sys.stderr, flush=True
            )
            if started:
                raise  # the server closes the connection: a cut answer must not look complete
            await error_response(ApiError(500, "The server failed on this request; its log says how."))(
                scope, receive, send_with_id
            )

    def _check_key(self, scope: Scope) -> None:
        if self._api_key is None or scope["path"] == "/health":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        right = hmac.compare_digest(key.strip(), self._api_key)
        if kind.lower() != b"bearer" or not right:
            message = "Send the API key in the header 'Authorization: Bearer <key>'."
            message = ("The API key is wrong. " if given else "There is no API key. ") + message
            raise ApiError(401, message, code="invalid_api_key")


def _http_error(scope: Scope, error: HTTPException) -> Response:
    method, path = scope["method"], scope["path"]
    if error.status_code == 404:
        return error_response(ApiError(404, f"There is no route {method} {path}.", code="not_found"))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        found = ApiError(405, f"{path} takes {allowed}, not {method}.", code="method_not_allowed")
        return json_response(405, found.body(), {"allow": allowed})
    return error_response(ApiError(error.status_code, str(error.detail)))


# -- plain routes -----------------------------------------------------------------------------------------------------


def _health(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def health(_: Request) -> Response:
        engine = service.engine
        if engine.failure is not None:
            return json_response(503, {"status": "dead"})
        if engine.draining:
            return json_response(503, {"status": "stopping"})
        if engine.ready is None:
            return json_response(503, {"status": "loading", "stage": describe(engine.progress)})
        return json_response(200, {"status": "ok"})

    return health


def _metrics(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def show_metrics(_: Request) -> Response:
        return Response(service.metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})

    return show_metrics


def _models(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def models(_: Request) -> Response:
        return json_response(200, {"object": "list", "data": [service.model_card()]})

    return models


def _model(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def model(request: Request) -> Response:
        service.check_model(request.path_params["model"])
        return json_response(200, service.model_card())

    return model


class Call:
    """A route that answers a JSON object with a JSON object."""

    def __init__(
        self, service: Service, function: Callable[[Service, dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> None:
        self._service = service
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, self._service.max_body_bytes)
        answer = await self._function(self._service, body)
        await json_response(200, answer)(scope, receive, send)


# -- generation -------------------------------------------------------------------------------------------------------


class Generate:
    """A route that generates, streaming or not. A client that goes away takes its requests with it."""

    def __init__(self, service: Service, make_job: JobMaker) -> None:
        self._service = service
        self._make_job = make_job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        self._service.engine.check_open()
        body = await read_json(scope, receive, self._service.max_body_bytes)
        await unless_gone(receive, self._answer(body, arrival, scope, receive, send))

    async def _answer(self, body: dict[str, Any], arrival: float, scope: Scope, receive: Receive, send: Send) -> None:
        job = await self._make_job(self._service, body, arrival)
        async with self._service.engine.generate(job.requests) as outputs:
            if job.stream:
                await self._stream(job, outputs, send)
                return
            async for output in outputs:
                job.feed(output)
        await json_response(200, job.body())(scope, receive, send)

    async def _stream(self, job: Job, outputs: Any, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        # Tells buffering proxies to pass each event on at once.
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def events(bodies: Any) -> None:
            data = b"".join(b"data: " + _json.encode(body) + b"\n\n" for body in bodies)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await events(job.first_events())
            async for output in outputs:
                await events(job.events(output))
            await events(job.last_events())
        except ApiError as error:  # too late for a status
            await events([error.body()])
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but cancel it when the client closes the connection. The body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
