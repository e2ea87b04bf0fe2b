"""`twinax COMMAND ...`: finds the command, runs it, and says in one message what went wrong."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import __version__, commands
from .overrides import UsageError, did_you_mean

if TYPE_CHECKING:
    from .parser import Parser

_HEAD = """\
usage: twinax COMMAND ...

Train, serve and convert language models with one Flax codebase.

commands:
{commands}

examples:
  twinax train recipe.py --steps 200 --optimizer.lr 3e-4
  twinax generate runs/demo "def main(" --max-tokens 64
  twinax serve runs/demo --port 8000
  twinax convert runs/demo exported/

`twinax COMMAND --help` teaches a command; `twinax --version` says the version.
"""

# What only an extra installs.
_EXTRAS: dict[str, str] = dict.fromkeys(
    ("starlette", "uvicorn", "uvloop", "httptools", "prometheus_client", "llguidance", "multipart", "python_multipart"),
    "serve",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 good, 1 it failed, 2 the command line is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HEAD.format(commands="\n".join(f"  {name:<10} {_summary(name)}" for name in commands.names())), end="")
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(f"twinax {__version__}")
        return 0
    name = f"twinax {words[0]}"
    try:
        return _run(words[0], words[1:])
    except UsageError as error:
        if words[0] not in commands.names():
            name = "twinax"
        print(f"{name}: error: {error}\n`{name} --help` shows how to use it.", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        message = f"this needs {error.name}, which is not installed: pip install 'twinax[{extra}]'"
        print(f"{name}: error: {message}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


def _run(command: str, words: list[str]) -> int:
    if command not in commands.names():
        raise UsageError(f"There is no command {command!r}.{did_you_mean(command, commands.names())}")
    module = commands.load(command)
    if not hasattr(module, "begin"):
        options, given = make_parser(command).parse(words)
        return module.run(options, given) or 0
    with module.begin(words) as begun:
        options, given = make_parser(command).parse(words)
        return module.run(options, given, begun) or 0


def make_parser(command: str) -> "Parser":
    """The parser of one command."""
    from .parser import Parser

    module = commands.load(command)
    parser = Parser(f"twinax {command}", (module.__doc__ or "").strip(), module.USAGE)
    module.add_arguments(parser)
    return parser


def _summary(name: str) -> str:
    return (commands.load(name).__doc__ or "").strip().splitlines()[0]


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message was written for the user: the system's errors and Twinax's own, not a library's ValueError.

    A library's ValueError that nobody here turned into a message is a bug of ours: its traceback is what helps.
    """
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] == "twinax":
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").split(".")[0] == "twinax"
    return ours and isinstance(error, ValueError | FloatingPointError)
