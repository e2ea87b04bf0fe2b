"""The commands of `twinax`, one file each; the file's name is the command's.

A command's module holds, and imports nothing heavy before `run`:
- a docstring: its first line is the summary in `twinax --help`, all of it the beginning of `twinax NAME --help`;
- `USAGE`: the usage line, with what matters most;
- `add_arguments(parser)`: its options;
- `run(options, given)`: does it, and may return an exit status; `given` names the dataclass's settings that were given.
  A ValueError or OSError of ours is printed as one message;
- `begin(words)`, where there is one: a context around all of that, for what takes long and needs no options. Its value
  is a third argument of `run`.
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """The names of all commands."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of one command."""
    return importlib.import_module(f"{__name__}.{name}")
