"""Packed rows, addressed by a global index.

T = sequence length, B = rows in a batch.

- The documents of a split, one after the other, are cut into rows of T tokens; the last row is padded.
- A token's target is the next token of its document, also across the end of a row, so every token but the first of each
  document is a target exactly once in an epoch. The last token of a document has weight 0.
- Training row `index` is row `permutation(index % rows)` of epoch `index // rows`; the permutation depends on the seed
  and the epoch only. Evaluation rows are in order.
- Step s of batch size B takes the indices s*B to s*B+B-1, whatever the number of processes, so the step is all that a
  checkpoint needs to remember. A process reads the rows that its devices need (`Part`), and no others.
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
class Part:
    """Which rows of a batch there are, where several processes share it.

    Attributes:
      numbers: int64, ascending, from 0 in the batch.
      size: rows of the whole batch.
      is_counted: bool, for each of them whether it counts here when the processes add something up: of those that have
        a row, one counts it.
    """

    numbers: np.ndarray
    size: int
    is_counted: np.ndarray

    @classmethod
    def whole(cls, size: int) -> "Part":
        """All rows."""
        return cls(np.arange(size), size, np.ones(size, dtype=bool))


@dataclass(frozen=True)
class Batch:
    """Rows for one step (NumPy).

    Attributes:
      tokens_BT: int32, 0 in padding.
      targets_BT: int32, 0 where the weight is 0.
      segment_ids_BT: int32, from 1; 0 for padding.
      positions_BT: int32, from 0 in each segment; 0 in padding.
      weights_BT: float32, 1 where there is a target, else 0.
      part: which rows of the whole batch these are; None for all of them.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segment_ids_BT: np.ndarray
    positions_BT: np.ndarray
    weights_BT: np.ndarray
    part: Part | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The five arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "part"}

    def hash(self) -> str:
        """A hash of the contents, the same on any machine: of the rows there are."""
        return hash_text(self.hash_words())

    def hash_words(self) -> np.ndarray:
        """The hash as uint32 [4], of the rows that count here; those of all parts add up to that of the batch."""
        part = self.part or Part.whole(len(self.tokens_BT))
        words = np.zeros(4, dtype=np.uint32)
        for row in np.flatnonzero(part.is_counted):
            digest = hashlib.blake2b(f"row {part.numbers[row]} ".encode(), digest_size=16)
            for name, array in self.arrays().items():
                digest.update(f"{name} {array.dtype.name} {array.shape[1]} ".encode())
                digest.update(np.ascontiguousarray(array[row], dtype=array.dtype.newbyteorder("<")).tobytes())
            words += np.frombuffer(digest.digest(), dtype="<u4")
        return words


def hash_text(words: np.ndarray) -> str:
    """The hash of a batch from its four words."""
    return words.astype("<u4").tobytes().hex()


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

    def batch(self, step: int, batch_size: int, part: Part | None = None) -> Batch:
        """The rows of a step, from 0.

        Args:
          step: which step.
          batch_size: B, rows in the whole batch, over all processes.
          part: only these of them; None for all.
        """
        if step < 0 or batch_size < 1:
            raise DataError(f"a batch needs step >= 0 and batch_size >= 1, not step={step}, batch_size={batch_size}")
        numbers = _numbers(batch_size, part)
        return _stack([self._row(int(n)) for n in self.row_numbers(step * batch_size + numbers)], part)

    def one_pass(self, batch_size: int, part: Part | None = None) -> Iterator[Batch]:
        """Each row of the split once, in order; the last batch is filled up with rows of padding. For evaluation."""
        numbers = _numbers(batch_size, part)
        for start in range(0, self.len_rows, batch_size):
            yield _stack([self._row(int(n)) for n in start + numbers], part)

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


def _numbers(batch_size: int, part: Part | None) -> np.ndarray:
    if batch_size < 1 or (part is not None and part.size != batch_size):
        raise DataError(f"batch_size={batch_size} must be from 1 up, and that of the part, {part and part.size}")
    return np.arange(batch_size) if part is None else part.numbers


def _stack(rows: Sequence[Row], part: Part | None) -> Batch:
    return Batch(*(np.stack([getattr(row, field.name) for row in rows]) for field in fields(Row)), part=part)
