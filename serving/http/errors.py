"""Errors as the OpenAI API words them: a status, and a JSON body `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ApiError(Exception):
    """An answer other than success.

    `param` names the request field at fault (a path such as `messages[1].content`), `code` is the machine-readable
    reason, `retry_after` (seconds) becomes the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _printable(message, 1000)
        self.param = None if param is None else _printable(param, 200)
        self.code = code
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400 for the field `param`."""
    return ApiError(400, message, param=param, code=code)


def queue_full(retry_after: int, message: str) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="queue_full", retry_after=retry_after)


def engine_down(message: str) -> ApiError:
    return ApiError(500, message, code="engine_error")


def grammar_failed(message: str) -> ApiError:
    """A grammar that could be compiled, and then could not be followed."""
    return ApiError(400, message, code="grammar_failed")


def engine_restarted(message: str) -> ApiError:
    """The engine died, and what it did of this request is lost."""
    return ApiError(503, message, code="engine_restarted")


def unavailable(message: str, code: str, retry_after: int | None = None) -> ApiError:
    return ApiError(503, message, code=code, retry_after=retry_after)


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean "x"?`, or nothing when no choice is close."""
    found = difflib.get_close_matches(name[:64], list(choices), n=1, cutoff=0.6)
    return f' Did you mean "{found[0]}"?' if found else ""


def _printable(text: str, limit: int) -> str:
    """Text that can be sent: names of fields, which messages repeat, may be long or hold lone surrogates."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def show(value: Any, limit: int = 80) -> str:
    """A value as it is quoted in a message: short, and safe to print."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
