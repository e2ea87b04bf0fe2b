"""notebooks/quickstart.py, executed cell by cell as a notebook does."""

import ast
import contextlib
import io
import re
import types
from pathlib import Path
from typing import Any

import pytest

from twinax.serving.request import Grammar


def cells(path: Path) -> list[tuple[str, int, str]]:
    """The cells of a percent-format notebook: kind ("code", "markdown"), first line, source."""
    found: list[tuple[str, list[str], int]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", [], number + 1))
        elif found:
            found[-1][1].append(line)
    return [(kind, start, "\n".join(lines)) for kind, lines, start in found]


class Notebook:
    """The cells' shared names, and what each printed."""

    def __init__(self, path: Path):
        self.module = types.ModuleType("quickstart")
        self.module.__dict__["__file__"] = str(path)
        self.printed: dict[int, str] = {}
        for kind, start, source in cells(path):
            if kind == "code":
                out = io.StringIO()
                code = compile(ast.increment_lineno(ast.parse(source), start - 1), str(path), "exec")
                with contextlib.redirect_stdout(out):
                    exec(code, self.module.__dict__)
                self.printed[start] = out.getvalue()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@pytest.fixture(scope="module")
def notebook(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("notebook")
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return Notebook(repository / "notebooks" / "quickstart.py")


def test_every_cell_runs_and_every_markdown_cell_is_comments(notebook: Notebook, repository: Path):
    kinds = [kind for kind, _, _ in cells(repository / "notebooks" / "quickstart.py")]
    assert kinds.count("code") == len(notebook.printed) >= 6
    for kind, start, source in cells(repository / "notebooks" / "quickstart.py"):
        if kind == "markdown":
            bare = [line for line in source.splitlines() if line and not line.startswith("#")]
            assert not bare, f"line {start}: a markdown cell holds code: {bare}"


def test_training_learns(notebook: Notebook):
    assert notebook.result.step == 20
    assert notebook.result.loss < 5.0  # ln 259 = 5.56 to begin with
    assert len(notebook.losses) == 10
    assert notebook.losses[-1] < notebook.result.loss


def test_logits_are_of_every_token_and_move_with_training(notebook: Notebook):
    import numpy as np

    assert notebook.logits.shape == (len("import js"), 259)
    assert notebook.logits.dtype == np.float32
    assert np.isfinite(notebook.logits).all()
    assert np.abs(notebook.model.logits("import js") - notebook.before).max() > 1e-3


def test_generation_prints_text_and_repeats_with_its_seed(notebook: Notebook):
    model = notebook.model
    first = model.generate("def ", max_tokens=12, temperature=0.8, seed=1)
    assert model.generate("def ", max_tokens=12, temperature=0.8, seed=1) == first
    assert "".join(notebook.printed.values()).endswith("\n")


def test_greedy_text_is_what_the_logits_say(notebook: Notebook):
    """The model that trains is the model that serves: the engine's choice is the logits' largest."""
    model, ids = notebook.model, notebook.model.encode("import js")
    for _ in range(5):
        ids.append(int(model.logits(ids)[-1].argmax()))
    written = model.generate("import js", max_tokens=5, temperature=0, ignore_eos=True)
    assert written == model.tokenizer.decode(ids[len("import js") :])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.logits(""), "1 to 128 tokens .* got 0"),
        (lambda model: model.logits([1] * 129), "1 to 128 tokens .* got 129"),
        (lambda model: model.logits([259]), "below 259 in this model; got 259"),
        (lambda model: model.generate("x", max_tokens=0), "max_tokens must be a whole number from 1"),
        (lambda model: model.generate("x", temperature=float("nan")), "temperature must be a finite number"),
        (lambda model: model.generate("x", temprature=1), "no option temprature"),
        (lambda model: model.generate("x" * 128), "shorter than the model's context"),
        (
            lambda model: model.generate("x", grammar=Grammar("regex", "ab"), stop_token_ids=[98], min_tokens=5),
            "The grammar can't be followed after 1 tokens",
        ),
        (lambda model: model.train("nowhere"), "no such file or folder"),
        (lambda model: model.train(Path(__file__), steps=0), "steps is a whole number from 1"),
    ],
)
def test_what_is_wrong_is_said(notebook: Notebook, call: Any, says: str):
    with pytest.raises(ValueError, match=re.compile(says)):
        call(notebook.model)


def test_load_refuses_an_unknown_dtype(notebook: Notebook):
    import twinax

    with pytest.raises(ValueError, match="float32, bfloat16 or None; got 'float13'"):
        twinax.load(notebook.work / "run", dtype="float13")


def test_the_front_door_names_what_it_has():
    import twinax

    assert dir(twinax) == ["Model", "Recipe", "__version__", "load"]
    with pytest.raises(AttributeError, match="has no attribute 'laod'; it has Model, Recipe"):
        twinax.laod  # noqa: B018
