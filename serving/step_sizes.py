"""The sizes that steps are padded to, and so the programs there are: few, as each is compiled."""

# A chunk region of this and its multiples by four: short prompts need not pay for long ones.
SMALLEST_CHUNK = 64
# XLA:CPU rounds a row differently in batches of a few rows, and takes about as long for two rows as for eight. With no
# smaller batch, a request's numbers do not depend on how many run beside it. One row alone takes half as long, with a
# rounding of its own: it is used where there is never a neighbour.
FEWEST_ROWS = 8
# Nor does it round alike a number of rows that is a multiple of 32, or just below one, and any other (measured on
# AVX-512, of products with the weights first). So rows are 8 or 16 more than such a multiple, and chunks are multiples.
ROUND = 32
# Token rows whose final states, or the log-probabilities of what came next, are computed at a time. With all rows of a
# long chunk the logits would take more than the rest of the step (1,024 rows of 128,256 tokens: 0.5 GB).
PIECE = 2 * ROUND + 8


def ladder(smallest: int, largest: int, factor: int) -> list[int]:
    """smallest, smallest * factor, ... and then `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return [*sizes, largest]


def step_sizes(slots: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """(request rows, chunk tokens) of all kinds of steps, cheapest first."""
    rows = [1] if slots == 1 else [_rows(size) for size in ladder(FEWEST_ROWS, max(slots, FEWEST_ROWS), 4)]
    chunks = ladder(SMALLEST_CHUNK, -(-max(chunk_tokens, SMALLEST_CHUNK) // ROUND) * ROUND, 4)
    # A chunk dwarfs decode rows, so with one there is no gain from fewer of these.
    return [(size, 0) for size in rows] + [(rows[-1], size) for size in chunks]


def _rows(least: int) -> int:
    """The next number of rows, from `least` on, that is 8 or 16 more than a multiple of ROUND."""
    return next(size for size in range(least, least + ROUND) if size % ROUND in (8, 16))
