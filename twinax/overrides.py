"""Dataclasses as command-line options: `--optimizer.lr 3e-4` sets `recipe.optimizer.lr`.

Every leaf of a (nested) dataclass becomes one option named by its dotted path. Its help is the field's entry in the
"Attributes:" section of the class's docstring.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


class UsageError(Exception):
    """The command line is wrong; the message says what was meant, most likely."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One option: its dotted path, type, default (MISSING when there is none) and help."""

    path: str
    type: Any
    default: Any
    help: str


def leaves(cls: type, prefix: str = "") -> list[Leaf]:
    """The options of a dataclass, in the order of its fields, nested dataclasses in their place."""
    hints = typing.get_type_hints(cls)
    texts = attribute_texts(cls)
    found: list[Leaf] = []
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], prefix + field.name
        if not field.init:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += leaves(hint, f"{path}.")
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(Leaf(path, hint, default, texts.get(field.name, "")))
    return found


def apply(instance: T, values: Mapping[str, Any]) -> T:
    """A copy of a (nested, frozen) dataclass with the fields at the dotted paths replaced."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        first, _, rest = path.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    for name, inner in nested.items():
        own[name] = apply(getattr(instance, name), inner)
    return dataclasses.replace(instance, **own)  # type: ignore[type-var]


def attribute_texts(cls: type) -> dict[str, str]:
    """Field name to text, from the "Attributes:" section of a docstring; `a, b: text` serves both."""
    _, _, section = (cls.__doc__ or "").partition("Attributes:")
    texts: dict[str, str] = {}
    names: list[str] = []
    indent = 0
    for line in section.splitlines():
        entry = re.match(r"\s*((?:\w+, )*\w+): (.*)", line)
        # A continuation line may hold a colon too; it is indented more than the entry that it continues.
        if entry and (not names or _indent(line) <= indent):
            names, indent = entry[1].split(", "), _indent(line)
            texts |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        elif names:
            break
    return texts


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def describe(hint: Any) -> str:
    """A type in words, as in "takes ..."."""
    options = _members(hint)
    if type(None) in options:
        return f"{describe_all(option for option in options if option is not type(None))}, or null"
    return describe_all(options)


def describe_all(options: Iterable[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    said = []
    for option in options:
        if typing.get_origin(option) is Literal:
            said.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        elif is_list(option):
            said.append("a list such as a,b")
        else:
            said.append(words.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(dict.fromkeys(said))


def metavar(hint: Any) -> str:
    """A type as a word of the usage line."""
    options = [option for option in _members(hint) if option is not type(None)]
    first = options[0] if options else str
    if typing.get_origin(first) is Literal:
        return "|".join(map(str, typing.get_args(first)))
    return {int: "N", float: "X", bool: "true|false"}.get(first, "A,B" if is_list(first) else "TEXT")


def parsed_as(hint: Any) -> Any:
    """The type for the parser. It takes the first member of a union that fits, so text, which always fits, is last."""
    options = _members(hint)
    return Union[tuple(sorted(options, key=lambda option: option is str))] if len(options) > 1 else hint  # noqa: UP007


def is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def spell(hint: Any, text: str) -> str:
    """A list may be written `a,b` on the command line; the parser wants JSON."""
    if is_list(hint) and not text.lstrip().startswith("["):
        return json.dumps(text.split(",")) if typing.get_args(hint)[0] is str else f"[{text}]"
    return text


def is_wide(hint: Any, text: str) -> bool:
    """Whether a number is asked for, and the text is a whole one of more than 64 bits, which nothing has a use for."""
    if not {int, float} & set(_members(hint)) or not re.fullmatch(r"[+-]?\d{19,}", text.strip()):
        return False
    return len(text) > 1000 or not -(2**63) <= int(text) < 2**63


def wants_text(hint: Any, value: Any) -> bool:
    """Whether nothing but a text will do, and the value, from a file, is not even null where that is allowed."""
    options = set(_members(hint))
    return options <= {str, type(None)} and not (value is None and type(None) in options)


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `word` was most likely meant to be, best first; a right last component counts, too."""
    known = list(known)
    last = word.rpartition(".")[2]

    def likeness(name: str) -> float:
        end = name.rpartition(".")[2]
        whole, ends = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in ((word, name), (last, end)))
        return max(whole, 0.95 * ends)

    scores = {name: likeness(name) for name in known}
    best = max(scores.values(), default=0.0)
    close = [name for name in known if scores[name] >= max(0.6, best - 0.03)]
    return sorted(close, key=lambda name: -scores[name])[:3]


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """" Did you mean ...?", or nothing when nothing is near."""
    found = [f"{prefix}{name}" for name in nearest(word, known)]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def existing(path: str, what: str) -> Path:
    """The path, when it exists; otherwise a UsageError that names the nearest one that does."""
    found = Path(path).expanduser()
    try:
        if found.exists():
            return found
        at = found
        while not at.parent.exists():
            at = at.parent
        names = [entry.name for entry in at.parent.iterdir()] if at.parent.is_dir() else []
    except OSError as error:
        raise UsageError(f"{what} {path} can't be reached: {error.strerror}.") from error
    close = difflib.get_close_matches(at.name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(at.parent / name) for name in close)}?" if close else ""
    raise UsageError(f"{what} {path} does not exist.{hint}")
