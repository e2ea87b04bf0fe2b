"""Reads what the compilers leave behind: libtpu's static profile and last bundles, ptxas's remarks.

Bundles are counted as they run, too (see `benchmarks.bundles`).

A dump is read once, and what was read is deleted, so that the next kernel of a process finds an empty folder.
"""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinax.pallas_kernels.chips import CORES
from twinax.planner.gpu_target import TARGETS

from .bundles import Lost, Program


@dataclasses.dataclass(frozen=True)
class Dump:
    """Cycles and bundles of each operation, and of all together the rest (the most registers); see `static.Static`.

    `counted`: cycles of each operation by the bundles that run. `lost`: why it has none.
    """

    cycles: dict[str, float]
    bundles: dict[str, int]
    spills: int | None
    registers: int | None = None
    warnings: tuple[str, ...] = ()
    counted: dict[str, float] = dataclasses.field(default_factory=dict)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    spilled: dict[str, int] = dataclasses.field(default_factory=dict)


_ESTIMATE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_OPERATION = re.compile(r"^\d+-(.+?)-\d+-")
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_SPILL = re.compile(r"vmem:\[#allocation\d+_spill")


def read_tpu(folder: Path, chip: str, data: Mapping[str, Mapping[int, Any]] | None = None) -> Dump:
    """Operations of the whole program (`<...>`, `TLP`) are left out.

    `data`: of kernels by their names, the operands that decide loops.
    """
    cycles: dict[str, float] = {}
    for file in (folder / "static").glob("*_static_llo_profile.textproto"):
        cycles |= {name: float(count) for name, count in _ESTIMATE.findall(file.read_text())}
    bundles: dict[str, int] = {}
    kernels: set[str] = set()
    for name, file in _named(folder / "llo", "*schedule-analysis_final_bundles.txt"):
        said = file.read_text()
        if found := _BUNDLES.search(said[:400]):
            bundles[name] = int(found[1])
        if "tpu_custom_call" in said:
            kernels.add(name)
    spills = {
        name: sum(len(_SPILL.findall(line)) for line in file.open())
        for name, file in _named(folder / "llo", "*-final_bundles.txt")
        if name in bundles
    }
    counted: dict[str, float] = {}
    lost: dict[str, str] = {}
    for name, file in _named(folder / "llo", "*-packed-bundles-post-ra.txt"):
        if name in bundles and "schedule-analysis" not in file.name:
            try:
                program = Program(file.read_text(), chip)
                operands = _operands(data, name) if data and name in kernels else None
                counted[name] = float(max(program.cycles(operands, core) for core in range(CORES.get(chip, 1))))
            except Lost as error:
                lost[name] = str(error)
    _empty(folder / "static")
    _empty(folder / "llo")
    return Dump(cycles, bundles, sum(spills.values()) if bundles else None, counted=counted, lost=lost, spilled=spills)


def _operands(data: Mapping[str, Mapping[int, Any]], operation: str) -> Mapping[int, Any] | None:
    """Of the kernel that `operation` is, which XLA calls by its name and a number; a single one may have no name."""
    return next(iter(data.values())) if len(data) == 1 else data.get(operation.partition(".")[0])


def forget(folder: Path) -> None:
    """What a compilation that failed left, which would be taken for the next one's."""
    for name in ("static", "llo", "xla"):
        _empty(folder / name)


def _named(folder: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.glob(pattern)):
        found = _OPERATION.match(file.name)
        if found and not found[1].startswith("<") and found[1] != "TLP":
            yield found[1], file


def read_cuda(folder: Path, chip: str) -> Dump:
    """Of kernels through Mosaic, ptxas has spoken already; PTX that XLA and Triton made is given to it here."""
    capability = TARGETS[chip].capability
    architecture = f"sm_{capability}0" + ("a" if capability >= 9 else "")
    said = (folder / "said").read_text(errors="replace")
    for file in sorted((folder / "xla").glob("*.ptx")):
        if ".entry" in file.read_text():
            command = ["ptxas", "-v", f"-arch={architecture}", str(file), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said += done.stdout + done.stderr
    _empty(folder / "xla")
    return read_ptxas(said)


def read_ptxas(said: str) -> Dump:
    """What `ptxas -v` says: registers of a thread, bytes spilled, and where it serialises wgmma."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    warnings = tuple(dict.fromkeys(re.findall(r"\((C75\d\d)\) Potential Performance Loss", said)))
    spills = sum(int(count) for pair in spilled for count in pair) if spilled else None
    return Dump({}, {}, spills, max(registers, default=None), warnings)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
        folder.mkdir()
