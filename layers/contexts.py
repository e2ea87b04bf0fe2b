"""Contexts: how tokens see each other. The same attention layer trains under one and serves under the other.

Shapes: B rows, T tokens, H heads, K key-value heads, D head size, R requests, M pages a request.
"""

import dataclasses
from functools import partial
from typing import Any

import jax

from ..pallas_kernels.flash_attention import flash_attention
from ..pallas_kernels.paged_attention import paged_attention
from ..sharding.rules import ACTIVATION_RULES, current, partition_spec


@partial(jax.tree_util.register_dataclass, data_fields=["segment_ids_BT", "positions_BT"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedContext:
    """Rows of packed documents, for training and scoring. Causal within a segment, nothing across.

    Attributes:
        segment_ids_BT: int32; equal ids see each other, 0 is padding.
        positions_BT: int32; position of a token in its document.
    """

    segment_ids_BT: jax.Array
    positions_BT: jax.Array

    @property
    def positions(self) -> jax.Array:
        return self.positions_BT

    def attend(self, q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, cache: None, layer: Any):
        """Mixes values within segments; returns ([B, T, H, D], None), as nothing is kept."""

        def local(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
            return flash_attention(
                q_BTHD, k_BTKD, v_BTKD, q_segment_ids_BT=segment_ids_BT, kv_segment_ids_BS=segment_ids_BT
            )

        mesh = current()
        if mesh is not None:
            heads = partition_spec(("batch", "tokens", "heads", None), mesh, ACTIVATION_RULES)
            rows = partition_spec(("batch", "tokens"), mesh, ACTIVATION_RULES)
            local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        return local(q_BTHD, k_BTKD, v_BTKD, self.segment_ids_BT), cache


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_T", "page_table_RM", "lengths_R", "query_start_R", "query_length_R"],
    meta_fields=["decode_rows"],
)
@dataclasses.dataclass(frozen=True)
class PagedContext:
    """A flat ragged batch of prompt chunks and decodes over a paged cache, for serving.

    Attributes:
        positions_T: int32; position of each token in its request.
        page_table_RM: int32; the pages of each request, in order.
        lengths_R: int32; tokens of each request in the cache after this step.
        query_start_R, query_length_R: int32; the token rows of each request (length 0: idle).
        decode_rows: static; requests with one token sit at token row == request row, below this.
    """

    positions_T: jax.Array
    page_table_RM: jax.Array
    lengths_R: jax.Array
    query_start_R: jax.Array
    query_length_R: jax.Array
    decode_rows: int

    @property
    def positions(self) -> jax.Array:
        return self.positions_T

    def attend(self, q_THD: jax.Array, k_TKD: jax.Array, v_TKD: jax.Array, cache: Any, layer: Any):
        """Writes the new keys and values of `layer`, mixes over the cache; returns ([T, H, D], cache)."""
        return paged_attention(
            q_THD,
            k_TKD,
            v_TKD,
            cache,
            layer=layer,
            page_table_RM=self.page_table_RM,
            lengths_R=self.lengths_R,
            query_start_R=self.query_start_R,
            query_length_R=self.query_length_R,
            decode_rows=self.decode_rows,
        )
