"""POST /tokenize and /detokenize: what the model sees, and back."""

from __future__ import annotations

from typing import Any

from . import fields
from .chat import chat_prompt
from .choices import token_text
from .errors import bad
from .fields import Field, boolean, string, token_ids
from .service import Service, off_loop

_TOKENIZE = {
    "model": Field(string),
    "prompt": Field(string),
    "messages": Field(lambda param, value: value),
    "add_special_tokens": Field(boolean, True),
    "add_generation_prompt": Field(boolean, True),
    "return_token_strs": Field(boolean, False),
}
_DETOKENIZE = {"model": Field(string), "tokens": Field(token_ids, required=True)}


async def tokenize(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`prompt` (a text) or `messages` (a conversation) -> tokens, as the generating endpoints would see them."""
    values = fields.parse_object(None, body, _TOKENIZE)
    service.check_model(values["model"])
    tokenizer = service.tokenizer
    if (values["prompt"] is None) == (values["messages"] is None):
        raise bad("prompt", "Send either 'prompt' or 'messages'.", "missing_required_parameter")
    if values["prompt"] is None:
        generation = values["add_generation_prompt"]
        tokens = await chat_prompt(service, values["messages"], add_generation_prompt=generation)
    else:
        tokens = await service.encode(values["prompt"], add_bos=values["add_special_tokens"] and tokenizer.adds_bos)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
    if values["return_token_strs"]:
        answer["token_strs"] = [token_text(tokenizer, token) for token in tokens]
    return answer


async def detokenize(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`tokens` -> `prompt`, their text (special tokens left out)."""
    values = fields.parse_object(None, body, _DETOKENIZE)
    service.check_model(values["model"])
    tokenizer, tokens = service.tokenizer, values["tokens"]
    vocab_size = service.engine.info.vocab_size
    for i, token in enumerate(tokens):
        if token >= vocab_size:
            raise bad(f"tokens[{i}]", f"'tokens[{i}]' must be below the vocabulary's {vocab_size}, got {token}.")
    return {"prompt": await off_loop(len(tokens), lambda: tokenizer.decode(tokens))}
