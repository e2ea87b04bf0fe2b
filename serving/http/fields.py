"""Every field of the OpenAI endpoints, and what this server does with each: honour it, or answer 400.

The tables are compared with the installed `openai` client's types by a test, so a field added to the API shows up as a
failing test.
"""

from __future__ import annotations

from ..request import MAX_DEADLINE_SECONDS, MAX_PRIORITY, MAX_STAGES
from .output_format import response_format, structured_outputs
from .parsers import (
    MAX_N,
    MAX_TOP_LOGPROBS,
    SEED_MAX,
    SEED_MIN,
    Field,
    boolean,
    decimal,
    expires_after,
    hint,
    inputs,
    integer,
    logit_bias,
    metadata,
    no_op,
    number,
    one_of,
    prompts,
    stop,
    stream_options,
    string,
    texts,
    token_ids,
)
from .parsers import parse_object as parse_object  # what the tables are for
from .parsers import schema_of_object as schema_of_object
from .tools import tool_choice, tools

COMMON: dict[str, Field] = {
    "model": Field(string, required=True),
    "frequency_penalty": Field(number(-2, 2), 0.0),
    "presence_penalty": Field(number(-2, 2), 0.0),
    "logit_bias": Field(logit_bias, {}),
    "n": Field(integer(1, MAX_N), 1),
    "seed": Field(integer(SEED_MIN, SEED_MAX)),
    "stop": Field(stop, []),
    "stream": Field(boolean, False),
    "stream_options": Field(stream_options),
    "temperature": Field(number(0, 2), 1.0),
    "top_p": Field(number(0, 1, exclude_low=True), 1.0),
    "user": Field(hint),
    # Extensions of the OpenAI API, named as other open servers name them.
    "top_k": Field(integer(0), 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0, 100, exclude_low=True), 1.0),
    "stop_token_ids": Field(token_ids, []),
    "ignore_eos": Field(boolean, False),
    "min_tokens": Field(integer(0), 0),
    "cache_salt": Field(string, ""),
    "priority": Field(integer(-MAX_PRIORITY, MAX_PRIORITY), 0),
    "deadline_seconds": Field(number(0, MAX_DEADLINE_SECONDS, exclude_low=True)),
    "stages_left": Field(integer(1, MAX_STAGES), 1),
    "return_token_ids": Field(boolean, False),
    "skip_special_tokens": Field(boolean, True),
    "structured_outputs": Field(structured_outputs),
}

EXTENSIONS = (
    "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "cache_salt",
    "priority", "deadline_seconds", "stages_left", "return_token_ids", "skip_special_tokens", "structured_outputs",
)  # fmt: skip

COMPLETIONS: dict[str, Field] = COMMON | {
    "prompt": Field(prompts, required=True, nullable=True),  # null begins a new document
    "best_of": Field(integer(1, MAX_N)),
    "echo": Field(boolean, False),
    "logprobs": Field(integer(0, MAX_TOP_LOGPROBS)),
    "max_tokens": Field(integer(0)),
    "suffix": Field(no_op("", why="the model does not fill in the middle")),
}

CHAT: dict[str, Field] = COMMON | {
    "messages": Field(lambda param, value: value, required=True),
    "max_tokens": Field(integer(1)),
    "max_completion_tokens": Field(integer(1)),
    "logprobs": Field(boolean, False),
    "top_logprobs": Field(integer(0, MAX_TOP_LOGPROBS)),
    "audio": Field(no_op(why="the model writes text only")),
    "function_call": Field(no_op("none", why="it is the old name; use 'tool_choice'")),
    "functions": Field(no_op([], why="it is the old name; use 'tools'")),
    "metadata": Field(no_op({}, why="nothing is stored that it could be attached to")),
    "modalities": Field(no_op(["text"], why="the model writes text only")),
    "moderation": Field(no_op(why="there is no moderation model")),
    "parallel_tool_calls": Field(boolean),
    "prediction": Field(no_op(why="predicted outputs are not implemented")),
    "prompt_cache_key": Field(hint),
    "prompt_cache_options": Field(no_op({}, why="the lifetime of cached prompts can't be promised")),
    "prompt_cache_retention": Field(no_op("in_memory", why="prompts are cached in memory only")),
    "reasoning_effort": Field(no_op("none", why="the model has no reasoning mode")),
    "response_format": Field(response_format),
    "safety_identifier": Field(hint),
    "service_tier": Field(no_op("auto", "default", why="there is one service tier")),
    "store": Field(no_op(False, why="completions are not stored")),
    "tool_choice": Field(tool_choice),
    "tools": Field(tools, []),
    "verbosity": Field(no_op("medium", why="the model has no verbosity setting")),
    "web_search_options": Field(no_op(why="there is no web search")),
}

_POOLED: dict[str, Field] = {
    "pooling": Field(one_of("last", "mean"), "last"),
    "cache_salt": Field(string, ""),
}

EMBEDDINGS: dict[str, Field] = _POOLED | {
    "model": Field(string, required=True),
    "input": Field(inputs, required=True),
    "dimensions": Field(integer(1)),
    "encoding_format": Field(one_of("float", "base64"), "float"),
    "user": Field(hint),
    "normalize": Field(boolean, True),
}

EMBEDDING_EXTENSIONS = ("pooling", "cache_salt", "normalize")

SCORE: dict[str, Field] = _POOLED | {
    "model": Field(string),
    "text_1": Field(texts, required=True),
    "text_2": Field(texts, required=True),
}

UPLOAD: dict[str, Field] = {
    "file": Field(lambda param, value: value, required=True),
    "purpose": Field(one_of("batch"), required=True),
    "expires_after": Field(expires_after),
}

LIST_FILES: dict[str, Field] = {
    "after": Field(string),
    "limit": Field(decimal(integer(1, 10_000)), 10_000),
    "order": Field(one_of("asc", "desc"), "desc"),
    "purpose": Field(string),
}

BATCH: dict[str, Field] = {
    "completion_window": Field(one_of("24h"), required=True),
    "endpoint": Field(string, required=True),
    "input_file_id": Field(string, required=True),
    "metadata": Field(metadata),
    "output_expires_after": Field(expires_after),
}

LIST_BATCHES: dict[str, Field] = {"after": Field(string), "limit": Field(decimal(integer(1, 100)), 20)}
