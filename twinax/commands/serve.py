"""Serve a model over HTTP, with the OpenAI API: completions, chat, streaming, metrics.

PATH is a run folder (its newest good step), one of its steps, or a Hugging Face folder.

examples:
  twinax serve runs/demo
  twinax serve runs/demo --port 0 --max-running 16      # port 0: a free one, named when ready
  TWINAX_API_KEY=secret twinax serve hf-folder --host 0.0.0.0
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "demo", "prompt": "def ", "max_tokens": 32, "stream": true}'

Ctrl-C or SIGTERM lets the requests in flight finish, then stops. Needs the extra `serve`: pip install 'twinax[serve]'.
"""

from argparse import Namespace

from ..overrides import apply, existing
from ..parser import Parser

USAGE = "twinax serve PATH [--host ADDRESS] [--port N] [--api-key KEY] ..."


def add_arguments(parser: Parser) -> None:
    from ..serving.http.server import ServeConfig

    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    parser.add_dataclass(ServeConfig, skip=("model",), dashes=True)


def run(options: Namespace, given: set[str]) -> None:
    from ..serving.http.server import ServeConfig, serve

    path = existing(options.path, "The model")
    serve(apply(ServeConfig(model=str(path)), {name: getattr(options, name) for name in given}))
