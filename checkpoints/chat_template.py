"""Chat templates: Jinja in a sandbox, with what Hugging Face gives them, so that the same template gives the same text.

A template comes with a model, so it is a program by a stranger. It runs in Jinja's immutable sandbox, and sees plain
JSON values only: no objects, hence no methods but those of str, int, float, list and dict.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class ChatTemplateError(ValueError):
    """There is no chat template, or it does not compile, or it refused the conversation."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` for templates; a function object would carry attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore, which would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace in a chat template may not hold {name!r}: names may not begin with '_'")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ChatTemplateError(f"the chat template is not valid Jinja{line}: {error.message}") from error


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise ChatTemplateError(
        f"a chat template takes JSON values (text, numbers, lists, objects), but {where} is a {type(value).__name__}"
    )


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Args:
      source: the Jinja template.
      messages: dicts with "role" and "content", as in the OpenAI API.
      tools: JSON schemas of functions, or None.
      add_generation_prompt: whether to open the assistant's turn at the end.
      variables: more names for the template (`bos_token`, `eos_token`, `documents`, a template's own switches).

    Raises:
      ChatTemplateError: the template does not compile, refuses the conversation (`raise_exception`), or fails in it.
    """
    context: dict[str, Any] = {"documents": None} | {name: _plain(value, name) for name, value in variables.items()}
    context |= {"messages": _plain(messages, "messages"), "tools": _plain(tools, "tools")}
    context["add_generation_prompt"] = add_generation_prompt
    try:
        return _compile(source).render(**context)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template refused this conversation: {error.message}") from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ChatTemplateError):
            raise
        raise ChatTemplateError(
            f"the chat template failed on this conversation ({type(error).__name__}: {error}); "
            "check the roles and the contents of the messages against the template"
        ) from error
