"""Convert a Twinax checkpoint to a Hugging Face folder, or the other way round.

SOURCE decides the direction: a run folder (its newest good step) or one of its steps becomes a Hugging Face folder
(config.json, safetensors, tokenizer files); a Hugging Face folder becomes a Twinax step. The numbers stay the same, bit
for bit, unless --dtype changes them. TARGET appears complete and checked, or not at all: it is read again and compared.
Interrupted or killed, the same command goes on where it was. Memory stays small, whatever the size of the model.

examples:
  twinax convert runs/demo exported/
  twinax convert runs/demo/checkpoints/step_00000200 exported/ --dtype bfloat16
  twinax convert hf-folder imported/step_00000000
  twinax convert hf-folder imported/step_00000000 --plan fsdp=8    # each device's part in files of its own
"""

import sys
from argparse import Namespace
from pathlib import Path

from ..parser import Parser

USAGE = "twinax convert SOURCE TARGET [--dtype TYPE] [--plan PLAN] [--overwrite] [--max-shard-bytes N] [--quiet]"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="run folder, step folder or Hugging Face folder")
    parser.add_argument("target", metavar="TARGET", help="folder to make")
    parser.add_argument(
        "--dtype", metavar="TYPE", default=None, help="float32, bfloat16 or float16; by default what is stored"
    )
    parser.add_argument(
        "--plan", metavar="PLAN", default=None, help="cut a step's files as this plan cuts the parameters: fsdp=8"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET when it holds a model")
    parser.add_argument(
        "--max-shard-bytes", metavar="N", type=int, default=5_000_000_000, help="bytes of a safetensors file, at most"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: Namespace, given: set[str]) -> None:
    from ..overrides import existing

    source = existing(options.source, "The source")
    from ..checkpoints.convert import convert

    try:
        report = convert(
            source,
            options.target,
            overwrite=options.overwrite,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_bytes,
            plan=options.plan,
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        from ..checkpoints.files import unfinished

        begun = unfinished(Path(options.target).expanduser().absolute())
        if begun.exists():
            print(f"\nwhat is done is kept in {begun}: the same command goes on from there", file=sys.stderr)
        raise
    kind = "a Hugging Face folder" if report.direction == "to_hugging_face" else "a Twinax step"
    print(f"wrote {report.target}: {kind}, {report.parameters:,} parameters in {report.tensors} tensors")
    print(f"  {', '.join(report.dtypes)}, {report.bytes / 1e6:,.1f} MB in {len(report.files)} files")
    for note in report.notes:
        print(f"  note: {note}")
