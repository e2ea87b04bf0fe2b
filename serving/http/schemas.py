"""JSON Schema of what the parsers of fields accept, kept with each of them, so that /openapi.json says what is done.

A schema may allow more than its parser does (which looks at the model's limits too), but never less: whatever breaks
the schema is answered with an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Schema = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}


def described(schema: Schema | Callable[[], Schema]) -> Callable[[F], F]:
    """Decorates a parser with its schema, or with a function that gives it where it needs what is defined later."""

    def attach(parse: F) -> F:
        setattr(parse, "schema", schema)  # noqa: B010 a function has no such attribute to a type checker
        return parse

    return attach


def schema_of(parse: Callable[..., Any]) -> Schema:
    """Anything, for a parser without one."""
    schema: Any = getattr(parse, "schema", {})
    return schema if isinstance(schema, dict) else schema()


def array(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    limits = {name: value for name, value in {"minItems": low, "maxItems": high}.items() if value}
    return {"type": "array", "items": items, **limits}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def record(*, closed: bool = False, optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these properties, all required but the `optional` ones; `closed`: and no others."""
    required = [name for name in properties if name not in optional]
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {}) | ({"additionalProperties": False} if closed else {})


def nullable(schema: Schema) -> Schema:
    if not schema:
        return schema
    if "enum" in schema:
        return schema if None in schema["enum"] else schema | {"enum": [*schema["enum"], None]}
    return any_of(*schema["anyOf"], {"type": "null"}) if set(schema) == {"anyOf"} else any_of(schema, {"type": "null"})
