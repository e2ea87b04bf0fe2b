"""The lines of a batch: what a file of requests must look like, and how their answers are written down."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from . import fields
from .body import parse_json
from .errors import ApiError, show
from .fields import Field, one_of, string
from .records import new_name

MOST_LINES = 50_000
MOST_ERRORS = 100
_MOST_ID = 512

_encoder = msgspec.json.Encoder()


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of the input, counted from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a line is in its file, in bytes, and how its client calls it."""

    custom_id: str
    offset: int
    length: int


def read_lines(path: Path, endpoint: str, most_line_bytes: int) -> tuple[list[Place], list[LineError]]:
    """All lines with a request, and what is wrong with those that have none (the first `MOST_ERRORS`)."""
    places: list[Place] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(iter(lambda: file.readline(most_line_bytes + 1), b""), 1):
            if len(line) > most_line_bytes:
                message = f"A line has at most {most_line_bytes} bytes (max_body_bytes); split the request."
                errors.append(LineError("line_too_long", message, number))
                break  # what comes next is the rest of this one
            if line.strip():
                try:
                    custom_id = _line(line, endpoint)["custom_id"]
                    if custom_id in seen:
                        raise ApiError(400, "'custom_id' must differ from line to line.", param="custom_id")
                    seen.add(custom_id)
                    places.append(Place(custom_id, offset, len(line)))
                except ApiError as error:
                    errors.append(LineError(error.code or "invalid_value", error.message, number, error.param))
            offset += len(line)
            if len(places) > MOST_LINES:
                errors.append(LineError("too_many_lines", f"A batch has at most {MOST_LINES} requests."))
            if len(errors) >= MOST_ERRORS or len(places) > MOST_LINES:
                break
    if not places and not errors:
        errors.append(LineError("empty_file", "The input file has no requests."))
    return places, errors


def read_body(path: Path, place: Place) -> dict[str, Any]:
    """The body of a request that `read_lines` has found."""
    with path.open("rb") as file:
        file.seek(place.offset)
        return json.loads(file.read(place.length))["body"]


def _custom_id(param: str, value: Any) -> str:
    text = string(param, value)
    if not 0 < len(text) <= _MOST_ID:
        raise ApiError(400, f"'{param}' must have from 1 to {_MOST_ID} characters, got {len(text)}.", param=param)
    return text


def _object(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(400, f"'{param}' must be a JSON object, got {show(value)}.", param=param)
    return value


def _line(line: bytes, endpoint: str) -> dict[str, Any]:
    table = {
        "custom_id": Field(_custom_id, required=True),
        "method": Field(one_of("POST"), required=True),
        "url": Field(one_of(endpoint), required=True),
        "body": Field(_object, required=True),
    }
    return fields.parse_object(None, parse_json(line), table)


# -- answers ----------------------------------------------------------------------------------------------------------


def answer_line(custom_id: str, status: int, body: dict[str, Any]) -> bytes:
    """What came back for a request, as a line of the output file, or of the error file when that is an error."""
    response = {"status_code": status, "request_id": new_name("req_"), "body": body}
    return _written(custom_id, response, None)


def unanswered_line(custom_id: str, code: str, message: str) -> bytes:
    """For a request that was never run."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    line = {"id": new_name("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
    return _encoder.encode(line) + b"\n"


class _Response(msgspec.Struct):
    status_code: int
    body: dict[str, Any]


class Answer(msgspec.Struct):
    """A line that was written."""

    id: str
    custom_id: str
    response: _Response | None

    @property
    def is_error(self) -> bool:
        return self.response is None or self.response.status_code != 200


class NotAnAnswer(ValueError):
    """A line is none of these: `line`, counted from 1, at `offset` bytes. Nothing was changed."""

    def __init__(self, line: int, offset: int) -> None:
        super().__init__(f"line {line} is no answer to a request")
        self.line, self.offset = line, offset


_decoder = msgspec.json.Decoder(Answer)
_BEGIN = b'{"id":"batch_req_'


def written_answers(path: Path) -> Iterator[Answer]:
    """The lines that were written before this process began. One that a crash has torn is cut off, and run again.

    Raises NotAnAnswer for what was never written here, before it changes the file.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        end = 0
        for number, line in enumerate(file, 1):
            if line.startswith(_BEGIN) and line.endswith(b"\n"):
                try:
                    yield _decoder.decode(line)
                except (msgspec.DecodeError, RecursionError):
                    raise NotAnAnswer(number, end) from None
            elif not (_BEGIN.startswith(line) or line.startswith(_BEGIN)):
                raise NotAnAnswer(number, end)
            else:
                break
            end += len(line)
        file.truncate(end)
