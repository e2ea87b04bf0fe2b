"""Prints verdicts: a table for each, and one that compares several."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .buffers import CLASSES, MEANINGS
from .chips import GIB
from .costs import Key, Traffic
from .inputs import summary
from .roofline import assumption
from .verdict import Verdict, compiled_roofline, scheduled_seconds
from .workload import Workload

DIFFERS = 0.05  # relative difference from which the compiler's own number is shown beside ours


def print_workload(console: Console, workload: Workload) -> None:
    rows = f"{workload.rows:,} rows of {workload.seq_len:,} tokens, {workload.tokens:,} a step"
    if workload.mode == "serve":
        rows = f"requests of {workload.seq_len:,} tokens"
        rows += f", cache in {workload.cache_dtype}" if workload.cache_dtype else ""
    console.print(f"[bold]{summary(workload.model)}[/]: {workload.mode}, {rows}, products in {workload.dtype}")


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Everything about one layout."""
    estimate, compiled = verdict.estimate, verdict.compiled
    topology, layout, chip = estimate.topology, estimate.layout, estimate.topology.chip
    console.print()
    per = "" if chip.devices_per_chip == 1 else f", {chip.devices_per_chip} devices a chip; numbers are of a device"
    console.print(f"[bold]{topology}[/]: {topology.chips} chips, {chip.memory / GIB:.4g} GiB a device{per}")
    how = f"plan {layout.plan}"
    if estimate.workload.mode == "train":
        how += f", remat {layout.remat}, accumulation {layout.accumulation}, {estimate.workload.rows} rows"
    else:
        how += f", {estimate.workload.rows} requests at once"
    console.print(how)
    word = "[green]fits[/]" if verdict.fits else "[red]does not fit[/]"
    by = "the compiler" if compiled else "the analytic model"
    console.print(f"{word}: {_gib(abs(verdict.free))} GiB {'free' if verdict.free >= 0 else 'too much'}, says {by}")
    if verdict.reason:
        console.print(f"[yellow]not compiled:[/] {escape(verdict.reason)}", soft_wrap=True)
    if compiled and compiled.refused:
        console.print(f"[yellow]the compiler refused:[/] {escape(compiled.refused)}", soft_wrap=True)

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    table.add_column("")
    if compiled:
        table.add_column("compiled", justify="right")
    table.add_column("estimated", justify="right")
    table.add_column("", style="dim")
    _memory(table, verdict)
    _work(table, verdict)
    _time(table, verdict)
    console.print(table)
    if compiled and compiled.unknown:
        names = escape(", ".join(compiled.unknown[:5]))
        console.print(f"Counted once, as their turns or products are not known: {names}", soft_wrap=True)
    if verdict.compilation:
        seconds = f"{verdict.compilation.seconds:.0f} s, {verdict.compilation.cpu_seconds:.0f} s of CPU"
        console.print(f"[dim]compiled in {seconds}. Assumed: {assumption(chip)}.[/]", soft_wrap=True)
    else:
        console.print(f"[dim]Assumed: {assumption(chip)}.[/]", soft_wrap=True)


def _row(table: Table, name: str, compiled: str | None, estimated: str, note: str = "") -> None:
    """One line; the compiler's column is left out of a table that has none."""
    cells = [name, estimated, note] if len(table.columns) == 3 else [name, compiled or "", estimated, note]
    table.add_row(*cells)


def _memory(table: Table, verdict: Verdict) -> None:
    estimate, compiled = verdict.estimate, verdict.compiled
    _row(table, "[bold]memory, GiB[/]", None, "")
    for name in CLASSES:
        ours, theirs = estimate.memory[name], compiled.memory[name] if compiled else 0.0
        if max(ours, theirs) >= 0.005 * GIB:
            _row(table, f"  {name}", _gib(theirs), _gib(ours), MEANINGS[name])
    total = _gib(compiled.total_memory) if compiled else None
    _row(table, "  in all", total, _gib(estimate.total_memory), f"of {_gib(estimate.topology.chip.memory)}")
    if compiled and compiled.own:
        arguments = compiled.own["argument_size_in_bytes"]
        ours = sum(compiled.memory[name] for name in ("parameters", "optimizer", "cache", "inputs"))
        if abs(arguments - ours) > DIFFERS * ours:
            _row(table, "  arguments, by the compiler", _gib(arguments), "")


def _work(table: Table, verdict: Verdict) -> None:
    estimate, compiled = verdict.estimate, verdict.compiled
    _row(table, "[bold]a step[/]", None, "")
    flops = f"{compiled.flops / 1e12:,.1f}" if compiled else None
    asked = f"of which the model asks for {estimate.work.model_flops / 1e12:,.1f}"
    _row(table, "  TFLOP", flops, f"{estimate.work.flops / 1e12:,.1f}", asked)
    if compiled and compiled.own.get("flops"):
        own = compiled.own["flops"]
        if abs(own - compiled.flops) > DIFFERS * compiled.flops:
            _row(table, "  TFLOP, by the compiler", f"{own / 1e12:,.1f}", "", "each loop counted once")
    moved = f"{compiled.hbm_bytes / 1e9:,.0f}" if compiled else None
    inside = f"{compiled.attend[1] / 1e9:,.0f} of it in attention" if compiled and compiled.attend[1] else ""
    _row(table, "  HBM traffic, GB", moved, f"{estimate.work.hbm_bytes / 1e9:,.0f}", inside)
    theirs: dict[Key, Traffic] = compiled.collectives if compiled else {}
    for key in sorted({*estimate.work.collectives, *theirs}, key=lambda key: (key[1], key[0])):
        ours, found = estimate.work.collectives.get(key, Traffic()), theirs.get(key, Traffic())
        if max(ours.sent, found.sent) < 1e6:
            continue
        note = f"{found.count:,.0f} times"
        note += f", {found.beside / found.sent:.0%} beside compute" if found.beside else ""
        name = f"  {key[0]} over {'+'.join(key[1])}, GB"
        _row(table, name, _gb(found.sent), _gb(ours.sent), note if found.count else "")


def _time(table: Table, verdict: Verdict) -> None:
    estimate, compiled = verdict.estimate, verdict.compiled
    ours = estimate.roofline
    theirs = compiled_roofline(estimate, compiled) if compiled else None

    _row(table, "[bold]milliseconds[/]", None, "")
    _row(table, "  compute, at the peak", _ms(theirs.compute) if theirs else None, _ms(ours.compute))
    _row(table, "  compute, as expected", _ms(theirs.busy) if theirs else None, _ms(ours.busy))
    _row(table, "  memory", _ms(theirs.memory) if theirs else None, _ms(ours.memory), "attention as a kernel moves it")
    for axes in sorted({*ours.axes, *(theirs.axes if theirs else ())}):
        mine = ours.axes.get(axes, 0.0)
        other = theirs.axes.get(axes, 0.0) if theirs else 0.0
        if max(mine, other) >= 1e-5:
            name = "+".join(axes)
            speed = estimate.topology.bandwidth(estimate.layout.plan.sizes, axes) / 1e9 if axes[0] != "?" else 0.0
            _row(table, f"  links of {name}", _ms(other), _ms(mine), f"{speed:,.0f} GB/s" if speed else "")
    for name in ("least", "expected", "most"):
        note = {"least": "all at once", "expected": "as assumed below", "most": "nothing overlaps"}[name]
        value = _ms(getattr(theirs, name)) if theirs else None
        _row(table, f"  {name}", value, _ms(getattr(ours, name)), note)
    if compiled:
        scheduled = scheduled_seconds(estimate, compiled)
        if scheduled is not None:
            _row(table, "  as scheduled", _ms(scheduled), "", "the compiler's cycles and order")
    rates = [estimate.rates(times.expected) for times in (theirs, ours) if times]
    both = [f"{rate['tokens_per_second_per_chip']:,.0f}" for rate in rates]
    _row(table, "[bold]tokens/s a chip[/]", both[0], both[-1], f"bound by {(theirs or ours).bound}")
    if estimate.workload.mode == "train":
        both = [f"{rate['mfu']:.1%}" for rate in rates]
        _row(table, "[bold]MFU[/]", both[0], both[-1])


def print_comparison(console: Console, verdicts: Sequence[Verdict], title: str) -> None:
    """One line a verdict."""
    serving = verdicts[0].estimate.workload.mode == "serve"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=title, title_justify="left")
    for name in ("", "topology", "plan", "requests" if serving else "remat", "" if serving else "accum."):
        table.add_column(name)
    for name in ("GiB", "fits", "ms a step", "tokens/s a chip", "" if serving else "MFU", "by"):
        table.add_column(name, justify="right")
    for place, verdict in enumerate(verdicts, 1):
        estimate, layout = verdict.estimate, verdict.estimate.layout
        rates = estimate.rates(verdict.seconds)
        how = (str(verdict.requests), "") if serving else (layout.remat, str(layout.accumulation))
        table.add_row(
            str(place),
            str(estimate.topology),
            str(layout.plan),
            *how,
            f"{verdict.total_memory / GIB:.1f}",
            "yes" if verdict.fits else "no",
            _ms(verdict.seconds),
            f"{rates['tokens_per_second_per_chip']:,.0f}",
            "" if serving else f"{rates['mfu']:.1%}",
            "compiler" if verdict.compiled else "estimate",
        )
    console.print()
    console.print(table)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"
