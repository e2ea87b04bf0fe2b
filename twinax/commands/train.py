"""Train a model as a recipe says, or go on with a run that was interrupted.

RECIPE is a Python file that defines `recipe = Recipe(...)`, or the name of one in recipes/. Every setting of the recipe
is also an option, named by its dotted path; an option wins over the file.

examples:
  twinax train recipe.py
  twinax train recipe.py --steps 200 --optimizer.lr 3e-4 --output runs/lr3e-4
  twinax train recipe.py --data.path 'corpus/*.jsonl.gz' --data.tokenizer tokenizer/
  twinax train recipe.py --model.init_from hf-folder           # begin with a trained model
  twinax train recipe.py --resume never                        # start over where an older run is

Run the same command again to resume: bit for bit, from the newest good checkpoint in --output. Ctrl-C (or SIGTERM)
finishes the step, saves and exits, with status 130 (or 143).

Several processes, one on each machine, are one run: the same command in each, on a disk that all share. SLURM, JobSet
and TPU pods on GKE number them; elsewhere --coordinator, --processes and --process do. See docs/several-machines.md.
"""

import signal
from argparse import Namespace
from operator import attrgetter

from ..overrides import UsageError, apply
from ..parser import Parser

USAGE = "twinax train RECIPE [--SETTING VALUE ...] [--resume auto|never|must] [--quiet] [--processes N ...]"


def add_arguments(parser: Parser) -> None:
    from ..train.recipe import Recipe

    parser.add_argument("recipe", metavar="RECIPE", help="Python file that defines `recipe`")
    parser.add_argument(
        "--resume",
        choices=["auto", "never", "must"],
        default="auto",
        help="go on from the newest checkpoint in --output if there is one, never, or fail if there is none",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    several = parser.add_argument_group("several processes")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same for all")
    several.add_argument("--processes", metavar="N", help="how many there are; auto where JAX finds out by itself")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    parser.add_dataclass(Recipe)


def run(options: Namespace, given: set[str]) -> int | None:
    from ..train.recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(options.recipe)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    try:
        recipe = apply(recipe, {path: attrgetter(path)(options) for path in given})
    except ValueError as error:
        raise UsageError(str(error)) from error

    from ..sharding import processes

    with processes.join(options.coordinator, options.processes, options.process) as job:
        from ..train.loop import train

        result = train(recipe, resume=options.resume, display=not options.quiet)
    if options.quiet and job.is_first:
        print(f"step {result.step}, loss {result.loss:.4f}: {result.checkpoint}")
    # As a shell says it of a process that a signal ended, so that nobody takes the run for complete.
    return 128 + signal.Signals[result.interrupted] if result.interrupted else None
