"""What an administrator may do to a running server, on a Unix socket of its own: the public port has none of this.

GET /status; POST /pause, /resume, /drain, /reload, /profile. Arguments are in the query, answers are JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from .app import Gate, json_response
from .engine_client import EngineClient
from .errors import bad, show
from .keys import ApiKeys

_LONGEST_PROFILE = 600.0
_STALL_SECONDS = 60.0


def create_admin(engine: EngineClient, drain: Callable[[], None]) -> ASGIApp:
    """The application. `drain` makes the server take nothing new and end, with status 0, when all is done."""

    async def status(_: dict[str, str]) -> dict[str, Any]:
        return describe_engine(engine)

    async def pause(given: dict[str, str]) -> dict[str, Any]:
        engine.pause(_boolean("hold", given.get("hold", "false")))
        return describe_engine(engine)

    async def resume(_: dict[str, str]) -> dict[str, Any]:
        engine.resume()
        return describe_engine(engine)

    async def start_drain(_: dict[str, str]) -> dict[str, Any]:
        drain()
        return {"status": "stopping", "in_flight": engine.in_flight}

    async def reload(given: dict[str, str]) -> dict[str, Any]:
        path = _path("path", given)
        return {"status": "ok", "message": await engine.reload(path)}

    async def profile(given: dict[str, str]) -> dict[str, Any]:
        folder, seconds = _path("folder", given), _seconds(given.get("seconds", "5"))
        return {"status": "ok", "message": await engine.profile(folder, seconds)}

    routes = [
        Route("/status", _call(status), methods=["GET"]),
        Route("/pause", _call(pause, "hold"), methods=["POST"]),
        Route("/resume", _call(resume), methods=["POST"]),
        Route("/drain", _call(start_drain), methods=["POST"]),
        Route("/reload", _call(reload, "path"), methods=["POST"]),
        Route("/profile", _call(profile, "folder", "seconds"), methods=["POST"]),
    ]
    return Gate(Router(routes, redirect_slashes=False), ApiKeys({}), _STALL_SECONDS)


def describe_engine(engine: EngineClient) -> dict[str, Any]:
    """What /status answers."""
    state, stage = engine.state
    return {
        "status": state,
        "stage": stage,
        "held": engine.held,
        "model": engine.settings.model,
        "engine_pid": engine.pid,
        "in_flight": engine.in_flight,
        "restarts": engine.metrics.restarts,
        "replays": engine.metrics.replays,
        "last_death": engine.last_death,
        "stats": msgspec.to_builtins(engine.metrics.stats),
    }


def _call(
    function: Callable[[dict[str, str]], Awaitable[dict[str, Any]]], *names: str
) -> Callable[[Request], Awaitable[Response]]:
    """A route whose query holds nothing but these names, each once."""

    async def endpoint(request: Request) -> Response:
        given: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name not in names:
                takes = f"takes {' and '.join(names)}" if names else "takes no arguments"
                raise bad(name, f"{request.url.path} {takes} in its query, got {show(name)}.")
            if name in given:
                raise bad(name, f"{show(name)} is given twice.")
            given[name] = value
        return json_response(200, await function(given))

    return endpoint


def _boolean(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise bad(name, f"'{name}' must be true or false, got {show(value)}.")
    return value == "true"


def _path(name: str, given: dict[str, str]) -> str:
    """Absolute: the client's working folder is not the server's."""
    value = given.get(name, "")
    if not Path(value).is_absolute():
        raise bad(name, f"'{name}' must be an absolute path, got {show(value)}.")
    return value


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_PROFILE:
        raise bad("seconds", f"'seconds' must be above 0 and at most {_LONGEST_PROFILE:g}, got {show(value)}.")
    return seconds
