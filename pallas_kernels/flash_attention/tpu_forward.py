"""Flash attention on TPU, forward (Dao 2023, arXiv:2307.08691).

One step of the grid takes a block of queries and a block of keys. Within it the queries go in chunks, all written out
in one straight line: a chunk's scores are multiplied while the softmax of the chunk before is taken, so that the matrix
and the vector units are both busy; the compiler's scheduler does the rest. The blocks of keys come last first: on the
diagonal there is then nothing to rescale.

Scores are held [key, query], and the output is summed transposed, [E, query]: what there is one of a query (maximum,
sum) is then a row, which costs nothing to apply, and the probabilities fill the matrix unit as its weights, which E
alone does not. A row's sum is kept in 8 parts, added once, at the end.

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

from ..chips import target_chip
from .block_plan import Plan

LANES = 128
AHEAD = 4  # chunks whose scores are multiplied before they are needed
PART = 512  # keys of one product: the chunk's products go to several matrix units
LOWEST = -1e30  # a running maximum's start: finite, so that what is hidden, -inf, has no weight beside it
SMALLEST = 1e-30
LOG2E = math.log2(math.e)
SUBLANES = 8  # parts of a row's sum
TILE = 128
# Of 64 MiB that the smallest chips have; what the compiler spills comes on top, and its profiler's program needs more.
VMEM_BYTES = 38 << 20
# Of the compiler's two schedulers the one that is quicker, by 1 to 8%, where a row is one block, and slower elsewhere.
SCHEDULER = {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True}


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

    `extras` may hold q_ids and kv_ids [B, 1, length], bias [B or 1, H or 1, S, T], sinks [H] and factors [H].
    """
    (B, H, T, D), (_, K, _, E) = q_BHTD.shape, v_BKSE.shape
    bq, bk, G = plan.block_q, plan.block_k, H // K
    grid_rows, steps = plan.grid
    names = list(tables)

    def of(refs: Any) -> Any:
        return dict(zip(names, refs, strict=True))

    def in_memory(b: Any, n: Any, t: Any, refs: Any) -> tuple[Any, Any]:
        return plan.blocks(n, t, of(refs), b)[:2]

    def q_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
        return b, h, in_memory(b, n, t, refs)[0], 0

    def kv_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
        return b, lax.div(h, jnp.int32(G)), in_memory(b, n, t, refs)[1], 0

    def out_map(b: Any, h: Any, n: Any, t: Any, *_: Any) -> Any:
        return b, h, plan.place(n, t)[0], 0

    specs = {
        "q": pl.BlockSpec((None, None, bq, D), q_map),
        "k": pl.BlockSpec((None, None, bk, D), kv_map),
        "v": pl.BlockSpec((None, None, bk, E), kv_map),
    }
    inputs = {"q": q_BHTD, "k": k_BKSD, "v": v_BKSE, **extras}
    if "q_ids" in extras:
        for name, size, side in (("q_ids", bq, 0), ("kv_ids", bk, 1)):
            specs[name] = pl.BlockSpec(
                (None, 1, size), lambda b, h, n, t, *refs, side=side: (b, 0, in_memory(b, n, t, refs)[side])
            )
    if "bias" in extras:
        shared_b, shared_h = (n == 1 for n in extras["bias"].shape[:2])

        def bias_map(b: Any, h: Any, n: Any, t: Any, *refs: Any) -> Any:
            row, block = in_memory(b, n, t, refs)
            return 0 if shared_b else b, 0 if shared_h else h, block, row

        specs["bias"] = pl.BlockSpec((None, None, bk, bq), bias_map)
    for name in ("sinks", "factors"):
        if name in extras:
            specs[name] = pl.BlockSpec(memory_space=pltpu.SMEM)
    cost = pl.CostEstimate(
        flops=2 * B * H * plan.pairs * (plan.D + plan.E),
        transcendentals=B * H * plan.pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q_BHTD, k_BKSD, v_BKSE)) + B * H * T * (E * 2 + 4),
    )
    is_short = steps == 1 and bq * bk <= 1 << 20
    # The compiler spills less of either of two bodies than of the only one. 7x's profiler cannot follow two.
    in_turns = is_short and len(_kinds(plan, steps)) == 1 and target_chip() != "7x"
    return pl.pallas_call(
        functools.partial(_kernel, plan, scores, steps, in_turns, names, list(inputs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(names),
            grid=(B, H, grid_rows, steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=[
                pl.BlockSpec((None, None, bq, E), out_map),
                pl.BlockSpec((None, None, 1, bq), lambda b, h, n, t, *_: (b, h, 0, plan.place(n, t)[0])),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, bq), jnp.float32),
                pltpu.VMEM((SUBLANES, bq), jnp.float32),
                pltpu.VMEM((E, bq), jnp.float32),
                pltpu.VMEM(scores_kept(plan), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, E), v_BKSE.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            flags=SCHEDULER if is_short and target_chip() != "v6e" else None,
        ),
        cost_estimate=cost,
        name="flash_attention_forward",
    )(*(tables[name] for name in names), *inputs.values())


def scores_kept(plan: Plan) -> tuple[int, int, int]:
    """The shape of the memory for a pair's scores. Left to itself, the compiler spills more than twice as much."""
    size = min(plan.chunk, plan.block_q)
    return min(AHEAD + 1, plan.block_q // size), plan.block_k, size


def _kernel(
    plan: Plan, scores: Scores, steps: int, in_turns: bool, names: list[str], inputs: list[str], *refs: Any
) -> None:
    """`in_turns`: every other head has a body of its own, which is the same."""
    tables = dict(zip(names, refs[: len(names)], strict=True))
    refs = refs[len(names) :]
    x = dict(zip(inputs, refs[: len(inputs)], strict=True))
    out_ref, lse_ref, max_ref, sum_ref, acc_ref, scores_ref = refs[len(inputs) :]
    b, h, n, t = (pl.program_id(axis) for axis in range(4))
    i, j = plan.place(n, t)
    _, block, meets = plan.blocks(n, t, tables, b)
    rows = Rows(plan, scores, x, tables, (b, h, i, block), (out_ref, lse_ref, max_ref, sum_ref, acc_ref, scores_ref))

    full, kinds = plan.is_full(i, block, tables, b), _kinds(plan, steps)
    for first, is_edge in kinds:
        wanted = [] if steps == 1 else [j == 0] if first else [j > 0]
        if meets is not True and (plan.has_empty_rows or not first):
            wanted.append(meets)
        if (first, not is_edge) in kinds:
            wanted.append(jnp.logical_not(full) if is_edge else full)
        body = functools.partial(rows.run, first=first, last=steps == 1, edge=is_edge)
        for turn in ([h % 2 == 0], [h % 2 == 1]) if in_turns else ([],):
            conditions = wanted + turn
            pl.when(functools.reduce(jnp.logical_and, conditions))(body) if conditions else body()
    if plan.has_empty_rows:
        pl.when((j == 0) & jnp.logical_not(meets))(functools.partial(rows.begin, last=steps == 1))
    if steps > 1:
        high = plan.keys_of(i, tables, b)[1] if plan.folded else None

        @pl.when(j == high if plan.folded else j == steps - 1)
        def _() -> None:
            for chunk in rows.chunks():
                rows.finish(chunk, max_ref[:, chunk], sum_ref[:, chunk], acc_ref[:, chunk])


@functools.cache
def _kinds(plan: Plan, steps: int) -> list[tuple[bool, bool]]:
    """(is it a row's first block, is it an edge): what can happen, so that nothing else is compiled."""
    if not plan.is_static:
        every = [(True, True), (True, False), (False, True), (False, False)]
        return every[:2] if steps == 1 else every
    found = set()
    for i in range(plan.nq):
        low, high = plan.keys_of(i, None, 0)
        for j in range(high - low + 1):
            found.add((j == 0, not plan.is_full(i, high - j, None, 0)))
    return sorted(found, reverse=True)


@dataclasses.dataclass
class Rows:
    """A block of queries that meets a block of keys."""

    plan: Plan
    scores: Scores
    x: dict[str, Any]
    tables: dict[str, Any]
    at: tuple[Any, Any, Any, Any]
    refs: tuple[Any, ...]

    def chunks(self) -> list[slice]:
        size = min(self.plan.chunk, self.plan.block_q)
        return [slice(start, start + size) for start in range(0, self.plan.block_q, size)]

    def begin(self, last: bool) -> None:
        """In place of `run` where nothing is seen."""
        *_, max_ref, sum_ref, acc_ref, _ = self.refs
        for chunk in self.chunks():
            size = chunk.stop - chunk.start
            parts = [
                jnp.full((ref.shape[0], size), x, jnp.float32)
                for ref, x in ((max_ref, LOWEST), (sum_ref, 0), (acc_ref, 0))
            ]
            if last:
                self.finish(chunk, *parts)
            else:
                max_ref[:, chunk], sum_ref[:, chunk], acc_ref[:, chunk] = parts

    def run(self, first: bool, last: bool, edge: bool) -> None:
        # On the diagonal a chunk's last keys are known to be hidden, and the first ones to be seen.
        diagonal = edge and self.plan.diagonal
        chunks, bk = self.chunks(), self.plan.block_k
        keys = [min(bk, chunk.stop) if diagonal else bk for chunk in chunks]
        vT = jnp.transpose(self.x["v"][...])
        tops = [self._scores(n, chunks[n], keys[n], edge) for n in range(min(AHEAD, len(chunks)))]
        for n, chunk in enumerate(chunks):
            if n + AHEAD < len(chunks):
                tops.append(self._scores(n + AHEAD, chunks[n + AHEAD], keys[n + AHEAD], edge))
            self._attend(n, chunk, tops[n], vT[:, : keys[n]], first, last)

    def _scores(self, n: int, chunk: slice, keys: int, edge: bool) -> jax.Array:
        """Keeps those of a chunk, masked, [key, query]; their maxima, [1, query]."""
        x, k, q = self.x, self.x["k"], self.x["q"][chunk]
        s = jnp.concatenate([dot(k[at : min(at + PART, keys)], q, (1, 1)) for at in range(0, keys, PART)])
        bias = x["bias"][:keys, chunk] if "bias" in x else None
        s = self.scores.logits(s, x["factors"][self.at[1]] if "factors" in x else None, bias)
        if edge and self.plan.diagonal and chunk.start:
            s = jnp.concatenate([s[: chunk.start], self._mask(chunk, s[chunk.start :], chunk.start)])
        elif edge:
            s = self._mask(chunk, s, 0)
        self.refs[-1][n % (AHEAD + 1), :keys] = s
        return jnp.maximum(s.max(0, keepdims=True), LOWEST)

    def _attend(self, n: int, chunk: slice, top: jax.Array, vT: jax.Array, first: bool, last: bool) -> None:
        _, _, max_ref, sum_ref, acc_ref, scores_ref = self.refs
        late = self.scores.late
        if not first:
            before = max_ref[:, chunk]
            top = jnp.maximum(before, top)
        s = scores_ref[n % (AHEAD + 1), : vT.shape[1]]
        p = jnp.exp2((s - top) * late) if late != 1.0 else jnp.exp2(s - top)
        total = p.reshape(-1, SUBLANES, p.shape[1]).sum(0)
        out = dot(vT, p.astype(vT.dtype), (1, 0))
        if not first:
            decay = jnp.exp2((before - top) * late)
            total = sum_ref[:, chunk] * decay + total
            out = acc_ref[:, chunk] * decay + out
        if last:
            self.finish(chunk, top, total, out)
        else:
            max_ref[:, chunk], sum_ref[:, chunk], acc_ref[:, chunk] = top, total, out

    def _mask(self, chunk: slice, s: jax.Array, first_key: int) -> jax.Array:
        b, _, i, block = self.at
        if self.plan.diagonal:
            sees = self.plan.sees(chunk.start, first_key, s.shape, 1)
        else:
            q_at = self.plan.position(i, self.tables, b) + chunk.start
            sees = self.plan.sees(q_at, block * self.plan.block_k, s.shape, 1)
        if "q_ids" in self.x:
            same = column(self.x["kv_ids"][...], s.shape[1]) == self.x["q_ids"][:, chunk]
            sees = same if sees is None else sees & same
        return s if sees is None else jnp.where(sees, s, -jnp.inf)

    def finish(self, chunk: slice, top: jax.Array, total: jax.Array, out: jax.Array) -> None:
        """Of top [1, r], total [SUBLANES, r] and out [E, r]."""
        out_ref, lse_ref, *_ = self.refs
        top, total = top * self.scores.late, total.sum(0, keepdims=True)
        if "sinks" in self.x:
            sink = jnp.full(top.shape, self.x["sinks"][self.at[1]] * LOG2E)
            new_top = jnp.maximum(top, sink)
            share = jnp.exp2(top - new_top)
            total, out, top = total * share + jnp.exp2(sink - new_top), out * share, new_top
        # Where nothing is seen both are 0; else the greatest logit alone adds 1.
        some = jnp.maximum(total, SMALLEST)
        out_ref[chunk] = jnp.transpose((out * (1 / some)).astype(out_ref.dtype))
        lse_ref[:, chunk] = jnp.where(total > 0, (top + jnp.log2(some)) * math.log(2), -jnp.inf)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """A product that accumulates in float32, and of float32 inputs rounds nothing before."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def column(x: jax.Array, width: int) -> jax.Array:
    """A row [1, r] as [r, width], whose columns are all the same."""
    columns = jnp.transpose(jnp.broadcast_to(x, (LANES, x.shape[1])))
    return columns[:, :width] if width <= LANES else jnp.tile(columns, (1, width // LANES))
