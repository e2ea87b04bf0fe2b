"""Training a tokenizer on the files that a model will be trained on."""

import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...checkpoints.detokenize import byte_alphabet
from ...checkpoints.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError
from .cache import scan_all
from .config import DataConfig
from .documents import read_documents
from .files import find_files


def train_bpe(
    files: str | tuple[str, ...] | DataConfig, vocab_size: int, out_folder: str | os.PathLike[str]
) -> Tokenizer:
    """Trains a byte-level BPE and writes it as a Hugging Face tokenizer folder.

    Args:
      files: a file, folder or pattern, or several, as `DataConfig.path`; or a whole DataConfig.
      vocab_size: counts the 256 bytes and our three special tokens, so 259 at least. A small text may not give so many
        merges; `.vocab_size` of the result says how many there are.
      out_folder: made if missing; gets tokenizer.json and tokenizer_config.json.

    Raises:
      DataError: no usable text. TokenizerError: `vocab_size` too small, or the folder cannot be written.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise TokenizerError(
            f"a BPE vocabulary holds the 256 bytes and {len(SPECIAL_TOKENS)} special tokens, so vocab_size must be "
            f"at least {least}, not {vocab_size}"
        )
    config = files if isinstance(files, DataConfig) else DataConfig(path=files)
    tokenizer = bpe_from_texts(_texts(config), vocab_size)
    try:
        tokenizer.save(out_folder)
    except OSError as error:
        raise TokenizerError(f"cannot write the tokenizer to {out_folder}: {error.strerror or error}") from error
    return Tokenizer.load(Path(out_folder))


def bpe_from_texts(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """As `train_bpe`, from texts in memory, writing nothing."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False, initial_alphabet=list(byte_alphabet())
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer.from_backend(backend)


def _texts(config: DataConfig) -> Iterator[str]:
    good = scan_all(find_files(config))[0]
    for source in good:
        for document in read_documents(source, config.text_key):
            for piece in document:
                yield piece.decode(errors="replace")
