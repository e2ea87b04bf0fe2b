"""The ASGI application: routes, the API key, errors as JSON, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import secrets
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics, openapi, page, tokenize
from .body import ClientGone, InTime, read_json
from .chat import chat_job
from .completions import completion_job
from .embeddings import embeddings, score
from .errors import ApiError
from .file_routes import FileRoutes, Kept
from .jobs import Job, JobMaker, run_job
from .keys import ApiKeys
from .live import Live, status
from .responses import response_job
from .service import Answer, Caller, Service

_json = msgspec.json.Encoder()
# What needs no API key: whether the server lives, what can be asked of it, and the page, which asks for a key itself.
OPEN = frozenset({"/health", "/openapi.json", *page.FILES})


def create_app(service: Service, keys: ApiKeys, stall_seconds: float, kept: Kept | None) -> ASGIApp:
    """The application; every route but those of `OPEN` demands one of the `keys`, if there are any.

    A client that sends nothing of its body, or takes nothing of its answer, for `stall_seconds` is cut off.
    """
    routes = [
        *page.routes(),
        Route("/live", _live(service), methods=["GET"]),
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{model:path}", _model(service), methods=["GET"]),
        Route("/v1/completions", Generate(service, completion_job), methods=["POST"]),
        Route("/v1/chat/completions", Generate(service, chat_job), methods=["POST"]),
        Route("/v1/responses", Generate(service, response_job), methods=["POST"]),
        Route("/v1/embeddings", Call(service, embeddings, queues=True), methods=["POST"]),
        Route("/v1/score", Call(service, score, queues=True), methods=["POST"]),
        *FileRoutes(service, kept).routes(),
        Route("/tokenize", Call(service, tokenize.tokenize), methods=["POST"]),
        Route("/detokenize", Call(service, tokenize.detokenize), methods=["POST"]),
    ]
    described = openapi.document(routes, service.model_id, version("twinax"), OPEN if keys else None)
    routes.append(Route("/openapi.json", _constant(described), methods=["GET"]))
    # A bare router: Starlette's own layers would answer errors in their way before they reach the gate.
    return Gate(Router(routes, redirect_slashes=False), keys, stall_seconds)


def json_response(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(_json.encode(body), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.status, error.body(), error.headers())


class Gate:
    """The outermost layer: request ids, the API key, clients that stall, and the last resort for errors."""

    def __init__(self, app: Router, keys: ApiKeys, stall_seconds: float) -> None:
        self._app = app
        self._keys = keys
        self._stall_seconds = stall_seconds

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
            try:
                async with asyncio.timeout(self._stall_seconds):
                    await send(message)
            except TimeoutError:
                raise ClientGone from None  # it is there, and reads nothing

        in_time = InTime(receive, self._stall_seconds)
        try:
            tenant = self._tenant(scope)
            # With an "app" in the scope the router raises what it can't route, instead of answering in plain text.
            await self._app({**scope, "app": self, "tenant": tenant}, in_time, send_with_id)
        except ClientGone:
            return
        except ApiError as error:
            if not started:
                await error_response(error)(scope, receive, send_with_id)
        except HTTPException as error:
            await _http_error(scope, error, self._methods(scope))(scope, receive, send_with_id)
        except Exception:
            print(
                f"error in {scope['method']} {scope['path']!r}:\n{traceback.format_exc()}", file=sys.stderr, flush=True
            )
            if started:
                raise  # the server closes the connection: a cut answer must not look complete
            await error_response(ApiError(500, "The server failed on this request; its log says how."))(
                scope, receive, send_with_id
            )

    def _methods(self, scope: Scope) -> set[str]:
        """What the path takes: several routes may have it."""
        found: set[str] = set()
        for route in self._app.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                found |= route.methods or set()
        return found

    def _tenant(self, scope: Scope) -> str:
        if scope["path"] in OPEN:
            return ""
        return self._keys.tenant(next((value for name, value in scope["headers"] if name == b"authorization"), b""))


def _http_error(scope: Scope, error: HTTPException, methods: Iterable[str]) -> Response:
    method, path = scope["method"], scope["path"]
    if error.status_code == 404:
        return error_response(ApiError(404, f"There is no route {method} {path}.", code="not_found"))
    if error.status_code == 405:
        allowed = ", ".join(sorted(methods))
        found = ApiError(405, f"{path} takes {allowed}, not {method}.", code="method_not_allowed")
        return json_response(405, found.body(), {"allow": allowed})
    return error_response(ApiError(error.status_code, str(error.detail)))


# -- plain routes -----------------------------------------------------------------------------------------------------


def _health(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def health(_: Request) -> Response:
        state, stage = status(service)
        body = {"status": state} | ({"stage": stage} if stage else {})
        return json_response(200 if state == "ok" else 503, body)

    return health


def _constant(body: Any) -> Callable[[Request], Awaitable[Response]]:
    async def show(_: Request) -> Response:
        return json_response(200, body)

    return show


def _live(service: Service) -> Callable[[Request], Awaitable[Response]]:
    live = Live(service)

    async def show_live(request: Request) -> Response:
        return json_response(200, live.snapshot(request.scope["tenant"]), {"cache-control": "no-store"})

    return show_live


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
    """A route that answers a JSON object with a JSON object, unless the client goes away meanwhile. `queues`: it asks
    the engine, whose queue may be full."""

    def __init__(self, service: Service, function: Answer, queues: bool = False) -> None:
        self._service = service
        self._function = function
        self._queues = queues

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(scope["tenant"])
        if self._queues:
            self._service.check_room(caller)  # before a body is read for nothing
        body = await read_json(scope, receive, self._service.max_body_bytes)
        await unless_gone(receive, self._answer(body, caller, scope, receive, send))

    async def _answer(self, body: dict[str, Any], caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._function(self._service, body, caller)
        await json_response(200, answer)(scope, receive, send)


# -- generation -------------------------------------------------------------------------------------------------------


class Generate:
    """A route that generates, streaming or not. A client that goes away takes its requests with it."""

    def __init__(self, service: Service, make_job: JobMaker) -> None:
        self._service = service
        self._make_job = make_job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(scope["tenant"])
        engine = self._service.engine
        engine.check_room()  # before a body is read for nothing
        body = await read_json(scope, receive, self._service.max_body_bytes)
        engine.check_room()  # and before it is tokenized
        await unless_gone(receive, self._answer(body, caller, scope, receive, send))

    async def _answer(self, body: dict[str, Any], caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        job = await self._make_job(self._service, body, caller.arrival)
        if job.stream:
            async with self._service.generate(job.requests, caller) as outputs:
                await self._stream(job, outputs, send)
        else:
            await json_response(200, await run_job(self._service, job, caller))(scope, receive, send)

    async def _stream(self, job: Job, outputs: Any, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        # Tells buffering proxies to pass each event on at once.
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def events(bodies: Any) -> None:
            data = b""
            for body in bodies:
                name = f"event: {body['type']}\n".encode() if job.named_events else b""
                data += name + b"data: " + _json.encode(body) + b"\n\n"
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await events(job.first_events())
            async for output in outputs:
                await events(job.events(output))
            await events(job.last_events())
        except ApiError as error:  # too late for a status
            await events(job.failed(error))
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.body", "body": b"" if job.named_events else b"data: [DONE]\n\n"})


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
