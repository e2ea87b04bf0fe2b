"""Train a tokenizer on text files.

examples:
  twinax tokenizer train docs/ --vocab-size 8192 --output tokenizer/
  twinax tokenizer train 'corpus/*.jsonl.gz' more.txt --vocab-size 32000 --output tokenizer/
  twinax train recipe.py --data.tokenizer tokenizer/      # then use it

It writes tokenizer.json and tokenizer_config.json, as Hugging Face has them: a byte-level BPE that can encode any text.
"""

from argparse import Namespace

from ..parser import Parser

USAGE = "twinax tokenizer train FILES [FILES ...] --vocab-size N --output FOLDER"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", metavar="train", choices=["train"], help="what to do")
    parser.add_argument("files", metavar="FILES", nargs="+", help="text or JSONL, plain or gzip; folders; patterns")
    size_help = "tokens, with the 256 bytes and 3 special ones"
    parser.add_argument("--vocab-size", type=int, metavar="N", required=True, help=size_help)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder to write, made if missing")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="the key of the text in JSONL files")


def run(options: Namespace, given: set[str]) -> None:
    from ..train.data.bpe import train_bpe
    from ..train.data.config import DataConfig

    config = DataConfig(path=tuple(options.files), text_key=options.text_key)
    tokenizer = train_bpe(config, options.vocab_size, options.output)
    print(f"wrote {options.output}: {tokenizer.vocab_size} tokens")
