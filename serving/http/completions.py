"""POST /v1/completions: from checked fields to engine requests, and from outputs to answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..request import Output, Request
from . import fields
from .choices import Choice, TokenEntry, completion_logprobs, prompt_entries
from .errors import bad
from .jobs import Job, check_count, new_id
from .service import Service, include_usage, off_loop, sampling_params, scheduling, usage

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class _Prompt:
    """`text`: as it is echoed, in which special tokens are not where `skip_special`, nor the first `untold` tokens."""

    ids: list[int]
    text: str
    skip_special: bool = True
    untold: int = 0


class CompletionJob(Job):
    """Choices are numbered prompt by prompt: choice j of prompt i is `i * n + j`."""

    def __init__(self, service: Service, values: dict[str, Any], prompts: list[_Prompt], arrival: float) -> None:
        self.id = new_id("cmpl")
        self.stream = values["stream"]
        self._include_usage = include_usage(values)
        self._cache_salt = values["cache_salt"]
        self._service = service
        self._prompts = prompts
        self._n = values["n"]
        self._best_of = _best_of(values)
        self._echo = values["echo"]
        self._logprobs: int | None = values["logprobs"]
        self._return_ids = values["return_token_ids"]
        self._created = int(time.time())
        check_count(service, len(prompts) * self._best_of, "prompt" if len(prompts) > 1 else "n")
        self.requests = [
            self._request(values, i, j, arrival) for i in range(len(prompts)) for j in range(self._best_of)
        ]
        options = {"want_ids": self._return_ids, "skip_special": values["skip_special_tokens"]}
        options["drop_output"] = values["max_tokens"] == 0
        self._choices = {
            request.id: Choice(index, service.tokenizer, self._logprobs is not None, **options)
            for index, request in enumerate(self.requests)
        }

    def _request(self, values: dict[str, Any], i: int, j: int, arrival: float) -> Request:
        prompt = self._prompts[i]
        field = "prompt" if len(self._prompts) == 1 else f"prompt[{i}]"
        if not prompt.ids:
            raise bad(field, f"'{field}' has no tokens; send some text, or null to begin a new document.")
        asked = values["max_tokens"]
        if asked == 0 and not self._echo:
            message = "'max_tokens' must be at least 1, got 0 (0 only makes sense with 'echo', to score the prompt)."
            raise bad("max_tokens", message)
        asked = 1 if asked == 0 else asked
        max_tokens = self._service.new_tokens(len(prompt.ids), asked, DEFAULT_MAX_TOKENS, (field, "max_tokens"))
        logprobs = self._logprobs
        params = sampling_params(
            values,
            max_tokens=max_tokens,
            seed_offset=j,
            logprobs=0 if logprobs is None and self._best_of > self._n else logprobs,
            prompt_logprobs=logprobs if self._echo else None,
            grammar=values["structured_outputs"],
        )
        request = Request(
            f"{self.id}-{i * self._best_of + j}", prompt.ids, params, arrival, self._cache_salt, **scheduling(values)
        )
        self._service.check_request(request, {"prompt": field})
        return request

    # -- answers --------------------------------------------------------------------------------------------------

    def events(self, output: Output) -> Iterator[dict[str, Any]]:
        choice = self._choices[output.request_id]
        prompt = self._prompt_of(choice) if self._return_ids and not choice.prompt_tokens else None
        text, entries = self._begin(choice, output)
        delta = choice.feed(output)
        text, entries = text + delta.text, entries + delta.entries
        if text or entries or delta.token_ids or prompt or delta.finish_reason is not None:
            found = self._choice(choice.index, text, entries, delta.finish_reason)
            if self._return_ids:
                found |= {"prompt_token_ids": prompt and prompt.ids, "token_ids": delta.token_ids}
            yield self._body([found], None)

    def last_events(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            yield self._body([], self._usage())

    def feed(self, output: Output) -> None:
        choice = self._choices[output.request_id]
        self._begin(choice, output)
        choice.feed(output)

    def body(self) -> dict[str, Any]:
        choices = []
        ranked = list(self._choices.values())
        for i in range(len(self._prompts)):
            group = ranked[i * self._best_of : (i + 1) * self._best_of]
            if self._best_of > self._n:
                group = sorted(group, key=lambda choice: choice.mean_logprob, reverse=True)[: self._n]
            for choice in group:
                found = self._choice(len(choices), choice.text, choice.entries, choice.finish_reason)
                if self._return_ids:
                    found |= {"prompt_token_ids": self._prompts[i].ids, "token_ids": choice.token_ids}
                choices.append(found)
        return self._body(choices, self._usage())

    def _prompt_of(self, choice: Choice) -> _Prompt:
        return self._prompts[choice.index // self._best_of]

    def _begin(self, choice: Choice, output: Output) -> tuple[str, list[TokenEntry]]:
        """The echo that comes with a choice's first output."""
        if not self._echo or choice.prompt_tokens:
            return "", []
        prompt = self._prompt_of(choice)
        entries = []
        if self._logprobs is not None:
            told = {"skip_special": prompt.skip_special, "untold": prompt.untold}
            entries = prompt_entries(self._service.tokenizer, prompt.ids, output.prompt_logprobs, **told)
        choice.begin(prompt.text, entries)
        return prompt.text, entries

    def _choice(self, index: int, text: str, entries: list[TokenEntry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = completion_logprobs(self._service.tokenizer, entries, self._logprobs)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _usage(self) -> dict[str, Any]:
        completion_tokens = [choice.completion_tokens for choice in self._choices.values()]
        first = list(self._choices.values())[:: self._best_of]  # of each prompt
        return usage(
            [len(prompt.ids) for prompt in self._prompts], completion_tokens, sum(one.cached_tokens for one in first)
        )

    def _body(self, choices: list[dict[str, Any]], tokens: dict[str, Any] | None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_id,
            "system_fingerprint": self._service.engine.info.fingerprint,
            "choices": choices,
        }
        if tokens is not None or (self.stream and self._include_usage):
            body["usage"] = tokens
        return body


def _best_of(values: dict[str, Any]) -> int:
    n, best_of = values["n"], values["best_of"]
    if best_of is None:
        return n
    if best_of < n:
        raise bad("best_of", f"'best_of' must be at least 'n', got best_of={best_of} and n={n}.")
    if best_of > n and values["stream"]:
        raise bad("best_of", "'best_of' above 'n' can't be streamed: the best is known only at the end.")
    return best_of


async def completion_job(service: Service, body: dict[str, Any], arrival: float) -> CompletionJob:
    values = fields.parse_object(None, body, fields.COMPLETIONS)
    service.check_model(values["model"])
    await service.check_grammar(values["structured_outputs"], "structured_outputs")
    prompts = await _prompts(service, values)
    return CompletionJob(service, values, prompts, arrival)


async def _prompts(service: Service, values: dict[str, Any]) -> list[_Prompt]:
    """The prompts as ids, and as text where they are echoed."""
    tokenizer = service.tokenizer
    given: list[str | list[int]] | None = values["prompt"]
    if given is None:
        if tokenizer.bos_id is None:
            raise bad("prompt", "A null 'prompt' begins a new document, but this model has no token for that.")
        return [_Prompt([tokenizer.bos_id], "")]
    check_count(service, len(given), "prompt")  # before they are tokenized for nothing
    out, skip_special = [], values["skip_special_tokens"]
    for i, item in enumerate(given):
        if isinstance(item, str):
            field = "prompt" if len(given) == 1 else f"prompt[{i}]"
            ids = await service.encode_prompt(field, item, add_bos=tokenizer.adds_bos)
            # As it was sent: with the special tokens that it names, without the one that begins every text.
            out.append(_Prompt(ids, item, skip_special=False, untold=int(tokenizer.adds_bos)))
        elif values["echo"]:
            vocab_size = service.engine.info.vocab_size
            ids = [token for token in item if token < vocab_size]  # others are refused when the request is checked
            text = await off_loop(len(ids), lambda ids=ids: tokenizer.decode(ids, skip_special))
            out.append(_Prompt(item, text, skip_special))
        else:
            out.append(_Prompt(item, ""))
    return out
