"""flash_attention's TPU kernels in interpret mode, and what the compiler makes of them for each chip.

Blocks are made 128 x 128, so that a few hundred tokens are several blocks: empty, full and edges.
"""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.static import Request, compile_all
from tests.pallas_kernels import test_flash_attention as contract
from tests.pallas_kernels import test_flash_attention_backward as backward_contract
from twinax.pallas_kernels.flash_attention import flash_attention, tpu, tpu_backward, tpu_forward
from twinax.pallas_kernels.flash_attention.block_plan import Plan

# B, T, S, H, K, D, options: as in the contract.
QUICK = {
    "causal, grouped, a rest": (1, 390, 390, 2, 1, 8, {}),
    "segments, sinks, softcap": (2, 300, 300, 1, 1, 8, {"segments": True, "sinks": True, "softcap": 2.0}),
    "window, offsets by row": (2, 140, 390, 1, 1, 8, {"q_offset": (250, -20), "window": 100}),
    "bias of every row, other values": (2, 130, 200, 2, 2, 8, {"bias": (1, 2), "causal": False, "value_size": 5}),
}
SLOW = {
    "one query": (2, 1, 390, 2, 1, 8, {"q_offset": 389, "window": 200}),
    "all keys": (1, 200, 333, 2, 2, 8, {"causal": False}),
    "the middle of a row": (1, 256, 512, 1, 1, 8, {"q_offset": 128}),
    "late queries": (1, 512, 256, 1, 1, 8, {"q_offset": -128}),
    "not on the diagonal": (1, 200, 400, 1, 1, 8, {"q_offset": 77, "sinks": True}),
    "rows before the first key": (1, 300, 140, 1, 1, 8, {"q_offset": -150, "sinks": True}),
    "window both sides": (1, 260, 400, 1, 1, 8, {"causal": False, "window": 60, "q_offset": 70}),
    "window, segments": (2, 390, 390, 2, 1, 8, {"segments": True, "window": 40, "scale": 0.7}),
    "bias of every head, offsets by row": (
        2,
        140,
        260,
        2,
        1,
        8,
        {"bias": (2, 1), "q_offset": (120, 40), "sinks": True},
    ),
    "a negative scale": (1, 140, 140, 1, 1, 8, {"scale": -0.5}),
}
SLOW |= contract.paired(256, 40) | contract.headed(200)
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
PROGRAMS = {
    "v5e": {"D": 64, "options": {"window": 200}},
    "v5p": {"D": 96, "options": {"segments": True}},
    "v6e": {"D": 256, "options": {"segments": True, "window": 300}},
    "7x": {"D": 80, "options": {"segments": True, "softcap": 20.0}},
}
compiles = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "blocks", lambda *_: (128, 128))
    monkeypatch.setattr(contract, "CASES", QUICK | SLOW)
    with pltpu.force_tpu_interpret_mode():
        yield


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case):
    """Whatever padding holds, even what is not finite."""
    with jax.enable_x64(True):
        wanted = contract.outputs_and_gradients(*contract.make(case), "reference")
    inputs, options = contract.make(case, np.float32)
    if "q_segment_ids_BT" in options:
        ids = options["q_segment_ids_BT"]
        assert (ids == 0).any(1).all()
        inputs = [np.where((ids == 0)[:, :, None, None], np.float32(np.inf), x) for x in inputs]
    contract.check(contract.outputs_and_gradients(inputs, options, "tpu"), wanted, 3e-6)


@pytest.mark.parametrize(
    "case",
    [name if name == "causal, grouped, a rest" else pytest.param(name, marks=pytest.mark.slow) for name in QUICK],
)
def test_where_heads_do_not_fill_the_matrix_unit_their_gradients_are_made_transposed(case, monkeypatch):
    monkeypatch.setattr(tpu_backward, "target_chip", lambda: "v6e")
    test_forward_and_backward(case)


@pytest.mark.parametrize(
    ("T", "S", "causal", "window", "offset"),
    [
        (1024, 1024, True, None, 0), (640, 640, True, None, 0), (512, 512, False, None, 0), (256, 512, True, None, 128),
        (512, 256, True, None, -128), (256, 512, True, None, 256), (512, 512, True, 700, 0), (512, 512, True, 200, 0),
    ],
)  # fmt: skip
def test_covered_blocks_begin_with_the_first_keys_and_the_first_step(T, S, causal, window, offset):
    plan = Plan(T, S, 128, 128, causal, window, offset, segments=False, per_key_block=True)
    rows, steps = plan.grid
    seen: dict[tuple[str, int], int] = {}  # of each block, the number of what it meets first
    for n in range(rows):
        for step in range(steps):
            j, t = map(int, plan.place(n, step))
            low, high = plan.queries_of(j, None, 0)
            if low + t <= high:
                seen.setdefault(("queries", low + t), j)
                seen.setdefault(("keys", j), t)
    is_covered = len(seen) == plan.nq + plan.nk and not any(seen.values())
    assert plan.covered == is_covered


@pytest.mark.slow
def test_rows_too_long_for_the_backward_kernel_go_in_parts(monkeypatch):
    monkeypatch.setattr(tpu, "DQ_BYTES", 0)
    monkeypatch.setattr(tpu, "PART", 128)
    test_forward_and_backward("bias of every head, offsets by row")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["segments, sinks, softcap", "window, segments"])
def test_rows_whose_list_of_pairs_is_too_long_go_in_parts(case, monkeypatch):
    monkeypatch.setattr(tpu, "TABLE", 6)
    monkeypatch.setattr(tpu, "PART", 128)
    test_forward_and_backward(case)


def test_bfloat16_sums_in_float32_and_large_scores_stay_finite():
    (q, k, v), options = contract.make("segments, sinks, softcap", jnp.bfloat16)
    del options["softcap"]
    options["sinks_H"] = options["sinks_H"].astype(np.float32)
    attend = jax.jit(partial(flash_attention, return_lse=True, implementation="tpu", **options))
    out, lse = attend(q, k, v)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    wanted_out, wanted_lse = contract.by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)), options)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)  # products of bfloat16 are exact in float32
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted_out, atol=2**-6)
    q, k = (np.asarray(x * np.float32(1e4), q.dtype) for x in (q, k))
    out, lse = attend(q, k, v)
    assert np.isfinite(np.asarray(out, np.float32)).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("length", [512, 450])
def test_pairs_of_many_chunks(length, monkeypatch):
    monkeypatch.setattr(tpu, "blocks", lambda *_: (128, 512))
    monkeypatch.setattr(tpu_backward, "MANY", 4)
    plan = tpu._plan
    monkeypatch.setattr(tpu, "_plan", lambda *given, **more: dataclasses.replace(plan(*given, **more), chunk=128))
    monkeypatch.setitem(contract.CASES, "many", (1, 200, length, 2, 1, 8, {"causal": False}))
    test_forward_and_backward("many")


@pytest.mark.parametrize("case", ["causal, grouped, a rest"])
def test_each_result_alone_has_its_gradient(case):
    contract.check_gradients_of_one_result(case, "tpu", 3e-6, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal, grouped, a rest", "segments, sinks, softcap", "heads of 192, 128"])
def test_gradients_of_bfloat16(case):
    contract.check_bfloat16_gradients(case, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "window both sides", "segments, window", "bias of every head"])
def test_parts_add_up_to_the_gradients_of_the_whole(case):
    backward_contract.check_parts(case, "tpu", T=300, dtype=jnp.float32, tolerance=3e-6)


@pytest.mark.parametrize(
    "case", ["causal, grouped, a rest", pytest.param("segments, sinks, softcap", marks=pytest.mark.slow)]
)
def test_large_scores_and_their_gradients_stay_finite(case):
    (q, k, v), options = contract.make(case, np.float32)
    results = contract.outputs_and_gradients((q * np.float32(1e4), k * np.float32(1e4), v), options, "tpu")
    assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize("scales", ["one a head", pytest.param("one number", marks=pytest.mark.slow)])
def test_float8(scales):
    (q, k, v), options = contract.make("segments, sinks, softcap", np.float32)
    del options["sinks_H"]
    rng, heads = np.random.default_rng(3), scales == "one a head"
    factors = [np.float32(rng.uniform(0.5, 2, x.shape[2]) if heads else rng.uniform(0.5, 2)) for x in (q, k, v)]
    q, k, v = (jnp.asarray(x, jnp.float8_e4m3fn) for x in (q, k, v))
    scaled = dict(zip(("q_scale", "k_scale", "v_scale"), factors, strict=True))
    out, lse = jax.jit(partial(flash_attention, return_lse=True, implementation="tpu", **options, **scaled))(q, k, v)
    wide = [np.asarray(x, np.float64) * np.reshape(f, (-1, 1)) for x, f in zip((q, k, v), factors, strict=True)]
    wanted_out, wanted_lse = contract.by_hand(*wide, options)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted_out, atol=2**-6 * np.abs(wanted_out).max())


@pytest.mark.parametrize(
    ("causal", "window", "offset"), [(True, None, 0), (True, 300, 128), (False, 200, -70), (True, None, -300)]
)
def test_the_blocks_that_meet_are_those_that_the_mask_leaves(causal, window, offset):
    plan = Plan(700, 900, 128, 256, causal, window, offset, segments=False)
    distance = np.arange(700)[:, None] + offset - np.arange(900)
    sees = np.ones((700, 900), bool) if not causal else distance >= 0
    sees = sees if window is None else sees & (np.abs(distance) < window)
    for i in range(plan.nq):
        for j in range(plan.nk):
            part = sees[i * 128 : i * 128 + 128, j * 256 : j * 256 + 256]
            (low, high), (first, last) = plan.keys_of(i, None, 0), plan.queries_of(j, None, 0)
            if part.any():
                assert low <= j <= high and first <= i <= last
            elif low <= j <= high:  # the rows that pad the last block may see more
                assert i == plan.nq - 1
            if plan.is_full(i, j, None, 0):
                assert part.all() and j * 256 + 256 <= 900


@pytest.mark.parametrize(("T", "S", "offset"), [(512, 512, 0), (500, 512, 0), (256, 768, 256), (768, 256, -256)])
@pytest.mark.parametrize("per_key_block", [False, True])
def test_under_the_diagonal_every_step_of_the_grid_has_a_pair_and_each_pair_a_step(T, S, offset, per_key_block):
    plan = Plan(T, S, 128, 128, True, None, offset, segments=False, per_key_block=per_key_block)
    of, rows = (plan.queries_of, plan.nk) if per_key_block else (plan.keys_of, plan.nq)
    wanted = [(row, n) for row in range(rows) for n in range(of(row, None, 0)[1] - of(row, None, 0)[0] + 1)]
    got = [tuple(int(x) for x in plan.place(n, t)) for n in range(plan.grid[0]) for t in range(plan.grid[1])]
    if plan.folded:
        assert sorted(got) == wanted and len(set(np.diff([row for row, _ in got]).nonzero()[0])) == rows - 1
    else:  # the other kernel's part of a longer row
        assert (offset < 0) != per_key_block or rows % 2
        assert set(wanted) <= set(got)


def steps_of(monkeypatch, kernel, run):
    """The plan of a kernel, the ids of each step of its grid, the block [steps, axes] of each operand and result in
    memory then, and (row, other, whether they meet)."""
    found = []

    def record(body, *, grid_spec, out_shape, **_):
        def call(*operands):
            plan, tables = body.args[0], [jnp.asarray(x) for x in operands[: grid_spec.num_scalar_prefetch]]
            grid = np.indices(grid_spec.grid).reshape(len(grid_spec.grid), -1)
            specs = [x for x in (*grid_spec.in_specs, *grid_spec.out_specs) if x.index_map is not None]
            names = body.args[4] if kernel is tpu_forward else body.args[4][0]
            named = dict(zip(names, tables, strict=True))

            def of_step(*at):
                b, n, t = at[0], *at[2:4]
                maps = *(x.index_map(*at, *tables) for x in specs), plan.blocks(n, t, named, b)
                return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), maps)

            *blocks, pairs = jax.jit(jax.vmap(of_step))(*jnp.asarray(grid, jnp.int32))
            found.append((plan, grid, [np.stack(x, 1) for x in blocks], np.stack(pairs)))
            return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

        return call

    monkeypatch.setattr(kernel.pl, "pallas_call", record)
    run()
    return found[0]


IDS = {
    "in order": [[1] * 200 + [2] * 300 + [0] * 100, [0] * 600],
    "come back": [[1] * 150 + [2] * 230 + [1] * 140 + [3] * 80, [7] * 128 + [0] * 256 + [7] * 128 + [9] * 88],
    "not in order, with gaps": [[9] * 130 + [2] * 250 + [5] * 220, [0] * 200 + [4] * 100 + [3] * 300],
}
MASKS = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"window": 90},
    "window both sides, before and after the keys": {"causal": False, "window": 60, "q_offset": -200},
    "window, far": {"window": 100, "q_offset": 420},
    "offsets by row": {"q_offset": (300, -150)},
    "offsets by row, window": {"q_offset": (-220, 400), "window": 150},
    "rows before the first key": {"q_offset": -150},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ids", [None, *IDS])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_that_the_mask_empties_are_neither_loaded_nor_visited(mask, ids, bias, monkeypatch):
    """By the index maps of the very programs; steps with nothing to do name the blocks that are there."""
    B, T, H, K = 2, 600, 4, 2
    options = {"causal": True, "window": None, "q_offset": 0} | MASKS[mask]
    if isinstance(options["q_offset"], tuple):
        options["q_offset"] = jnp.asarray(options["q_offset"], jnp.int32)
    at = np.arange(T)[:, None] + np.reshape(options["q_offset"], (-1, 1, 1)) - np.arange(T)
    sees = np.broadcast_to(at >= 0 if options["causal"] else True, (B, T, T))
    sees = sees if options["window"] is None else sees & (np.abs(at) < options["window"])
    options |= {"scale": 1.0, "softcap": None}
    if ids is not None:
        options["q_segment_ids_BT"] = options["kv_segment_ids_BS"] = rows = jnp.asarray(IDS[ids], jnp.int32)
        sees = sees & (rows[:, :, None] == rows[:, None]) & (rows != 0)[:, None]
    sees = np.pad(np.asarray(sees), [(0, 0), (0, 40), (0, 40)])
    meet = np.asarray(sees.reshape(B, 5, 128, 5, 128).any((2, 4)))
    if bias:
        options["bias_BHTS"] = jnp.zeros((1, H, T, T))
    q, k, of_rows = jnp.zeros((B, T, H, 8)), jnp.zeros((B, T, K, 8)), jnp.zeros((B, T, H))
    runs = (
        (tpu_forward, lambda: tpu._forward(q, k, k, **options)),
        (tpu_backward, lambda: tpu.flash_attention_backward(q, k, k, q, of_rows, of_rows, **options)),
    )
    for kernel, run in runs:
        plan, (b, h, n, t, *g), blocks, (row, other, visited) = steps_of(monkeypatch, kernel, run)
        own, (i, j) = plan.place(n, t)[0], (other, row) if plan.per_key_block else (row, other)
        # Each pair that meets has its step, and no other has.
        visits = [(b, h, *g, own, other)] if plan.per_key_block else [(b, h, own, other)]
        visits = np.stack(visits[0])[:, visited == 1]
        wanted = np.swapaxes(meet, 1, 2) if plan.per_key_block else meet
        times = np.zeros((B, K, H // K, 5, 5) if g else (B, H, 5, 5), int)
        np.add.at(times, tuple(visits), 1)
        np.testing.assert_array_equal(
            times, np.broadcast_to(wanted.reshape(B, *[1] * (times.ndim - 3), 5, 5), times.shape)
        )
        # What is in memory meets, and is copied for its own steps only, or a first time before.
        assert (meet[b, i, j] | ~np.asarray(meet.any((1, 2)))[b]).all()
        of_q, of_k, of_v = blocks[:3]
        np.testing.assert_array_equal(of_q[:, -2], i)
        np.testing.assert_array_equal(of_k[:, 2], j)
        np.testing.assert_array_equal(of_v, of_k)
        copies = 1 + np.diff(of_q, axis=0).any(1).sum()
        needed = times.sum() if plan.per_key_block else times.any(-1).sum()
        assert copies <= needed + B * times.shape[1]
        if bias:
            of_bias = blocks[len(blocks) - (5 if plan.per_key_block else 3)]
            np.testing.assert_array_equal(of_bias[:, -2:], np.stack([j, i], 1))
            assert len(set(map(tuple, blocks[-1]))) == len(b) or not plan.per_key_block


def test_blocks_that_nobody_sees_may_hold_anything():
    """What is not finite would show in anything that is computed of it, even if it were hidden then."""
    ids = np.asarray([[1] * 128 + [2] * 128 + [1] * 128 + [3] * 128])
    kv_ids = np.where(ids == 2, 5, ids)
    rng = np.random.default_rng(0)
    shapes = (1, 512, 2, 8), (1, 512, 1, 8), (1, 512, 1, 8), (1, 2, 512, 512)
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    poisoned = [x.copy() for x in given]
    for x in poisoned[:3]:
        x[:, 128:256] = np.nan
    poisoned[3][:, :, 128:256] = poisoned[3][..., 128:256] = np.nan

    @jax.jit
    def results(*given):
        def loss(q, k, v, bias):
            options = {"bias_BHTS": bias, "q_segment_ids_BT": ids, "kv_segment_ids_BS": kv_ids}
            out, lse = flash_attention(q, k, v, **options, return_lse=True, implementation="tpu")
            return jnp.where(lse > -jnp.inf, lse, 0).sum() + (out * out).sum(), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*given)

    jax.tree.map(np.testing.assert_array_equal, results(*poisoned), results(*given))


def test_float64_is_for_others():
    with jax.enable_x64(True):
        x = jnp.ones((1, 4, 1, 8))
        with pytest.raises(NotImplementedError, match="float64"):
            flash_attention(x, x, x, implementation="tpu")


def program(target, D, options, dtype="bfloat16"):
    """Forward and backward, for one chip; called in the compiler's process."""
    from benchmarks.static import Program

    q, k = target.array((1, 640, 2, D), dtype), target.array((1, 640, 1, D), dtype)
    ids = target.array((1, 640), "int32")

    def loss(q, k, v, ids):
        given = {"q_segment_ids_BT": ids} if options.pop("segments", False) else {}
        return flash_attention(q, k, v, implementation="tpu", **given, **options).astype(jnp.float32).sum()

    return Program(jax.grad(loss, (0, 1, 2)), (q, k, k, ids), 0.0, 0.0)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("chip", PROGRAMS)
def test_it_compiles(chip):
    (found,) = compile_all([Request(chip, f"{__file__}:program", PROGRAMS[chip])], profiled=False)
    assert found.failed is None
