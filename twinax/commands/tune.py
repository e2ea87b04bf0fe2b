"""Find the server's settings for this machine and a workload, simulated first, then measured, and write them to a file.

MODEL is what `twinax serve` takes. The load is said as for `twinax bench serve`: a trace, scaled, or made up. The
steps of an engine are timed on this machine, and with them many settings are simulated (requests running together,
prompt tokens a step, page size, scheduler). A server is started for each of the best few; those that do badly on a few
requests are dropped, the rest see more, and the best goes to a file.

examples:
  twinax tune serve runs/demo --rate 4 --max-ttft-ms 500 --max-itl-ms 50
  twinax tune serve hf-folder --trace azure_code.csv --scale 1/16 --rate inf --goal throughput --out fast.json
  twinax tune serve runs/demo --concurrency 8 --space '{"max_running": [8, 16], "chunk_tokens": [128, 256, 512]}'
  twinax serve runs/demo --config serve.json
"""

from argparse import Namespace

from ..overrides import UsageError, existing
from ..parser import Parser

USAGE = "twinax tune serve MODEL [--trace FILE] [--rate X | --speed X | --concurrency N] [--goal GOAL] ..."
_NOT_OURS = ("url", "model", "api_key", "json", "plot")  # settings of the measurement that are chosen here


def add_arguments(parser: Parser) -> None:
    from ..serving.bench.config import BenchConfig
    from ..serving.bench.tuning import TuneConfig

    parser.add_argument("what", choices=["serve"], help="what is tuned: a server")
    parser.add_argument("model", metavar="MODEL", help="run folder, step folder or Hugging Face folder")
    parser.add_dataclass(TuneConfig, dashes=True)
    parser.add_dataclass(BenchConfig, skip=_NOT_OURS, dashes=True)


def run(options: Namespace, given: set[str]) -> int:
    from ..serving.bench.config import BenchConfig
    from ..serving.bench.tuning import TuneConfig, tune

    model = existing(options.model, "The model")
    names = set(TuneConfig.__dataclass_fields__)
    try:
        config = TuneConfig(**{name: getattr(options, name) for name in given & names})
        load = BenchConfig(url="http://127.0.0.1", **{name: getattr(options, name) for name in given - names})
    except ValueError as error:
        raise UsageError(str(error)) from None
    return tune(str(model), load, config)
