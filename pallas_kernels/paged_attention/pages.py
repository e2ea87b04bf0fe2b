"""The pool of pages that all candidates of `paged_attention` read and write (Kwon et al. 2023, arXiv:2309.06180).

Shapes: L layers, P pages, K key/value heads, S slots a page, D head size, V size of a value (D, or less of a latent).
Of layout "joint": E lanes of a token, its key and
its value, as N tiles of X = 128. Of a quantised cache: Z = 2 S, the scales of the keys of
a page and then those of its values.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from .. import float8
from ..chips import known_platform

LANES = 128
LAYOUTS = ("split", "bits", "joint")
BITS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), float8.FLOAT8: jnp.dtype(jnp.uint8)}
QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number of each


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_LPKDS", "v_LPKSD", "kv_LPKNSX", "scale_LPKZ"],
    meta_fields=["head_dim", "value_dim", "latent"],
)
@dataclass(frozen=True)
class Pages:
    """Keys and values of all layers. A pytree, and the carry of the decoder's scan over layers.

    The layout is private to this folder. A page is contiguous, and either

    - "split": keys transposed and values, so that both products of attention contract the last axis on the left with
      the last but one on the right. Of XLA:CPU's products that kind is quick for few rows and rounds a row the same
      whatever rows stand beside it. Values of a latent are kept a second time.
    - "bits": as "split", of bfloat16 or float8, kept as integers: XLA:CPU makes a pool of these wider to write to it.
    - "joint": each token's key and then its value, in lanes, one tile of lanes after the other, so that a page of all
      heads is one plain copy to a TPU's memory, and as the matrix unit wants it. A latent is kept once.

    A quantised cache (int8, float8_e4m3fn) has a scale for each token and head, float32. Written once with its token,
    it never changes: scales for a page would have the page rounded anew with each token, and results depend on how a
    prompt was cut; one for a layer (what servers have that calibrate before) costs accuracy where tokens differ.
    """

    k_LPKDS: jax.Array | None
    v_LPKSD: jax.Array | None
    kv_LPKNSX: jax.Array | None
    scale_LPKZ: jax.Array | None
    head_dim: int
    value_dim: int
    latent: bool

    @property
    def layout(self) -> str:
        if self.kv_LPKNSX is not None:
            return "joint"
        return "bits" if self._tokens.dtype in BITS.values() else "split"

    @property
    def _tokens(self) -> jax.Array:
        found = self.v_LPKSD if self.kv_LPKNSX is None else self.kv_LPKNSX
        assert found is not None
        return found

    @property
    def num_layers(self) -> int:
        return self._tokens.shape[0]

    @property
    def num_pages(self) -> int:
        return self._tokens.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self._tokens.shape[2]

    @property
    def page_size(self) -> int:
        return self._tokens.shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the numbers."""
        kept = self._tokens.dtype
        return next((dtype for dtype, bits in BITS.items() if kept == bits), kept)

    @property
    def quantised(self) -> bool:
        return self.scale_LPKZ is not None

    @property
    def lanes(self) -> int:
        """Of layout "joint": E."""
        return self._tokens.shape[3] * self._tokens.shape[5]

    @property
    def value_lane(self) -> int:
        """Of layout "joint": the lane where a value begins."""
        return 0 if self.latent else value_lane(self.head_dim)

    def take(self, layer: int | jax.Array, page_W: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [..., K, D, S] and values [..., K, S, V] of pages, in the pages' dtype; of float8's bits float32."""
        if self.kv_LPKNSX is None:
            assert self.k_LPKDS is not None and self.v_LPKSD is not None
            k, v = self.k_LPKDS[layer, page_W], self.v_LPKSD[layer, page_W]
            return (from_bits(k), from_bits(v)) if self.layout == "bits" else (k, v)
        kv = jnp.swapaxes(self.kv_LPKNSX[layer, page_W], -2, -3)  # [..., K, S, N, X]
        kv = kv.reshape(*kv.shape[:-2], -1)
        first = self.value_lane
        return jnp.swapaxes(kv[..., : self.head_dim], -1, -2), kv[..., first : first + self.value_dim]

    def take_one(self, layer: int | jax.Array, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`take` of a single page: [K, D, S] and [K, S, V]."""
        if self.k_LPKDS is None or self.v_LPKSD is None or self.k_LPKDS.size > jnp.iinfo(jnp.int32).max:
            return self.take(layer, page)
        place = layer * self.num_pages + page
        k_KDS, v_KSV = (_piece(x_LP, place) for x_LP in (self.k_LPKDS, self.v_LPKSD))
        return (from_bits(k_KDS), from_bits(v_KSV)) if self.layout == "bits" else (k_KDS, v_KSV)

    def take_scales(self, layer: int | jax.Array, page_W: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scales of the keys and of the values of pages, [..., K, S] each."""
        assert self.scale_LPKZ is not None
        both = self.scale_LPKZ[layer, page_W]
        return both[..., : self.page_size], both[..., self.page_size :]

    def join(self, k_TKD: jax.Array, v_TKV: jax.Array) -> jax.Array:
        """[T, K, E]: tokens as layout "joint" has them."""
        E = self.lanes
        if self.latent:
            return jnp.pad(k_TKD, ((0, 0), (0, 0), (0, E - self.head_dim)))
        gap = self.value_lane - self.head_dim
        k_TKF = jnp.pad(k_TKD, ((0, 0), (0, 0), (0, gap)))
        return jnp.concatenate([k_TKF, jnp.pad(v_TKV, ((0, 0), (0, 0), (0, E - self.value_lane - self.value_dim)))], -1)


def init_pages(
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype = jnp.float32,
    *,
    latent: int | None = None,
    layout: str | None = None,
) -> Pages:
    """An empty pool of `num_pages` pages of `page_size` tokens for each layer, in `dtype`.

    Args:
      dtype: a floating one of 16 bits or more, or int8 or float8_e4m3fn: quantised as it is written.
      latent: the value of a token is the first so many numbers of its key (latent attention, arXiv:2405.04434).
      layout: "split", "bits" or "joint"; None: what the platform's kernels want.
    """
    sizes = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
    if min(sizes) < 1:
        raise ValueError(f"layers, pages, heads, slots and head size must be positive, got {sizes}")
    if latent is not None and not 1 <= latent <= head_dim:
        raise ValueError(f"latent is how many of a key's {head_dim} numbers are its value, got {latent}")
    if layout is None:
        platform = known_platform() or jax.default_backend()
        narrow = "bits" if platform == "cpu" and jnp.dtype(dtype) in BITS else "split"
        layout = "joint" if platform == "tpu" else narrow
    if layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
    dtype = jnp.dtype(dtype)
    if layout == "bits" and dtype not in BITS:
        names = " or ".join(kept.name for kept in BITS)
        raise ValueError(f"pages of the layout 'bits' are {names}, got {dtype.name}; use 'split'")
    # Other floats of 8 bits would have no scales, and numbers beyond their reach be lost.
    if dtype.name not in QUANTISED and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1):
        raise ValueError(f"pages are floats of 16 bits or more, or one of {', '.join(QUANTISED)}; got {dtype.name}")
    V, rows = latent or head_dim, sizes[:4]
    k = v = kv = scale = None
    if layout != "joint":
        kept = BITS[dtype] if layout == "bits" else dtype
        k = jnp.zeros((*rows[:3], head_dim, page_size), kept)
        v = jnp.zeros((*rows, V), kept)
    else:
        E = head_dim if latent else value_lane(head_dim) + head_dim
        kv = jnp.zeros((*rows[:3], -(-E // LANES), page_size, LANES), dtype)
    if dtype.name in QUANTISED:
        scale = jnp.zeros((*rows[:3], 2 * page_size), jnp.float32)
    return Pages(k, v, kv, scale, head_dim, V, latent is not None)


def _piece(x_LP: jax.Array, place: int | jax.Array) -> jax.Array:
    """One page, as a piece of one long row: so XLA:CPU copies it in half of the time that it takes with more axes."""
    shape = x_LP.shape[2:]
    size = math.prod(shape)
    return jax.lax.dynamic_slice(x_LP.reshape(-1), (place * size,), (size,)).reshape(shape)


def to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, BITS[x.dtype])


def from_bits(x: jax.Array) -> jax.Array:
    """bfloat16; of float8, whose numbers are normal or 0, float32, as XLA:CPU's own conversion is slow."""
    if x.dtype == BITS[jnp.dtype(jnp.bfloat16)]:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    bits = x.astype(jnp.uint32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return jax.lax.bitcast_convert_type(moved, jnp.float32) * 2.0**float8.BIAS


def value_lane(head_dim: int) -> int:
    """Right after the key where both fit one tile of lanes, else in a tile of its own."""
    return head_dim if 2 * head_dim <= LANES else -(-head_dim // LANES) * LANES


def quantise(x_TKD: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Numbers in `dtype`, and the scale of each token and head, [T, K] in float32.

    float8 numbers are normal or 0 (`float8.to_bfloat16`): what lies below is rounded by at most 2e-5 of the largest.
    """
    most = QUANTISED[jnp.dtype(dtype).name]
    x_TKD = x_TKD.astype(jnp.float32)
    scale_TK = jnp.max(jnp.abs(x_TKD), -1) / most
    whole = x_TKD / jnp.where(scale_TK > 0, scale_TK, 1)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        whole = jnp.round(whole)
    else:
        whole = jnp.where(jnp.abs(whole) < float8.LEAST, jnp.round(whole / float8.LEAST) * float8.LEAST, whole)
    return jnp.clip(whole, -most, most).astype(dtype), scale_TK
