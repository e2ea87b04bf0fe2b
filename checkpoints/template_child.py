"""The process in which chat templates run: `python -m twinax.checkpoints.template_child CPU_SECONDS`.

A template comes with a model, so it is a program by a stranger. It runs in Jinja's immutable sandbox, and sees plain
JSON values only: no objects, hence no methods but those of str, int, float, list and dict. A sandbox in Python bounds
neither time nor memory; a process does both.

It is asked {"template", "context"}, and answers {"text"} or {"error"}, which goes on "the chat template ...". With
{"last"} it ends.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .chat_template import receive, send

MEMORY = 512 << 20  # bytes of address space, Python's own 40 MB included


class TemplateFailed(Exception):
    """A template did not compile, refused the conversation, or failed."""


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
        raise TemplateFailed(f"is not valid Jinja{line}: {error.message}") from error


def render(template: str, context: dict[str, Any]) -> str:
    """The text of a template. Raises TemplateFailed with what is to be said after "the chat template"."""
    try:
        return _compile(template).render(**context)
    except jinja2.TemplateError as error:
        raise TemplateFailed(f"refused this conversation: {error.message}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a program by a stranger may do
        raise TemplateFailed(
            f"failed on this conversation ({type(error).__name__}: {error}); "
            "check the roles and the contents of the messages against the template"
        ) from error


def limit() -> None:
    """For the whole process: memory, and no file may be written."""
    with contextlib.suppress(ValueError, OSError):  # macOS knows the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def allow_time(more: int) -> None:
    """The process is killed when so many more seconds of CPU time (and less than one beyond) are over."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + more
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end of the pipe ends this
    limit()
    while (request := receive(sys.stdin.buffer)) is not None:
        allow_time(int(sys.argv[1]))
        try:
            answer = {"text": render(request["template"], request["context"])}
            send(sys.stdout.buffer, answer)
        except TemplateFailed as error:
            send(sys.stdout.buffer, {"error": str(error)})
        except MemoryError:
            error = f"needs more than {MEMORY >> 20} MB of memory on this conversation"
            send(sys.stdout.buffer, {"error": error, "last": True})
            return  # what else failed in here is not known


if __name__ == "__main__":
    main()
