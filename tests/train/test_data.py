"""Rows, batches, order and splits, on datasets small enough to check token by token."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.train.data import DataConfig, DataError, Dataset, Part, hash_text, open_dataset, unigram_entropy
from twinax.train.data.order import permute

TOKENIZER = Tokenizer.bytes()
BOS, EOS = 256, 257


def write_documents(folder: Path, texts: list[str]) -> Path:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def open_texts(tmp_path: Path, texts: list[str], length: int, seed: int = 0, split="train", fraction=0.0) -> Dataset:
    path = write_documents(tmp_path, texts)
    config = DataConfig(path=str(path), eval_fraction=fraction, cache_dir=str(tmp_path / "cache"))
    return open_dataset(config, TOKENIZER, length, seed, split)


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list("abcdefgh"), size=generator.integers(1, 60))) for _ in range(count)]


def expected_rows(texts: list[str], length: int) -> list[list[tuple[int, int, int, int, float]]]:
    """The rows in order, by the slow and plain way: (token, target, segment, position, weight) for each place."""
    stream = []
    for number, text in enumerate(texts):
        document = [BOS, *text.encode(), EOS]
        for at, token in enumerate(document):
            target = document[at + 1] if at + 1 < len(document) else None
            stream.append((token, target, number))
    rows = []
    for start in range(0, len(stream), length):
        row, segment, position, last = [], 0, 0, None
        for token, target, number in stream[start : start + length]:
            if number != last:
                segment, position, last = segment + 1, 0, number
            row.append((token, target or 0, segment, position, float(target is not None)))
            position += 1
        rows.append(row + [(0, 0, 0, 0, 0.0)] * (length - len(row)))
    return rows


def as_rows(batch) -> list[list[tuple]]:
    return [
        list(zip(*(array[b].tolist() for array in batch.arrays().values()), strict=True))
        for b in range(len(batch.tokens_BT))
    ]


def part_of(size: int, index: int, parts: int) -> Part:
    """Every `parts`-th row of a batch, from `index`."""
    numbers = np.arange(index, size, parts)
    return Part(numbers, size, np.ones(len(numbers), dtype=bool))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 5000])
def test_rows_are_the_documents_cut_and_packed(tmp_path: Path, length: int):
    texts = random_texts(40)
    dataset = open_texts(tmp_path, texts, length)
    want = expected_rows(texts, length)
    assert dataset.len_rows == len(want)
    got = [row for batch in dataset.one_pass(3) for row in as_rows(batch)]
    assert got[: len(want)] == want
    assert all(place == (0, 0, 0, 0, 0.0) for row in got[len(want) :] for place in row)
    # An epoch of training holds the same rows in another order, each once.
    epoch = as_rows(dataset.batch(0, dataset.len_rows))
    assert sorted(epoch) == sorted(want)
    assert dataset.num_tokens == sum(len(text) + 2 for text in texts)
    assert dataset.num_targets == sum(len(text) + 1 for text in texts) == sum(p[4] for row in want for p in row)


def test_arrays_have_their_types(tmp_path: Path):
    batch = open_texts(tmp_path, ["abc"], 8).batch(0, 2)
    kinds = {name: (array.dtype.name, array.shape) for name, array in batch.arrays().items()}
    assert kinds.pop("weights_BT") == ("float32", (2, 8))
    assert set(kinds.values()) == {("int32", (2, 8))}


def test_batches_depend_on_seed_and_index_only(tmp_path: Path):
    texts = random_texts(60)
    dataset = open_texts(tmp_path, texts, 16)
    rows = [dataset.row(index) for index in range(3 * dataset.len_rows)]
    for size in (1, 4, 6):
        for step in (0, 3, 2 * dataset.len_rows // size):  # also across the end of an epoch
            batch = dataset.batch(step, size)
            for b in range(size):
                row = rows[step * size + b]
                assert all(
                    np.array_equal(array[b], value)
                    for array, value in zip(batch.arrays().values(), dataclasses.astuple(row), strict=True)
                )
            for parts in (n for n in (1, 2, 3) if size % n == 0):
                every = [dataset.batch(step, size, part_of(size, i, parts)) for i in range(parts)]
                for name, array in batch.arrays().items():
                    joined = np.empty_like(array)
                    for part in every:
                        joined[part.part.numbers] = part.arrays()[name]
                    assert np.array_equal(joined, array)
                assert hash_text(sum(part.hash_words() for part in every)) == batch.hash()
    again = open_texts(tmp_path, texts, 16)
    assert again.batch(5, 4).hash() == dataset.batch(5, 4).hash()
    assert open_texts(tmp_path, texts, 16, seed=1).batch(5, 4).hash() != dataset.batch(5, 4).hash()


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path):
    dataset = open_texts(tmp_path, random_texts(60), 16)
    rows = dataset.len_rows
    epochs = [dataset.row_numbers(np.arange(e * rows, (e + 1) * rows)).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(rows)) not in epochs


def test_hash_is_the_contents(tmp_path: Path):
    dataset = open_texts(tmp_path, ["hello world"], 8)
    batch = dataset.batch(0, 2)
    # Frozen: a change here makes the batch hashes of stored runs wrong.
    assert batch.hash() == "3fd64d65e71e15a4b9964aba1810a59b"
    for name, array in batch.arrays().items():
        changed = array.copy()
        changed[1, 3] += 1
        assert dataclasses.replace(batch, **{name: changed}).hash() != batch.hash()
    big_endian = dataclasses.replace(batch, tokens_BT=batch.tokens_BT.astype(">i4"))
    assert big_endian.hash() == batch.hash()


def test_a_row_of_two_parts_counts_once(tmp_path: Path):
    batch = open_texts(tmp_path, random_texts(9), 8).batch(1, 4)
    halves = [
        Part(np.array([0, 1, 2]), 4, np.array([True, True, True])),
        Part(np.array([1, 2, 3]), 4, np.array([False, False, True])),
    ]
    dataset = open_texts(tmp_path, random_texts(9), 8)
    assert hash_text(sum(dataset.batch(1, 4, half).hash_words() for half in halves)) == batch.hash()
    # The same rows in other places are another batch.
    turned = dataclasses.replace(batch, **{name: array[::-1] for name, array in batch.arrays().items()})
    assert turned.hash() != batch.hash()


@pytest.mark.parametrize(("step", "size", "part"), [(-1, 4, None), (0, 0, None), (0, 4, Part.whole(3))])
def test_impossible_batches_are_refused(tmp_path: Path, step: int, size: int, part: Part | None):
    dataset = open_texts(tmp_path, ["hello"], 8)
    with pytest.raises(DataError, match="batch_size"):
        dataset.batch(step, size, part)
    with pytest.raises(DataError, match="no row -1"):
        dataset.row(-1)


# Order


@given(st.integers(1, 400), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permute_is_frozen():
    # A change here changes the order of tokens of every stored run.
    assert permute(np.arange(10), 10, 0, 0).tolist() == [5, 2, 8, 6, 0, 4, 9, 7, 1, 3]
    assert permute(np.array([[0, 10**12 - 1]]), 10**12, 7, 3).tolist() == [[409789348182, 926529261046]]


def test_permute_is_fair():
    # Where each of 8 things lands over 1000 epochs: chi-squared with 49 degrees of freedom, 99.9th percentile 85.4.
    counts = np.zeros((8, 8))
    for epoch in range(1000):
        counts[np.arange(8), permute(np.arange(8), 8, 1, epoch)] += 1
    assert ((counts - 125) ** 2 / 125).sum() < 85.4
    # Neighbours part: the share of pairs that stay neighbours is about 2/n.
    order = permute(np.arange(10_000), 10_000, 3, 0)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001


# Splits


def documents_of(dataset: Dataset) -> list[str]:
    whole = "".join(chr(t) if t < 256 else {BOS: "<", EOS: ">"}[t] for t in span_tokens(dataset))
    return whole.removeprefix("<").removesuffix(">").split("><")


def span_tokens(dataset: Dataset) -> list[int]:
    return dataset.cache.tokens[dataset.split.spans(0, dataset.num_tokens)[2]].tolist()


def test_whole_documents_are_held_out(tmp_path: Path):
    texts = random_texts(400)
    texts += texts[:50]  # copies stay together
    train, held = (open_texts(tmp_path, texts, 16, split=split, fraction=0.2) for split in ("train", "eval"))
    assert train.split.held_out == held.split.held_out == "documents"
    assert Counter(documents_of(train)) + Counter(documents_of(held)) == Counter(texts)
    assert not set(documents_of(train)) & set(documents_of(held))
    assert 0.1 < held.num_tokens / (train.num_tokens + held.num_tokens) < 0.4
    # Neither the seed nor other documents move a document to the other side.
    more, more_held = (
        open_texts(tmp_path, random_texts(99, 1) + texts[::-1], 16, 5, s, 0.2) for s in ("train", "eval")
    )
    assert set(documents_of(train)) <= set(documents_of(more))
    assert set(documents_of(held)) <= set(documents_of(more_held))


@pytest.mark.parametrize("texts", [["abcdefgh" * 50], ["a" * 300, "b" * 40, "c" * 60]])
def test_the_tail_of_few_documents_is_held_out(tmp_path: Path, texts: list[str]):
    train, held = (open_texts(tmp_path, texts, 16, split=split, fraction=0.1) for split in ("train", "eval"))
    assert held.split.held_out == "tail"
    stream = [token for text in texts for token in (BOS, *text.encode(), EOS)]
    assert span_tokens(train) + span_tokens(held) == stream
    assert held.num_tokens == round(0.1 * len(stream))


def test_evaluation_is_in_order(tmp_path: Path):
    held = open_texts(tmp_path, random_texts(300), 16, split="eval", fraction=0.3)
    assert held.row_numbers(np.arange(2 * held.len_rows)).tolist() == 2 * list(range(held.len_rows))
    whole = [row for batch in held.one_pass(4) for row in as_rows(batch)]
    odd = Part(np.array([1, 3]), 4, np.ones(2, dtype=bool))
    assert [row for batch in held.one_pass(4, odd) for row in as_rows(batch)] == whole[1::2]
    with pytest.raises(DataError, match=r"batch_size=4 must be .* that of the part, 3"):
        next(held.one_pass(4, Part.whole(3)))


def test_nothing_held_out(tmp_path: Path):
    assert open_texts(tmp_path, ["abc"], 4).split.held_out == "nothing"
    with pytest.raises(DataError, match="eval_fraction is 0"):
        open_texts(tmp_path, ["abc"], 4, split="eval")


# Tiny inputs


def test_less_than_a_row_is_one_padded_row(tmp_path: Path):
    dataset = open_texts(tmp_path, ["a"], 64)
    assert dataset.len_rows == 1
    batch = dataset.batch(7, 4)
    assert batch.tokens_BT[:, :4].tolist() == [[BOS, 97, EOS, 0]] * 4
    assert batch.weights_BT.sum() == 8


def test_too_little_to_hold_out_is_an_error(tmp_path: Path):
    open_texts(tmp_path, ["a"], 64, fraction=0.01)
    with pytest.raises(DataError, match=r"the eval split has nothing to predict: 1 tokens .*eval_fraction=0"):
        open_texts(tmp_path, ["a"], 64, split="eval", fraction=0.01)


@pytest.mark.parametrize(("length", "split", "message"), [(0, "train", "at least 1"), (4, "test", "no|splits 'train'")])
def test_impossible_datasets_are_refused(tmp_path: Path, length: int, split: str, message: str):
    with pytest.raises(DataError, match=message):
        open_texts(tmp_path, ["a"], length, split=split)


def test_a_tokenizer_without_special_tokens(tmp_path: Path):
    files = TOKENIZER.files() | {"tokenizer_config.json": b"{}"}
    path = write_documents(tmp_path, ["ab", "c"])
    config = DataConfig(path=str(path), eval_fraction=0, cache_dir=str(tmp_path / "cache"))
    batch = open_dataset(config, Tokenizer.from_files(files), 4, 0).batch(0, 1)
    assert batch.tokens_BT.tolist() == [[97, 98, 99, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 2, 0]]
    assert batch.weights_BT.tolist() == [[1, 0, 0, 0]]


# Statistics, description


def test_unigram_entropy(tmp_path: Path):
    texts = random_texts(100)
    dataset = open_texts(tmp_path, texts, 16)
    counts = Counter(token for text in texts for token in (*text, EOS))
    total = sum(counts.values())
    want = -sum(n / total * math.log(n / total) for n in counts.values())
    assert unigram_entropy(dataset) == pytest.approx(want, rel=1e-12)
    assert Counter(np.concatenate(list(dataset.targets(chunk=7))).tolist()) == Counter(
        ord(token) if isinstance(token, str) else token for token in counts.elements()
    )


def test_description_tells_what_decides_the_batches(tmp_path: Path):
    texts = random_texts(30)
    base = open_texts(tmp_path, texts, 16, fraction=0.1)
    assert json.loads(json.dumps(base.describe())) == base.describe()
    assert base.describe()["rows"] == base.len_rows
    same = open_texts(tmp_path, texts, 16, fraction=0.1)
    others = [
        open_texts(tmp_path, texts, 17, fraction=0.1),
        open_texts(tmp_path, texts, 16, seed=1, fraction=0.1),
        open_texts(tmp_path, texts, 16, fraction=0.2),
        open_texts(tmp_path, texts, 16, fraction=0.1, split="eval"),
        open_texts(tmp_path, texts[1:], 16, fraction=0.1),
    ]
    assert same.fingerprint == base.fingerprint
    assert len({other.fingerprint for other in [base, *others]}) == 6
