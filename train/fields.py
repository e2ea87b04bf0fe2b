"""What the frozen dataclasses of a recipe have in common: typed fields, and plain dicts there and back."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..layers.plain import fits, rule_of

Config = TypeVar("Config")


def check_types(config: Any, prefix: str = "") -> None:
    """Raises ValueError naming a field whose value is not of its annotated type, or is NaN or infinite.

    A whole number is also accepted for a float, but never True for 1.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not fits(value, hint):
            given = f"{value!r} ({type(value).__name__})"
            raise ValueError(f"{prefix}{field.name} is {rule_of(hint, value)}; got {given}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{field.name} is a finite number; got {value!r}.")


def check_rules(config: Any, prefix: str, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ValueError for the first of `rules`, {field: (does it hold, the rule in words)}, that does not hold."""
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{prefix}{name} is {rule}; got {getattr(config, name)!r}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values for JSON; tuples become lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Reads back `to_dict`; ValueError names an unknown key and the nearest right one."""
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{prefix}{key} is not a setting{nearest(key, known)}.")
        if dataclasses.is_dataclass(hints[key]):
            value = from_dict(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def names(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    found = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(typing.cast(Any, kind)):
        hint = hints[field.name]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found += names(hint, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return found


def closest(name: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` most like `name`, None when none is like it."""
    return next(iter(difflib.get_close_matches(name, list(choices), 1)), None)


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error that names the closest choice, empty when none is close."""
    near = closest(name, choices)
    return f"; the nearest is {near!r}" if near else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value
