"""Our kernels beside the libraries', shape by shape: `--target v6e` compiles them for a chip that is not there.

For TPUs (v5e, v5p, v6e, 7x; needs libtpu and no TPU) a row says how many microseconds a kernel takes by the compiler's
static profile, which share of the chip's limit that is (the larger of FLOPs over peak and bytes over bandwidth; causal
attention counts half), how long its program is in bundles, what it spills, and how long it took to compile. Where the
profiler fails on our kernel or a library's, where data decides how long one runs, and with --clock bundles, the bundles
that run are counted instead (benchmarks/bundles.py): a star in the table, "clock" in the rows. Libraries
come from the same compiler in the same run: of each the best of a few block sizes, and the ratio is to the best of all;
above 1 we are faster. For NVIDIA (h100, h200, b200; needs JAX's CUDA plug-in and ptxas) there is no clock: registers,
spills and ptxas's warnings.

On a machine with an NVIDIA GPU and without --target, kernels are timed instead, against cuDNN, cuBLAS and JAX's own
Pallas kernels, and the rows go to benchmarks/results/kernels.CHIP.DATE.jsonl too.

  python -m benchmarks.kernels --target v6e --op flash_attention
  python -m benchmarks.kernels --target 7x --op grouped_matmul --match "8 experts" --json rows.jsonl

What was compiled is kept in .cache/kernels and found again while neither the code nor the compiler changes, so a run
that was stopped goes on; --again compiles everything. What an entry of the table hangs on is in benchmarks/static.py,
which shapes there are in benchmarks/kernel_cases/.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from twinax.planner.chips import find_chip
from twinax.planner.errors import PlannerError

from . import kernel_cases, report
from .kernel_cases import Case, Kernel
from .static import REPOSITORY, Request, Static, compile_all
from .tokamax_peer import TOKAMAX, in_environment, tokamax_kernels, versions

KEPT = REPOSITORY / ".cache" / "kernels"
OURS = "twinax"
# How the names of files begin that are for one platform only.
FILES = {"tpu": ("tpu",), "cuda": ("gpu", "hopper", "blackwell", "triton")}
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case and what was found: ours, and the best variant of each library that could be compiled."""

    case: Case
    ours: Static
    peers: dict[str, Static]

    @property
    def best(self) -> str | None:
        """The fastest library."""
        timed = {name: found.microseconds for name, found in self.peers.items() if found.microseconds}
        return min(timed, key=lambda name: timed[name]) if timed else None

    def rows(self) -> list[report.Row]:
        """Of the table that all benchmarks write; without a kernel of ours, nothing."""
        name, ours, found = f"{self.case.operation}: {self.case.name}", self.ours, []
        if ours.microseconds:
            best = self.best
            peer = self.peers[best].microseconds if best else None
            goal = self.case.goal if best else None
            found.append(report.Row("kernels", name, ours.microseconds, peer, best or "", "us", goal, False))
            wanted = self.case.of_limit
            found.append(report.Row("kernels", name, ours.of_limit or 0.0, None, "", "of the limit", wanted))
        if ours.spills is not None:
            found.append(report.Row("kernels", name, ours.spills, None, "", "spills", 0, False))
        if ours.registers is not None:
            found.append(report.Row("kernels", name, len(ours.warnings), None, "", "warnings of ptxas", 0, False))
        return found


class KeptResults:
    """Results in a file, a line each, under a name that changes with the code that they hang on."""

    def __init__(self, file: Path, fresh: bool = False):
        self.file, self.found = file, {}
        if file.exists() and not fresh:
            for line in file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    self.found[entry["name"]] = Static.from_json(entry["result"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line of which a stopped run wrote a part, or of an older form

    def get(self, name: str) -> Static | None:
        return self.found.get(name)

    def add(self, name: str, result: Static) -> None:
        self.found[name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps({"name": name, "result": result.to_json()}) + "\n")


def fingerprint(request: Request, operation: str | None) -> str:
    """Names a request together with the compilers and the sources that it hangs on; `operation` of a kernel of ours."""
    installed = {}
    for name in COMPILERS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(request), installed], sort_keys=True).encode())
    for file in _sources(request, operation):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _sources(request: Request, operation: str | None) -> Iterable[Path]:
    benchmarks, kernels = REPOSITORY / "benchmarks", REPOSITORY / "pallas_kernels"
    yield from (benchmarks / name for name in ("static.py", "static_child.py", "dumps.py", "bundles.py"))
    module = request.builder.partition(":")[0]
    if module.startswith("benchmarks."):
        yield REPOSITORY / (module.replace(".", "/") + ".py")
    if operation is not None:
        folders = {operation, "flash_attention"} if operation == "ring_attention" else {operation}
        patterns = ["*.py", *(f"{folder}/{name}" for folder in sorted(folders) for name in ("*.py", "tuned/*.json"))]
        platform = request.topology.chip.platform
        others = [start for of, starts in FILES.items() if of != platform for start in starts]
        found = [file for pattern in patterns for file in sorted(kernels.glob(pattern))]
        yield from (file for file in found if not file.name.startswith(tuple(others)))


def measure(
    cases: Sequence[Case],
    target: str,
    kept: KeptResults,
    console: Console,
    pythons: dict[str, str] | None = None,
    profiled: bool = True,
) -> list[Measured]:
    """Compiles what is not kept; `pythons` are the interpreters of other environments. Raises CompilerMissing."""
    pythons = pythons or {}
    installed = {environment: versions(python) for environment, python in pythons.items()}
    todo: dict[tuple[int, str, int], tuple[Request, str]] = {}
    elsewhere: dict[str, str] = {}
    for number, case in enumerate(cases):
        for name, place, kernel in _kernels(case):
            request = Request(target, case.builder(kernel), kernel.arguments, profiled=profiled and kernel.profiled)
            found = fingerprint(request, case.operation if name == OURS else None)
            if kernel.environment is not None:
                found = f"{found} {installed[kernel.environment]}"
                elsewhere[found] = pythons[kernel.environment]
            todo[number, name, place] = (request, found)
    missing = {name: request for request, name in todo.values() if kept.get(name) is None}
    missing = dict(sorted(missing.items(), key=lambda item: item[0] in elsewhere))
    words = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*words, console=console, transient=True) as bar:
        task = bar.add_task(f"compiling for {target}", total=len(missing))
        names, requests = list(missing), list(missing.values())

        def there(index: int, found: Static) -> None:
            if not (found.failed or "").startswith("not compiled after"):  # another day, the machine is not as busy
                kept.add(names[index], found)
            else:
                kept.found[names[index]] = found
            bar.advance(task)

        here = sum(name not in elsewhere for name in names)
        compile_all(requests[:here], progress=there)
        for n in range(here, len(names)):
            in_environment(elsewhere[names[n]], [requests[n]], lambda _, found, n=n: there(n, found))
    measured = []
    for number, case in enumerate(cases):
        variants: dict[str, list[Static]] = {}
        for name, place, _ in _kernels(case):
            found = kept.get(todo[number, name, place][1])
            assert found is not None
            variants.setdefault(name, []).append(found)
        best = {name: fastest(results) for name, results in by_one_clock(variants).items()}
        measured.append(Measured(case, best.pop(OURS), best))
    return measured


def by_one_clock(variants: dict[str, list[Static]]) -> dict[str, list[Static]]:
    """All by bundles, where one has no other time: the two clocks differ by what begins and ends a program."""
    every = [found for results in variants.values() for found in results]
    if all(found.clock != "bundles" for found in every):
        return variants

    def counted(found: Static) -> Static:
        if found.clock != "profile":
            return found
        time, before = found.counted_microseconds, found.microseconds
        share = found.of_limit * before / time if time and before and found.of_limit is not None else None
        return dataclasses.replace(found, microseconds=time, of_limit=share, by_op=found.counted, clock="bundles")

    return {name: [counted(found) for found in results] for name, results in variants.items()}


def fastest(results: Sequence[Static]) -> Static:
    """The best variant: by time, or where there is none by spills; one that failed only if all did."""
    return min(results, key=lambda x: (x.failed is not None, x.microseconds or 0.0, x.spills or 0))


def _kernels(case: Case) -> Iterable[tuple[str, int, Kernel]]:
    yield OURS, 0, case.ours
    for name, variants in case.peers.items():
        yield from ((name, place, kernel) for place, kernel in enumerate(variants))


def show(measured: Sequence[Measured], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("case", "kernel", "us", "of limit", "bundles", "spills", "registers", "compiling", "ratio", "met"):
        table.add_column(column, justify="left" if column in ("case", "kernel") else "right", overflow="fold")
    for one in measured:
        rows = one.rows()
        met = {None: "-", True: "yes", False: "NO"}
        # Where there is no clock, what ptxas says is what there is to meet.
        counted = ("us", "of the limit") if one.ours.microseconds else ("spills", "warnings of ptxas")
        goals = [row.met for row in rows if row.met is not None and row.unit in counted]
        all_met = None if not goals else all(goals)
        for name, found in {OURS: one.ours, **one.peers}.items():
            first = name == OURS
            if found.failed:
                reason = found.failed.splitlines()[0][:60]
                table.add_row(one.case.name if first else "", name, f"[dim]{reason}[/]", *[""] * 7)
                continue
            ratio = rows[0].ratio if first and rows and rows[0].unit == "us" else None
            table.add_row(
                one.case.name if first else "",
                name,
                "-" if found.microseconds is None else f"{found.microseconds:,.1f}{'*' * (found.clock == 'bundles')}",
                "-" if found.of_limit is None else f"{found.of_limit:.1%}",
                "-" if found.bundles is None else f"{found.bundles:,}",
                "-" if found.spills is None else f"{found.spills:,}",
                "-" if found.registers is None else " ".join([str(found.registers), *found.warnings]),
                "-" if found.compile_seconds is None else f"{found.compile_seconds:.1f} s",
                "" if ratio is None else f"{ratio:.2f}",
                met[all_met] if first else "",
            )
    console.print(table)


def to_json(measured: Sequence[Measured], **more: Any) -> str:
    """A line for each row; beside what all benchmarks write, what the compiler said of our kernel and the best peer."""
    lines = []
    for one in measured:
        by = {"clock": one.ours.clock} if one.ours.clock else {}
        said = {OURS: one.ours.to_json()} | ({one.best: one.peers[one.best].to_json()} if one.best else {})
        lines += [json.dumps({**row.to_json(), **more, **by, "kernels": said}) for row in one.rows()]
    return "".join(line + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="v5e, v5p, v6e, 7x, h100, h200 or b200; without it, the GPU that is here")
    parser.add_argument("--op", action="append", help=f"only this; may be repeated: {', '.join(kernel_cases.names())}")
    parser.add_argument("--match", help="only cases whose name holds this")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one JSON object a line")
    parser.add_argument("--tokamax", metavar="PYTHON", help="an interpreter with tokamax, to compare with it on TPUs")
    parser.add_argument("--clock", choices=("profile", "bundles"), default="profile", help="what tells TPUs' time")
    parser.add_argument("--again", action="store_true", help="compile what was kept too")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    operations = options.op or kernel_cases.names()
    if options.target is None:
        from .kernels_timed import timed

        try:
            timed(operations, options.match, options.json, console)
        except RuntimeError as error:
            parser.error(str(error))
        return
    try:
        chip = find_chip(options.target)
        found = [case for operation in operations for case in kernel_cases.cases(operation, chip.name)]
        cases = [case for case in found if options.match is None or options.match in case.name]
        pythons = {TOKAMAX: options.tokamax} if options.tokamax and chip.platform == "tpu" else {}
        if pythons:
            more = [tokamax_kernels(case) for case in cases]
            cases = [
                dataclasses.replace(case, peers={**case.peers, TOKAMAX: kernels}) if kernels else case
                for case, kernels in zip(cases, more, strict=True)
            ]
        kept = KeptResults(KEPT / f"{chip.name}.jsonl", fresh=options.again)
        measured = measure(cases, options.target, kept, console, pythons, options.clock == "profile")
    except (PlannerError, ValueError) as error:
        parser.error(str(error))
    show(measured, f"{options.target}, static (*: by bundles)", console)
    if "flash_attention" in operations and not pythons:
        console.print("skipped: tokamax, which lives in an environment of its own: --tokamax PYTHON")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(to_json(measured, target=options.target))


if __name__ == "__main__":
    main()
