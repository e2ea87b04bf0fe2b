"""Serve a model over HTTP, with the OpenAI API: completions, chat, streaming, metrics.

PATH is a run folder (its newest good step), one of its steps, or a Hugging Face folder.

examples:
  twinax serve runs/demo
  twinax serve runs/demo --port 0 --max-running 16      # port 0: a free one, named when ready
  twinax serve runs/demo --config serve.json            # what `twinax tune serve` found
  TWINAX_API_KEY=secret twinax serve hf-folder --host 0.0.0.0
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "demo", "prompt": "def ", "max_tokens": 32, "stream": true}'

Ctrl-C or SIGTERM lets the requests in flight finish, then stops. Needs the extra `serve`: pip install 'twinax[serve]'.

An engine that dies or hangs is started again, and is given the requests that were in flight: a stream goes on where it
was. Requests that come meanwhile wait; /health says "restarting". After --max-restarts in ten minutes the server ends
with status 1. What an administrator may do is on a socket of its own, of this user alone (--admin-socket a.sock):
  curl --unix-socket a.sock http://a/status
  curl --unix-socket a.sock -X POST 'http://a/pause?hold=true'      # new requests wait; hold: those that run do too
  curl --unix-socket a.sock -X POST http://a/resume
  curl --unix-socket a.sock -X POST http://a/drain                  # take nothing new, end when all is done
  curl --unix-socket a.sock -X POST 'http://a/reload?path=/run/new' # other weights of the same model (see below)
  curl --unix-socket a.sock -X POST 'http://a/profile?folder=/tmp/p&seconds=5'

A reload cuts no answer: the old weights serve while the new ones are loaded. From then on new requests wait until all
earlier ones have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace

    from ..parser import Parser
    from ..serving.http.launch import LaunchedEngine

USAGE = "twinax serve PATH [--host ADDRESS] [--port N] [--api-key KEY] ..."


def add_arguments(parser: Parser) -> None:
    from ..serving.http.server import ServeConfig

    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    help_ = "JSON file of the settings below, as `twinax tune serve` writes it; options given beside it win"
    parser.add_argument("--config", metavar="FILE", default=None, help=help_)
    parser.add_dataclass(ServeConfig, skip=("model",), dashes=True)


@contextlib.contextmanager
def begin(words: list[str]) -> Iterator[LaunchedEngine | None]:
    """The engine process: it imports JAX while options are parsed here, and waits to be told them."""
    if {"-h", "--help"} & set(words):
        yield None
        return
    from ..serving.http.launch import LaunchedEngine

    with LaunchedEngine() as engine:
        yield engine


def run(options: Namespace, given: set[str], engine: LaunchedEngine) -> None:
    from ..overrides import apply, existing
    from ..parser import read_settings
    from ..serving.http.server import ServeConfig, serve

    path = existing(options.path, "The model")
    settings = {} if options.config is None else read_settings(options.config, ServeConfig, skip=("model",))
    serve(apply(ServeConfig(model=str(path)), settings | {name: getattr(options, name) for name in given}), engine)
