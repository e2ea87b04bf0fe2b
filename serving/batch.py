"""The one array a step sends to the device. Many small transfers would cost more than the step's Python.

Shapes: T token rows, R request rows, F fields of one, M pages a request. The array is int32, in three parts:
[TOKEN_FIELDS, T], [ROW_FIELDS, R] and the page table [R, M]; float fields travel as their bits.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .sampling import SamplingRows

if TYPE_CHECKING:
    from ..layers.contexts import PagedContext

# token: -1 takes the slot's last sampled token. slot: S for rows that are padding. generated: 1 for tokens that the
# model produced.
TOKEN_FIELDS: tuple[str, ...] = ("token", "position", "slot", "generated")
INT_FIELDS = (
    "slot", "flags", "position", "seed_high", "seed_low", "top_k",
    "length", "query_start", "query_length", "prompt_length", "sample_row", "leader", "shared_pages",
)  # fmt: skip
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
ROW_FIELDS = INT_FIELDS + FLOAT_FIELDS
ROW = {name: index for index, name in enumerate(ROW_FIELDS)}
TOKEN = {name: index for index, name in enumerate(TOKEN_FIELDS)}


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A static shape: `rows` requests, of which each may decode, and `chunk` rows of prompt tokens after them."""

    rows: int
    chunk: int

    @property
    def tokens(self) -> int:
        return self.rows + self.chunk

    def size(self, pages: int) -> int:
        """int32 numbers in the array."""
        return len(TOKEN_FIELDS) * self.tokens + (len(ROW_FIELDS) + pages) * self.rows


class HostBatch:
    """Views into one numpy array, to be filled for a step. Starts as an idle batch."""

    def __init__(self, bucket: Bucket, pages: int, slots: int):
        self.array = np.zeros(bucket.size(pages), np.int32)
        split = len(TOKEN_FIELDS) * bucket.tokens
        table = split + len(ROW_FIELDS) * bucket.rows
        self.tokens = self.array[:split].reshape(len(TOKEN_FIELDS), bucket.tokens)
        self.rows = self.array[split:table].reshape(len(ROW_FIELDS), bucket.rows)
        self.floats = self.rows.view(np.float32)
        self.page_table = self.array[table:].reshape(bucket.rows, pages)
        self.tokens[TOKEN["slot"]] = slots
        self.rows[ROW["slot"]] = slots
        self.floats[ROW["top_p"]] = 1.0
        self.floats[ROW["repetition"]] = 1.0


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The same inside the compiled step."""

    tokens: dict[str, jax.Array]
    rows_FR: jax.Array
    context: "PagedContext"
    sample_row: jax.Array


def unpack(array: jax.Array, bucket: Bucket, pages: int) -> DeviceBatch:
    """Takes the array apart (free: slices and bit casts)."""
    from ..layers.contexts import PagedContext  # Flax and kernels, which only tracing needs
    from ..pallas_kernels.paged_attention import SharedPrefixes

    split = len(TOKEN_FIELDS) * bucket.tokens
    table = split + len(ROW_FIELDS) * bucket.rows
    tokens = dict(zip(TOKEN_FIELDS, array[:split].reshape(len(TOKEN_FIELDS), bucket.tokens), strict=True))
    rows_FR = array[split:table].reshape(len(ROW_FIELDS), bucket.rows)
    context = PagedContext(
        positions_T=tokens["position"],
        page_table_RM=array[table:].reshape(bucket.rows, pages),
        lengths_R=rows_FR[ROW["length"]],
        query_start_R=rows_FR[ROW["query_start"]],
        query_length_R=rows_FR[ROW["query_length"]],
        prompt_length_R=rows_FR[ROW["prompt_length"]],
        slot_R=rows_FR[ROW["slot"]],
        prefixes=SharedPrefixes(rows_FR[ROW["leader"]], rows_FR[ROW["shared_pages"]]),
        decode_rows=bucket.rows,
    )
    return DeviceBatch(tokens, rows_FR, context, rows_FR[ROW["sample_row"]])


def sampling_rows(rows_FR: jax.Array) -> SamplingRows:
    """The sampling parameters among the row fields."""
    named = {field.name: rows_FR[ROW[field.name]] for field in dataclasses.fields(SamplingRows)}
    floats = {name: lax.bitcast_convert_type(named[name], jnp.float32) for name in FLOAT_FIELDS}
    return SamplingRows(**{**named, **floats})
