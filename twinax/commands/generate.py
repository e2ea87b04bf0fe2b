"""Continue a prompt with a model, streaming the text to the terminal.

PATH is a run folder (its newest good step), one of its steps, or a Hugging Face folder.

examples:
  twinax generate runs/demo "def main("
  twinax generate runs/demo "import " --max-tokens 200 --temperature 0.7 --seed 1
  cat prompt.txt | twinax generate hf-folder -          # `-` reads the prompt from standard input
  twinax generate hf-folder "What is RoPE?" --chat      # through the model's chat template

The same prompt, options and --seed give the same text, here and from `twinax serve`.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass

from ..parser import Parser

USAGE = "twinax generate PATH PROMPT [--max-tokens N] [--temperature X] [--seed N] ..."


@dataclass(frozen=True)
class Sampling:
    """How to continue.

    Attributes:
        max_tokens: new tokens, at most.
        temperature: 0 takes the likeliest token always, 1 samples as trained.
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the likeliest tokens that together have probability p; 1: all.
        min_p: leave out tokens whose probability is below p times that of the likeliest; 0: none.
        stop: end before this text; several as a JSON list.
        seed: makes the text repeatable.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: str | tuple[str, ...] = ()
    seed: int | None = None


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; `-` reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    parser.add_argument(
        "--dtype", metavar="TYPE", type=str, default=None, help="float32 or bfloat16; by default what suits the device"
    )
    parser.add_dataclass(Sampling, dashes=True)


def run(options: Namespace, given: set[str]) -> None:
    from ..overrides import existing

    path = existing(options.path, "The model")
    from ..notebook import load

    model = load(path, dtype=options.dtype)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.chat:
        prompt = model.chat_prompt([{"role": "user", "content": prompt}])
    sampling = {name: getattr(options, name) for name in Sampling.__dataclass_fields__}
    stop = sampling.pop("stop")
    pieces = model.stream(prompt, stop=[stop] if isinstance(stop, str) else list(stop), **sampling)
    if not options.chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
