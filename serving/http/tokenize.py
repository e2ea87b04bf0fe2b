"""POST /tokenize and /detokenize: what the model sees, and back."""

from __future__ import annotations

from typing import Any

from .chat import chat_prompt
from .choices import token_text
from .errors import bad
from .parsers import Field, boolean, no_op, parse_object, string, token_ids
from .service import Caller, Service, off_loop
from .tools import tools

_MOST_CHARACTERS = 1 << 20  # which take about a second
_MOST_TOKENS = 1 << 18  # as well

TOKENIZE = {
    "model": Field(string),
    "prompt": Field(string),
    "messages": Field(lambda param, value: value),
    "tools": Field(tools, []),
    "add_special_tokens": Field(boolean),
    "add_generation_prompt": Field(boolean),
    "return_token_strs": Field(boolean, False),
    "continue_final_message": Field(no_op(False, why="the chat template ends every message")),
    "chat_template": Field(no_op(why="the model's own is used")),
    "chat_template_kwargs": Field(no_op({}, why="the chat template gets messages and tools only")),
    "mm_processor_kwargs": Field(no_op({}, why="the model reads text only")),
}
_OF_MESSAGES = ("tools", "add_generation_prompt")
DETOKENIZE = {
    "model": Field(string),
    "tokens": Field(token_ids, required=True),
    "skip_special_tokens": Field(boolean, True),
}


async def tokenize(service: Service, body: dict[str, Any], _: Caller) -> dict[str, Any]:
    """`prompt` (a text) or `messages` (a conversation) -> tokens, as the generating endpoints would see them."""
    values = parse_object(None, body, TOKENIZE)
    service.check_model(values["model"])
    tokenizer = service.tokenizer
    if (values["prompt"] is None) == (values["messages"] is None):
        raise bad("prompt", "Send either 'prompt' or 'messages'.", "missing_required_parameter")
    if values["prompt"] is None:
        if values["add_special_tokens"]:
            raise bad("add_special_tokens", "'add_special_tokens' is for a 'prompt': a chat template writes its own.")
        generation = values["add_generation_prompt"] is not False
        offered = [tool.given for tool in values["tools"]]
        tokens = await chat_prompt(service, values["messages"], add_generation_prompt=generation, tools=offered)
    else:
        for name in _OF_MESSAGES:
            if values[name] not in (None, []):
                raise bad(name, f"'{name}' is for 'messages': a 'prompt' is taken as it is.")
        size = len(values["prompt"])
        if size > _MOST_CHARACTERS:
            raise bad("prompt", f"'prompt' must have at most {_MOST_CHARACTERS} characters, got {size}; send parts.")
        special = values["add_special_tokens"] is not False
        tokens = await service.encode(values["prompt"], add_bos=special and tokenizer.adds_bos)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
    if values["return_token_strs"]:
        answer["token_strs"] = [token_text(tokenizer, token) for token in tokens]
    return answer


async def detokenize(service: Service, body: dict[str, Any], _: Caller) -> dict[str, Any]:
    """`tokens` -> `prompt`, their text, without special tokens unless they are asked for."""
    values = parse_object(None, body, DETOKENIZE)
    service.check_model(values["model"])
    tokenizer, tokens = service.tokenizer, values["tokens"]
    if len(tokens) > _MOST_TOKENS:
        raise bad("tokens", f"'tokens' must have at most {_MOST_TOKENS} tokens, got {len(tokens)}; send parts.")
    vocab_size = service.engine.info.vocab_size
    for i, token in enumerate(tokens):
        if token >= vocab_size:
            raise bad(f"tokens[{i}]", f"'tokens[{i}]' must be below the vocabulary's {vocab_size}, got {token}.")
    text = await off_loop(len(tokens), lambda: tokenizer.decode(tokens, values["skip_special_tokens"]))
    return {"prompt": text}
