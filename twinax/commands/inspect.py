"""Say what a folder holds: model, tokenizer, step, data, recipe; and whether every byte of it is as written.
With --chip, what the model needs at least to be trained and served there. The exit status is 1 when something is odd.

examples:
  twinax inspect runs/demo
  twinax inspect runs/demo/checkpoints/step_00000200 --verify
  twinax inspect hf-folder --chip v5e
  twinax inspect hf-folder --json | jq .parameters
"""

import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ..parser import Parser

if TYPE_CHECKING:
    from ..planner.needs import Needs

USAGE = "twinax inspect PATH [--verify] [--chip NAME] [--json]"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    parser.add_argument("--verify", action="store_true", help="also compare every file with its checksum")
    parser.add_argument(
        "--chip", metavar="NAME", default=None, help="say what the model needs on v5e, v5p, v6e, h100, h200, ..."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: Namespace, given: set[str]) -> int:
    from ..overrides import existing

    path = existing(options.path, "The path")
    from ..checkpoints.inspect import inspect, render

    if options.chip:
        from ..planner.chips import find_chip

        find_chip(options.chip)  # a wrong name is said before anything is read
    found = inspect(path, verify=options.verify)
    needed = _needs(found, options.chip)
    if options.json:
        print(json.dumps({**found, **({"needs": needed.to_dict()} if needed else {})}, indent=2, default=str))
    else:
        print("\n".join([render(found), *(needed.lines() if needed else ())]))
    return 1 if found["odd"] else 0


def _needs(found: dict[str, Any], chip: str | None) -> "Needs | None":
    if not chip or "model" not in found:
        return None
    from ..models.config import DecoderConfig
    from ..planner.needs import needs

    return needs(DecoderConfig.from_dict(found["model"]), chip)
