"""Numbers about a dataset that put a loss into proportion."""

import numpy as np

from .dataset import Dataset


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the split's targets in nats per token: the loss of the best model that ignores all context."""
    counts = np.zeros(1, dtype=np.int64)
    for targets in dataset.targets():
        found = np.bincount(targets)
        counts, found = (counts, found) if len(counts) >= len(found) else (found, counts)
        counts[: len(found)] += found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0
