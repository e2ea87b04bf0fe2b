"""What the engine knows of a request that it serves, beside the scheduler's state."""

import dataclasses
import secrets

from . import sampling
from .grammar import GrammarError, Matcher
from .pooling import Pooled
from .request import Output, Request, TokenLogprob


@dataclasses.dataclass(slots=True)
class Live:
    """One request. `matcher`: where its output is in its grammar; `stops`: tokens that end it."""

    request: Request
    stops: frozenset[int]
    flags: int
    seed_high: int
    seed_low: int
    prompt_logprobs: list[TokenLogprob | None] | None
    pooled: Pooled | None
    matcher: Matcher | None
    prompt_sent: bool = False
    let_in: int = 0  # tokens that it had when its first chunk was sent, last time
    cached: int = 0  # of its prompt, found when it was let in for the first time

    @classmethod
    def begin(cls, request: Request, stops: frozenset[int], matcher: Matcher | None) -> "Live":
        params = request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        return cls(
            request=request,
            stops=stops,
            flags=(sampling.LOGPROBS if params.logprobs is not None else 0)
            | (sampling.PENALTIES if penalties else 0)
            | (sampling.BIAS if params.logit_bias else 0),
            seed_high=_signed(seed >> 32),
            seed_low=_signed(seed),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            pooled=Pooled(request.pooling) if request.pooling else None,
            matcher=matcher,
        )

    def advance(self, output: Output, token: int, length_reached: bool) -> None:
        """Notes in `output` how the request ends, if it does with this token."""
        params = self.request.params
        if token in self.stops and output.completion_tokens > params.min_tokens:
            output.finish_reason, output.stop_token = "stop", True
            output.stop_reason = token if token in params.stop_token_ids else None
            return
        try:
            complete = self.matcher is not None and self.matcher.push(token)
        except GrammarError as error:
            self.fail(output, error)
            return
        if complete or length_reached:
            output.finish_reason = "stop" if complete else "length"

    def end(self, output: Output, error: GrammarError | None) -> None:
        """Ends a request whose grammar leaves no token that may be sampled: it is complete, or can't be completed."""
        if error is None and self.matcher is not None and self.matcher.may_end:
            output.finish_reason = "stop"
        else:
            self.fail(output, error or GrammarError("no token of the model is allowed"))

    def fail(self, output: Output, error: GrammarError) -> None:
        output.finish_reason, output.error_kind = "error", "grammar"
        output.error = f"The grammar can't be followed after {output.completion_tokens} tokens: {error}."


def _signed(word: int) -> int:
    """The low 32 bits as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
