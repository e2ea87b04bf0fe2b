"""Say what a run would take on chips that are not there: whether it fits, where memory goes, how long a step takes.

MODEL is a recipe (a file, or a name in recipes/), a Hugging Face config.json, or a folder with one. The very step that
the trainer or the engine would run is compiled for the named chips by their real compiler, on this machine; no TPU or
GPU is needed (TPUs: pip install 'twinax[tpu]'). Without --plan all layouts are ranked by an analytic model, the best
few are compiled, and the winner is printed with the command line that uses it.

examples:
  twinax plan config.json --topology v5p:4x4x8 --batch-tokens 1048576 --seq-len 8192
  twinax plan recipes/small.py --topology v6e:2x4 --plan fsdp=8 --remat full
  twinax plan config.json --topology v5p:4x4x4 --topology v6e:8x8 --batch-tokens 2097152 --seq-len 4096 --json plan.json
  twinax plan config.json --topology v6e:2x2 --mode serve --seq-len 8192       # how many requests fit at once
  twinax plan config.json --topology h100:64 --batch-tokens 1048576 --seq-len 8192 --picture plan.svg

Chips: v4, v5e, v5p, v6e, tpu7x, with the shape of the slice; a100, h100, h200, b200, with their number. The analytic
model alone, in seconds: --compile 0.
"""

from argparse import Namespace

from ..overrides import UsageError
from ..parser import Parser

USAGE = "twinax plan MODEL --topology CHIP:SHAPE [--plan PLAN] [--batch-tokens N] [--seq-len N] ..."


def add_arguments(parser: Parser) -> None:
    from ..serving.engine_config import CACHE_DTYPES
    from ..train.recipe import REMAT

    parser.add_argument("model", metavar="MODEL", help="recipe, config.json, or a folder with one")
    parser.add_argument(
        "--topology", metavar="CHIP:SHAPE", action="append", required=True, help="what to plan for; may be repeated"
    )
    parser.add_argument("--mode", choices=["train", "serve"], default="train", help="what runs there")
    parser.add_argument(
        "--cache-dtype", choices=list(CACHE_DTYPES), default=None, help="of a server's cache; by default bfloat16"
    )
    parser.add_argument(
        "--plan", metavar="PLAN", action="append", default=None, help="layout such as fsdp=4,tensor=2; may be repeated"
    )
    batch_help = "tokens of a step, over all chips; by default the recipe's, or what is best"
    parser.add_argument("--batch-tokens", metavar="N", type=int, default=None, help=batch_help)
    length_help = "tokens of a row, or of a request; by default the recipe's, or 4096"
    parser.add_argument("--seq-len", metavar="N", type=int, default=None, help=length_help)
    parser.add_argument("--remat", choices=list(REMAT), default=None, help="as a recipe's; by default what is best")
    parser.add_argument(
        "--accumulation", metavar="N", type=int, default=None, help="as a recipe's; by default what is best"
    )
    parser.add_argument(
        "--compile", metavar="N", type=int, default=3, help="layouts to compile, of those that are ranked; 0: none"
    )
    parser.add_argument("--json", metavar="FILE", default=None, help="write everything as JSON; - prints it alone")
    parser.add_argument("--picture", metavar="FILE.svg", default=None, help="draw where memory and time go")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(options: Namespace, given: set[str]) -> int | None:
    from ..train.recipe import RecipeError

    if options.compile < 0:
        raise UsageError(f"--compile is a number of layouts from 0 up; got {options.compile}.")
    try:
        from ..planner.main import Options, plan

        return plan(Options(**{name: getattr(options, name) for name in Options.__dataclass_fields__}))
    except RecipeError as error:
        raise UsageError(str(error)) from error
