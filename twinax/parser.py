"""The argument parser: typed by jsonargparse, with errors that name the nearest right word."""

import argparse
import dataclasses
import json
import re
from typing import Any, NoReturn

import jsonargparse

from .overrides import (
    Leaf,
    UsageError,
    describe,
    did_you_mean,
    existing,
    is_wide,
    leaves,
    metavar,
    parsed_as,
    shown,
    spell,
    wants_text,
)


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of descriptions, which hold examples; says defaults only where there is one."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 34, "width": 120, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip(".")
        default = action.default
        flag = action.nargs == 0
        if action.option_strings and default not in (None, "", (), argparse.SUPPRESS) and not flag:
            said = ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
            said = said.lower() if isinstance(default, bool) else said
            text += f" (default: {said})".replace("%", "%%")
        return text


def read_settings(path: str, cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of a dataclass from a JSON file, checked as on the command line. Raises UsageError."""
    try:
        found = json.loads(existing(path, "The file of settings").read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON that can be read: {error}.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a JSON object with a value for each setting, not {type(found).__name__}.")
    parser = Parser("settings", "")
    parser.add_dataclass(cls, skip=skip)
    types = {leaf.path: leaf.type for leaf in parser.leaves.values()}
    for name, value in found.items():
        if name not in types:
            raise UsageError(f"{path} has the unknown setting {name!r}.{did_you_mean(name, types)}")
        if not isinstance(value, str) and wants_text(types[name], value):
            raise UsageError(f"{path}: {name} takes {describe(types[name])}; got {shown(value)}.")
    try:
        options, given = parser.parse(
            [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in found.items()]
        )
    except UsageError as error:
        raise UsageError(f"{path}: {str(error).removeprefix('--')}") from None
    return {name: getattr(options, name) for name in given}


class Parser(jsonargparse.ArgumentParser):
    """One command's parser. Raises UsageError where argparse would print and exit."""

    def __init__(self, prog: str, description: str, usage: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            usage=usage,
            formatter_class=_Formatter,
            allow_abbrev=False,
            default_env=False,
        )
        self.leaves: dict[str, Leaf] = {}

    def add_dataclass(self, cls: type, skip: tuple[str, ...] = (), dashes: bool = False) -> None:
        """One option for each leaf of a dataclass, grouped by nested dataclass; `dashes` writes `--max-running`."""
        groups: dict[str, Any] = {}
        for leaf in leaves(cls):
            if leaf.path in skip:
                continue
            head = leaf.path.rpartition(".")[0]
            if head not in groups:
                groups[head] = self.add_argument_group(head) if head else self
            default = None if leaf.default is dataclasses.MISSING else leaf.default
            flag = f"--{leaf.path.replace('_', '-')}" if dashes else f"--{leaf.path}"
            text = leaf.help.replace("%", "%%") or None
            groups[head].add_argument(
                flag, type=parsed_as(leaf.type), default=default, help=text, metavar=metavar(leaf.type)
            )
            self.leaves[flag] = leaf

    def parse(self, words: list[str]) -> tuple[argparse.Namespace, set[str]]:
        """The options, and the dotted paths of the dataclass's fields that were given. Raises UsageError."""
        words, given = self._spelled(words)
        return self.parse_args(words), given

    def _spelled(self, words: list[str]) -> tuple[list[str], set[str]]:
        """Lists as JSON, a bare boolean flag as true."""
        spelled: list[str] = []
        given: set[str] = set()
        queue = list(words)
        while queue:
            word = queue.pop(0)
            if word == "--":
                spelled += [word, *queue]
                break
            flag, equals, value = word.partition("=")
            # `--max_running` and `--max-running` are the same.
            flag = next((f for f in (flag, flag[:2] + flag[2:].replace("_", "-")) if f in self.leaves), flag)
            flag = next((f for f in (flag, flag[:2] + flag[2:].replace("-", "_")) if f in self.leaves), flag)
            leaf = self.leaves.get(flag)
            if leaf is None:
                spelled.append(word)
                continue
            given.add(leaf.path)
            if not equals:
                if leaf.type is bool and (not queue or queue[0].startswith("-")):
                    value = "true"
                elif not queue or queue[0] in self.leaves:
                    raise UsageError(f"{flag} takes {describe(leaf.type)}, but no value was given.")
                else:
                    value = queue.pop(0)
            if is_wide(leaf.type, value):
                raise UsageError(f"{flag} takes {describe(leaf.type)}, and no more than 64 bits; got {shown(value)}.")
            spelled.append(f"{flag}={spell(leaf.type, value)}")
        return spelled, given

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(self._explain(message)) from None

    def _explain(self, message: str) -> str:
        wrong = re.match(r"(?:Parser key|Option|Argument) ['\"]?([\w.\-]+)['\"]?:\s*(.*)", message, re.DOTALL)
        if wrong:
            return self._wrong_value(wrong[1], wrong[2])
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message, re.IGNORECASE)
        if choice:
            choices = re.findall(r"[\w.\-]+", choice[3])
            near = did_you_mean(choice[2], choices)
            name = choice[1] if choice[1].startswith("-") else choice[1].upper()
            return f"{name} is one of {', '.join(choices)}; got {choice[2]!r}.{near}"
        missing = re.match(r"the following arguments are required: (.*)", message, re.IGNORECASE)
        if missing:
            flags = {action.dest: action.option_strings for action in self._actions}
            names = [(flags.get(name) or [name.upper()])[0] for name in missing[1].split(", ")]
            return f"{' and '.join(names)} must be given."
        unknown = re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE)
        if unknown:
            flag = unknown[1].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            if not flag.startswith("-"):
                return f"Unexpected argument {unknown[1]!r}: quote a text that has spaces in it."
            return f"Unknown option {flag}.{did_you_mean(flag.lstrip('-'), [k.lstrip('-') for k in known], '--')}"
        return message[:1].upper() + message[1:] + ("" if message.endswith(".") else ".")

    def _wrong_value(self, key: str, reason: str) -> str:
        given = re.search(r"(?:Got|Given) value: *(\S.*)", reason)
        value = given[1].strip() if given else "nothing"
        action = next((action for action in self._actions if action.dest == key), None)
        flag = action.option_strings[0] if action and action.option_strings else key.upper()
        leaf = self.leaves.get(flag)
        hint = leaf.type if leaf else getattr(action, "_typehint", None) or getattr(action, "type", None)
        choices = [str(choice) for choice in getattr(hint, "__args__", ()) if isinstance(choice, str)]
        near = did_you_mean(value, choices) if choices else ""
        return f"{flag} takes {describe(hint)}; got {shown(value)}.{near}"
