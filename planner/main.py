"""`twinax plan`, from its options to what it prints and writes."""

import dataclasses
import json
import shlex
from pathlib import Path

from rich.console import Console

from ..sharding.plan import Plan
from .errors import PlannerError
from .inputs import Source, read_source, summary
from .picture import write_picture
from .plan import Wishes, plan_on
from .report import print_comparison, print_verdict, print_workload
from .search import REMATS
from .topology import Topology
from .verdict import Verdict
from .workload import Workload

DEFAULT_LENGTH = 4096
WIDE = 140
LISTED = 8  # estimates shown of a search


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line; None is what was not given. See `twinax plan --help`."""

    model: str
    topology: list[str]
    mode: str = "train"
    cache_dtype: str | None = None
    plan: list[str] | None = None
    batch_tokens: int | None = None
    seq_len: int | None = None
    remat: str | None = None
    accumulation: int | None = None
    compile: int = 3
    json: str | None = None
    picture: str | None = None
    quiet: bool = False


def plan(options: Options) -> int:
    """Prints and writes what is asked for; 0 when something fits, else 1. Raises PlannerError and RecipeError."""
    topologies = [Topology.parse(text) for text in options.topology]
    source = read_source(options.model, options.seq_len)
    workload = workload_of(source, options, topologies[0])
    console = Console(quiet=options.json == "-", highlight=False)
    if not console.is_terminal:  # a file has no width to keep to
        console = Console(quiet=options.json == "-", highlight=False, width=WIDE)
    print_workload(console, workload)
    verdicts: list[Verdict] = []
    for topology in topologies:
        workload = workload_of(source, options, topology)
        found, ranked = plan_on(workload, topology, wishes_of(source, options))
        if not options.plan and len(ranked) > 1:
            rest = [Verdict(e) for e in ranked[:LISTED]] if workload.mode == "train" else found
            print_comparison(console, rest, f"{len(ranked)} layouts of {topology}, best first, estimated")
        for verdict in found if options.plan else found[:1]:
            print_verdict(console, verdict)
        verdicts += found
    if len(verdicts) > 1:
        print_comparison(console, verdicts, "compared")
    winner = min(verdicts, key=lambda v: (not v.fits, -v.estimate.rates(v.seconds)["tokens_per_second_per_chip"]))
    if winner.fits:
        console.print(f"\n[bold]use[/] {command_line(winner, source, options)}", soft_wrap=True)
    if options.picture:
        write_picture(Path(options.picture), verdicts, f"{summary(source.model)}: {options.mode}")
        console.print(f"wrote {options.picture}")
    if options.json:
        _write_json(options, source, verdicts)
    return 0 if winner.fits else 1


def workload_of(source: Source, options: Options, topology: Topology) -> Workload:
    """What runs: sizes from the options, else from the recipe, else one row a device."""
    recipe = source.recipe
    seq_len = options.seq_len or (recipe.sequence_length if recipe else DEFAULT_LENGTH)
    if options.mode == "serve":
        return Workload(source.model, "serve", 1, seq_len, cache_dtype=options.cache_dtype)
    if options.cache_dtype is not None:
        raise PlannerError("--cache-dtype is of a server's cache; add --mode serve, or leave it out.")
    if options.batch_tokens is not None:
        if options.batch_tokens < seq_len or options.batch_tokens % seq_len:
            near = max(1, round(options.batch_tokens / seq_len)) * seq_len
            raise PlannerError(
                f"--batch-tokens is a multiple of --seq-len {seq_len}; got {options.batch_tokens}. The nearest is "
                f"{near}."
            )
        rows = options.batch_tokens // seq_len
    elif recipe is not None:
        rows = recipe.batch_size
    else:
        rows = topology.devices
    return Workload(source.model, "train", rows, seq_len)


def wishes_of(source: Source, options: Options) -> Wishes:
    return Wishes(
        plans=tuple(Plan.parse(text) for text in options.plan or ()),
        remats=(options.remat,) if options.remat else REMATS,
        accumulation=options.accumulation,
        batch=options.batch_tokens is not None or source.recipe is not None or bool(options.plan),
        compiled=options.compile,
        display=not options.quiet,
    )


def command_line(verdict: Verdict, source: Source, options: Options) -> str:
    """The command that runs a layout."""
    estimate, layout = verdict.estimate, verdict.estimate.layout
    if estimate.workload.mode == "serve":
        words = ["twinax", "serve", "PATH", "--max-running", str(verdict.requests)]
        words += ["--max-model-len", str(estimate.workload.seq_len), "--dtype", estimate.workload.dtype]
        if estimate.workload.cache_dtype is not None:
            words += ["--cache-dtype", estimate.workload.cache_dtype]
        if layout.plan.devices > 1:
            words += ["--plan", str(layout.plan)]
        return shlex.join(words)
    recipe = options.model if source.recipe is not None else "RECIPE"
    settings = {
        "plan": "" if layout.plan.devices == 1 else str(layout.plan),
        "remat": layout.remat,
        "accumulation": layout.accumulation,
        "batch_size": estimate.workload.rows,
        "sequence_length": estimate.workload.seq_len,
        "dtype": estimate.workload.dtype,
    }
    words = ["twinax", "train", recipe]
    for name, value in settings.items():
        if value != "":
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _write_json(options: Options, source: Source, verdicts: list[Verdict]) -> None:
    found = {
        "model": source.model.to_dict(),
        "verdicts": [{**verdict.to_dict(), "command": command_line(verdict, source, options)} for verdict in verdicts],
    }
    text = json.dumps(found, indent=2)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
        Console(highlight=False).print(f"wrote {options.json}")
