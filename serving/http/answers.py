"""What the routes answer, as JSON Schema. They are closed: a field that is not here is a mistake."""

from __future__ import annotations

from typing import Any

from .batch_work import ENDPOINTS
from .schemas import BOOLEAN, STRING, Schema, any_of, array, nullable, record

COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
NULL: Schema = {"type": "null"}
_MAYBE_COUNT, _MAYBE_STRING = nullable(COUNT), nullable(STRING)


def _one(value: Any) -> Schema:
    return {"const": value}


def _closed(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return record(closed=True, optional=optional, **properties)


def _each(names: tuple[str, ...], schema: Schema) -> dict[str, Any]:
    return dict.fromkeys(names, schema)


def listed(item: Schema) -> Schema:
    return _closed(object=_one("list"), data=array(item))


def page(item: Schema) -> Schema:
    """A part of a long list."""
    ends: dict[str, Any] = {"first_id": _MAYBE_STRING, "last_id": _MAYBE_STRING, "has_more": BOOLEAN}
    return _closed(object=_one("list"), data=array(item), **ends)


ERROR = _closed(error=_closed(message=STRING, type=STRING, param=_MAYBE_STRING, code=_MAYBE_STRING))
HEALTH = _closed(("stage",), status=STRING, stage=STRING)

_PERCENTILES = nullable(_closed(p50=NUMBER, p95=NUMBER))
_LIMITS = ("vocab_size", "max_model_len", "max_running", "max_waiting", "cache_tokens")
_COUNTS = (
    "running", "waiting", "pages_used", "pages_total", "prompt_tokens", "cached_tokens", "generated_tokens",
    "preemptions", "host_pages_used", "host_pages_total", "requests_left_out",
)  # fmt: skip
LIVE = _closed(
    state=STRING,
    stage=_MAYBE_STRING,
    started=COUNT,
    time=NUMBER,
    model=nullable(_closed(id=STRING, family=STRING, chat=BOOLEAN, **_each(_LIMITS, COUNT))),
    first_token_seconds=_PERCENTILES,
    between_tokens_seconds=_PERCENTILES,
    requests=array(_closed(seconds=NUMBER, prompt_tokens=COUNT, cached_tokens=COUNT, generated_tokens=COUNT)),
    **_each(_COUNTS, COUNT),
)

MODEL = _closed(
    ("max_model_len",), id=STRING, object=_one("model"), created=COUNT, owned_by=STRING, max_model_len=COUNT
)

_USAGE = _closed(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=_closed(cached_tokens=COUNT),
)
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}


def _generated(kind: str, choice: Schema, **more: Schema) -> Schema:
    common: dict[str, Any] = {
        "id": STRING,
        "object": _one(kind),
        "created": COUNT,
        "model": STRING,
        "system_fingerprint": STRING,
    }
    return _closed(tuple(more), **common, choices=array(choice, 1), usage=_USAGE, **more)


_TOP = nullable(array(nullable({"type": "object", "additionalProperties": NUMBER})))
COMPLETION = _generated(
    "text_completion",
    _closed(
        ("prompt_token_ids", "token_ids"),
        prompt_token_ids=array(COUNT),
        token_ids=array(COUNT),
        index=COUNT,
        text=STRING,
        logprobs=nullable(
            _closed(
                tokens=array(STRING),
                token_logprobs=array(nullable(NUMBER)),
                top_logprobs=_TOP,
                text_offset=array(COUNT),
            )
        ),
        finish_reason=_FINISH,
    ),
)

_BYTE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
_TOKEN: dict[str, Any] = {"token": STRING, "logprob": NUMBER, "bytes": array(_BYTE)}
CHAT = _generated(
    "chat.completion",
    _closed(
        ("token_ids",),
        token_ids=array(COUNT),
        index=COUNT,
        message=record(role=_one("assistant"), content=_MAYBE_STRING, refusal=NULL),
        logprobs=nullable(
            _closed(content=array(_closed(**_TOKEN, top_logprobs=array(_closed(**_TOKEN)))), refusal=NULL)
        ),
        finish_reason=_FINISH,
    ),
    service_tier=STRING,
    prompt_token_ids=array(COUNT),
)

_ITEM = any_of(
    _closed(
        type=_one("message"),
        id=STRING,
        role=_one("assistant"),
        status=STRING,
        content=array(
            _closed(
                type=_one("output_text"),
                text=STRING,
                annotations=array({}),
                logprobs=array(_closed(**_TOKEN, top_logprobs=array(_closed(**_TOKEN)))),
            )
        ),
    ),
    _closed(**_each(("id", "call_id", "name", "arguments", "status"), STRING), type=_one("function_call")),
)
RESPONSE = record(
    id=STRING,
    object=_one("response"),
    created_at=COUNT,
    completed_at=_MAYBE_COUNT,
    status={"enum": ["completed", "incomplete"]},
    error=NULL,
    incomplete_details=nullable(_closed(reason=_one("max_output_tokens"))),
    model=STRING,
    output=array(_ITEM, 1),
    usage=_closed(
        **_each(("input_tokens", "output_tokens", "total_tokens"), COUNT),
        input_tokens_details=_closed(cached_tokens=COUNT),
        output_tokens_details=_closed(reasoning_tokens=COUNT),
    ),
    store=_one(False),
)

EMBEDDINGS = _closed(
    object=_one("list"),
    data=array(_closed(object=_one("embedding"), index=COUNT, embedding=any_of(array(NUMBER, 1), STRING)), 1),
    model=STRING,
    usage=_USAGE,
)
SCORE = _closed(
    id=STRING,
    object=_one("list"),
    created=COUNT,
    model=STRING,
    data=array(_closed(index=COUNT, object=_one("score"), score=NUMBER), 1),
    usage=_USAGE,
)
TOKENIZE = _closed(("token_strs",), count=COUNT, max_model_len=COUNT, tokens=array(COUNT), token_strs=array(STRING))
DETOKENIZE = _closed(prompt=STRING)

FILE = _closed(
    ("expires_at",),
    id=STRING,
    object=_one("file"),
    bytes=COUNT,
    created_at=COUNT,
    filename=STRING,
    purpose=STRING,
    status=STRING,
    expires_at=COUNT,
)
DELETED = _closed(id=STRING, object=_one("file"), deleted=_one(True))
_TIMES = tuple(
    f"{name}_at" for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
)
BATCH = record(
    id=STRING,
    object=_one("batch"),
    endpoint={"enum": list(ENDPOINTS)},
    input_file_id=STRING,
    completion_window=STRING,
    status=STRING,
    created_at=COUNT,
    expires_at=COUNT,
    output_file_id=_MAYBE_STRING,
    error_file_id=_MAYBE_STRING,
    metadata=nullable({"type": "object", "additionalProperties": STRING}),
    model=STRING,
    errors=nullable(listed({"type": "object"})),
    **_each(_TIMES, _MAYBE_COUNT),
)
