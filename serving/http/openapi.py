"""GET /openapi.json: the API as OpenAPI 3.1, made of the routes, of the fields that they check, and of OPERATIONS.

https://spec.openapis.org/oas/v3.1.1. A route that is not in OPERATIONS keeps the server from starting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.routing import Route

from . import answers, fields
from .batch_work import ENDPOINTS
from .fields import Field, schema_of_object
from .messages import ROLES
from .response_input import RESPONSES
from .schemas import STRING, Schema, any_of, array, record, schema_of
from .tokenize import DETOKENIZE, TOKENIZE

_JSON, _FORM = "application/json", "multipart/form-data"
# What can be wrong with any request, with one that has a body, and with one that the engine works on.
_ANY, _BODY, _ENGINE = (401, 500), (400, 408, 413, 415), (404, 429, 503)

_EVENTS: Schema = {"description": "With 'stream': one `data: {...}` for each part of the answer, then `data: [DONE]`."}
_MESSAGES = array(
    record(role={"enum": list(ROLES)}, content=any_of(STRING, array({"type": "object"}, 1), {"type": "null"}))
    | {"required": ["role"]},
    1,
)


@dataclass(frozen=True)
class Operation:
    """What a method of a route does. `answers`: the schema of each media type that it may answer with."""

    summary: str
    answers: dict[str, Schema]
    statuses: tuple[int, ...] = ()
    body: dict[str, Field] | None = None
    form: dict[str, Field] | None = None
    query: dict[str, Field] | None = None
    example: dict[str, Any] | None = None
    also: tuple[int, ...] = ()  # statuses of success other than 200, with the same answer
    links: dict[str, Any] | None = None  # what may follow a success


def _json(schema: Schema) -> dict[str, Schema]:
    return {_JSON: schema}


def _generates(summary: str, body: dict[str, Field], answer: Schema, example: dict[str, Any]) -> Operation:
    media = {_JSON: answer, "text/event-stream": _EVENTS}
    return Operation(summary, media, (*_BODY, *_ENGINE), body, example=example)


def _computes(summary: str, body: dict[str, Field], answer: Schema, example: dict[str, Any]) -> Operation:
    return Operation(summary, _json(answer), (*_BODY, *_ENGINE), body, example=example)


# A file may become a batch: without it no tool would find a body that begins one.
_BATCH = {
    "batch": {"operationRef": "#/paths/~1v1~1batches/post", "requestBody": {"input_file_id": "$response.body#/id"}}
}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/"): Operation("The page for people.", {"text/html": STRING}),
    ("GET", "/page/page.css"): Operation("How the page looks.", {"text/css": STRING}),
    ("GET", "/page/page.js"): Operation("What the page does.", {"text/javascript": STRING}),
    ("GET", "/health"): Operation("Whether the server takes requests.", _json(answers.HEALTH), (503,)),
    ("GET", "/live"): Operation("What the server does at this moment.", _json(answers.LIVE)),
    ("GET", "/metrics"): Operation("Counts and times, for Prometheus.", {"text/plain": STRING}),
    ("GET", "/v1/models"): Operation("The model.", _json(answers.listed(answers.MODEL))),
    ("GET", "/v1/models/{model}"): Operation("The model, by its name.", _json(answers.MODEL), (404,)),
    ("POST", "/v1/completions"): _generates(
        "Continue prompts.", fields.COMPLETIONS, answers.COMPLETION, {"prompt": "Once upon a time", "max_tokens": 4}
    ),
    ("POST", "/v1/chat/completions"): _generates(
        "Answer a conversation.",
        fields.CHAT,
        answers.CHAT,
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    ),
    ("POST", "/v1/responses"): _generates(
        "Answer a conversation, in items.", RESPONSES, answers.RESPONSE, {"input": "Hello", "max_output_tokens": 4}
    ),
    ("POST", "/v1/embeddings"): _computes(
        "Vectors of texts.", fields.EMBEDDINGS, answers.EMBEDDINGS, {"input": ["one", "two"]}
    ),
    ("POST", "/v1/score"): _computes(
        "How near texts are.", fields.SCORE, answers.SCORE, {"text_1": "one", "text_2": ["two", "three"]}
    ),
    ("POST", "/tokenize"): _computes("Tokens of a text.", TOKENIZE, answers.TOKENIZE, {"prompt": "Hello"}),
    ("POST", "/detokenize"): _computes("Text of tokens.", DETOKENIZE, answers.DETOKENIZE, {"tokens": [1, 2]}),
    ("POST", "/v1/files"): Operation(
        "Upload a file.", _json(answers.FILE), (404, *_BODY), form=fields.UPLOAD, links=_BATCH
    ),
    ("GET", "/v1/files"): Operation(
        "The files.", _json(answers.page(answers.FILE)), (400, 404), query=fields.LIST_FILES
    ),
    ("GET", "/v1/files/{file}"): Operation("A file.", _json(answers.FILE), (404,)),
    ("DELETE", "/v1/files/{file}"): Operation("Delete a file.", _json(answers.DELETED), (400, 404)),
    ("GET", "/v1/files/{file}/content"): Operation(
        "What is in a file.", {"application/octet-stream": {}}, (404,), also=(206,)
    ),
    ("POST", "/v1/batches"): Operation(
        "Begin a batch.",
        _json(answers.BATCH),
        (*_BODY, 404),
        fields.BATCH,
        example={"input_file_id": "file-0", "endpoint": ENDPOINTS[0], "completion_window": "24h"},
    ),
    ("GET", "/v1/batches"): Operation(
        "The batches.", _json(answers.page(answers.BATCH)), (400, 404), query=fields.LIST_BATCHES
    ),
    ("GET", "/v1/batches/{batch}"): Operation("A batch.", _json(answers.BATCH), (404,)),
    ("POST", "/v1/batches/{batch}/cancel"): Operation("Cancel a batch.", _json(answers.BATCH), (400, 404)),
}


def document(routes: Iterable[Route], model_id: str, version: str, open_paths: Iterable[str] | None) -> dict[str, Any]:
    """The document. `open_paths`: what needs no API key; None: there are no keys."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r":\w+}", "}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            locked = open_paths is not None and path not in open_paths
            described = _operation(OPERATIONS[method, path], path, model_id, locked)
            paths.setdefault(path, {})[method.lower()] = described
    components: dict[str, Any] = {"schemas": {"Error": answers.ERROR}}
    if open_paths is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Twinax", "version": version},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, path: str, model_id: str, locked: bool) -> dict[str, Any]:
    content = {media: {"schema": schema} for media, schema in operation.answers.items()}
    responses = {
        str(status): {"description": HTTPStatus(status).phrase, "content": content} for status in (200, *operation.also)
    }
    failed = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in sorted({*operation.statuses, *(_ANY if locked else (500,))}):
        health = path == "/health" and status == 503
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": content if health else failed}
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    parameters = [_parameter("path", name, True, STRING) for name in re.findall(r"{(\w+)}", path)]
    for name, field in (operation.query or {}).items():
        parameters.append(_parameter("query", name, field.required, schema_of(field.parse)))
    if operation.links is not None:
        responses["200"]["links"] = operation.links
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        media: dict[str, Any] = {"schema": _body(operation.body, model_id)}
        if operation.example is not None:
            named = {"model": model_id} if "model" in operation.body else {}
            media["example"] = named | operation.example
        found["requestBody"] = {"required": True, "content": {_JSON: media}}
    if operation.form is not None:
        found["requestBody"] = {"required": True, "content": {_FORM: {"schema": _form(operation.form)}}}
    if locked:
        found["security"] = [{"key": []}]
    return found


def _parameter(place: str, name: str, required: bool, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": schema}


def _body(table: dict[str, Field], model_id: str) -> Schema:
    schema = schema_of_object(table)
    known = {"model": {"enum": [model_id]}, "messages": _MESSAGES, "endpoint": {"enum": list(ENDPOINTS)}}
    properties = {name: known.get(name, property) for name, property in schema["properties"].items()}
    for name, field in table.items():
        if name in known and not field.required:
            properties[name] = any_of(properties[name], {"type": "null"})
        if field.default is not None and field.default != {}:
            properties[name] = {**properties[name], "default": field.default}
    return schema | {"properties": properties}


def _form(table: dict[str, Field]) -> Schema:
    """In a form all but files is text, and the fields of an object are `name[key]`."""
    properties: dict[str, Schema] = {"file": {"type": "string", "format": "binary"}}
    for name, field in table.items():
        schema = schema_of(field.parse)
        if name != "file":
            inner = schema.get("properties", {})
            # A list of nothing is sent as nothing: no type can be demanded of what may be left out.
            properties |= {f"{name}[{key}]": {} for key in inner} if inner else {name: schema}
    required = [name for name, field in table.items() if field.required]
    return {"type": "object", "properties": properties, "required": required}
