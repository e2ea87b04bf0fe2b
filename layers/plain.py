"""Configs from the plain values of a JSON file: every key known, every value of its field's type."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

Config = TypeVar("Config")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. A whole number is also a float, but True is no number.

    Whole numbers have 64 bits at most: no size needs more, and larger ones overflow wherever they are used.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int):
        return hint in (int, float) and not is_wide(value)
    return isinstance(value, hint)


def is_wide(value: Any) -> bool:
    """Whether a value is a whole number of more than 64 bits."""
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def rule_of(hint: Any, value: Any) -> str:
    """What a value that does not fit an annotated type should have been, in words."""
    name = str(hint) if typing.get_args(hint) else hint.__name__
    return f"of type {name}{', of 64 bits at most' if is_wide(value) else ''}"


def keys(values: Any, what: str) -> dict[str, Any]:
    """A copy of `values`; ValueError if they are no dict."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is an object of keys and values; got {values!r}.")
    return dict(values)


def read(kind: type[Config], values: Any, what: str) -> Config:
    """`kind(**values)`, of a dataclass; lists are tuples.

    Raises ValueError, which calls it `what`, where a key is unknown or missing, or a value is of another type than its
    field, or no finite number.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in keys(values, what).items()}
    fields = dataclasses.fields(typing.cast(Any, kind))
    known = sorted(field.name for field in fields)
    unknown = sorted(set(values) - set(known))
    missing = sorted(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING is field.default_factory and field.name not in values
    )
    if unknown or missing:
        raise ValueError(
            f"{what} has the keys {known}; unknown here: {unknown}, missing: {missing}. It may come from "
            "another version of Twinax."
        )
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if not fits(value, hints[key]):
            raise ValueError(f"{what}: {key} is {rule_of(hints[key], value)}; got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what}: {key} is a finite number; got {value!r}.")
    return kind(**values)
