"""What the schema of a function says of one parameter whose value is written as plain text.

Such a value is a text without quotes, or else JSON. Where a schema takes both, what reads like JSON is JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..grammar import WHITESPACE, escape

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
# What does not say which values are right; a format is a hint, as JSON schema has it by default.
_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "format"}
_NOTES |= {"contentEncoding", "contentMediaType"}
_TEXT_RULES = {"type", "minLength", "maxLength", "pattern"}
_UNIONS = ("anyOf", "oneOf")
_STEPS = 5_000  # schemas that are looked at, of one function: references make long ways
_ANY = "/(?s:.*)/"
# Whatever begins like JSON that is no text: a lexer follows one of both.
_LIKE_JSON = r"/\s*([\[{0-9]|-[0-9]|true|false|null|True|False|None)(?s:.*)/"


class ParameterSchemas:
    """The parameters of one function. `schema`: of all of them, an object."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._steps = 0

    def types(self, name: str) -> frozenset[str]:
        """The JSON types that a parameter may have; all, where that is not said or can't be told."""
        properties = self._root.get("properties")
        try:
            return self._types(properties.get(name, {}) if isinstance(properties, dict) else {})
        except (ValueError, RecursionError):
            return TYPES

    def lark(self, rule: str, schema: Any, end: str) -> list[str]:
        """Lark for `rule`: a value, and behind it the text `end`, without which its texts are.

        Raises ValueError for what can't be kept to.
        """
        try:
            return self._lark(rule, schema, end)
        except RecursionError:
            raise ValueError("schemas nested too deeply, or references that go round in a circle") from None

    def _lark(self, rule: str, schema: Any, end: str) -> list[str]:
        types, name, stop = self._types(schema), rule.upper(), json.dumps(end)
        rest, forms, lines = types - {"string"}, [], []
        if "string" in types:
            texts = list(dict.fromkeys(self._texts(schema)))
            lines += [f"{name}_{n}: {text}" for n, text in enumerate(texts)]
            one = " | ".join(f"{name}_{n}" for n in range(len(texts)))
            unlike = f" & ~{_LIKE_JSON}" if rest else ""
            lines.append(f"{name}: ({one}) & ~/(?s:.*){_regex(end.strip())}(?s:.*)/{unlike}")
            lines.append(f"{rule}_text[lazy]: {name} {stop}")
            forms.append(f"{rule}_text")
        if rest:
            lines.append(f"{rule}_json: {json_rule(self._json(schema))}")
            forms.append(f"{rule}_json {stop}")
        if not forms:
            raise ValueError("a parameter that no value is right for")
        return [f"{rule}: {' | '.join(forms)}", *lines]

    def _json(self, schema: Any) -> dict[str, Any]:
        """The schema of all values that are no texts, on its own."""
        found = self._without_texts(schema)
        _check_references([found, self._root.get("$defs"), self._root.get("definitions")])
        return {**found, **{key: self._root[key] for key in ("$defs", "definitions") if key in self._root}}

    def _types(self, schema: Any) -> frozenset[str]:
        self._step()
        if not isinstance(schema, dict):
            return frozenset() if schema is False else TYPES
        found = TYPES
        if isinstance(kinds := schema.get("type"), str | list):
            found &= frozenset([kinds] if isinstance(kinds, str) else filter(_is_text, kinds))
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if isinstance(values, list):
                found &= frozenset(map(_type_of, values))
        if "$ref" in schema:
            found &= self._types(self._referred(schema["$ref"]))
        for name in _UNIONS:
            if name in schema:
                found &= frozenset.union(*map(self._types, _list(schema, name)))
        if "allOf" in schema:
            found &= frozenset.intersection(*map(self._types, _list(schema, "allOf")))
        return found

    def _texts(self, schema: Any) -> list[str]:
        """Lark, as parts of terminals, for the texts that a schema takes."""
        types = self._types(schema)
        if not isinstance(schema, dict):
            return [_ANY]
        if "string" not in types:
            return []
        own = {key: value for key, value in schema.items() if key not in _NOTES}
        for name, values in (("const", [own.get("const")]), ("enum", own.get("enum"))):
            if name in own:
                _only(own, {name, "type"})
                return [f"/{_regex(value)}/" for value in _list({name: values}, name) if isinstance(value, str)]
        if "$ref" in own:
            _only(own, {"$ref", "type"})
            return self._texts(self._referred(own["$ref"]))
        for name in (*_UNIONS, "allOf"):
            if name in own:
                _only(own, {name, "type"})
                parts = _list(own, name)
                if name == "allOf" and len(parts) > 1:
                    raise ValueError("allOf, of several schemas")
                return [text for one in parts for text in self._texts(one)]
        if types == {"string"}:
            _only(own, _TEXT_RULES)
        return [_text(own)]

    def _without_texts(self, schema: Any) -> dict[str, Any]:
        types = self._types(schema)
        if isinstance(schema, dict) and "string" not in types:
            return schema
        if isinstance(schema, dict):
            if "$ref" in schema:
                return self._without_texts(self._referred(schema["$ref"]))
            for name in (*_UNIONS, "allOf"):
                if name in schema:
                    parts = [one for one in _list(schema, name) if self._types(one) != {"string"}]
                    return {name: list(map(self._without_texts, parts))}
            if "enum" in schema:
                return {"enum": [value for value in schema["enum"] if not isinstance(value, str)]}
        rest = types - {"string"}
        return (schema if isinstance(schema, dict) else {}) | {
            "type": sorted(rest - ({"integer"} if "number" in rest else set()))
        }

    def _referred(self, reference: Any) -> Any:
        match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", reference) if isinstance(reference, str) else None
        found = self._root.get(match[1]) if match else None
        if match is None or not isinstance(found, dict) or match[2] not in found:
            raise ValueError(f"the reference {reference!r}, which is not one to '#/$defs/...' of the function's schema")
        return found[match[2]]

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _STEPS:
            raise ValueError(f"more than {_STEPS} schemas, those that are referred to included")


def json_rule(schema: dict[str, Any]) -> str:
    """Lark for a value in JSON."""
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}})


def _text(own: dict[str, Any]) -> str:
    least, most = own.get("minLength", 0), own.get("maxLength", "")
    if not isinstance(least, int) or not isinstance(most, int | str):
        raise ValueError("a length that is no integer")
    terminal = f"/(?s:.{{{least},{most}}})/" if least or most != "" else _ANY
    if "pattern" not in own:
        return terminal
    pattern = own["pattern"]
    if not isinstance(pattern, str):
        raise ValueError("a pattern that is no text")
    begins, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$\Z", pattern))
    inner = pattern[begins : len(pattern) - ends]
    if "|" in inner and (begins or ends):
        raise ValueError(f"the pattern {pattern!r}, with an anchor and a choice")
    # Within slashes, on one line.
    written = re.sub(r"(\\[\s\S])|/", lambda found: found[1] or r"\/", inner).replace("\n", r"\n")
    return f"{terminal} & /{'' if begins else '(?s:.*)'}({written}){'' if ends else '(?s:.*)'}/"


def _check_references(value: Any) -> None:
    """Raises ValueError where one leads out of the definitions."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            reference = one.get("$ref")
            if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
                raise ValueError(f"the reference {reference!r}, which is not one to '#/$defs/...'")
            stack += one.values()
        elif isinstance(one, list):
            stack += one


def _list(schema: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(schema[name], list) or not schema[name]:
        raise ValueError(f"{name} without a list of what it takes")
    return schema[name]


def _only(own: dict[str, Any], known: set[str]) -> None:
    if others := sorted(set(own) - known - {"$defs", "definitions"}):
        raise ValueError(f"{', '.join(others)}, of a text")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _regex(text: str) -> str:
    return escape(text).replace("/", r"\/")
