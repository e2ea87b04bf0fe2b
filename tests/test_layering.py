"""The table of DESIGN section 1: which room may import which, checked over the source of every module.

Also: between rooms only relative imports (`from ..layers import x`). An absolute one would work until somebody runs a
file by its path, and then there are two copies of every class.
"""

import ast
from pathlib import Path

import pytest

BELOW_CHECKPOINTS = {"pallas_kernels", "sharding", "layers", "models"}
MAY_IMPORT: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "sharding": set(),
    "layers": {"pallas_kernels", "sharding"},
    "models": {"layers", "sharding"},
    "checkpoints": {"models", "sharding"},
    "train": {"checkpoints", *BELOW_CHECKPOINTS},
    "serving": {"checkpoints", *BELOW_CHECKPOINTS},
    # Compiles what both run, so it sits above both.
    "planner": {"train", "serving", "checkpoints", *BELOW_CHECKPOINTS},
}


def _violations(source: str, room: str, module: str) -> list[str]:
    """What the module `twinax.<room>.<...>` (given with its dots, the package part only) must not import, by line."""
    found = []

    def check(target: str, line: int, relative: bool) -> None:
        parts = target.split(".")
        if parts[0] != "twinax":
            if parts[0] in MAY_IMPORT:
                found.append(f"{line}: imports {target!r} by its folder; write a relative import")
            return
        if not relative:
            found.append(f"{line}: imports {target!r} absolutely; write a relative import")
        other = parts[1] if len(parts) > 1 else "twinax"
        if other != room and other not in MAY_IMPORT[room]:
            found.append(f"{line}: the room {room!r} may not import {other!r}")

    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                check(alias.name, node.lineno, relative=False)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                check(node.module or "", node.lineno, relative=False)
                continue
            base = package[: len(package) - (node.level - 1)]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if target == "twinax":  # `from .. import layers`
                for alias in node.names:
                    check(f"twinax.{alias.name}", node.lineno, relative=True)
            else:
                check(target, node.lineno, relative=True)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                check(str(first.value).removeprefix("."), node.lineno, relative=False)
    return found


def _modules(root: Path, room: str) -> list[tuple[Path, str]]:
    """Each Python file of a room with the dotted name of the package it lies in."""
    return [
        (path, ".".join(["twinax", *path.parent.relative_to(root).parts]))
        for path in sorted((root / room).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_room_imports_only_what_the_design_allows(repository: Path, room: str):
    modules = _modules(repository, room)
    assert modules, f"the room {room!r} holds no Python file"
    wrong = [
        f"{path.relative_to(repository)}:{problem}"
        for path, package in modules
        for problem in _violations(path.read_text(), room, package)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "package", "source", "says"),
    [
        ("serving", "twinax.serving", "from ..train import loop", "'serving' may not import 'train'"),
        ("train", "twinax.train", "from .. import serving", "'train' may not import 'serving'"),
        ("train", "twinax.train.data", "from ...serving.engine import Engine", "'train' may not import 'serving'"),
        ("layers", "twinax.layers", "def f():\n    from ..models import decoder", "2: the room 'layers' may not"),
        ("models", "twinax.models", "from ..pallas_kernels import candidates", "may not import 'pallas_kernels'"),
        ("models", "twinax.models", "from twinax.layers import norm", "absolutely"),
        ("models", "twinax.models", "import layers.norm", "by its folder"),
        ("serving", "twinax.serving", "import importlib\nimportlib.import_module('twinax.train.loop')", "'train'"),
        ("sharding", "twinax.sharding", "from ..cli import main", "'sharding' may not import 'cli'"),
        ("train", "twinax.train", "from ..planner.chips import CHIPS", "'train' may not import 'planner'"),
    ],
)
def test_a_planted_violation_is_caught(room: str, package: str, source: str, says: str):
    assert says in "\n".join(_violations(source, room, package))


def test_what_is_allowed_passes():
    serving = "import os\nfrom . import scheduler\nfrom ..checkpoints.load import load_model\nfrom .http import app"
    assert _violations(serving, "serving", "twinax.serving") == []
    data = "import jax\nfrom ...checkpoints.tokenizer import Tokenizer\nfrom ..loss import x"
    assert _violations(data, "train", "twinax.train.data") == []
