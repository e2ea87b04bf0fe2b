"""Finds better block sizes without the device: compiles candidates for a chip and compares the static profiles.

What is tuned is what our kernels ask `pallas_kernels.tuned.best` for while the cases of `benchmarks.kernels` are
traced. The candidates of a key are those that the operation offers:

    def tuning_space(chip, key):          # in pallas_kernels/<operation>/tpu.py, or imported into it
        return [{...}, ...]               # block sizes as `best` is to answer them; the first is the closed form

A case with several keys is tuned one key after the other, the best so far in place. A candidate wins when it is faster
by more than --least and spills no more; candidates that do not compile are left out. What wins goes to
pallas_kernels/<operation>/tuned/<chip>.json, with the microseconds of both; a key for which the closed form wins is
taken out. A key that several cases share keeps what is best for the sum of them.

  python -m benchmarks.tune --target v6e --op flash_attention
  python -m benchmarks.tune --target 7x --op quantized_matmul --match "16 rows" --dry-run
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twinax.pallas_kernels import tuned
from twinax.planner.chips import find_chip
from twinax.planner.errors import PlannerError

from . import kernel_cases, report
from .kernel_cases import Case
from .static import Request, Static, compile_all

Blocks = dict[str, Any]
LEAST = 0.02
Compile = Callable[[Sequence[Request]], list[Static]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found for one key: microseconds of the cases that ask for it, together, and spills."""

    operation: str
    key: dict[str, Any]
    blocks: Blocks
    microseconds: float
    closed_form: float
    tried: int

    @property
    def is_better(self) -> bool:
        return self.microseconds < self.closed_form


def tune(cases: Sequence[Case], target: str, compile: Compile, least: float = LEAST) -> list[Choice]:
    """Tries each key's candidates. Nothing that is known from earlier counts: everything begins at the closed forms."""
    chip = tuned_name(target)
    requests = [Request(target, case.builder(case.ours), case.ours.arguments) for case in cases]
    asking: dict[tuple[str, str], tuple[dict[str, Any], list[int]]] = {}
    for number, found in enumerate(compile(requests)):
        for operation, key in found.asked:
            asking.setdefault((operation, tuned.name_of(key)), (key, []))[1].append(number)
    spaces = {name: tuning_space(name[0], chip, key) for name, (key, _) in asking.items()}
    spaces = {name: space for name, space in spaces.items() if space}
    chosen = {name: space[0] for name, space in spaces.items()}

    def measure(name: tuple[str, str], candidates: Sequence[Blocks]) -> list[tuple[float, int] | None]:
        """Microseconds and spills of the cases that ask for a key, with each candidate; None if one has none."""
        numbers, questions = asking[name][1], []
        for blocks in candidates:
            now = {**chosen, name: blocks}
            using = tuple((each[0], asking[each][0], now[each]) for each in now)
            questions += [dataclasses.replace(requests[i], using=using) for i in numbers]
        answers, sums = compile(questions), []
        for first in range(0, len(answers), len(numbers)):
            group = answers[first : first + len(numbers)]
            times = [one.microseconds for one in group if one.microseconds is not None]
            whole = len(times) == len(group)
            sums.append((sum(times), sum(one.spills or 0 for one in group)) if whole else None)
        return sums

    choices = []
    for name, candidates in spaces.items():
        first, *others = measure(name, candidates)
        if first is None:
            continue  # the closed form does not compile: nothing to compare with
        best, blocks = first, candidates[0]
        for found, candidate in zip(others, candidates[1:], strict=True):
            if found is not None and found[0] < min(best[0], first[0] * (1 - least)) and found[1] <= first[1]:
                best, blocks = found, candidate
        chosen[name] = blocks
        choices.append(Choice(name[0], asking[name][0], blocks, best[0], first[0], len(candidates)))
    return choices


def tuning_space(operation: str, chip: str, key: dict[str, Any]) -> list[Blocks]:
    """The operation's candidates; none where it offers no function of that name."""
    module = importlib.import_module(f"twinax.pallas_kernels.{operation}.tpu")
    return list(module.tuning_space(chip, key)) if hasattr(module, "tuning_space") else []


def tuned_name(target: str) -> str:
    """A chip as `pallas_kernels.chips.target_chip` calls it."""
    name = find_chip(target).name
    return "7x" if name == "tpu7x" else name


def write(choices: Sequence[Choice], chip: str, folder: Callable[[str, str], Path] = tuned.file_of) -> list[Path]:
    """Adds to the files what is better, takes out what is not. Returns the files that changed."""
    changed = []
    for operation in dict.fromkeys(choice.operation for choice in choices):
        file = folder(operation, chip)
        before = json.loads(file.read_text()) if file.exists() else {}
        after = dict(before)
        for choice in (one for one in choices if one.operation == operation):
            name = tuned.name_of(choice.key)
            after.pop(name, None)
            if choice.is_better:
                times = {"microseconds": round(choice.microseconds, 2), "closed_form": round(choice.closed_form, 2)}
                after[name] = {"blocks": choice.blocks, **times}
        if after != before:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(dict(sorted(after.items())), indent=1) + "\n")
            changed.append(file)
    return changed


def show(choices: Sequence[Choice], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("operation", "key", "tried", "closed form", "best", "faster", "blocks"):
        table.add_column(column, overflow="fold")
    for one in choices:
        gain = f"{one.closed_form / one.microseconds - 1:.1%}" if one.is_better else "-"
        blocks = tuned.name_of(one.blocks) if one.is_better else "closed form"
        times = f"{one.closed_form:,.1f} us", f"{one.microseconds:,.1f} us"
        table.add_row(one.operation, tuned.name_of(one.key), str(one.tried), *times, gain, blocks)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="v5e, v5p, v6e or 7x; may be repeated; default all four")
    parser.add_argument("--op", action="append", help=f"only this; may be repeated: {', '.join(kernel_cases.names())}")
    parser.add_argument("--match", help="only cases whose name holds this")
    parser.add_argument("--least", type=float, default=LEAST, help="the gain that is worth an entry")
    parser.add_argument("--dry-run", action="store_true", help="tell what would improve and write nothing")
    parser.add_argument("--json", type=Path, help="also write a row for each key to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[report.Row] = []
    for target in options.target or ("v5e", "v5p", "v6e", "7x"):
        try:
            chip = find_chip(target)
            if chip.platform != "tpu":
                parser.error(f"{target} has no static profile to tune by; choose v5e, v5p, v6e or 7x")
            found = [case for op in options.op or kernel_cases.names() for case in kernel_cases.cases(op, chip.name)]
            cases = [case for case in found if options.match is None or options.match in case.name]

            def compile(requests: Sequence[Request]) -> list[Static]:
                def say(index: int, found: Static) -> None:
                    Console(stderr=True).print(f"{index + 1}/{len(requests)}", highlight=False, end="\r")

                return compile_all(requests, progress=say)

            choices = tune(cases, target, compile, options.least)
        except (PlannerError, ValueError) as error:
            parser.error(str(error))
        show(choices, target, console)
        for one in choices:
            case = f"{target}, {one.operation}: {tuned.name_of(one.key)}"
            rows.append(report.Row("tune", case, one.microseconds, one.closed_form, "closed form", "us", None, False))
        if not options.dry_run:
            for file in write(choices, tuned_name(target)):
                console.print(f"wrote {file}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


if __name__ == "__main__":
    main()
