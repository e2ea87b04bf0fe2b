"""Flash attention on TPU, forward (Dao 2023, arXiv:2307.08691).

One step of the grid takes a block of queries and a block of keys. Within it the queries go in chunks, all written out
in one straight line: a chunk's scores are multiplied while the softmax of the chunk before is taken, so that the matrix
and the vector units are both busy; the compiler's scheduler does the rest. Rows' sums are kept lane by lane, and added
across lanes once, at the end. The blocks of keys come last first: on the diagonal there is then nothing to rescale.

Scores are kept in base 2. What multiplies them is applied to their distance from the maximum, and so costs one
operation in all; with a soft cap or a bias, before.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, D head size, E head size of values; T and S
padded to whole blocks. r, s: the rows and keys of one chunk.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_plan import Plan

LANES = 128
LOWEST = -1e30  # a running maximum's start: finite, so that what is hidden, -inf, has no weight beside it
SMALLEST = 1e-30
LOG2E = math.log2(math.e)
VMEM_BYTES = 60 << 20  # of the 64 MiB of the smallest chip


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores become base-2 logits: static."""

    scale: float
    softcap: float | None
    bias: bool
    scaled: bool  # whether each head has a factor of its own

    @property
    def late(self) -> float:
        """What multiplies a distance of logits from their maximum; 1 if they are scaled before."""
        early = self.softcap is not None or self.bias or self.scaled or self.scale <= 0
        return 1.0 if early else self.scale * LOG2E

    def logits(self, s: jax.Array, factor: Any, bias: Any) -> jax.Array:
        if self.late != 1.0:
            return s
        scale = self.scale if factor is None else self.scale * factor
        if self.softcap is not None:
            s = jnp.tanh(s * (scale / self.softcap)) * (self.softcap * LOG2E)
        else:
            s = s * (scale * LOG2E)
        return s if bias is None else s + bias.astype(jnp.float32) * LOG2E


def forward(
    plan: Plan,
    scores: Scores,
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    tables: dict[str, jax.Array],
    extras: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """out_BHTE in bfloat16 or q's dtype, and lse [B, H, 1, T].

    `extras` may hold q_ids and kv_ids [B, 1, length], bias [B or 1, H or 1, T, S], sinks [H] and factors [H].
    """
    (B, H, T, D), (_, K, _, E) = q_BHTD.shape, v_BKSE.shape
    bq, bk, G = plan.block_q, plan.block_k, H // K
    grid_rows, steps = plan.grid
    names = list(tables)

    def of(refs: Any) -> Any:
        return dict(zip(names, refs, strict=True))

    def row(n: Any, t: Any) -> Any:
        return plan.place(n, t)[0]

    def key_block(b: Any, n: Any, t: Any, refs: Any) -> Any:
        i, j = plan.place(n, t)
        return _key_block(plan, *plan.keys_of(i, of(refs), b), j)

    def q_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
        return b, h, row(n, t), 0

    def kv_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
        return b, lax.div(h, jnp.int32(G)), key_block(b, n, t, refs), 0

    specs = {
        "q": pl.BlockSpec((None, None, bq, D), q_map),
        "k": pl.BlockSpec((None, None, bk, D), kv_map),
        "v": pl.BlockSpec((None, None, bk, E), kv_map),
    }
    inputs = {"q": q_BHTD, "k": k_BKSD, "v": v_BKSE, **extras}
    if "q_ids" in extras:
        specs["q_ids"] = pl.BlockSpec((None, 1, bq), lambda b, h, n, t, *_: (b, 0, row(n, t)))
        specs["kv_ids"] = pl.BlockSpec((None, 1, bk), lambda b, h, n, t, *refs: (b, 0, key_block(b, n, t, refs)))
    if "bias" in extras:
        shared_b, shared_h = (n == 1 for n in extras["bias"].shape[:2])

        def bias_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
            block = key_block(b, n, t, refs)
            return 0 if shared_b else b, 0 if shared_h else h, row(n, t), block

        specs["bias"] = pl.BlockSpec((None, None, bq, bk), bias_map)
    for name in ("sinks", "factors"):
        if name in extras:
            specs[name] = pl.BlockSpec(memory_space=pltpu.SMEM)
    cost = pl.CostEstimate(
        flops=2 * B * H * plan.pairs * (plan.D + plan.E),
        transcendentals=B * H * plan.pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q_BHTD, k_BKSD, v_BKSE)) + B * H * T * (E * 2 + 4),
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan, scores, steps, names, list(inputs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(names),
            grid=(B, H, grid_rows, steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=[
                pl.BlockSpec((None, None, bq, E), q_map),
                pl.BlockSpec((None, None, 1, bq), lambda b, h, n, t, *_: (b, h, 0, row(n, t))),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, E), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, E), v_BKSE.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        name="flash_attention_forward",
    )(*(tables[name] for name in names), *inputs.values())


def _key_block(plan: Plan, low: Any, high: Any, j: Any) -> Any:
    """The last comes first; a step without a block of its own names one that is there."""
    if plan.folded:
        return high - j
    return jnp.minimum(jnp.maximum(jnp.maximum(high - j, low), 0), plan.nk - 1) if plan.nk > 1 else 0


def _kernel(plan: Plan, scores: Scores, steps: int, names: list[str], inputs: list[str], *refs: Any) -> None:
    tables = dict(zip(names, refs[: len(names)], strict=True))
    refs = refs[len(names) :]
    x = dict(zip(inputs, refs[: len(inputs)], strict=True))
    out_ref, lse_ref, max_ref, sum_ref, acc_ref = refs[len(inputs) :]
    b, h, n, t = (pl.program_id(axis) for axis in range(4))
    i, j = plan.place(n, t)
    low, high = plan.keys_of(i, tables, b)
    block = _key_block(plan, low, high, j)
    rows = Rows(plan, scores, x, tables, (b, h, i, block), (out_ref, lse_ref, max_ref, sum_ref, acc_ref))

    full, kinds = plan.is_full(i, block, tables, b), _kinds(plan, steps)
    for first, is_edge in kinds:
        # A row's first block is visited even when it is empty, for the output to be written.
        wanted = [] if steps == 1 else [j == 0] if first else [j > 0] if plan.folded else [j > 0, high - j >= low]
        if (first, not is_edge) in kinds:
            wanted.append(jnp.logical_not(full) if is_edge else full)
        body = functools.partial(rows.run, first=first, last=steps == 1, edge=is_edge)
        pl.when(functools.reduce(jnp.logical_and, wanted))(body) if wanted else body()
    if steps > 1:

        @pl.when(j == high if plan.folded else j == steps - 1)
        def _() -> None:
            for chunk in rows.chunks():
                rows.finish(chunk, max_ref[chunk], sum_ref[chunk], acc_ref[chunk])


@functools.cache
def _kinds(plan: Plan, steps: int) -> list[tuple[bool, bool]]:
    """(is it a row's first block, is it an edge): what can happen, so that nothing else is compiled."""
    if not plan.is_static:
        every = [(True, True), (True, False), (False, True), (False, False)]
        return every[:2] if steps == 1 else every
    found = set()
    for i in range(plan.nq):
        low, high = plan.keys_of(i, None, 0)
        for j in range(max(1, high - low + 1)):
            block = min(max(high - j, low, 0), plan.nk - 1)
            found.add((j == 0, not plan.is_full(i, block, None, 0)))
    return sorted(found, reverse=True)


@dataclasses.dataclass
class Rows:
    """A block of queries that meets a block of keys."""

    plan: Plan
    scores: Scores
    x: dict[str, Any]
    tables: dict[str, Any]
    at: tuple[Any, Any, Any, Any]
    refs: tuple[Any, Any, Any, Any, Any]

    def chunks(self) -> list[slice]:
        size = min(self.plan.chunk, self.plan.block_q)
        return [slice(start, start + size) for start in range(0, self.plan.block_q, size)]

    def run(self, first: bool, last: bool, edge: bool) -> None:
        # On the diagonal a chunk's last keys are known to be hidden, and the first ones to be seen.
        diagonal = edge and self.plan.diagonal
        chunks = self.chunks()
        keys = [min(self.plan.block_k, c.stop) if diagonal else self.plan.block_k for c in chunks]
        product = self._product(chunks[0], keys[0])
        for n, chunk in enumerate(chunks):
            following = self._product(chunks[n + 1], keys[n + 1]) if n + 1 < len(chunks) else None
            self._attend(chunk, product, first, last, edge, diagonal)
            product = following

    def _product(self, chunk: slice, keys: int) -> jax.Array:
        return dot(self.x["q"][chunk], self.x["k"][:keys], (1, 1))

    def _attend(self, chunk: slice, s: Any, first: bool, last: bool, edge: bool, diagonal: bool) -> None:
        b, h, i, block = self.at
        _, _, max_ref, sum_ref, acc_ref = self.refs
        keys, v_ref, late = s.shape[1], self.x["v"], self.scores.late
        bias = self.x["bias"][chunk, :keys] if "bias" in self.x else None
        s = self.scores.logits(s, self.x["factors"][h] if "factors" in self.x else None, bias)
        if diagonal and chunk.start:
            tail = self._mask(chunk, s[:, chunk.start :], chunk.start)
            s = jnp.concatenate([s[:, : chunk.start], tail], 1)
        elif edge:
            s = self._mask(chunk, s, 0)
        top = jnp.maximum(jnp.broadcast_to(s.max(-1, keepdims=True), (s.shape[0], LANES)), LOWEST)
        if not first:
            before = max_ref[chunk]
            top = jnp.maximum(before, top)
        p = jnp.exp2((s - across(top, keys)) * late) if late != 1.0 else jnp.exp2(s - across(top, keys))
        total = p[:, :LANES]
        for n in range(LANES, keys, LANES):
            total = total + p[:, n : n + LANES]
        out = dot(p.astype(v_ref.dtype), v_ref[:keys], (1, 0))
        if not first:
            decay = jnp.exp2((before - top) * late)
            total = sum_ref[chunk] * decay + total
            out = acc_ref[chunk] * across(decay, out.shape[1]) + out
        if last:
            self.finish(chunk, top, total, out)
        else:
            max_ref[chunk], sum_ref[chunk], acc_ref[chunk] = top, total, out

    def _mask(self, chunk: slice, s: jax.Array, first_key: int) -> jax.Array:
        b, _, i, block = self.at
        if self.plan.diagonal:
            sees = self.plan.sees(chunk.start, first_key, s.shape, 0)
        else:
            q_at = self.plan.position(i, self.tables, b) + chunk.start
            sees = self.plan.sees(q_at, block * self.plan.block_k, s.shape, 0)
        if "q_ids" in self.x:
            ids = jnp.broadcast_to(self.x["q_ids"][:, chunk], (LANES, s.shape[0]))
            same = across(jnp.transpose(ids), s.shape[1]) == self.x["kv_ids"][...]
            sees = same if sees is None else sees & same
        return s if sees is None else jnp.where(sees, s, -jnp.inf)

    def finish(self, chunk: slice, top: jax.Array, total: jax.Array, out: jax.Array) -> None:
        out_ref, lse_ref, *_ = self.refs
        top = top * self.scores.late
        total = jnp.broadcast_to(total.sum(-1, keepdims=True), top.shape)
        if "sinks" in self.x:
            sink = jnp.full(top.shape, self.x["sinks"][self.at[1]] * LOG2E)
            new_top = jnp.maximum(top, sink)
            share = jnp.exp2(top - new_top)
            total, out = total * share + jnp.exp2(sink - new_top), out * across(share, out.shape[1])
            top = new_top
        # Where nothing is seen both are 0; else the greatest logit alone adds 1.
        out_ref[chunk] = (out * across(1 / jnp.maximum(total, SMALLEST), out.shape[1])).astype(out_ref.dtype)
        lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
        both = jnp.transpose(jnp.where(lane == 0, top, total))
        lse = (both[:1] + jnp.log2(jnp.maximum(both[1:2], SMALLEST))) * math.log(2)
        lse_ref[:, chunk] = jnp.where(both[1:2] > 0, lse, -jnp.inf)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def across(x: jax.Array, width: int) -> jax.Array:
    """[r, LANES], whose columns are the same, as [r, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
