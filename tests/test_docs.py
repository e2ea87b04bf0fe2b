"""What README and CONTRIBUTING tell people to type exists, and so does what they link to."""

import re
import shlex
from pathlib import Path

import pytest

from twinax import commands
from twinax.cli import make_parser

PAGES = ("README.md", "CONTRIBUTING.md", "docs/several-machines.md", "docs/serving.md")


def _targets(repository: Path) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (repository / "Makefile").read_text(), re.MULTILINE))


def _commands(text: str) -> list[str]:
    """The lines of fenced shell blocks, and inline code; continued lines joined, comments cut."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.strip().removeprefix("$ ") for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str, repository: Path):
    named = {
        word
        for line in _commands((repository / page).read_text())
        if line.startswith("make ")
        for word in line.partition("#")[0].split()[1:]
        if re.fullmatch(r"[a-z][\w-]*", word)
    }
    assert named <= _targets(repository), f"{page} names make targets that do not exist"


@pytest.mark.parametrize("page", PAGES)
def test_twinax_commands_parse(page: str, repository: Path):
    """Every option that a page shows exists; values and files are not looked at."""
    for line in _commands((repository / page).read_text()):
        # `...` and alternatives are prose, not commands.
        if not line.startswith("twinax ") or "..." in line or "|" in line:
            continue
        words = shlex.split(line.rstrip("&"), comments=True)
        if words[1].startswith("-"):
            assert words[1] in ("--help", "--version"), f"{page}: {line}"
            continue
        assert words[1] in commands.names(), f"{page}: {line}"
        parser = make_parser(words[1])
        known = {option for action in parser._actions for option in action.option_strings}
        flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert flags <= known, f"{page}: {line}: no option {sorted(flags - known)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, repository: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", (repository / page).read_text())
    lost = [target for target in targets if "://" not in target and not (repository / target).exists()]
    assert not lost, f"{page} links to what is not there"


@pytest.mark.parametrize("page", PAGES)
def test_modules_to_run_exist(page: str, repository: Path):
    named = re.findall(r"python -m ((?:benchmarks|twinax)[\w.]*)", (repository / page).read_text())
    lost = [name for name in named if not _module(repository, name)]
    assert not lost, f"{page} names modules that do not exist"


def _module(repository: Path, name: str) -> bool:
    path = repository.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_contributing_names_every_room(repository: Path):
    text = (repository / "CONTRIBUTING.md").read_text()
    rooms = ("pallas_kernels", "sharding", "layers", "models", "checkpoints", "train", "serving", "twinax", "tests")
    missing = [room for room in rooms if f"| `{room}/` |" not in text]
    assert not missing
