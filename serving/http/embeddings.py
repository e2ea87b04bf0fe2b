"""POST /v1/embeddings and /v1/score: a vector for each text, and how near the vectors of two texts are.

Both are of the model that generates: the final hidden state of the last token or their mean. A decoder that was not
trained to embed gives vectors that can be compared, but not as well as those of a model that was.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from collections.abc import Sequence
from operator import mul
from typing import Any

from ..request import Output, Request, SamplingParams
from . import fields
from .errors import ApiError, bad
from .jobs import new_id
from .service import Caller, Service, usage

_NOTHING_NEW = SamplingParams(temperature=0.0, max_tokens=1)
_RETRY_SECONDS = 0.05


async def embeddings(service: Service, body: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """`input` -> its vectors, in its order."""
    service.check_room(caller)
    values = fields.parse_object(None, body, fields.EMBEDDINGS)
    service.check_model(values["model"])
    width, dimensions = service.engine.info.hidden_size, values["dimensions"]
    if dimensions is not None and dimensions > width:
        raise bad("dimensions", f"'dimensions' must be at most the model's {width}, got {dimensions}.")
    prompts = await _prompts(service, "input", values["input"])
    outputs = await _pooled(service, prompts, values, caller)
    data = []
    for index, output in enumerate(outputs):
        vector = _vector(output, dimensions, values["normalize"])
        found = _base64(vector) if values["encoding_format"] == "base64" else vector
        data.append({"object": "embedding", "index": index, "embedding": found})
    return {"object": "list", "data": data, "model": service.model_id, "usage": _usage(outputs)}


async def score(service: Service, body: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """The cosine of the vectors of each pair of texts: `text_1` with each of `text_2`, or one by one."""
    service.check_room(caller)
    values = fields.parse_object(None, body, fields.SCORE)
    service.check_model(values["model"])
    left, right = values["text_1"], values["text_2"]
    if len(left) not in (1, len(right)):
        message = f"'text_1' must be one text or as many as 'text_2', got {len(left)} and {len(right)}."
        raise bad("text_1", message)
    prompts = await _prompts(service, "text_1", left) + await _prompts(service, "text_2", right)
    outputs = await _pooled(service, prompts, values, caller)
    vectors = [_vector(output, None, True) for output in outputs]
    firsts = vectors[: len(left)] if len(left) == len(right) else vectors[:1] * len(right)
    data = [
        {"index": index, "object": "score", "score": sum(map(mul, one, other))}
        for index, (one, other) in enumerate(zip(firsts, vectors[len(left) :], strict=True))
    ]
    return {
        "id": new_id("score"),
        "object": "list",
        "created": int(time.time()),
        "model": service.model_id,
        "data": data,
        "usage": _usage(outputs),
    }


async def _prompts(service: Service, param: str, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of texts or of token ids. What is wrong is called by its field."""
    tokenizer, found = service.tokenizer, []
    for index, item in enumerate(given):
        name = param if len(given) == 1 else f"{param}[{index}]"
        bos = tokenizer.adds_bos
        ids = await service.encode_prompt(name, item, add_bos=bos) if isinstance(item, str) else item
        if not ids:
            raise bad(name, f"'{name}' has no tokens; send some text.")
        if len(ids) >= service.context:
            message = f"This model's context holds {service.context} tokens, and '{name}' may have one less; it has "
            raise bad(name, f"{message}{len(ids)}. Shorten it.", "context_length_exceeded")
        service.check_request(Request("check", ids, _NOTHING_NEW), {"prompt": name})
        found.append(ids)
    return found


async def _pooled(service: Service, prompts: list[list[int]], values: dict[str, Any], caller: Caller) -> list[Output]:
    """One output a prompt, in their order. However many there are, few enter the queue at a time."""
    name = new_id("embd")
    places = asyncio.Semaphore(2 * service.engine.info.max_running)
    admitted = asyncio.Event()

    async def one(index: int) -> Output:
        options: dict[str, Any] = {"cache_salt": values["cache_salt"], "pooling": values["pooling"]}
        request = Request(f"{name}-{index}", prompts[index], _NOTHING_NEW, caller.arrival, **options)
        async with places:
            while True:
                try:
                    async with service.generate([request], caller) as outputs:
                        admitted.set()
                        return [output async for output in outputs][-1]
                except ApiError as error:
                    # A full queue refuses what comes new. What has begun waits for its next place.
                    if error.status != 429 or not admitted.is_set():
                        raise
                await asyncio.sleep(_RETRY_SECONDS)

    tasks = [asyncio.create_task(one(index)) for index in range(len(prompts))]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _vector(output: Output, dimensions: int | None, normalize: bool) -> list[float]:
    """The first `dimensions` numbers, of Euclidean length 1 where that is asked for."""
    numbers = array("f", output.embedding)[:dimensions].tolist()
    length = math.hypot(*numbers) if normalize else 1.0
    return [number / length for number in numbers] if length else numbers


def _base64(vector: list[float]) -> str:
    """Of 32-bit floats, the lowest byte first."""
    return base64.b64encode(array("f", vector).tobytes()).decode()


def _usage(outputs: Sequence[Output]) -> dict[str, Any]:
    tokens = [output.prompt_tokens for output in outputs]
    return usage(tokens, [], sum(output.cached_tokens for output in outputs))
