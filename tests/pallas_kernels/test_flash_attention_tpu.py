"""flash_attention's TPU kernels in interpret mode, and what the compiler makes of them for each chip.

Blocks are made 128 x 128, so that a few hundred tokens are several blocks: empty, full and edges.
"""

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
from twinax.pallas_kernels.flash_attention.tpu_plan import Plan

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
    "causal, three blocks": (1, 290, 290, 2, 1, 8, {}),
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
    "latent": (1, 150, 150, 1, 1, 192, {"value_size": 128}),
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


@pytest.mark.parametrize(
    "plan",
    [
        Plan(700, 900, 128, 256, True, 300, 128, segments=False),
        Plan(700, 900, 128, 256, False, 200, -70, segments=False),
        Plan(512, 512, 128, 128, True, None, 0, segments=False),
        Plan(500, 1500, 128, 128, True, 90, None, segments=False),  # the offset is known when it runs
    ],
)
def test_the_forward_kernel_loads_no_block_that_the_mask_empties(plan):
    """A step without a block of its own names the one that is there, or of a row that sees nothing the first."""
    tables = {"offset": np.asarray([700])} if plan.offset is None else {}
    seen = dict.fromkeys(range(plan.nq), frozenset())
    for n in range(plan.grid[0]):
        for t in range(plan.grid[1]):
            i, j = (int(x) for x in plan.place(n, t))
            low, high = (int(x) for x in plan.keys_of(i, tables, 0))
            block = int(tpu_forward._key_block(plan, low, high, j))
            assert low <= block <= high or high < low
            seen[i] |= {block}
    for i, blocks in seen.items():
        low, high = (int(x) for x in plan.keys_of(i, tables, 0))
        assert blocks == set(range(low, high + 1)) or (high < low and len(blocks) == 1)


def test_blocks_of_other_segments_are_not_loaded():
    ids = np.repeat([[1, 2, 3, 4]], 128, axis=1)
    plan = Plan(512, 512, 128, 128, True, None, 0, segments=True)
    _, tables = tpu._segments(plan, jnp.asarray(ids), jnp.asarray(ids), 0)
    for i in range(4):
        assert [int(x) for x in plan.keys_of(i, tables, 0)] == [i, i]
        assert [int(x) for x in plan.queries_of(i, tables, 0)] == [i, i]
    assert [bool(plan.is_full(i, i, tables, 0)) for i in range(4)] == [False] * 4  # causal: an edge


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
