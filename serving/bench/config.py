"""Settings of `twinax bench serve`. Imports next to nothing, so that the command line can show them at once."""

import dataclasses
import json
import math
import os
import secrets
from fractions import Fraction
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is sent to which server, and when.

    Attributes:
        url: the server's, with or without /v1.
        model: its name; by default the only one that the server lists.
        api_key: sent as a bearer token; default: the environment variable OPENAI_API_KEY, if set.
        trace: an Azure or BurstGPT CSV, or Mooncake JSON lines; without, requests are made up.
        requests: at most so many; without a trace, exactly so many (default 200, or rate x duration).
        scale: all lengths times this, such as 1/16.
        rate: requests a second in the mean: a trace is stretched or pressed to it, made-up requests come at random
            (Poisson); inf: all at once.
        speed: a trace's clock runs so many times as fast.
        concurrency: so many clients, each of which sends its next request when its last is answered.
        duration: seconds after which nothing more is sent.
        prompt_tokens, output_tokens: lengths of made-up requests, N or LOW-HIGH (log-uniform between these).
        shared_prefix: tokens that all made-up prompts begin with.
        max_ttft_ms: goodput counts requests whose first token came within so many milliseconds,
        max_itl_ms: and whose further tokens came within so many each, in the request's mean.
        chat: ask /v1/chat/completions, not /v1/completions.
        text_prompts: send words even where the server would take token ids.
        text: a file that prompts are drawn from; default: English from Python's own help.
        temperature: of sampling; 0 takes the likeliest token.
        extra_body: JSON object of more fields for every request.
        timeout: seconds until a request is given up.
        seed: of prompts and random times; default: a new one, so that no prompt is in the server's cache already.
        json: write everything to this file, every request too.
        plot: draw latencies and throughput to this .svg file.
    """

    url: str
    model: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    trace: str | None = None
    requests: int | None = None
    scale: str = "1"
    rate: str | None = None
    speed: float | None = None
    concurrency: int | None = None
    duration: float | None = None
    prompt_tokens: str = "16-256"
    output_tokens: str = "16-256"
    shared_prefix: int = 0
    max_ttft_ms: float = 1000.0
    max_itl_ms: float = 100.0
    chat: bool = False
    text_prompts: bool = False
    text: str | None = None
    temperature: float = 0.0
    extra_body: str = "{}"
    timeout: float = 600.0
    seed: int | None = None
    json: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(31))
        ways = [name for name in ("rate", "speed", "concurrency") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} each say when requests are sent; give one of them")
        if self.trace is None and not {"rate", "concurrency"} & set(ways):
            raise ValueError(
                "without a trace, say when requests are sent: rate (open loop) or concurrency (closed loop)"
            )
        for name in ("requests", "speed", "concurrency", "duration", "timeout", "max_ttft_ms", "max_itl_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.shared_prefix < 0 or (self.shared_prefix and self.trace is not None):
            raise ValueError(
                f"shared_prefix is a number of tokens from 0 up, of requests without a trace; got {self.shared_prefix}"
            )
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise ValueError(f"plot is an .svg file, got {self.plot}")
        for each in ("length_factor", "mean_rate", "prompt_range", "output_range", "more_fields"):
            getattr(self, each)  # checks itself

    @property
    def resolved_api_key(self) -> str | None:
        return self.api_key if self.api_key is not None else os.environ.get("OPENAI_API_KEY")

    @property
    def seed_used(self) -> int:
        assert self.seed is not None
        return self.seed

    @property
    def length_factor(self) -> float:
        try:
            factor = float(Fraction(self.scale))
        except (ValueError, ZeroDivisionError):
            factor = -1.0
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"scale is a number or a fraction above 0, such as 1/16; got {self.scale!r}")
        return factor

    @property
    def mean_rate(self) -> float | None:
        """Requests a second, math.inf for all at once; None: not given."""
        try:
            rate = None if self.rate is None else float(self.rate)
        except ValueError:
            rate = -1.0
        if rate is not None and not rate > 0:
            raise ValueError(f"rate is a number of requests a second above 0, or inf; got {self.rate!r}")
        return rate

    @property
    def prompt_range(self) -> tuple[int, int]:
        return _range("prompt_tokens", self.prompt_tokens)

    @property
    def output_range(self) -> tuple[int, int]:
        return _range("output_tokens", self.output_tokens)

    @property
    def more_fields(self) -> dict[str, Any]:
        try:
            found = json.loads(self.extra_body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f'extra_body is a JSON object such as {{"top_k": 20}}; got {self.extra_body!r}')
        return found


def _range(name: str, text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        bounds = int(low), int(high if dash else low)
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} is a number of tokens from 1 up, or LOW-HIGH such as 16-256; got {text!r}")
    return bounds
