"""Attention for NVIDIA GPUs before Hopper, and for what the newer kernels refuse: Pallas's Triton backend.

The same plan as `hopper.py` and `hopper_backward.py`, without their hardware: a program holds a tile of queries (or of
keys, for dk and dv) and goes through the blocks that it sees, masked only at the edges. float32 products round nothing.

Shapes: B batch rows, T queries, S keys, H query heads, K key/value heads, G = H // K, D head size, E of values,
q rows of a block of queries, s of keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .gpu_blocks import (
    LOG2E,
    UNSEEN,
    Arrays,
    Options,
    blocks_met,
    edges,
    i32,
    keys_of,
    of_rows,
    pad_rows,
    pairs_met,
    queries_of,
    round_up,
)


def blocks(D: int, E: int, itemsize: int, backward: bool) -> tuple[int, int, int]:
    """(queries, keys, warps) of a tile: what shared memory and registers of an A100 hold."""
    narrow = max(D, E) <= 128 and itemsize == 2
    if backward:
        return (64 if narrow else 32, 32, 4 if max(D, E) <= 64 else 8)
    return (128, 64, 4 if max(D, E) <= 64 else 8) if narrow else (64, 32, 8)


def check(q: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for dtypes and head sizes that these kernels do not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn):
        raise NotImplementedError(f"the Triton kernel takes bfloat16, float16, float32 and float8, got {q.dtype}")
    if max(q.shape[3], v.shape[3]) > 256:
        raise NotImplementedError(f"the Triton kernel takes head sizes up to 256, got {q.shape[3]} and {v.shape[3]}")


def forward(
    o: Options, arrays: Arrays, q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHE, lse_BTH)."""
    check(q_BTHD, v_BSKE)
    if o.scaled:  # float8 is exact in bfloat16
        q_BTHD, k_BSKD, v_BSKE = (x.astype(jnp.bfloat16) for x in (q_BTHD, k_BSKD, v_BSKE))
    T, E = q_BTHD.shape[1], v_BSKE.shape[3]
    of_tile = blocks(q_BTHD.shape[3], E, q_BTHD.dtype.itemsize, False)
    given = _padded(o, of_tile, {"q": q_BTHD, "k": k_BSKD, "v": v_BSKE}, arrays)
    if o.segments:
        given["met"] = blocks_met(o, given, *of_tile[:2])
    (B, T_pad, H, _), E_pad = given["q"].shape, given["v"].shape[3]
    outs = {  # of float8, what it was widened to
        "out": jax.ShapeDtypeStruct((B, T_pad, H, E_pad), q_BTHD.dtype),
        "lse": jax.ShapeDtypeStruct((B, H, T_pad), jnp.float32),
    }
    out, lse_BHT = _launch("flash_attention", o, _forward_tile, of_tile, given, outs, over_queries=True)
    return out[:, :T, :, :E], jnp.swapaxes(lse_BHT[:, :, :T], 1, 2)


def backward(
    o: Options,
    arrays: Arrays,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTHD, dk_BSKD, dv_BSKE) in float32."""
    check(q_BTHD, v_BSKE)
    (_, T, _, D), E = q_BTHD.shape, v_BSKE.shape[3]
    of_tile = blocks(D, E, q_BTHD.dtype.itemsize, True)
    given = _padded(o, of_tile, {"q": q_BTHD, "k": k_BSKD, "v": v_BSKE, "d_out": d_out_BTHE}, arrays)
    (B, T_pad, H, D_pad), (_, S_pad, K, E_pad) = given["q"].shape, given["v"].shape
    given |= of_rows(lse_BTH, delta_BTH, T_pad)
    of_keys = dict(given)
    if o.segments:
        of_keys["met"] = blocks_met(o, given, *of_tile[:2], of_keys=True)
        given["met"] = blocks_met(o, given, *of_tile[:2])
    wide = {
        "dq": jax.ShapeDtypeStruct((B, T_pad, H, D_pad), jnp.float32),
        "dk": jax.ShapeDtypeStruct((B, S_pad, K, D_pad), jnp.float32),
        "dv": jax.ShapeDtypeStruct((B, S_pad, K, E_pad), jnp.float32),
    }
    dq = wide.pop("dq")
    (dq,) = _launch("flash_attention_dq", o, _queries_tile, of_tile, given, {"dq": dq}, over_queries=True)
    dk, dv = _launch("flash_attention_dkv", o, _keys_tile, of_tile, of_keys, wide, over_queries=False)
    return dq[:, :T, :, :D], dk[:, : o.S, :, :D], dv[:, : o.S, :, :E]


def bias_gradient(
    o: Options,
    arrays: Arrays,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    d_out_BTHE: jax.Array,
    lse_BTH: jax.Array,
    delta_BTH: jax.Array,
) -> jax.Array:
    """Of the bias alone, in float32 and its own shape, whichever kernels make the other gradients."""
    check(q_BTHD, v_BSKE)
    of_tile = blocks(q_BTHD.shape[3], v_BSKE.shape[3], q_BTHD.dtype.itemsize, True)
    given = _padded(o, of_tile, {"q": q_BTHD, "k": k_BSKD, "v": v_BSKE, "d_out": d_out_BTHE}, arrays)
    given |= of_rows(lse_BTH, delta_BTH, given["q"].shape[1])
    if o.segments:
        given["met"] = pairs_met(o, given, *of_tile[:2]).astype(jnp.int32)
    # A program adds up a tile over the rows and heads that share it.
    block_q, block_k, warps = of_tile
    names, bias = tuple(given), given["bias"]
    (own_B, own_H, T, S), (B, _, H, _) = bias.shape, given["q"].shape
    shared_H = H // own_H

    def kernel(*refs: Any) -> None:
        of_name = dict(zip((*names, "d_bias"), refs, strict=True))
        i, j = pl.program_id(0), pl.program_id(1)
        b, h = lax.div(pl.program_id(2), i32(own_H)), lax.rem(pl.program_id(2), i32(own_H))
        rows, keys = pl.ds(i * block_q, block_q), pl.ds(j * block_k, block_k)

        def add(n: Any, sum_qs: Any) -> Any:
            # Exactly one of the two goes on where one is shared.
            at_b, at_h = b + lax.div(n, i32(shared_H)), h + lax.rem(n, i32(shared_H))
            if o.offset is not None and not o.segments:
                return sum_qs + of_head(at_b, at_h)
            return lax.cond(meets(at_b), lambda x: x + of_head(at_b, at_h), lambda x: x, sum_qs)

        def meets(at_b: Any) -> Any:
            if o.segments:
                return of_name["met"][at_b, i, j] > 0
            low, _, _, high = keys_of(o, i * block_q + _offset(o, of_name, at_b), block_q, block_k, S // block_k)
            return (j >= low) & (j < high)

        def of_head(at_b: Any, at_h: Any) -> Any:
            kv, first_q = lax.div(at_h, i32(o.G)), i * block_q + _offset(o, of_name, at_b)
            q_qD, k_sD = of_name["q"][at_b, rows, at_h, :], of_name["k"][at_b, keys, kv, :]
            ids = (of_name["q_ids"][at_b, rows], of_name["kv_ids"][at_b, keys]) if o.segments else None
            sees = _mask(o, first_q, j * block_k, (block_q, block_k), ids)
            bias_qs = of_name["bias"][b, h, rows, keys]
            p_qs, _ = _weights(o, _dot(q_qD, k_sD, 1, 1), of_name["lse"][at_b, at_h, rows], sees, bias_qs)
            dp_qs = _dot(of_name["d_out"][at_b, rows, at_h, :], of_name["v"][at_b, keys, kv, :], 1, 1)
            return p_qs * (dp_qs - of_name["delta"][at_b, at_h, rows][:, None])  # it is added after the bend

        zeros = jnp.zeros((block_q, block_k), jnp.float32)
        count = jnp.int32(B // own_B * shared_H)
        if o.offset is not None and not o.segments:  # the same of all rows
            count = jnp.where(meets(b), count, 0)
        of_name["d_bias"][b, h, rows, keys] = lax.fori_loop(0, count, add, zeros)

    d_bias = pl.pallas_call(
        kernel,
        grid=(T // block_q, S // block_k, own_B * own_H),
        out_shape=jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        name="flash_attention_dbias",
    )(*given.values())
    return d_bias[:, :, : o.T, : o.S]


def _padded(o: Options, of_tile: Any, inputs: dict[str, jax.Array], arrays: Arrays) -> dict[str, jax.Array]:
    """Whole blocks of queries and keys, and head sizes that are powers of two, as Triton wants them."""
    block_q, block_k, _ = of_tile
    T, S = round_up(o.T, block_q), round_up(o.S, block_k)
    given = {}
    for name, x in inputs.items():
        x = pad_rows(x, T if name in ("q", "d_out") else S)
        given[name] = pad_rows(x, max(16, pl.next_power_of_2(x.shape[3])), 3)
    return given | arrays.padded(T, S)


def _launch(
    name: str, o: Options, tile: Any, of_tile: Any, given: dict[str, Any], outs: dict[str, Any], over_queries: bool
) -> list[jax.Array]:
    """Runs tile(o, of_tile, refs, i, head) over (tiles, heads, batch rows); references are to one head's rows."""
    block = of_tile[0 if over_queries else 1]
    owner = given["q" if over_queries else "k"]
    B, length, heads = owner.shape[:3]
    tiles = length // block
    of_query_head = (lambda h: h) if over_queries else None
    of_kv_head = (lambda h: h // o.G) if over_queries else (lambda h: h)

    def spec(which: str, x: Any) -> pl.BlockSpec:
        if which in ("q_ids", "kv_ids"):
            return pl.BlockSpec((None, x.shape[1]), lambda i, h, b: (b, 0))
        if which in ("offset", "sinks", "qk_scale", "v_scale"):
            return pl.BlockSpec((1,), (lambda i, h, b: (b,)) if which == "offset" else (lambda i, h, b: (h,)))
        if which == "bias":
            own_B, own_H = (n > 1 for n in x.shape[:2])
            kept = None if over_queries or not own_H else o.G
            return pl.BlockSpec((None, kept, *x.shape[2:]), lambda i, h, b: (b * own_B, h * own_H, 0, 0))
        if which == "met":
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b, 0, 0))
        of_head = of_kv_head if which in ("k", "v", "dk", "dv") else of_query_head
        heads_kept = None if of_head is not None else o.G  # all the query heads of a key head
        at = of_head or (lambda h: h)
        if which in ("lse", "delta"):
            return pl.BlockSpec((None, heads_kept, x.shape[2]), lambda i, h, b: (b, at(h), 0))
        return pl.BlockSpec((None, x.shape[1], heads_kept, x.shape[3]), lambda i, h, b: (b, 0, at(h), 0))

    def kernel(*refs: Any) -> None:
        of_name = dict(zip((*given, *outs), refs, strict=True))
        # Under a causal mask the last queries, and the first keys, have the most to do: they start first.
        i = i32(tiles - 1) - pl.program_id(0) if over_queries else pl.program_id(0)
        tile(o, of_tile, of_name, i)

    return pl.pallas_call(
        kernel,
        grid=(tiles, heads, B),
        in_specs=[spec(which, x) for which, x in given.items()],
        out_specs=[spec(which, x) for which, x in outs.items()],
        out_shape=list(outs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=of_tile[2], num_stages=2),
        name=name,
    )(*given.values())


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _bent(o: Options, x: jax.Array) -> jax.Array:
    return x if o.bend is None else 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2E * o.bend)))


def _mask(o: Options, first_q: Any, first_s: Any, shape: tuple[int, ...], ids: Any) -> jax.Array:
    """[q, s] for queries at positions first_q and on, and keys first_s and on; `ids` of both, or None."""
    query = first_q + lax.broadcasted_iota(jnp.int32, shape, 0)
    key = first_s + lax.broadcasted_iota(jnp.int32, shape, 1)
    sees = key < o.S
    if o.causal:
        sees &= key <= query
    if o.window is not None:
        sees &= key > query - o.window
        if not o.causal:
            sees &= key < query + o.window
    if ids is not None:
        sees &= ids[0][:, None] == ids[1][None, :]
    return sees


def _loops(o: Options, block: int, step: Any, refs: Any, i: Any, spans: Any, carry: Any) -> Any:
    """step(j, carry, masked) over the blocks j that tile i meets: of [low, high), masked but between full_low and
    full_high; with segments, of its list, all masked."""
    low, full_low, full_high, high = spans
    if o.segments:
        return lax.fori_loop(0, refs["met"][i, 0], lambda n, c: step(refs["met"][i, 1 + n], c, True), carry)
    if not edges(o, block):
        return lax.fori_loop(low, high, lambda j, c: step(j, c, False), carry)
    carry = lax.fori_loop(low, full_low, lambda j, c: step(j, c, True), carry)
    carry = lax.fori_loop(full_low, full_high, lambda j, c: step(j, c, False), carry)
    return lax.fori_loop(full_high, high, lambda j, c: step(j, c, True), carry)


def _offset(o: Options, refs: Any, b: Any = 0) -> Any:
    return i32(o.offset) if o.offset is not None else refs["offset"][b]


def _forward_tile(o: Options, of_tile: Any, refs: Any, i: Any) -> None:
    block_q, block_k, _ = of_tile
    rows = pl.ds(i * block_q, block_q)
    q_qD = refs["q"][rows, :]
    first_q = i * block_q + _offset(o, refs)
    q_ids = refs["q_ids"][rows] if o.segments else None

    def step(j: Any, carry: Any, masked: bool) -> Any:
        acc_qE, max_q, sum_q = carry
        keys = pl.ds(j * block_k, block_k)
        x_qs = _dot(q_qD, refs["k"][keys, :], 1, 1)
        x_qs = _bent(o, x_qs * refs["qk_scale"][0] if o.scaled else x_qs)
        if o.bias:
            x_qs = o.biased(x_qs, refs["bias"][rows, keys])
        if masked:
            ids = (q_ids, refs["kv_ids"][keys]) if o.segments else None
            x_qs = jnp.where(_mask(o, first_q, j * block_k, x_qs.shape, ids), x_qs, UNSEEN)
        new_max_q = jnp.maximum(max_q, x_qs.max(axis=1) * o.base2)
        decay_q = jnp.exp2(max_q - new_max_q)
        p_qs = jnp.exp2(x_qs * o.base2 - new_max_q[:, None])
        v_sE = refs["v"][keys, :]
        acc_qE = acc_qE * decay_q[:, None] + _dot(p_qs.astype(v_sE.dtype), v_sE, 1, 0)
        return acc_qE, new_max_q, sum_q * decay_q + p_qs.sum(axis=1)

    n = refs["k"].shape[0] // block_k
    spans = keys_of(o, first_q, block_q, block_k, n)
    start = jnp.full((block_q,), UNSEEN * o.base2, jnp.float32)
    carry = (jnp.zeros((block_q, refs["v"].shape[1]), jnp.float32), start, jnp.zeros((block_q,), jnp.float32))
    acc_qE, max_q, sum_q = _loops(o, block_k, step, refs, i, spans, carry)
    if o.sinks:
        sink = jnp.maximum(refs["sinks"][0] * LOG2E, UNSEEN * o.base2)
        new_max_q = jnp.maximum(max_q, sink)
        decay_q = jnp.exp2(max_q - new_max_q)
        acc_qE, sum_q = acc_qE * decay_q[:, None], sum_q * decay_q + jnp.exp2(sink - new_max_q)
        max_q = new_max_q
    seen_q = max_q > UNSEEN * o.base2 * 0.5
    norm_q = jnp.where(seen_q, sum_q, 1.0)
    out_qE = jnp.where(seen_q[:, None], acc_qE / norm_q[:, None], 0.0)
    if o.scaled:
        out_qE = out_qE * refs["v_scale"][0]
    refs["out"][rows, :] = out_qE.astype(refs["out"].dtype)
    refs["lse"][rows] = jnp.where(seen_q, max_q * (1 / LOG2E) + jnp.log(norm_q), -jnp.inf)


def _weights(o: Options, x_qs: jax.Array, lse_q: jax.Array, sees: Any, bias_qs: Any) -> tuple[jax.Array, jax.Array]:
    """(p, p times what the bend multiplies a gradient by)."""
    x_qs = _bent(o, x_qs)
    exponent_qs = x_qs * o.to_base2 if bias_qs is None else o.biased(x_qs, bias_qs)
    p_qs = jnp.exp2(exponent_qs - lse_q[:, None])
    p_qs = p_qs if sees is None else jnp.where(sees, p_qs, 0.0)
    return p_qs, p_qs if o.bend is None else p_qs * (1.0 - x_qs * x_qs)


def _queries_tile(o: Options, of_tile: Any, refs: Any, i: Any) -> None:
    block_q, block_k, _ = of_tile
    rows = pl.ds(i * block_q, block_q)
    q_qD, d_out_qE = refs["q"][rows, :], refs["d_out"][rows, :]
    lse_q, delta_q = refs["lse"][rows], refs["delta"][rows]
    first_q = i * block_q + _offset(o, refs)
    q_ids = refs["q_ids"][rows] if o.segments else None

    def step(j: Any, dq_qD: Any, masked: bool) -> Any:
        keys = pl.ds(j * block_k, block_k)
        k_sD = refs["k"][keys, :]
        sees = None
        if masked:
            ids = (q_ids, refs["kv_ids"][keys]) if o.segments else None
            sees = _mask(o, first_q, j * block_k, (block_q, block_k), ids)
        bias_qs = refs["bias"][rows, keys] if o.bias else None
        _, w_qs = _weights(o, _dot(q_qD, k_sD, 1, 1), lse_q, sees, bias_qs)
        ds_qs = w_qs * (_dot(d_out_qE, refs["v"][keys, :], 1, 1) - delta_q[:, None])
        return dq_qD + _dot(ds_qs.astype(k_sD.dtype), k_sD, 1, 0)

    n = refs["k"].shape[0] // block_k
    spans = keys_of(o, first_q, block_q, block_k, n)
    dq_qD = _loops(o, block_k, step, refs, i, spans, jnp.zeros(q_qD.shape, jnp.float32))
    refs["dq"][rows, :] = dq_qD * o.scale


def _keys_tile(o: Options, of_tile: Any, refs: Any, j: Any) -> None:
    block_q, block_k, _ = of_tile
    keys = pl.ds(j * block_k, block_k)
    k_sD, v_sE = refs["k"][keys, :], refs["v"][keys, :]
    offset = _offset(o, refs)
    kv_ids = refs["kv_ids"][keys] if o.segments else None

    def step(g: Any, i: Any, carry: Any, masked: bool) -> Any:
        dk_sD, dv_sE = carry
        rows = pl.ds(i * block_q, block_q)
        q_qD, d_out_qE = refs["q"][rows, g, :], refs["d_out"][rows, g, :]
        sees = None
        if masked:
            ids = (refs["q_ids"][rows], kv_ids) if o.segments else None
            sees = _mask(o, i * block_q + offset, j * block_k, (block_q, block_k), ids)
        bias_qs = None
        if o.bias:
            bias_qs = refs["bias"][rows, keys] if refs["bias"].ndim == 2 else refs["bias"][g, rows, keys]
        p_qs, w_qs = _weights(o, _dot(q_qD, k_sD, 1, 1), refs["lse"][g, rows], sees, bias_qs)
        ds_qs = w_qs * (_dot(d_out_qE, v_sE, 1, 1) - refs["delta"][g, rows][:, None])
        dv_sE = dv_sE + _dot(p_qs.astype(d_out_qE.dtype), d_out_qE, 0, 0)
        return dk_sD + _dot(ds_qs.astype(q_qD.dtype), q_qD, 0, 0), dv_sE

    n = refs["q"].shape[0] // block_q
    spans = queries_of(o, j * block_k - offset, block_k, block_q, n)

    def of_head(g: Any, carry: Any) -> Any:
        return _loops(o, block_k, lambda i, c, masked: step(g, i, c, masked), refs, j, spans, carry)

    zeros = (jnp.zeros(k_sD.shape, jnp.float32), jnp.zeros(v_sE.shape, jnp.float32))
    dk_sD, dv_sE = lax.fori_loop(0, o.G, of_head, zeros)
    refs["dk"][keys, :] = dk_sD * o.scale
    refs["dv"][keys, :] = dv_sE
