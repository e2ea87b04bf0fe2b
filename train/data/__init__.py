"""Data: text files to tokens, cached once, to packed rows that a global index addresses.

`open_dataset(config, tokenizer, sequence_length, seed)` gives a `Dataset`; `dataset.batch(step, batch_size)` is a pure
function of the seed and the step. No jax here.
"""

from .bpe import train_bpe
from .config import DataConfig, DataError, load_tokenizer
from .dataset import Batch, Dataset, Part, Row, hash_text, open_dataset
from .prefetch import Prefetch, batches
from .statistics import unigram_entropy

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Dataset",
    "Part",
    "Prefetch",
    "Row",
    "batches",
    "hash_text",
    "load_tokenizer",
    "open_dataset",
    "train_bpe",
    "unigram_entropy",
]
