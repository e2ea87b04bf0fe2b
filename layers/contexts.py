"""Contexts: how tokens see each other. The same attention layer trains under one and serves under the other.

Shapes: B rows, T tokens, H heads, K key-value heads, D head size, R requests, M pages a request,
N and P the parts of a head that are not turned and turned, V a value's size, R a latent's.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..pallas_kernels.chips import known_platform
from ..pallas_kernels.flash_attention import flash_attention
from ..pallas_kernels.linear_attention import linear_attention, ragged_linear_attention
from ..pallas_kernels.paged_attention import Pages, SharedPrefixes, paged_attention
from ..pallas_kernels.ring_attention import ring_attention, zigzag
from ..sharding.all_to_all import over_heads
from ..sharding.plan import CHOICES
from ..sharding.rules import ACTIVATION_RULES, current, mesh_axes, partition_spec
from .cache import Cache
from .convolution import Convolution, next_state, packed_inputs, paged_inputs
from .linear import matmul_precision
from .mixers.attention import Mixing

PLAIN = Mixing()


@partial(jax.tree_util.register_dataclass, data_fields=["segment_ids_BT", "positions_BT"], meta_fields=["attention"])
@dataclasses.dataclass(frozen=True)
class PackedContext:
    """Rows of packed documents, for training and scoring. Causal within a segment, nothing across.

    Where a mesh cuts the tokens of a row over devices, the rows are in the order that `in_order` gives them.

    Attributes:
        segment_ids_BT: int32; equal ids see each other, 0 is padding.
        positions_BT: int32; position of a token in its document.
        attention: static; how attention crosses those devices, as in a `Plan`.
    """

    segment_ids_BT: jax.Array
    positions_BT: jax.Array
    attention: str = "ring"

    def __post_init__(self) -> None:
        if self.attention not in CHOICES["attention"]:
            raise ValueError(f"attention is one of {', '.join(CHOICES['attention'])}; got {self.attention!r}.")

    @property
    def positions(self) -> jax.Array:
        return self.positions_BT

    @property
    def is_token(self) -> jax.Array:
        """Bool [B, T], False for padding."""
        return self.segment_ids_BT != 0

    @property
    def lengths(self) -> jax.Array:
        """int32 [B, T]: how many tokens each token's document has."""
        ids_BT = self.segment_ids_BT
        last_BN = jax.vmap(lambda at, ids: jax.ops.segment_max(at, ids, ids_BT.shape[1] + 1))(self.positions_BT, ids_BT)
        return jnp.take_along_axis(last_BN, ids_BT, axis=1) + 1

    def attend(
        self,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        cache: None,
        layer: Any,
        mixing: Mixing = PLAIN,
        sinks_H: jax.Array | None = None,
    ):
        """Mixes values within segments; returns ([B, T, H, D], None), as nothing is kept."""
        rows = partial(_attend_rows, mixing)
        ids_BT, mesh = self.segment_ids_BT, current()
        if mesh is None:
            return rows(q_BTHD, k_BTKD, v_BTKD, ids_BT, sinks_H), cache
        ring = mesh_axes("tokens", mesh)
        heads = partition_spec(("batch", "tokens", "heads", None), mesh, ACTIVATION_RULES)
        tokens = partition_spec(("batch", "tokens"), mesh, ACTIVATION_RULES)
        specs = (heads, heads, heads, tokens, partition_spec(("heads",), mesh, ACTIVATION_RULES))
        if not ring:
            local = jax.shard_map(rows, in_specs=specs, out_specs=heads, check_vma=False)
            return local(q_BTHD, k_BTKD, v_BTKD, ids_BT, sinks_H), cache
        if self.attention == "all_to_all":
            local = partial(over_heads, rows, axis=ring[0])
        else:
            local = partial(_attend_ring, mixing, axis=ring[0], two_way=self.attention == "ring_two_way")
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
        return local(q_BTHD, k_BTKD, v_BTKD, ids_BT, sinks_H), cache

    def attend_latent(
        self,
        q: tuple[jax.Array, jax.Array],
        latent_BTR: jax.Array,
        k_turned_BT1P: jax.Array,
        up: tuple[jax.Array, jax.Array],
        cache: None,
        layer: Any,
        mixing: Mixing,
    ) -> tuple[jax.Array, None]:
        """Attention with keys and values made of latents: ([B, T, H, V], None), as nothing is kept.

        Args:
            q: the parts of queries that are not turned [B, T, H, N], and that are [B, T, H, P].
            latent_BTR, k_turned_BT1P: what keys and values come from, and the key of the turned part of all heads.
            up: from a latent to each head's key [H, N, R] and value [H, V, R].
        """
        k_BTHN, v_BTHV = (_by_head("btr,hcr->bthc", latent_BTR, weight) for weight in up)
        k_turned = jnp.broadcast_to(k_turned_BT1P, (*k_BTHN.shape[:3], k_turned_BT1P.shape[-1]))
        k_BTHD = jnp.concatenate([k_BTHN, k_turned], axis=-1)
        return self.attend(jnp.concatenate(q, axis=-1), k_BTHD, v_BTHV, cache, layer, mixing)

    def convolve(self, convolution: Convolution, x_BTC: jax.Array, cache: None, layer: Any, mixer: str):
        """A causal convolution that does not cross documents; returns ([B, T, C], None), as nothing is kept."""
        return convolution(packed_inputs(x_BTC, self.segment_ids_BT, convolution.width)), cache

    def attend_linear(
        self,
        q_BTGN: jax.Array,
        k_BTGN: jax.Array,
        v_BTHP: jax.Array,
        log_decay_BTH: jax.Array,
        cache: None,
        layer: Any,
        mixer: str,
    ):
        """Linear attention within segments (`pallas_kernels.linear_attention`); returns ([B, T, H, P], None)."""
        arguments, mesh = (q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, self.segment_ids_BT), current()
        if mesh is None:
            return _attend_linear_rows(*arguments), cache
        if mesh_axes("tokens", mesh) or mesh_axes("heads", mesh):
            raise NotImplementedError(
                f"{mixer} keeps a state, and is not cut over tokens or heads yet; use a plan whose sequence and tensor "
                "are 1."
            )
        rows = partition_spec(("batch",), mesh, ACTIVATION_RULES)
        local = jax.shard_map(_attend_linear_rows, in_specs=(rows,) * 5, out_specs=rows, check_vma=False)
        return local(*arguments), cache


def _by_head(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product for each head, in the dtype of `x`. XLA:CPU has none of bfloat16 with sums of float32."""
    dtype, precision = x.dtype, matmul_precision(x.dtype)
    if known_platform() == "cpu":
        x, weight = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, weight))
    return jnp.einsum(subscripts, x, weight, precision=precision).astype(dtype)


def _attend_linear_rows(
    q_BTGN: jax.Array, k_BTGN: jax.Array, v_BTHP: jax.Array, log_decay_BTH: jax.Array, ids_BT: jax.Array
) -> jax.Array:
    return linear_attention(q_BTGN, k_BTGN, v_BTHP, log_decay_BTH, segment_ids_BT=ids_BT)


def _attend_rows(
    mixing: Mixing,
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    ids_BT: jax.Array,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    options = dataclasses.asdict(mixing)
    return flash_attention(
        q_BTHD, k_BTKD, v_BTKD, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT, sinks_H=sinks_H, **options
    )


def _attend_ring(
    mixing: Mixing,
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    ids_BT: jax.Array,
    sinks_H: jax.Array | None,
    **way: Any,
) -> jax.Array:
    options = dataclasses.asdict(mixing)
    return ring_attention(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT=ids_BT, sinks_H=sinks_H, **options, **way)


def in_order(x_BT: jax.Array, attention: str) -> jax.Array:
    """`x_BT`, which has its tokens in the order of the row, as `PackedContext(..., attention)` wants them.

    A ring over devices has them in `zigzag` order, so that under the causal mask every device has as much to do; all
    else leaves them where they are. ValueError when a ring's tokens are not a multiple of twice its devices.
    """
    mesh = current()
    ring = () if mesh is None else mesh_axes("tokens", mesh)
    if mesh is None or not ring or attention == "all_to_all":
        return x_BT
    return zigzag(x_BT, mesh.shape[ring[0]])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "positions_T",
        "page_table_RM",
        "lengths_R",
        "query_start_R",
        "query_length_R",
        "prompt_length_R",
        "slot_R",
        "prefixes",
    ],
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
        prompt_length_R: int32; tokens of each request when it was let in, for rope that hangs on lengths. That it stays
            what it was then keeps the keys that are in the cache right.
        slot_R: int32; where the state of each request is kept; idle rows have the number of slots.
        decode_rows: static; requests with one token sit at token row == request row, below this.
        prefixes: requests that begin with the same pages; None: nothing is known of that.
    """

    positions_T: jax.Array
    page_table_RM: jax.Array
    lengths_R: jax.Array
    query_start_R: jax.Array
    query_length_R: jax.Array
    prompt_length_R: jax.Array
    slot_R: jax.Array
    decode_rows: int
    prefixes: SharedPrefixes | None = None

    @property
    def positions(self) -> jax.Array:
        return self.positions_T

    @property
    def is_token(self) -> jax.Array:
        """Bool [T], False for rows of no request."""
        return jnp.any(self._is_of_TR, axis=1)

    @property
    def lengths(self) -> jax.Array:
        """int32 [T]: how many tokens each row's request had when it was let in."""
        return jnp.max(jnp.where(self._is_of_TR, self.prompt_length_R, 1), axis=1)

    @property
    def _is_of_TR(self) -> jax.Array:
        """Bool, which request each row belongs to."""
        row_T1 = jnp.arange(len(self.positions_T))[:, None]
        return (self.query_start_R <= row_T1) & (row_T1 < self.query_start_R + self.query_length_R)

    def _slots(self, slots: int) -> jax.Array:
        """int32 [T], the slot of each row's request; `slots`, the number of them, for rows of none."""
        return jnp.min(jnp.where(self._is_of_TR, self.slot_R, slots), axis=1)

    def attend(
        self,
        q_THD: jax.Array,
        k_TKD: jax.Array,
        v_TKD: jax.Array | None,
        cache: Cache,
        layer: Any,
        mixing: Mixing = PLAIN,
        sinks_H: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Writes the new keys and values of `layer`, mixes over the cache; returns ([T, H, V], cache).

        On a mesh each device has its heads, of queries and of the cache, and all pages of these.
        """

        def local(
            q_THD: jax.Array,
            k_TKD: jax.Array,
            v_TKD: jax.Array | None,
            pages: Pages,
            layer: Any,
            context: PagedContext,
            sinks_H: jax.Array | None,
        ):
            return paged_attention(
                q_THD,
                k_TKD,
                v_TKD,
                pages,
                layer=layer,
                page_table_RM=context.page_table_RM,
                lengths_R=context.lengths_R,
                query_start_R=context.query_start_R,
                query_length_R=context.query_length_R,
                decode_rows=context.decode_rows,
                sinks_H=sinks_H,
                prefixes=context.prefixes,
                **dataclasses.asdict(mixing),
            )

        mesh = current()
        if mesh is not None:
            heads = partition_spec((None, "heads", None), mesh, ACTIVATION_RULES, q_THD.shape)
            paged, everywhere = partition_spec((None, None, "heads"), mesh, ACTIVATION_RULES), PartitionSpec()
            local = jax.shard_map(
                local,
                in_specs=(heads, heads, heads, paged, everywhere, everywhere, PartitionSpec(*heads[1:2])),
                out_specs=(heads, paged),
                check_vma=False,
            )
        assert cache.pages is not None
        mixed_THV, new = local(q_THD, k_TKD, v_TKD, cache.pages, layer, self, sinks_H)
        return mixed_THV, cache.with_pages(new)

    def attend_latent(
        self,
        q: tuple[jax.Array, jax.Array],
        latent_TR: jax.Array,
        k_turned_T1P: jax.Array,
        up: tuple[jax.Array, jax.Array],
        cache: Cache,
        layer: Any,
        mixing: Mixing,
    ) -> tuple[jax.Array, Cache]:
        """See `PackedContext.attend_latent`. The cache keeps latents and turned keys, and attention reads these.

        What makes a head's key of a latent is applied to the query, and what makes its value to the result.
        """
        q_THN, q_THP = q
        up_HNR, up_HVR = up
        q_THR = _by_head("thn,hnr->thr", q_THN, up_HNR)
        k_T1D = jnp.concatenate([latent_TR[:, None], k_turned_T1P], axis=-1)
        mixed_THR, cache = self.attend(jnp.concatenate([q_THR, q_THP], axis=-1), k_T1D, None, cache, layer, mixing)
        up_HRV = jnp.swapaxes(up_HVR, 1, 2)
        if known_platform() == "cpu":
            # Turned in memory: otherwise XLA:CPU rounds a row in another way in batches of another size.
            up_HRV = jax.lax.optimization_barrier(up_HRV)
        return _by_head("thr,hrv->thv", mixed_THR, up_HRV), cache

    def convolve(
        self, convolution: Convolution, x_TC: jax.Array, cache: Cache, layer: Any, mixer: str
    ) -> tuple[jax.Array, Cache]:
        """A causal convolution over each request, whose last inputs the cache keeps; returns ([T, C], cache)."""
        state_LSWC = cache.states[name := f"{mixer}.inputs"]
        start_T = jnp.max(jnp.where(self._is_of_TR, self.query_start_R, 0), axis=1)
        offset_T = jnp.arange(len(x_TC)) - start_T
        slot_T = self._slots(state_LSWC.shape[1])
        inputs = paged_inputs(x_TC, state_LSWC, layer, slot_T, offset_T, self.positions_T)
        last_R = jnp.maximum(self.query_start_R + self.query_length_R - 1, 0)
        state_LSWC = next_state(inputs, state_LSWC, layer, last_R, self.slot_R)
        return convolution(inputs), cache.with_state(name, state_LSWC)

    def attend_linear(
        self,
        q_TGN: jax.Array,
        k_TGN: jax.Array,
        v_THP: jax.Array,
        log_decay_TH: jax.Array,
        cache: Cache,
        layer: Any,
        mixer: str,
    ) -> tuple[jax.Array, Cache]:
        """Linear attention over each request, whose state the cache keeps; returns ([T, H, P], cache).

        Slots are used again: a request's first token starts from zero.
        """
        state_LSHNP = cache.states[name := f"{mixer}.state"]
        y_THP, state_LSHNP = ragged_linear_attention(
            q_TGN,
            k_TGN,
            v_THP,
            log_decay_TH,
            state_LSHNP,
            layer=layer,
            slot_R=self.slot_R,
            start_R=self.query_start_R,
            length_R=self.query_length_R,
            is_new_R=self.lengths_R == self.query_length_R,
        )
        return y_THP, cache.with_state(name, state_LSHNP)
