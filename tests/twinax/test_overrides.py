"""Settings of dataclasses from the command line."""

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import pytest

from twinax.cli import make_parser
from twinax.overrides import UsageError, apply, attribute_texts, existing, leaves, nearest
from twinax.parser import Parser
from twinax.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Inner:
    """Part of it.

    Attributes:
        rate: how much,
            with: a colon in its second line.
        low, high: the bounds.

    Not an attribute: this.
    """

    rate: float = 0.5
    low: int | None = None
    high: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ("x",)
    sizes: tuple[int, ...] = ()
    where: str | tuple[str, ...] = ""
    mode: Literal["fast", "exact"] = "fast"
    on: bool = False
    text: str = ""


def parsed(*words: str) -> Outer:
    parser = Parser("test", "")
    parser.add_dataclass(Outer)
    options, given = parser.parse(list(words))
    return apply(Outer(), {path: attrgetter(path)(options) for path in given})


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--inner.rate", "3e-4"], "inner.rate", 3e-4),
        (["--inner.rate=1"], "inner.rate", 1.0),
        (["--inner.rate", "-1e3"], "inner.rate", -1000.0),
        (["--inner.low", "7"], "inner.low", 7),
        (["--inner.low", "null"], "inner.low", None),
        (["--names", "a"], "names", ("a",)),
        (["--names", "a,b"], "names", ("a", "b")),
        (["--names", '["a,b", "c"]'], "names", ("a,b", "c")),
        (["--names", "12"], "names", ("12",)),
        (["--sizes", "1,2"], "sizes", (1, 2)),
        (["--where", "docs/*.md"], "where", "docs/*.md"),
        (["--where", "a, b: [c"], "where", "a, b: [c"),
        (["--where", '["a", "b"]'], "where", ("a", "b")),
        (["--mode", "exact"], "mode", "exact"),
        (["--on"], "on", True),
        (["--on", "--mode", "exact"], "on", True),
        (["--on", "false"], "on", False),
        (["--text", "123"], "text", "123"),
        (["--text", "null"], "text", "null"),
        (["--text", "{a: 1}"], "text", "{a: 1}"),
        (["--text="], "text", ""),
        (["--text", "-x"], "text", "-x"),
    ],
)
def test_values_get_the_type_of_their_field(words: list[str], path: str, value: Any):
    found = attrgetter(path)(parsed(*words))
    assert found == value
    assert type(found) is type(value)


def test_what_is_not_given_keeps_the_instances_own_value():
    own = Outer(inner=Inner(rate=0.25, low=3), text="mine")
    assert apply(own, {"inner.high": 9}) == Outer(inner=Inner(rate=0.25, low=3, high=9), text="mine")
    assert apply(own, {}) == own


def test_a_wrong_choice_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"--mode takes one of fast, exact; got 'exat'. Did you mean exact\?"):
        parsed("--mode", "exat")


def test_help_comes_from_the_docstring():
    texts = attribute_texts(Inner)
    assert texts == {"rate": "how much, with: a colon in its second line.", "low": "the bounds.", "high": "the bounds."}


def test_every_setting_of_a_recipe_is_an_option_with_help():
    silent = [leaf.path for leaf in leaves(Recipe) if not leaf.help]
    assert not silent, f"document these in the Attributes section of their class: {silent}"
    parser = make_parser("train")
    for leaf in leaves(Recipe):
        if leaf.default is None or leaf.default == "" or isinstance(leaf.default, tuple):
            continue
        options, given = parser.parse(["recipe.py", f"--{leaf.path}={leaf.default}"])
        assert given == {leaf.path}
        assert attrgetter(leaf.path)(options) == leaf.default


def test_nearest():
    known = ["optimizer.lr", "optimizer.eps", "checkpoint.every", "eval.every", "steps"]
    assert nearest("optimzer.lr", known) == ["optimizer.lr"]
    assert nearest("every", known) == ["checkpoint.every", "eval.every"]
    assert nearest("step", known) == ["steps"]
    assert nearest("zzz", known) == []


def test_a_missing_path_names_its_neighbour(tmp_path: Path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert existing(str(tmp_path / "runs"), "It") == tmp_path / "runs"
    with pytest.raises(UsageError, match=r"Did you mean .*runs/demo"):
        existing(str(tmp_path / "runs" / "dmeo"), "It")
    with pytest.raises(UsageError, match=r"Did you mean .*/runs"):
        existing(str(tmp_path / "run" / "demo" / "step"), "It")
    with pytest.raises(UsageError, match=r"does not exist\.$"):
        existing(str(tmp_path / "zzzzz"), "It")
