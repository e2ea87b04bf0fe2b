"""Flash attention on TPU, backward (Dao 2023, arXiv:2307.08691): one kernel, five products a pair of blocks.

Scores are held [key, query]: what there is one of a query (log-sum-exp, delta) is then a row, and nothing is transposed
but in shape of the inputs. The gradient of the queries is kept transposed and whole in vector memory, while the blocks
of keys pass; that of the keys is summed over the queries of all heads that share them, while these pass.

Shapes: B batch rows, T queries, S keys, K key/value heads, G query heads of each, D head size, E head size of values; T
and S padded to whole blocks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_forward import LANES, LOG2E, VMEM_BYTES, Scores, across, dot
from .tpu_plan import Plan

ZEROED = 512  # queries whose gradient is set to zero at a time


def backward(
    plan: Plan,
    scores: Scores,
    arrays: dict[str, jax.Array],
    tables: dict[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """dq [B, K, G, D, T] and dk [B, K, S, D], both without the scale; dv [B, K, S, E], and d_bias [B, K, G, S, T].

    `arrays`, in this order: q [B, K, G, T, D], k [B, K, S, D], v [B, K, S, E], kT [B, K, D, S], d_out [B, K, G, T, E],
    lse2 (in base 2, large where nothing is seen) and delta [B, K, G, 1, T]; perhaps q_ids, kv_ids [B, 1, length], and
    the bias, transposed, [B or 1, K or 1, G or 1, S, T].
    """
    B, K, G, T, D = arrays["q"].shape
    S, E = arrays["v"].shape[2:]
    bq, bk, (grid_rows, steps) = plan.block_q, plan.block_k, plan.grid
    names = list(tables)

    def key_block(n: Any, t: Any) -> Any:
        return plan.place(n, t)[0]

    def query_block(b: Any, n: Any, t: Any, refs: Any) -> Any:
        j, t = plan.place(n, t)
        return _query_block(plan, *plan.queries_of(j, dict(zip(names, refs, strict=True)), b), t)

    def q_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        return b, h, g, query_block(b, n, t, refs), 0

    def row_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        return b, h, g, 0, query_block(b, n, t, refs)

    def k_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        return b, h, key_block(n, t), 0

    specs = {
        "q": pl.BlockSpec((None, None, None, bq, D), q_map),
        "k": pl.BlockSpec((None, None, bk, D), k_map),
        "v": pl.BlockSpec((None, None, bk, E), k_map),
        "kT": pl.BlockSpec((None, None, D, bk), lambda b, h, n, t, *_: (b, h, 0, key_block(n, t))),
        "d_out": pl.BlockSpec((None, None, None, bq, E), q_map),
        "lse2": pl.BlockSpec((None, None, None, 1, bq), row_map),
        "delta": pl.BlockSpec((None, None, None, 1, bq), row_map),
        "q_ids": pl.BlockSpec((None, 1, bq), lambda b, h, n, t, g, *refs: (b, 0, query_block(b, n, t, refs))),
        "kv_ids": pl.BlockSpec((None, 1, bk), lambda b, h, n, t, *_: (b, 0, key_block(n, t))),
        "factors": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    out_specs = [
        pl.BlockSpec((None, None, G, D, T), lambda b, h, *_: (b, h, 0, 0, 0)),
        pl.BlockSpec((None, None, bk, D), k_map),
        pl.BlockSpec((None, None, bk, E), k_map),
    ]
    out_shapes = [(B, K, G, D, T), (B, K, S, D), (B, K, S, E)]
    if "bias" in arrays:
        shared = [n == 1 for n in arrays["bias"].shape[:3]]

        def bias_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
            own = (0 if alone else at for alone, at in zip(shared, (b, h, g), strict=True))
            return *own, key_block(n, t), query_block(b, n, t, refs)

        specs["bias"] = pl.BlockSpec((None, None, None, bk, bq), bias_map)
        out_specs.append(
            pl.BlockSpec(
                (None, None, None, bk, bq),
                lambda b, h, n, t, g, *refs: (b, h, g, key_block(n, t), query_block(b, n, t, refs)),
            )
        )
        out_shapes.append((B, K, G, S, T))
    cost = pl.CostEstimate(
        flops=2 * B * K * G * plan.pairs * (3 * plan.D + 2 * plan.E),
        transcendentals=B * K * G * plan.pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays.values()) + 4 * B * K * (G * T * D + S * (D + E)),
    )
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, plan, scores, steps, names, list(arrays)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(names),
                grid=(B, K, grid_rows, steps, G),
                in_specs=[specs[name] for name in arrays],
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM((bk, D), jnp.float32), pltpu.VMEM((bk, E), jnp.float32)],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in out_shapes],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=cost,
            name="flash_attention_backward",
        )(*(tables[name] for name in names), *arrays.values())
    )


def _query_block(plan: Plan, low: Any, high: Any, t: Any) -> Any:
    if plan.folded:  # folded: no step is without a block
        return low + t
    return jnp.minimum(jnp.maximum(jnp.minimum(low + t, high), 0), plan.nq - 1) if plan.nq > 1 else 0


def _kernel(plan: Plan, scores: Scores, steps: int, names: list[str], inputs: list[str], *refs: Any) -> None:
    tables = dict(zip(names, refs[: len(names)], strict=True))
    refs = refs[len(names) :]
    x = dict(zip(inputs, refs[: len(inputs)], strict=True))
    outs, (dk_sum, dv_sum) = refs[len(inputs) : -2], refs[-2:]
    b, _h, n, step, g = (pl.program_id(axis) for axis in range(5))
    j, t = plan.place(n, step)
    low, high = plan.queries_of(j, tables, b)
    i = _query_block(plan, low, high, t)

    @pl.when((n == 0) & (g == 0) & (step == 0))
    def _() -> None:
        G, D, T = outs[0].shape
        size = min(ZEROED, plan.block_q)

        def zero(n: Any, _: None) -> None:
            outs[0][lax.div(n, T // size), :, pl.ds(pl.multiple_of(lax.rem(n, T // size) * size, size), size)] = (
                jnp.zeros((D, size), jnp.float32)
            )

        lax.fori_loop(0, G * (T // size), zero, None)

    @pl.when((g == 0) & (t == 0))
    def _() -> None:
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)

    pair = Pair(plan, scores, x, tables, (b, i, j, g), (outs[0], dk_sum, dv_sum, *outs[3:]))
    visited = True if plan.folded else low + t <= high
    full = plan.is_full(i, j, tables, b)
    kinds = _kinds(plan)
    for is_edge in kinds:
        pl.when(visited & (jnp.logical_not(full) if is_edge else full))(functools.partial(pair.run, edge=is_edge))

    last = low + t == high if plan.folded else t == steps - 1

    @pl.when((g == pl.num_programs(4) - 1) & last)
    def _() -> None:
        outs[1][...], outs[2][...] = dk_sum[...], dv_sum[...]


@functools.cache
def _kinds(plan: Plan) -> list[bool]:
    """Whether there are edges, and whether there are full pairs."""
    if not plan.is_static:
        return [True, False]
    found = set()
    for j in range(plan.nk):
        low, high = plan.queries_of(j, None, 0)
        found |= {not plan.is_full(i, j, None, 0) for i in range(low, high + 1)}
    return sorted(found)


@dataclasses.dataclass
class Pair:
    """A block of queries that meets a block of keys."""

    plan: Plan
    scores: Scores
    x: dict[str, Any]
    tables: dict[str, Any]
    at: tuple[Any, Any, Any, Any]
    refs: tuple[Any, ...]

    def run(self, edge: bool) -> None:
        diagonal = edge and self.plan.diagonal
        size = min(self.plan.chunk, self.plan.block_k)
        chunks = [slice(start, start + size) for start in range(0, self.plan.block_k, size)]
        # On the diagonal, earlier queries see nothing of a chunk.
        firsts = [chunk.start if diagonal else 0 for chunk in chunks]
        products = self._products(chunks[0], firsts[0])
        dq = None
        for n, chunk in enumerate(chunks):
            following = self._products(chunks[n + 1], firsts[n + 1]) if n + 1 < len(chunks) else None
            term = self._pass(chunk, firsts[n], products, edge)
            if dq is None or firsts[n] == 0:
                dq = term if dq is None else dq + term
            else:
                dq = jnp.concatenate([dq[:, : firsts[n]], dq[:, firsts[n] :] + term], 1)
            products = following
        _, i, _, g = self.at
        bq = self.plan.block_q
        where = pl.ds(pl.multiple_of(i * bq, bq), bq) if self.plan.nq > 1 else slice(None)
        self.refs[0][g, :, where] += dq

    def _products(self, chunk: slice, first: int) -> tuple[jax.Array, jax.Array]:
        """Scores, and the gradients of the probabilities, [key, query]."""
        x = self.x
        return dot(x["k"][chunk], x["q"][first:], (1, 1)), dot(x["v"][chunk], x["d_out"][first:], (1, 1))

    def _pass(self, chunk: slice, first: int, products: Any, edge: bool) -> jax.Array:
        """Adds to dk and dv; returns the term of dq, transposed, of queries from `first` on."""
        _, dk_sum, dv_sum, *d_bias_ref = self.refs
        x, scores, slope, (s, dp) = self.x, self.scores, None, products
        if scores.softcap is not None:
            bent = jnp.tanh(s * (scores.scale / scores.softcap))
            slope = 1 - bent * bent
            logits = bent * (scores.softcap * LOG2E)
        else:
            logits = s * (scores.scale * LOG2E)
        if "bias" in x:
            logits = logits + x["bias"][chunk, first:].astype(jnp.float32) * LOG2E
        logits = logits - x["lse2"][:, first:]
        if edge:
            logits = self._mask(chunk, first, logits)
        p = jnp.exp2(logits)
        ds = p * (dp - x["delta"][:, first:])
        for ref in d_bias_ref:
            ref[chunk, first:] = ds
        if slope is not None:
            ds = ds * slope
        p, ds = p.astype(x["d_out"].dtype), ds.astype(x["q"].dtype)
        dv_sum[chunk] += dot(p, x["d_out"][first:], (1, 0))
        dk_sum[chunk] += dot(ds, x["q"][first:], (1, 0))
        return dot(x["kT"][:, chunk], ds, (1, 0))

    def _mask(self, chunk: slice, first: int, logits: jax.Array) -> jax.Array:
        b, i, j, _ = self.at
        if self.plan.diagonal:
            # What is left of the chunk's own queries; later ones see it all.
            size = chunk.stop - chunk.start
            sees = self.plan.sees(first, chunk.start, (size, size), 1)
            assert sees is not None
            own = jnp.where(sees, logits[:, :size], -jnp.inf)
            return own if logits.shape[1] == size else jnp.concatenate([own, logits[:, size:]], 1)
        q_at = self.plan.position(i, self.tables, b) + first
        sees = self.plan.sees(q_at, j * self.plan.block_k + chunk.start, logits.shape, 1)
        if "q_ids" in self.x:
            ids = jnp.broadcast_to(self.x["kv_ids"][:, chunk], (LANES, logits.shape[0]))
            same = across(jnp.transpose(ids), logits.shape[1]) == self.x["q_ids"][:, first:]
            sees = same if sees is None else sees & same
        return logits if sees is None else jnp.where(sees, logits, -jnp.inf)
