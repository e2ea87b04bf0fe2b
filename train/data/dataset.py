"""Packed rows, addressed by a global index.

T = sequence length, B = rows in a batch.

- The documents of a split, one after the other, are cut into rows of T tokens; the last row is padded.
- A token's target is the next token of its document, also across the end of a row, so every token but the first of each
  document is a target exactly once in an epoch. The last token of a document has weight 0.
- Training row `index` is row `permutation(index % rows)` of epoch `index // rows`; the permutation depends on the seed
  and the epoch only. Evaluation rows are in order.
- Step s of batch size B takes the indices s*B to s*B+B-1, whatever the number of hosts, so the step is all that a
  checkpoint needs to remember.
- Segment ids count documents within a row from 1 (0 is padding); positions restart at 0 in each segment.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ...checkpoints.tokenizer import Tokenizer
from .cache import TokenCache, open_cache
from .config import DataConfig, DataError
from .order import permute
from .split import Split, split_documents


@dataclass(frozen=True)
class Row:
    """One row: as `Batch`, without the batch axis."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    weights_T: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Rows for one step (NumPy).

    Attributes:
      tokens_BT: int32, 0 in padding.
      targets_BT: int32, 0 where the weight is 0.
      segment_ids_BT: int32, from 1; 0 for padding.
      positions_BT: int32, from 0 in each segment; 0 in padding.
      weights_BT: float32, 1 where there is a target, else 0.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segment_ids_BT: np.ndarray
    positions_BT: np.ndarray
    weights_BT: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The five arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def hash(self) -> str:
        """A hash of the contents, the same on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """The rows of one split. Make it with `open_dataset`.

    Attributes:
      cache: the tokens of all documents.
      split: which spans of them are ours.
      name: "train" or "eval".
      sequence_length: T.
      seed: chooses the order of training rows.
      fingerprint: hash of everything that decides the batches; a resumed run compares it.
    """

    cache: TokenCache
    split: Split
    name: Literal["train", "eval"]
    sequence_length: int
    seed: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return self.split.num_tokens

    @property
    def num_documents(self) -> int:
        return len(self.split.begins_D)

    @property
    def num_targets(self) -> int:
        """Tokens that have a target, in an epoch."""
        return self.num_tokens - self.num_documents

    @property
    def len_rows(self) -> int:
        """Rows in an epoch."""
        return -(-self.num_tokens // self.sequence_length)

    def describe(self) -> dict[str, Any]:
        """Plain facts for a checkpoint or a report."""
        return {
            "split": self.name,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "rows": self.len_rows,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "held_out": self.split.held_out,
            "files": self.cache.meta["files"],
            "skipped_files": self.cache.meta["skipped"],
            "cache_key": self.cache.key,
            "fingerprint": self.fingerprint,
        }

    def row_numbers(self, indices: np.ndarray) -> np.ndarray:
        """Where in the split the rows with these global indices are: int64 in [0, len_rows)."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.len_rows)
        if self.name == "train":
            for epoch in np.unique(epochs):
                here = epochs == epoch
                places[here] = permute(places[here], self.len_rows, self.seed, int(epoch))
        return places

    def row(self, global_index: int) -> Row:
        """The row with a global index, from 0; there is no last one, epochs follow each other."""
        if global_index < 0:
            raise DataError(f"rows are counted from 0, so there is no row {global_index}")
        return self._row(int(self.row_numbers(np.array([global_index]))[0]))

    def batch(self, step: int, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Batch:
        """The rows of a step, from 0.

        Args:
          step: which step.
          batch_size: B, rows in the whole batch, over all hosts.
          shard: (i, n) for the i-th of n equal parts of it, B/n rows.
        """
        part, parts = shard
        if step < 0 or batch_size < 1:
            raise DataError(f"a batch needs step >= 0 and batch_size >= 1, not step={step}, batch_size={batch_size}")
        if not 0 <= part < parts or batch_size % parts:
            raise DataError(f"shard={shard} of batch_size={batch_size}: (i, n) needs 0 <= i < n, n dividing the batch")
        size = batch_size // parts
        first = step * batch_size + part * size
        return _stack([self._row(int(n)) for n in self.row_numbers(np.arange(first, first + size))])

    def one_pass(self, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Each row of the split once, in order; the last batch is filled up with rows of padding. For evaluation."""
        part, parts = shard
        if batch_size < 1 or not 0 <= part < parts or batch_size % parts:
            raise DataError(f"batch_size={batch_size} must be a multiple of the n of shard=(i, n), which is {shard}")
        size = batch_size // parts
        for start in range(0, self.len_rows, batch_size):
            first = start + part * size
            yield _stack([self._row(n) for n in range(first, first + size)])

    def targets(self, chunk: int = 1 << 20) -> Iterator[np.ndarray]:
        """All targets of an epoch, in order: every token but the first of each document. At most `chunk` an array."""
        for low in range(0, self.num_tokens, chunk):
            high = min(low + chunk, self.num_tokens)
            _, _, where = self.split.spans(low, high)
            keep = np.ones(high - low, dtype=bool)
            openings = self.split.ends[:-1]
            begin, end = np.searchsorted(openings, [low, high])
            keep[openings[begin:end] - low] = False
            yield self.cache.tokens[where[keep]]

    def _row(self, number: int) -> Row:
        """Row `number` of the split; beyond the last one, a row of padding."""
        length = self.sequence_length
        low = min(number * length, self.num_tokens)
        high = min(low + length + 1, self.num_tokens)  # one more, for the target of the row's last token
        used = min(length, high - low)
        ints = np.zeros((4, length), dtype=np.int32)
        weights = np.zeros(length, dtype=np.float32)
        tokens, targets, segments, positions = ints
        if used:
            document, position, where = self.split.spans(low, high)
            ids = self.cache.tokens[where]
            tokens[:used], segments[:used], positions[:used] = ids[:used], document[:used] + 1, position[:used]
            follows = document[1:] == document[:-1]
            targets[: len(follows)] = np.where(follows, ids[1:], 0)
            weights[: len(follows)] = follows
        return Row(tokens, targets, segments, positions, weights)


def open_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    seed: int,
    split: Literal["train", "eval"] = "train",
    progress: bool = True,
) -> Dataset:
    """Opens a split of the config's text, making the cache of tokens if it is not there yet.

    Args:
      config: where the text is.
      tokenizer: its ids must fit the model (`check_vocabulary`).
      sequence_length: T, tokens in a row.
      seed: chooses the order of training rows.
      split: "train", or "eval" for what `config.eval_fraction` holds out.
      progress: show a bar on a terminal while tokenising takes long.

    Raises:
      DataError: no usable text, a fault in a file, or too little text for this split.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length must be at least 1, not {sequence_length}")
    if split not in ("train", "eval"):
        raise DataError(f"there are the splits 'train' and 'eval', not {split!r}")
    if split == "eval" and config.eval_fraction == 0:
        raise DataError("data.eval_fraction is 0, so nothing is held out; set it above 0, or do not evaluate")
    cache = open_cache(config, tokenizer, progress)
    spans = split_documents(cache, config.eval_fraction)[split == "eval"]
    if spans.num_tokens <= len(spans.begins_D):
        raise DataError(
            f"the {split} split has nothing to predict: {spans.num_tokens} tokens in {len(spans.begins_D)} documents "
            f"(of {len(cache.tokens)} tokens in all, eval_fraction={config.eval_fraction}); give more text"
            + (", or set data.eval_fraction=0" if config.eval_fraction else "")
        )
    parts = [cache.key, config.eval_fraction, split, sequence_length, seed]
    fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return Dataset(cache, spans, split, sequence_length, seed, fingerprint)


def _stack(rows: Sequence[Row]) -> Batch:
    return Batch(*(np.stack([getattr(row, field.name) for row in rows]) for field in fields(Row)))
