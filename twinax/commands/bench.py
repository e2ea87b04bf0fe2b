"""Measure a server under load: latency percentiles, throughput, and goodput within latency bounds.

URL is any server with the OpenAI API: ours, vLLM, SGLang, llama.cpp. Traffic is a trace (Azure's or BurstGPT's CSV,
Mooncake's JSON lines with its shared prefixes), scaled in length and rate, or made up: at random times (--rate), or by
clients that wait for their answers (--concurrency). The server counts the tokens, not pieces of text.

examples:
  twinax bench serve http://localhost:8000 --rate 4 --duration 60
  twinax bench serve http://localhost:8000 --trace azure_code.csv --scale 1/16 --requests 200 --rate inf
  twinax bench serve http://localhost:8000 --trace mooncake.jsonl --scale 1/64 --speed 10 --json run.json --plot run.svg
  twinax bench serve https://server --api-key KEY --model NAME --chat --concurrency 8 --requests 100

Says when the client itself was too slow for its numbers to be trusted. Needs the extra `serve`.
"""

import dataclasses
from argparse import Namespace

from ..overrides import UsageError
from ..parser import Parser

USAGE = "twinax bench serve URL [--trace FILE] [--rate X | --speed X | --concurrency N] ..."


def add_arguments(parser: Parser) -> None:
    from ..serving.bench.config import BenchConfig

    parser.add_argument("what", choices=["serve"], help="what is measured: a server")
    parser.add_argument("url", metavar="URL", help="the server's, such as http://localhost:8000")
    parser.add_dataclass(BenchConfig, skip=("url",), dashes=True)


def run(options: Namespace, given: set[str]) -> int:
    from ..serving.bench.config import BenchConfig

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(BenchConfig)}
    try:
        config = BenchConfig(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None
    from ..serving.bench.main import bench

    return bench(config)
