"""/v1/completions through the real client. The model is random, so texts are compared with each other."""

import asyncio
import math

import httpx
import pytest

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving.http.choices import prompt_entries
from twinax.serving.request import TokenLogprob

from .conftest import CONTEXT, MODEL, Server

PROMPT = "def f(x):"


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def text(client, **options) -> str:
    return complete(client, **options).choices[0].text


def as_bytes(tokens: list[str]) -> bytes:
    """The bytes of legacy token names, where parts of characters are written `bytes:\\xe2\\x82`."""
    parts = []
    for token in tokens:
        hexadecimal = token.removeprefix("bytes:").replace("\\x", "")
        parts.append(bytes.fromhex(hexadecimal) if token.startswith("bytes:") else token.encode())
    return b"".join(parts)


def test_answer_has_the_shape_of_the_api(client):
    answer = complete(client, user="me")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint.startswith("fp_")
    [choice] = answer.choices
    assert (choice.index, choice.logprobs) == (0, None)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_usage_says_what_was_computed_for_an_earlier_request(server: Server, client):
    prompt = "Twice asked, and the second time a good part of it need not be computed."
    before = server.metrics()

    def ask(**body):
        answer = complete(client, prompt, max_tokens=2, temperature=0, extra_body={"ignore_eos": True, **body})
        return answer.usage.prompt_tokens_details.cached_tokens, answer.choices[0].text

    (first, text), (again, same) = ask(cache_salt="own"), ask(cache_salt="own")
    whole_pages = (len(prompt) - 1) // 16 * 16
    assert (first, again) == (0, whole_pages) and text == same
    assert ask(cache_salt="another") == (0, text)
    assert ask(cache_salt="own", repetition_penalty=1.1)[0] == whole_pages
    difference = {name: server.metrics()[f"vllm:prefix_cache_{name}_total"] for name in ("queries", "hits")}
    assert difference["hits"] - before["vllm:prefix_cache_hits_total"] == 2 * whole_pages
    assert difference["queries"] - before["vllm:prefix_cache_queries_total"] == 4 * len(prompt)


def test_max_tokens_defaults_to_16(client):
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_greedy_is_deterministic_and_ignores_the_seed(client):
    assert text(client, temperature=0, seed=1) == text(client, temperature=0, seed=2)


def test_all_forms_of_a_prompt_mean_the_same(client):
    ids = list(PROMPT.encode())
    expected = text(client, seed=3)
    for prompt in (ids, [PROMPT], [ids]):
        assert complete(client, prompt, seed=3).choices[0].text == expected
    answer = complete(client, [PROMPT, "other", PROMPT], seed=3, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[4] == expected
    assert texts[1] == texts[5] == text(client, seed=4)
    assert answer.usage.prompt_tokens == 2 * len(PROMPT) + len("other")


def test_a_null_prompt_begins_a_document(server: Server):
    first, second = (
        server.post("/v1/completions", {"model": MODEL, "prompt": prompt, "seed": 1}).json() for prompt in (None, [256])
    )
    assert first["usage"]["prompt_tokens"] == 1
    assert first["choices"] == second["choices"]


def test_n_choices_are_seeded_one_after_the_other(client):
    answer = complete(client, n=3, seed=2**63 - 1)
    assert [choice.text for choice in answer.choices] == [
        text(client, seed=seed) for seed in (2**63 - 1, -(2**63), -(2**63) + 1)
    ]
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert len({choice.text for choice in answer.choices}) == 3


def test_a_seed_means_the_same_alone_and_among_neighbours(server: Server, client):
    alone = {seed: text(client, seed=seed, max_tokens=40) for seed in range(4)}

    async def together() -> dict[int, str]:
        async with httpx.AsyncClient(timeout=60) as http:

            async def one(seed: int, prompt: str, max_tokens: int) -> str:
                body = {"model": MODEL, "prompt": prompt, "seed": seed, "max_tokens": max_tokens}
                response = await http.post(f"{server.url}/v1/completions", json=body)
                return response.json()["choices"][0]["text"]

            neighbours = [one(100 + i, "noise " * i, 5 + 7 * i) for i in range(1, 5)]
            wanted = [one(seed, PROMPT, 40) for seed in alone]
            mixed = [task for pair in zip(neighbours, wanted, strict=True) for task in pair]
            return dict(zip(alone, (await asyncio.gather(*mixed))[1::2], strict=True))

    assert asyncio.run(together()) == alone


def test_best_of_returns_the_likeliest(client):
    candidates = []
    for seed in range(5, 9):
        [choice] = complete(client, seed=seed, logprobs=0).choices
        logprobs = choice.logprobs.token_logprobs
        candidates.append((sum(logprobs) / len(logprobs), choice.text))
    best = [candidate for _, candidate in sorted(candidates, reverse=True)]
    answer = complete(client, seed=5, best_of=4, n=2)
    assert [choice.text for choice in answer.choices] == best[:2]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in answer.choices)


def test_logprobs(client):
    [choice] = complete(client, seed=1, logprobs=3, max_tokens=30, extra_body={"ignore_eos": True}).choices
    found = choice.logprobs
    count = len(found.tokens)
    assert count == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 30
    assert as_bytes(found.tokens).decode(errors="replace") == choice.text
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert 3 <= len(top) <= 4
        assert top[token] == logprob <= max(top.values()) <= 0
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    assert found.text_offset == sorted(found.text_offset)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset] == token


def test_logprobs_zero_gives_the_chosen_tokens_only(client):
    [choice] = complete(client, seed=1, logprobs=0).choices
    assert choice.logprobs.top_logprobs is None
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens)


def test_echo_gives_the_prompt_first(client):
    continuation = text(client, seed=1)
    for prompt in (PROMPT, list(PROMPT.encode())):
        answer = complete(client, prompt, seed=1, echo=True)
        assert answer.choices[0].text == PROMPT + continuation


def test_echo_scores_what_was_generated_with_the_same_numbers(client):
    """The promise of one set of numbers: a token's log-probability does not depend on how it got into the cache."""
    prompt = "import os, sys\n" * 3
    answer = complete(client, prompt, seed=1, logprobs=2, max_tokens=24, echo=True, extra_body={"ignore_eos": True})
    full = answer.choices[0].logprobs
    ids = list(as_bytes(full.tokens))
    assert len(ids) == len(prompt) + 24
    scored = complete(client, ids, echo=True, logprobs=2, max_tokens=0)
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].finish_reason == "length"
    again = scored.choices[0].logprobs
    assert again.tokens == full.tokens
    assert again.token_logprobs[0] is None
    assert again.top_logprobs[0] is None
    assert again.token_logprobs[1:] == pytest.approx(full.token_logprobs[1:], abs=1e-4)


def test_streamed_and_whole_answers_are_the_same(client):
    options = {"seed": 7, "n": 2, "logprobs": 1, "max_tokens": 25, "echo": True}
    whole = complete(client, **options)
    texts, logprobs, reasons = ["", ""], [[], []], [None, None]
    chunks = list(complete(client, **options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        logprobs[choice.index] += choice.logprobs.token_logprobs
        reasons[choice.index] = choice.finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert reasons[choice.index] == choice.finish_reason


def _inside(whole: str) -> str:
    """A string of two characters that appears inside a text, not at its beginning."""
    return next(
        whole[i : i + 2]
        for i in range(5, len(whole) - 2)
        if whole[i : i + 2].isascii() and whole.index(whole[i : i + 2]) == i
    )


@pytest.mark.parametrize("logprobs", [None, 1])
def test_token_ids_are_those_of_the_text(server: Server, client, logprobs):
    prompt = [PROMPT, "other"]
    options = {"seed": 1, "n": 2, "max_tokens": 25, "logprobs": logprobs, "extra_body": {"return_token_ids": True}}
    whole = complete(client, prompt, **options).choices
    for choice in whole:
        assert choice.prompt_token_ids == list(prompt[choice.index // 2].encode())
        assert server.post("/detokenize", {"tokens": choice.token_ids}).json()["prompt"] == choice.text
        assert logprobs is None or len(choice.logprobs.tokens) == len(choice.token_ids)
    streamed = [[] for _ in whole]
    prompts = [[] for _ in whole]
    for chunk in complete(client, prompt, **options, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.token_ids
        prompts[choice.index] += choice.prompt_token_ids or []
    assert streamed == [choice.token_ids for choice in whole]
    assert prompts == [choice.prompt_token_ids for choice in whole]


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_never_leak(client, seed):
    options = {"seed": seed, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = text(client, **options)
    stop = _inside(whole)
    expected = whole[: whole.index(stop)]
    [choice] = complete(client, **options, stop=["never there", stop], logprobs=0).choices
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    ids = {"return_token_ids": True, **options["extra_body"]}
    [with_ids] = complete(client, **(options | {"extra_body": ids}), stop=stop).choices
    assert len(with_ids.token_ids) == len(choice.logprobs.tokens)
    assert all(offset < len(expected) for offset in choice.logprobs.text_offset)
    pieces = [chunk.choices[0].text for chunk in complete(client, **options, stop=stop, stream=True)]
    assert "".join(pieces) == expected


def test_logit_bias_and_stop_token_ids(client):
    assert text(client, logit_bias={"65": 100}, max_tokens=4) == "AAAA"
    answer = complete(client, logit_bias={"65": 100}, max_tokens=8, extra_body={"stop_token_ids": [65]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    body = {"stop_token_ids": [65], "min_tokens": 3, "ignore_eos": True}
    answer = complete(client, logit_bias={"65": 50}, max_tokens=8, extra_body=body)
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "stop"


def test_sampling_options_reach_the_engine(client):
    greedy = text(client, temperature=0, max_tokens=12)
    assert text(client, temperature=1, seed=1, max_tokens=12) != greedy
    assert text(client, temperature=1, seed=1, max_tokens=12, extra_body={"top_k": 1}) == greedy
    assert text(client, temperature=1, seed=1, max_tokens=12, top_p=1e-6) == greedy
    assert text(client, temperature=1, seed=1, max_tokens=12, extra_body={"min_p": 1.0}) == greedy
    options = {"temperature": 0, "max_tokens": 48}
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 2.0}}):
        assert text(client, **options) != text(client, **options, **penalty)


def test_a_prompt_may_fill_the_context_but_for_one_token(client):
    answer = complete(client, "a" * (CONTEXT - 1))
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_long_texts_are_tokenized_all_the_same(server: Server):
    answer = server.post("/tokenize", {"prompt": "é" * 30_000}).json()
    assert answer["count"] == 60_000
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "é" * 30_000}


def test_tokenize(server: Server):
    answer = server.post("/tokenize", {"model": MODEL, "prompt": "aé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": [97, 195, 169],
        "token_strs": ["a", "\\xc3", "\\xa9"],
    }


def test_tokenize_as_other_clients_send_it(server: Server):
    messages = [{"role": "user", "content": "a"}]
    off = {"continue_final_message": False, "add_special_tokens": False, "tools": None, "chat_template": None}
    answer = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False, **off}).json()
    assert bytes(answer["tokens"]) == b"user: a\n"
    assert answer["tokens"] == server.post("/tokenize", {"prompt": "user: a\n"}).json()["tokens"]
    ids = [*b"a", 256, *b"b"]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "ab"}
    whole = server.post("/detokenize", {"tokens": ids, "skip_special_tokens": False}).json()["prompt"]
    assert whole.startswith("a<") and whole.endswith(">b")


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "twinax")
    assert client.models.retrieve(MODEL).id == MODEL


def test_special_tokens_show_where_they_are_asked_for(client):
    """With the places of their log-probabilities in the text."""
    options = {"max_tokens": 4, "seed": 1, "logprobs": 0, "logit_bias": {"258": 100}}  # <|pad|>, which ends nothing
    for skip, text in ((True, ""), (False, "<|pad|>" * 4)):
        extra = {"skip_special_tokens": skip}
        [choice] = client.completions.create(model=MODEL, prompt="a", **options, extra_body=extra).choices
        assert choice.text == text
        assert choice.logprobs.tokens == ["<|pad|>"] * 4
        assert choice.logprobs.text_offset == [0 if skip else 7 * n for n in range(4)]


def test_the_places_of_an_echoed_prompts_tokens(client):
    """Of special tokens too, which a text that names them has, and one of ids where they are asked for."""
    whole = "a<|pad|>b€c"
    ids = [97, 258, 98, *"€c".encode()]
    for prompt, skip, echoed in ((whole, True, whole), (ids, False, whole), (ids, True, "ab€c")):
        extra = {"skip_special_tokens": skip}
        answer = complete(client, prompt, echo=True, logprobs=0, max_tokens=2, seed=1, extra_body=extra)
        [choice] = answer.choices
        assert choice.text.startswith(echoed) and answer.usage.prompt_tokens == len(ids)
        places = dict(zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True))
        assert {at: token for at, token in places.items() if at < len(echoed) and token in "abc"} == {
            echoed.index(letter): letter for letter in "abc"
        }
        if "<" in echoed:
            assert choice.logprobs.text_offset[1:3] == [1, 8]


def test_a_token_that_begins_every_text_has_no_place_in_an_echoed_one():
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode("a<|bos|>b", add_bos=True)
    logprobs = [None, *(TokenLogprob(token, -1.0) for token in ids[1:])]
    entries = prompt_entries(tokenizer, ids, logprobs, skip_special=False, untold=1)
    assert [(entry.id, entry.offset) for entry in entries] == [(256, 0), (97, 0), (256, 1), (98, 8)]
