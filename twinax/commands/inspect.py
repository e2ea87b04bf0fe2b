"""Say what a folder holds: model, tokenizer, step, data, recipe; and whether every byte of it is as written.
The exit status is 1 when something is odd about it.

examples:
  twinax inspect runs/demo
  twinax inspect runs/demo/checkpoints/step_00000200 --verify
  twinax inspect hf-folder --json | jq .parameters
"""

import json
from argparse import Namespace

from ..parser import Parser

USAGE = "twinax inspect PATH [--verify] [--json]"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    parser.add_argument("--verify", action="store_true", help="also compare every file with its checksum")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: Namespace, given: set[str]) -> int:
    from ..overrides import existing

    path = existing(options.path, "The path")
    from ..checkpoints.inspect import inspect, render

    found = inspect(path, verify=options.verify)
    print(json.dumps(found, indent=2, default=str) if options.json else render(found))
    return 1 if found["odd"] else 0
