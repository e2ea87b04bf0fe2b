"""What the GPU kernels of attention have in common: options, which key blocks a tile of queries sees, padding.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D and E head sizes. n: blocks.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .block_plan import PADDING_K, PADDING_Q, Plan, meet

LOG2E = math.log2(math.e)
# A row's maximum while it has seen no key, and a masked score: finite, so that no difference is nan, and a power of
# two: fused arithmetic does not round the product, and with -1e30 the exponent of a masked score was up to 1e22.
UNSEEN = -(2.0**100)
CLOSED = 1e30  # the log-sum-exp of a row that sees nothing, for the backward pass: its probabilities are 0
SHIFT = 1 << 20  # blocks by which a position may be negative and still divide by a block's length
NEVER = 1 << 20  # more steps than a loop has
# Registers of a thread that computes and of one that loads. A block is launched with 168 for each of 384 threads, which
# they share: 2 x 240 + 24 = 2 x 232 + 40 = 3 x 168; asking for more would wait for ever.
FEW_LOADS, MANY_LOADS = (240, 24), (232, 40)


@dataclass(frozen=True)
class Options:
    """The static part of a call. `offset` is None when it is an array, one int a batch row."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    offset: int | None
    segments: bool
    sinks: bool
    bias: bool
    scaled: bool
    T: int
    S: int
    G: int

    @property
    def bend(self) -> float | None:
        """What a score in the products' units is multiplied by before the tanh."""
        return None if self.softcap is None else self.scale / self.softcap

    @property
    def to_base2(self) -> float:
        """What turns a score (bent, with a softcap) into the exponent of 2."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)

    @property
    def base2(self) -> float:
        """`to_base2`, or 1 where a bias is added: scores are exponents before then."""
        return 1.0 if self.bias else self.to_base2

    def biased(self, x: Any, bias: Any) -> Any:
        """Exponents of 2 from scores and a bias in natural units."""
        return x * self.to_base2 + bias.astype(jnp.float32) * LOG2E


@dataclass(frozen=True)
class Arrays:
    """The arrays of a call beside queries, keys and values; None where there is none.

    Attributes:
      segments: ids of queries and of keys. qk_scale_H, v_scale_H: factors of float8's scores and outputs.
    """

    segments: tuple[jax.Array, jax.Array] | None = None
    offset_B: jax.Array | None = None
    sinks_H: jax.Array | None = None
    bias_BHTS: jax.Array | None = None
    qk_scale_H: jax.Array | None = None
    v_scale_H: jax.Array | None = None

    def padded(self, T: int, S: int) -> dict[str, jax.Array]:
        """As kernels read them, by name."""
        found = {}
        if self.segments is not None:
            found["q_ids"], found["kv_ids"] = pad_ids(*self.segments, T, S)
        if self.offset_B is not None:
            found["offset"] = self.offset_B.astype(jnp.int32)
        if self.bias_BHTS is not None:
            bias = self.bias_BHTS if self.bias_BHTS.dtype.itemsize == 2 else self.bias_BHTS.astype(jnp.float32)
            found["bias"] = pad_rows(pad_rows(bias, T, 2), S, 3)
        given = {"sinks": self.sinks_H, "qk_scale": self.qk_scale_H, "v_scale": self.v_scale_H}
        return found | {name: x.astype(jnp.float32) for name, x in given.items() if x is not None}


def options_of(q: jax.Array, k: jax.Array, **given: Any) -> tuple[Options, Arrays]:
    """Raises NotImplementedError for what none of these kernels does."""
    if not given["scale"] > 0:
        raise NotImplementedError(f"the GPU kernels want a positive scale, got {given['scale']}")
    offset = given["q_offset"]
    segments = given["q_segment_ids_BT"], given["kv_segment_ids_BS"]
    more = {name: given.get(name) for name in ("sinks_H", "bias_BHTS", "qk_scale_H", "v_scale_H")}
    arrays = Arrays(None if segments[0] is None else segments, None if isinstance(offset, int) else offset, **more)
    options = Options(
        causal=given["causal"],
        window=given["window"],
        softcap=given["softcap"],
        scale=float(given["scale"]),
        offset=offset if isinstance(offset, int) else None,
        segments=arrays.segments is not None,
        sinks=arrays.sinks_H is not None,
        bias=arrays.bias_BHTS is not None,
        scaled=arrays.qk_scale_H is not None,
        T=q.shape[1],
        S=k.shape[1],
        G=q.shape[2] // k.shape[2],
    )
    return options, arrays


def i32(x: int) -> jax.Array:
    return jnp.array(x, jnp.int32)


def unknown_zero() -> jax.Array:
    """0, which the compiler does not know. A place that it is added to is computed in each step of a loop: known ones
    are computed before, the 16 descriptors of a tile's parts for example, and take registers all along."""
    return jax.lax.optimization_barrier(i32(0))


def floor_div(x: Any, block: int) -> Any:
    """x // block in one division, for x above -SHIFT * block."""
    return jax.lax.div(x + i32(SHIFT * block), i32(block)) - i32(SHIFT)


def keys_of(o: Options, first: Any, rows: int, block: int, n: int) -> tuple[Any, Any, Any, Any]:
    """(low, full_low, full_high, high): blocks [low, high) have keys that queries at positions [first, first + rows)
    see, and those in [full_low, full_high) have no others."""
    last = first + i32(rows - 1)
    low, high, full_low, full_high = i32(0), i32(n), i32(0), i32(o.S // block)
    if o.causal:
        high = jnp.minimum(high, floor_div(last, block) + i32(1))
        full_high = jnp.minimum(full_high, floor_div(first + i32(1), block))
    elif o.window is not None:
        high = jnp.minimum(high, floor_div(last + i32(o.window - 1), block) + i32(1))
        full_high = jnp.minimum(full_high, floor_div(first + i32(o.window), block))
    if o.window is not None:
        low = jnp.maximum(low, floor_div(first - i32(o.window - 1), block))
        full_low = jnp.maximum(full_low, floor_div(last - i32(o.window - 1) + i32(block - 1), block))
    return _ordered(o, low, full_low, full_high, high, n)


def queries_of(o: Options, first: Any, keys: int, block: int, n: int) -> tuple[Any, Any, Any, Any]:
    """`keys_of` the other way: blocks of queries that see keys [first, first + keys), in queries' positions less the
    offset. Queries beyond T count as seeing, as they pass nothing."""
    last = first + i32(keys - 1)
    low, high, full_low, full_high = i32(0), i32(n), i32(0), i32(n)
    if o.causal:
        low = jnp.maximum(low, floor_div(first, block))
        full_low = jnp.maximum(full_low, floor_div(last + i32(block - 1), block))
    elif o.window is not None:
        low = jnp.maximum(low, floor_div(first - i32(o.window - 1), block))
        full_low = jnp.maximum(full_low, floor_div(last - i32(o.window - 1) + i32(block - 1), block))
    if o.window is not None:
        high = jnp.minimum(high, floor_div(last + i32(o.window - 1), block) + i32(1))
        full_high = jnp.minimum(full_high, floor_div(first + i32(o.window), block))
    return _ordered(o, low, full_low, full_high, high, n)


def edges(o: Options, block: int) -> bool:
    """Whether a tile can have blocks that it sees in part."""
    return o.causal or o.window is not None or o.segments or o.S % block != 0


def _ordered(o: Options, low: Any, full_low: Any, full_high: Any, high: Any, n: int) -> tuple[Any, Any, Any, Any]:
    low = jnp.minimum(low, i32(n))
    high = jnp.maximum(low, high)
    full_low = jnp.minimum(jnp.maximum(full_low, low), high)
    full_high = jnp.minimum(jnp.maximum(full_high, full_low), high)
    return (low, low, low, high) if o.segments else (low, full_low, full_high, high)


def blocks_met(o: Options, given: dict[str, Any], block_q: int, block_k: int, of_keys: bool = False) -> jax.Array:
    """[B, tiles, 1 + n]: how many blocks of keys each tile of queries meets by segments and positions (`of_keys`: the
    other way), and these in ascending order."""
    meets = pairs_met(o, given, block_q, block_k)
    meets = jnp.swapaxes(meets, 1, 2) if of_keys else meets
    n = meets.shape[2]
    block = jnp.arange(n, dtype=jnp.int32)
    order = jnp.sort(jnp.where(meets, block, block + n)) % n
    return jnp.concatenate([meets.sum(-1, keepdims=True, dtype=jnp.int32), order], -1)


def block_at(o: Options, given: dict[str, Any], batch: Any, tile: Any, n: Any) -> Any:
    """The block of a tile's step n: with segments that of its list."""
    return given["met"][batch, tile, i32(1) + n] if o.segments else n


def pairs_met(o: Options, given: dict[str, Any], block_q: int, block_k: int) -> jax.Array:
    """[B, tiles of queries, blocks of keys], of padded arrays."""
    T, S = given["q"].shape[1], given["k"].shape[1]
    plan = Plan(T, S, block_q, block_k, o.causal, o.window, o.offset, segments=True)
    return meet(plan, given["q_ids"], given["kv_ids"], given.get("offset"))


def pad_ids(q_ids_BT: jax.Array, kv_ids_BS: jax.Array, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Ids of which equality alone means seeing: segment 0, and what is added, differs."""

    def padded(ids: jax.Array, length: int, none: int) -> jax.Array:
        ids = jnp.where(ids == 0, none, ids.astype(jnp.int32))
        return jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=none)

    return padded(q_ids_BT, T, PADDING_Q), padded(kv_ids_BS, S, PADDING_K)


def pad_rows(x: jax.Array, length: int, axis: int = 1, value: float = 0.0) -> jax.Array:
    """`x` with `value` after its end on `axis`; itself when it is long enough."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def of_rows(lse_BTH: jax.Array, delta_BTH: jax.Array, T: int) -> dict[str, jax.Array]:
    """[B, H, T], as the kernels of a backward pass read them: of base 2, and so that a row passes nothing that saw
    nothing or is none."""
    seen = lse_BTH > -jnp.inf
    lse_BHT = jnp.swapaxes(jnp.where(seen, lse_BTH * LOG2E, CLOSED), 1, 2)
    delta_BHT = jnp.swapaxes(jnp.where(seen, delta_BTH, 0.0), 1, 2)
    return {"lse": pad_rows(lse_BHT, T, 2, CLOSED), "delta": pad_rows(delta_BHT, T, 2)}


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
