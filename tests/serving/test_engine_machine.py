"""The engine with everything at once: requests of all kinds come, go and push each other out, at random.

Each must get what it gets alone on an engine that has room and keeps nothing: the same tokens, to the bit the same
log-probabilities and vectors, the same end. What is cancelled got a beginning of it.
"""

import dataclasses
import random
from collections.abc import Collection

import msgspec
import pytest

from tests.serving.engines import TOKENIZER, engine_of, twin
from tests.serving.test_engine_latent import DENSE as LATENT
from tests.serving.test_engine_states import HYBRID
from tests.thorough import thorough
from twinax.models.config import DecoderConfig, LayerKind
from twinax.serving import kv_policies, schedulers
from twinax.serving.engine import Engine
from twinax.serving.request import SCHEDULING, Grammar, Output, QueueFull, Request, SamplingParams

COMMON = {
    "vocab_size": TOKENIZER.vocab_size + 1, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
    "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
WINDOWS = DecoderConfig(**COMMON, pattern=(LayerKind(), LayerKind(window=24)))
# Models, and how they are served.
KINDS = {
    "windows": (WINDOWS, {"dtype": "float32"}),
    "bfloat16": (WINDOWS, {"dtype": "bfloat16"}),
    "latent": (LATENT, {"dtype": "float32"}),
    "states": (HYBRID, {"dtype": "float32"}),
    "int8 cache": (WINDOWS, {"dtype": "float32", "cache_dtype": "int8"}),
    "bfloat16, latent of float8": (LATENT, {"dtype": "bfloat16", "cache_dtype": "float8"}),
}
GRAMMARS = (
    Grammar("regex", "[a-f]{2,30}x?"),
    Grammar("choice", '["yes", "no", "perhaps later"]'),
    Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
    Grammar("lark", 'start: ("ab" | "c")+ "!"'),
)
MOST_STEPS = 3000
SCENARIOS = 6


@dataclasses.dataclass
class Answer:
    """All that a request was told."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    prompt_logprobs: list | None = None
    end: tuple | None = None
    embedding: bytes = b""

    def take(self, output: Output) -> None:
        assert self.end is None, f"{output.request_id} was told more after its end"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            self.prompt_logprobs = output.prompt_logprobs
        self.embedding += output.embedding
        assert output.completion_tokens == len(self.token_ids)
        if output.finish_reason:
            self.end = (output.finish_reason, output.stop_reason, output.stop_token, output.error, output.error_kind)

    def begins(self, whole: "Answer") -> bool:
        count = len(self.token_ids)
        same = self.token_ids == whole.token_ids[:count] and self.logprobs == whole.logprobs[: len(self.logprobs)]
        return same and (self.prompt_logprobs is None or self.prompt_logprobs == whole.prompt_logprobs)


class Traffic:
    """Requests that a seed decides, many of which begin as an earlier one or its answer."""

    def __init__(self, rng: random.Random, config: DecoderConfig, honours: Collection[str]):
        self.rng, self.honours = rng, honours
        self.context = config.max_position_embeddings
        self.known: list[list[int]] = []
        self.count = 0

    def request(self) -> Request:
        rng = self.rng
        self.count += 1
        pooling = rng.choice(("", "", "", "", "", "", "last", "mean"))
        more = {"max_tokens": 1, "seed": 0} if pooling else self.params()
        turn = {"priority": (0, 0, 1, -1), "deadline_seconds": (None, 0.001, 5.0), "stages_left": (1, 1, 4)}
        return Request(
            f"r{self.count}",
            self._prompt(),
            SamplingParams(**more),
            cache_salt=rng.choice(("", "", "", "salt")),
            tenant=rng.choice(("", "a", "b")),
            pooling=pooling,
            **{name: rng.choice(values) for name, values in turn.items() if name in self.honours},
        )

    def _prompt(self) -> list[int]:
        rng = self.rng
        start: list[int] = []
        if self.known and rng.random() < 0.6:
            start = rng.choice(self.known)
            if rng.random() < 0.3:
                start = start[: rng.randint(0, len(start))]
        fresh = [rng.randrange(256) for _ in range(rng.choice((0, 1, 2, 15, 16, 17, 40, 70)))]
        prompt = (start + fresh)[: self.context - 1] or [rng.randrange(256)]
        self.known.append(prompt)
        return list(prompt)

    def params(self) -> dict:
        rng = self.rng
        most = rng.choice((1, 2, 5, 12, 25, 60, 90))
        more: dict = {"seed": rng.choice((rng.randrange(2**63), -rng.randrange(2**63))), "max_tokens": most}
        more["temperature"] = rng.choice((0.0, 0.0, 0.5, 1.0, 1.5, 30.0))
        more["ignore_eos"] = rng.random() < 0.7
        if rng.random() < 0.5:
            more["logprobs"] = rng.choice((0, 1, 5))
        if rng.random() < 0.2:
            more["prompt_logprobs"] = rng.choice((0, 2))
        if rng.random() < 0.25:
            more["grammar"] = rng.choice(GRAMMARS)
        rare = {
            "top_k": (1, 3, 50), "top_p": (0.1, 0.9), "min_p": (0.01, 0.5), "repetition_penalty": (0.5, 1.4, 100.0),
            "presence_penalty": (-2.0, 0.6), "frequency_penalty": (-1.0, 2.0), "min_tokens": (1, 4),
            "logit_bias": ({7: 100.0}, {65: 4.0, 66: -100.0}), "stop_token_ids": ([7], list(range(40, 90))),
        }  # fmt: skip
        for name, values in rare.items():
            if rng.random() < 0.2:
                more[name] = rng.choice(values)
        more["min_tokens"] = min(more.get("min_tokens", 0), most)
        return more


class Play:
    """One scenario on an engine whose limits a seed decides."""

    def __init__(self, engine: Engine, plain: Engine, seed: int):
        self.rng = rng = random.Random(seed)
        self.plain = plain
        room = engine.scheduler.config
        self.limits = {
            "max_running": rng.choice((1, 2, 4, 5, 6, 6)),
            "num_pages": rng.choice((8, 8, 9, 9, 11, 16, 30)),
            "chunk_tokens": rng.choice((2, 5, 17, 64, 64)),
            "max_waiting": rng.choice((3, 9)),
            "policy": rng.choice(sorted(schedulers.names())),
            "prefix_cache": None if room.prefix_cache is None else rng.choice((None, *2 * kv_policies.names())),
            "max_token_ms": rng.choice((None, None, 5.0)),
        }
        host_pages = min(room.host_pages, rng.choice((0, 2, 30, 30)))
        self.limits["host_pages"] = host_pages if self.limits["prefix_cache"] else 0
        self.engine = twin(engine, **self.limits)
        if rng.random() < 0.7:
            self.engine.scheduler.host_pages.page_seconds = 0.0  # copying always wins
        self.traffic = Traffic(rng, engine.loaded.config, self.engine.scheduler.waiting.honours)
        self.asked: dict[str, Request] = {}
        self.answers: dict[str, Answer] = {}
        self.gone: set[str] = set()

    def run(self) -> None:
        engine, rng, steps = self.engine, self.rng, 0
        compiles = engine.stats().compiles_after_warmup
        to_come, calm = rng.randint(4, 24), rng.choice((0.1, 0.3, 0.5, 0.9))
        while to_come or engine.has_work:
            if to_come and rng.random() > calm:
                self._add()
                to_come -= 1
            if rng.random() < 0.02:
                self._leave()
            self._step()
            steps += 1
            assert steps < MOST_STEPS, "it comes to no end"
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used, len(engine._live)) == (0, 0, 0, 0)
        assert stats.host_pages_used <= self.limits["host_pages"]
        # What was dropped when nothing was left to run, the next step would forget.
        assert stats.host_pages_used <= len(engine._host_copies) <= stats.pages_copied_out
        assert stats.compiles_after_warmup == compiles
        for name, request in self.asked.items():
            self._check(request, self.answers[name])

    def _add(self) -> None:
        """Sends a request, and now and then others of the same prompt with it: choices, or nearly."""
        first, rng = self.traffic.request(), self.rng
        each = [first]
        if not first.pooling and rng.random() < 0.2:
            for nth in range(rng.randint(1, 4)):
                own = SamplingParams(**self.traffic.params()) if rng.random() < 0.3 else first.params
                each.append(msgspec.structs.replace(first, id=f"{first.id}-{nth}", params=own))
        for one in each:
            try:
                self.engine.add(one)
            except QueueFull:
                continue
            self.asked[one.id], self.answers[one.id] = one, Answer()

    def _leave(self) -> None:
        here = [name for name, answer in self.answers.items() if answer.end is None and name not in self.gone]
        if here:
            name = self.rng.choice(here)
            self.gone.add(name)
            assert self.rng.choice((self.engine.cancel, self.engine.finish))(name)

    def _step(self) -> None:
        for output in self.engine.step():
            assert output.request_id not in self.gone, "it had left"
            self.answers[output.request_id].take(output)
            if output.finish_reason == "stop" or self.rng.random() < 0.01:
                answer = self.answers[output.request_id]
                self.traffic.known.append(self.asked[output.request_id].prompt_ids + answer.token_ids)

    def _check(self, request: Request, answer: Answer) -> None:
        alone = Answer()
        self.plain.add(msgspec.structs.replace(request, **SCHEDULING))
        while self.plain.has_work:
            for output in self.plain.step():
                alone.take(output)
        told = f"{request}\nlimits {self.limits}\nfound {answer}\nalone {alone}"
        if request.id in self.gone:
            assert answer.begins(alone), told
        else:
            assert answer == alone, told


def engines_of(kind: str) -> tuple[Engine, Engine]:
    """What scenarios share their programs with, and what answers a request alone."""
    config, settings = KINDS[kind]
    engine = engine_of(config, host_cache_bytes=1 << 20, **settings)
    return engine, twin(engine, prefix_cache=None, host_pages=0)


@pytest.fixture(scope="module", params=thorough(KINDS, 2))
def engines(request) -> tuple[Engine, Engine]:
    return engines_of(request.param)


@pytest.mark.parametrize("seed", range(SCENARIOS))
def test_whatever_happens_a_request_gets_what_it_gets_alone(engines, seed):
    Play(*engines, seed).run()
