"""The command line: what it teaches, and how it says what is wrong. Runs `main` in this process."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinax import __version__, commands
from twinax.cli import main, make_parser

RECIPE = "from twinax import Recipe\nrecipe = Recipe(steps=5)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a recipe in it."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wrong(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """The one message of a command that fails, after its "error: "."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.partition("error: ")[2]


@pytest.mark.parametrize("name", commands.names())
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "examples:" in text
    assert f"\n  twinax {name} " in text
    assert f"usage: twinax {name}" in text
    assert max(map(len, text.splitlines())) <= 120
    silent = [action.dest for action in make_parser(name)._actions if not action.help]
    assert not silent, f"these options do not say what they are for: {silent}"


def test_there_are_the_promised_commands():
    assert {"train", "generate", "serve", "convert", "inspect", "tokenizer"} <= set(commands.names())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in commands.names())


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twinax {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"], ["serve", "--help"]])
def test_help_needs_no_jax(words: list[str]):
    code = f"""
import sys
from twinax.cli import main
try:
    main({words!r})
except SystemExit:
    pass
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "There is no command 'trian'. Did you mean train?"),
        (["train"], "RECIPE must be given."),
        (["train", "recpie.py"], "There is no recipe 'recpie.py'; the nearest is 'recipe.py'."),
        (["train", "recipe.py", "--optimzer.lr", "3e-4"], "Unknown option --optimzer.lr. Did you mean --optimizer.lr?"),
        (["train", "recipe.py", "--optimizer.lr=fast"], "--optimizer.lr takes a number; got 'fast'."),
        (["train", "recipe.py", "--lr", "3e-4"], "Unknown option --lr. Did you mean --optimizer.lr?"),
        (["train", "recipe.py", "--stpes", "3"], "Unknown option --stpes. Did you mean --steps?"),
        (["train", "recipe.py", "--steps", "1.5"], "--steps takes a whole number; got '1.5'."),
        (["train", "recipe.py", "--steps"], "--steps takes a whole number, but no value was given."),
        (["train", "recipe.py", "--steps", "--seed", "1"], "--steps takes a whole number, but no value was given."),
        (["train", "recipe.py", "--steps", "-3"], "steps is a whole number from 1 up; got -3."),
        (["train", "recipe.py", "--optimizer.lr", "nan"], "--optimizer.lr takes a number; got 'nan'."),
        (["train", "recipe.py", "--tensorboard", "maybe"], "--tensorboard takes true or false; got 'maybe'."),
        (["train", "recipe.py", "--resume", "alway"], "--resume is one of auto, never, must; got 'alway'."),
        (["train", "recipe.py", "again"], "Unexpected argument 'again'"),
        (["generate", "recipe", "x"], "The model recipe does not exist. Did you mean recipe.py?"),
        (["generate", "x", "y", "--max-toknes", "3"], "Unknown option --max-toknes. Did you mean --max-tokens?"),
        (["serve", "x", "--prot", "3"], "Unknown option --prot. Did you mean --port?"),
        (["serve", "x", "--port", "http"], "--port takes a whole number; got 'http'."),
        (["convert", "recipe", "y"], "The source recipe does not exist. Did you mean recipe.py?"),
        (["convert", "x"], "TARGET must be given."),
        (["inspect", "x", "--verfy"], "Unknown option --verfy. Did you mean --verify?"),
        (["tokenizer", "trian", "x", "--vocab-size", "300", "--output", "y"], "got 'trian'. Did you mean train?"),
        (["tokenizer", "train", "x", "--vocab-size", "300"], "--output must be given."),
    ],
)
def test_a_wrong_command_line_is_told_what_was_meant(
    words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert says in wrong(capsys, *words)


def test_a_bad_recipe_file_is_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "empty.py").write_text("x = 1\n")
    assert "must define `recipe = Recipe(...)`" in wrong(capsys, "train", "empty.py")
    (folder / "broken.py").write_text("recipe = \n")
    assert "broken.py cannot be run as Python: SyntaxError" in wrong(capsys, "train", "broken.py")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", ".", "x"], "holds no model"),
        (["inspect", "."], "holds no model"),
        (["convert", ".", "y"], "holds no model"),
        (["serve", ".", "--port", "99999"], "port must be between 0 and 65535"),
        (["train", "recipe.py", "--quiet"], "data.path is not set"),
        (["train", "recipe.py", "--quiet", "--data.path", "nowhere"], "no such file or folder"),
        (["tokenizer", "train", "nowhere", "--vocab-size", "300", "--output", "y"], "no such file or folder: nowhere"),
        (["tokenizer", "train", "recipe.py", "--vocab-size", "9", "--output", "y"], "at least 259, not 9"),
    ],
)
def test_what_goes_wrong_later_is_one_message(
    words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert says in wrong(capsys, *words, status=1)


def test_serve_without_its_extra_names_it():
    code = "import sys; sys.modules['uvicorn'] = None; from twinax.cli import main; sys.exit(main(['serve', '.']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = "this needs uvicorn, which is not installed: pip install 'twinax[serve]'"
    assert done.stderr == f"twinax serve: error: {message}\n"


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    """A library's ValueError is a bug of ours; only messages that were written for the user are cut to one line."""
    monkeypatch.setattr(commands.load("inspect"), "run", lambda options, given: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["inspect", "."])


def test_tokenizer_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]):
    from twinax.checkpoints.tokenizer import Tokenizer

    (folder / "text.txt").write_text("the cat sat on the mat. " * 200)
    assert main(["tokenizer", "train", "text.txt", "--vocab-size", "280", "--output", "made"]) == 0
    tokenizer = Tokenizer.load(folder / "made")
    assert capsys.readouterr().out == f"wrote made: {tokenizer.vocab_size} tokens\n"
    assert tokenizer.decode(tokenizer.encode("the mat")) == "the mat"
    assert len(tokenizer.encode(" the cat")) < 8
