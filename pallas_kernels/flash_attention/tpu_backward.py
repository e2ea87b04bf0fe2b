"""Flash attention on TPU, backward (Dao 2023, arXiv:2307.08691): one kernel, five products a pair of blocks.

Scores are held [key, query]: what there is one of a query (log-sum-exp, delta) is then a row. The gradient of the
queries is summed transposed, [D, queries], so that ds, [key, query], is the matrix unit's weights as it is. Those of
keys and values are summed [keys, D], of rows of ds and p; but where D does not fill the unit as weights (`SIDES`) they
are transposed too, and what is transposed is only inputs and results. The gradient of the queries stays in vector
memory while the blocks of keys pass; that of the keys is summed over the queries of all heads that share them.

The matrix unit is what there is too little of, and it waits while anything is done between two pairs of blocks. Where
every block meets some, and of queries the first of keys (`Plan.covered`), a pair so does all beside its products: its
sums begin with its own term if it is the first, results are written by each pair over those of the one before, and
delta is made from the output, each time. Else sums are set to zero before, and written after, all.

Shapes: B batch rows, T queries, S keys, K key/value heads, G query heads of each, D head size, E head size of values; T
and S padded to whole blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import target_chip
from .block_plan import Plan
from .tpu_forward import LOG2E, VMEM_BYTES, Scores, column, dot

UNSEEN = 1e30  # the log-sum-exp of a row that sees nothing
MANY = 8  # chunks of a pair, from which on the compiler itself finds what can be done beside what
SIDES = {"v6e": 256, "7x": 256}  # of the matrix unit; else 128


def backward(
    plan: Plan,
    scores: Scores,
    arrays: dict[str, jax.Array],
    tables: dict[str, jax.Array],
    dtype: Any,
) -> tuple[jax.Array, ...]:
    """dq [B, K, G, T, D], dk [B, K, S, D] and dv [B, K, S, E] in `dtype`; d_bias [B, K, G, S, T] in float32.

    `arrays`, in this order: q [B, K, G, T, D], k [B, K, S, D], v [B, K, S, E], d_out [B, K, G, T, E]; where the plan is
    `covered`, out, alike; lse and delta or, with out, perhaps d_lse [B, K, G, 1, T], as they are: each operation of
    XLA's takes as long as a few blocks, and each further input on v5e 2% of a row of 1,024; perhaps q_ids, kv_ids [B,
    1, length], and the bias, transposed, [B or 1, K or 1, G or 1, S, T].
    """
    B, K, G, T, D = arrays["q"].shape
    S, E = arrays["v"].shape[2:]
    bq, bk, (grid_rows, steps) = plan.block_q, plan.block_k, plan.grid
    names, turned = list(tables), min(D, E) < SIDES.get(target_chip() or "", 128)

    def in_memory(b: Any, n: Any, t: Any, g: Any, refs: Any) -> tuple[Any, Any, Any]:
        """Blocks of keys and of queries, and the queries' head."""
        j, i, meets = plan.blocks(n, t, dict(zip(names, refs, strict=True)), b)
        return j, i, g if meets is True or G == 1 else jnp.where(meets, g, G - 1)

    def q_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        _, i, g = in_memory(b, n, t, g, refs)
        return b, h, g, i, 0

    def row_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        _, i, g = in_memory(b, n, t, g, refs)
        return b, h, g, 0, i

    def k_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
        return b, h, in_memory(b, n, t, g, refs)[0], 0

    def out_map(b: Any, h: Any, n: Any, t: Any, *_: Any) -> Any:
        return b, h, plan.place(n, t)[0], 0

    specs = {
        "q": pl.BlockSpec((None, None, None, bq, D), q_map),
        "k": pl.BlockSpec((None, None, bk, D), k_map),
        "v": pl.BlockSpec((None, None, bk, E), k_map),
        "d_out": pl.BlockSpec((None, None, None, bq, E), q_map),
        "out": pl.BlockSpec((None, None, None, bq, E), q_map),
        **{name: pl.BlockSpec((None, None, None, 1, bq), row_map) for name in ("lse", "delta", "d_lse")},
        "q_ids": pl.BlockSpec((None, 1, bq), lambda b, h, n, t, g, *refs: (b, 0, in_memory(b, n, t, g, refs)[1])),
        "kv_ids": pl.BlockSpec((None, 1, bk), lambda b, h, n, t, g, *refs: (b, 0, in_memory(b, n, t, g, refs)[0])),
    }
    out_specs = [
        pl.BlockSpec((None, None, G, T, D), lambda b, h, *_: (b, h, 0, 0, 0)),
        pl.BlockSpec((None, None, bk, D), out_map),
        pl.BlockSpec((None, None, bk, E), out_map),
    ]
    outs = [(B, K, G, T, D), (B, K, S, D), (B, K, S, E)]
    out_shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in outs]
    if "bias" in arrays:
        shared = [n == 1 for n in arrays["bias"].shape[:3]]

        def bias_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
            j, i, g = in_memory(b, n, t, g, refs)
            own = (0 if alone else at for alone, at in zip(shared, (b, h, g), strict=True))
            return *own, j, i

        def d_bias_map(b: Any, h: Any, n: Any, t: Any, g: Any, *refs: Any) -> Any:
            return b, h, g, n, plan.nth(n, t, dict(zip(names, refs, strict=True)), b)

        specs["bias"] = pl.BlockSpec((None, None, None, bk, bq), bias_map)
        out_specs.append(pl.BlockSpec((None, None, None, bk, bq), d_bias_map))
        out_shapes.append(jax.ShapeDtypeStruct((B, K, G, S, T), jnp.float32))
    scratch = {}
    if not _whole_queries(plan):
        scratch["dq"] = (G, D, T)
    if not _whole_keys(plan, G):
        scratch |= {"dk": (D, bk), "dv": (E, bk)} if turned else {"dk": (bk, D), "dv": (bk, E)}
    moved = (*arrays.values(), *out_shapes)
    cost = pl.CostEstimate(
        flops=2 * B * K * G * plan.pairs * (3 * plan.D + 2 * plan.E),
        transcendentals=B * K * G * plan.pairs,
        bytes_accessed=sum(x.size * jnp.dtype(x.dtype).itemsize for x in moved),
    )
    return tuple(
        pl.pallas_call(
            functools.partial(
                _kernel, plan, scores, steps, turned, (names, list(arrays), len(out_shapes), list(scratch))
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(names),
                grid=(B, K, grid_rows, steps, G),
                in_specs=[specs[name] for name in arrays],
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            ),
            out_shape=out_shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=cost,
            name="flash_attention_backward",
        )(*(tables[name] for name in names), *arrays.values())
    )


def _whole_queries(plan: Plan) -> bool:
    """Whether a pair has all that there is of its queries' gradient."""
    return plan.covered and plan.nk == 1


def _whole_keys(plan: Plan, G: int) -> bool:
    """The same of the keys'."""
    return plan.covered and plan.nq == G == 1


def _kernel(plan: Plan, scores: Scores, steps: int, turned: bool, parts: Any, *refs: Any) -> None:
    names, inputs, count, sums = parts
    left = iter(refs)
    tables, x = ({name: next(left) for name in given} for given in (names, inputs))
    dq_ref, dk_ref, dv_ref, *d_bias = (next(left) for _ in range(count))
    sums = {name: next(left) for name in sums}
    b, _h, n, step, g = (pl.program_id(axis) for axis in range(5))
    j, t = plan.place(n, step)
    _, i, visited = plan.blocks(n, step, tables, b)
    heads, bq, late = dq_ref.shape[0], plan.block_q, scores.scale

    def queries(i: Any, part: slice = slice(0, bq)) -> Any:
        size = part.stop - part.start
        return pl.ds(pl.multiple_of(i * bq + part.start, size), size) if plan.nq > 1 else part

    def write_queries(g: Any, i: Any, part: slice, dq: jax.Array) -> None:
        dq_ref[g, queries(i, part)] = jnp.transpose((dq * late).astype(dq_ref.dtype))

    def write_keys(keys: slice, dk: jax.Array, dv: jax.Array) -> None:
        for ref, x in ((dk_ref, dk * late), (dv_ref, dv)):
            x = x.astype(ref.dtype)
            ref[keys] = jnp.transpose(x) if turned else x

    def add(ref: Any, is_first: Any, more: jax.Array) -> jax.Array:
        old = ref[...]
        ref[...] = new = (jnp.where(is_first, 0, old) if plan.covered else old) + more
        return new

    def add_queries(part: slice, dq: jax.Array) -> None:
        dq = add(sums["dq"].at[g, :, queries(i, part)], j == 0, dq)
        if plan.covered:
            write_queries(g, i, part, dq)

    def add_keys(keys: slice, dk: jax.Array, dv: jax.Array) -> None:
        at, is_first = (slice(None), keys) if turned else (keys,), (g == 0) & (t == 0)
        dk, dv = (add(sums[name].at[at], is_first, x) for name, x in (("dk", dk), ("dv", dv)))
        if plan.covered:
            write_keys(keys, dk, dv)

    def each_block(body: Any) -> None:
        """Of queries, of all heads."""

        def turn(n: Any, _: None) -> None:
            body(lax.div(n, jnp.int32(plan.nq)), lax.rem(n, jnp.int32(plan.nq)))

        lax.fori_loop(0, heads * plan.nq, turn, None)

    def begin(g: Any, i: Any) -> None:
        sums["dq"][g, :, queries(i)] = jnp.zeros((sums["dq"].shape[1], bq), jnp.float32)

    def end(g: Any, i: Any) -> None:
        write_queries(g, i, slice(0, bq), sums["dq"][g, :, queries(i)])

    if not plan.covered:
        pl.when((n == 0) & (g == 0) & (step == 0))(lambda: each_block(begin))

        @pl.when((g == 0) & (t == 0))
        def _() -> None:
            for name in ("dk", "dv"):
                sums[name][...] = jnp.zeros_like(sums[name])

    to_queries = add_queries if "dq" in sums else functools.partial(write_queries, g, i)
    to_keys = add_keys if "dk" in sums else write_keys
    pair = Pair(plan, scores, x, tables, (b, i, j), to_queries, to_keys, turned, *d_bias)
    full = plan.is_full(i, j, tables, b)
    kinds = _kinds(plan)
    for is_edge in kinds:
        wanted = visited if len(kinds) == 1 else visited & (jnp.logical_not(full) if is_edge else full)
        body = functools.partial(pair.run, edge=is_edge)
        body() if wanted is True else pl.when(wanted)(body)

    if d_bias and visited is not True:

        @pl.when(jnp.logical_not(visited))
        def _() -> None:
            d_bias[0][...] = jnp.zeros_like(d_bias[0])

    if not plan.covered:
        is_last = (n == pl.num_programs(2) - 1) & (step == steps - 1) & (g == heads - 1)
        pl.when(is_last)(lambda: each_block(end))

        @pl.when((g == heads - 1) & (i == plan.queries_of(j, tables, b)[1] if plan.folded else t == steps - 1))
        def _() -> None:
            write_keys(slice(None), sums["dk"][...], sums["dv"][...])


def base2(lse: jax.Array) -> jax.Array:
    return jnp.where(lse > -jnp.inf, lse * LOG2E, UNSEEN)


def delta(x: dict[str, Any]) -> jax.Array:
    """[1, queries], from out, d_out and d_lse, if there is one."""
    out, d_out = (jnp.transpose(x[name][...]).astype(jnp.float32) for name in ("out", "d_out"))
    found = (out * d_out).sum(0, keepdims=True)
    return found - x["d_lse"][...] if "d_lse" in x else found


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
    """A block of queries that meets a block of keys.

    Of parts of the block, `to_queries` takes dq, transposed, and `to_keys` dk and dv, transposed if `turned`.
    """

    plan: Plan
    scores: Scores
    x: dict[str, Any]
    tables: dict[str, Any]
    at: tuple[Any, Any, Any]
    to_queries: Callable[[slice, jax.Array], None]
    to_keys: Callable[[slice, jax.Array, jax.Array], None]
    turned: bool = True
    d_bias_ref: Any = None
    _lse2: Any = None
    _delta: Any = None

    def run(self, edge: bool) -> None:
        x = self.x
        # In every pair again: beside the first products this costs nothing.
        self._lse2 = x["lse2"][...] if "lse2" in x else base2(x["lse"][...])
        self._delta = x["delta"][...] if "delta" in x else delta(x)
        diagonal = edge and self.plan.diagonal
        size = min(self.plan.chunk, self.plan.block_k)
        chunks = [slice(start, start + size) for start in range(0, self.plan.block_k, size)]
        # On the diagonal, earlier queries see nothing of a chunk.
        firsts = [chunk.start if diagonal else 0 for chunk in chunks]
        rows = [jnp.transpose(x[name][...]) if self.turned else x[name] for name in ("q", "d_out")]
        products = self._products(chunks[0], firsts[0])
        dq = None
        for n, chunk in enumerate(chunks):
            if products is None:
                products = self._products(chunk, firsts[n])
            ahead = n + 1 < len(chunks) and (n == 0 or not self._is_long)
            following = self._products(chunks[n + 1], firsts[n + 1]) if ahead else None
            term = self._pass(chunk, firsts[n], products, rows, edge)
            dq = term if dq is None else dq + term
            if diagonal:  # what later chunks do not see is complete
                self.to_queries(chunk, dq[:, :size])
                dq = dq[:, size:]
            products = following
        if not diagonal:
            assert dq is not None
            self.to_queries(slice(0, self.plan.block_q), dq)

    @property
    def _is_long(self) -> bool:
        """Whether chunks come one after the other; else each one's first products come before the last one's others."""
        return not self.turned and self.plan.block_k >= MANY * self.plan.chunk

    def _products(self, chunk: slice, first: int) -> tuple[jax.Array, jax.Array]:
        """Scores, and the gradients of the probabilities, [key, query]."""
        x = self.x
        return dot(x["k"][chunk], x["q"][first:], (1, 1)), dot(x["v"][chunk], x["d_out"][first:], (1, 1))

    def _pass(self, chunk: slice, first: int, products: Any, rows: Any, edge: bool) -> jax.Array:
        """Passes on dk and dv; returns the term of dq, transposed, of queries from `first` on."""
        x, scores, slope, (s, dp), (q, d_out) = self.x, self.scores, None, products, rows
        if scores.softcap is not None:
            bent = jnp.tanh(s * (scores.scale / scores.softcap))
            slope = 1 - bent * bent
            logits = bent * (scores.softcap * LOG2E)
        else:
            logits = s * (scores.scale * LOG2E)
        if "bias" in x:
            logits = logits + x["bias"][chunk, first:].astype(jnp.float32) * LOG2E
        logits = logits - self._lse2[:, first:]
        if edge:
            logits = self._mask(chunk, first, logits)
        p = jnp.exp2(logits)
        ds = p * (dp - self._delta[:, first:])
        if self.d_bias_ref is not None:
            self.d_bias_ref[chunk, first:] = ds
        if slope is not None:
            ds = ds * slope
        p, ds = p.astype(d_out.dtype), ds.astype(q.dtype)
        if self.turned:
            self.to_keys(chunk, dot(q[:, first:], ds, (1, 1)), dot(d_out[:, first:], p, (1, 1)))
            return dot(jnp.transpose(x["k"][chunk]), ds, (1, 0))
        if self._is_long:  # in the order in which p and ds are there
            dv, dk = dot(p, d_out[first:], (1, 0)), dot(ds, q[first:], (1, 0))
            dq = dot(jnp.transpose(x["k"][chunk]), ds, (1, 0))
            self.to_keys(chunk, dk, dv)
            return dq
        dq = dot(jnp.transpose(x["k"][chunk]), ds, (1, 0))  # first, as it alone is turned around in the end
        self.to_keys(chunk, dot(ds, q[first:], (1, 0)), dot(p, d_out[first:], (1, 0)))
        return dq

    def _mask(self, chunk: slice, first: int, logits: jax.Array) -> jax.Array:
        b, i, j = self.at
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
            same = column(self.x["kv_ids"][:, chunk], logits.shape[1]) == self.x["q_ids"][:, first:]
            sees = same if sees is None else sees & same
        return logits if sees is None else jnp.where(sees, logits, -jnp.inf)
