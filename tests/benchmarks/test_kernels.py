"""The table of kernels: limits, ratios, what is kept, what dumps say; and one kernel that is really compiled."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from benchmarks import dumps, kernel_cases, kernels, static, static_child
from benchmarks.dumps import forget, read_ptxas, read_tpu
from benchmarks.kernel_cases import Case, Kernel, grouped_matmul, paged_attention
from benchmarks.static import Program, Request, Static
from benchmarks.static_child import summary
from twinax.planner.chips import find_chip

V6E = find_chip("v6e")


def _summary(cycles, **more):
    from benchmarks.dumps import Dump

    program = Program(print, (), **{"flops": 918e12 * 1e-6, "hbm_bytes": 1638e9 * 2e-6, **more})
    return summary(V6E, program, Dump({"op": cycles}, {"op": 7, "other": 3}, 0), 1.0, 5)


def test_microseconds_and_the_share_of_the_limit():
    found = _summary(1.75e9 * 4e-6)
    assert found.microseconds == pytest.approx(4) and found.of_limit == pytest.approx(0.5)  # 2 us of bytes
    assert (found.bundles, found.unprofiled) == (10, ("other",))
    assert _summary(1.0).microseconds == pytest.approx(2), "never faster than its bytes"
    assert _summary(1.75e9 * 4e-6, hbm_bytes=0).of_limit == pytest.approx(0.25)
    assert _summary(1.75e9 * 4e-6, hbm_bytes=0, dtype="int8").of_limit == pytest.approx(0.125)
    assert _summary(1.75e9 * 4e-6, share=0.75).microseconds == pytest.approx(3)
    moved = _summary(1.0, moved_bytes=1638e9 * 8e-6)
    assert (moved.microseconds, moved.of_limit) == pytest.approx((8, 0.25)), "nor than those that it does move"


PEERS = {"a": (Kernel("g", {"n": 1}), Kernel("g", {"n": 2})), "b": ()}
CASE = Case("grouped_matmul", "a shape", Kernel("f", {}), PEERS, goal=1.15)


def test_the_ratio_is_to_the_best_of_all_libraries():
    peers = {"a": Static(microseconds=12.0), "b": Static(microseconds=11.0), "c": Static(failed="no")}
    measured = kernels.Measured(CASE, Static(microseconds=10.0, of_limit=0.5, spills=3), peers)
    time, share, spills = measured.rows()
    assert (time.peer_name, time.ratio, time.met) == ("b", 1.1, False)
    assert share.met is None and spills.met is False
    console = Console(width=150, record=True)
    kernels.show([measured], "v6e", console)
    text = console.export_text()
    assert "1.10" in text and "NO" in text
    first = json.loads(kernels.to_json([measured], target="v6e").splitlines()[0])
    assert first["met"] is False and first["kernels"]["b"]["microseconds"] == 11.0


def test_a_kernel_that_is_not_there_makes_no_row_and_no_ratio():
    measured = kernels.Measured(CASE, Static(failed="no implementation"), {"a": Static(microseconds=12.0)})
    assert measured.rows() == []
    kernels.show([measured], "v6e", Console(width=150, quiet=True))


def test_all_of_a_case_are_told_by_one_clock():
    both = Static(microseconds=10.0, of_limit=0.5, clock="profile", by_op={"a": 5.0}, counted={"a": 4.0})
    both = dataclasses.replace(both, counted_microseconds=8.0)
    counted, failed = Static(microseconds=9.0, clock="bundles"), Static(failed="no")
    assert kernels.by_one_clock({"twinax": [both], "a": [failed]}) == {"twinax": [both], "a": [failed]}
    found = kernels.by_one_clock({"twinax": [both], "a": [counted, failed]})
    (ours,) = found["twinax"]
    assert (ours.microseconds, ours.of_limit, ours.clock, ours.by_op) == (8.0, 0.625, "bundles", {"a": 4.0})
    assert found["a"] == [counted, failed]
    row = json.loads(kernels.to_json([kernels.Measured(CASE, ours, {"a": counted})]).splitlines()[0])
    assert row["clock"] == "bundles" and row["ratio"] == 9 / 8


def test_bundles_tell_the_time_where_the_profiler_does_not():
    from benchmarks.dumps import Dump

    def told(cycles, counted, lost=None, **more):
        program = Program(print, (), 918e12 * 1e-6, 0, **more)
        return summary(V6E, program, Dump(cycles, {"op": 7}, 0, counted=counted, lost=lost or {}), 1.0, 5)

    both = told({"op": 1.75e3}, {"op": 3.5e3})
    assert (both.clock, both.cycles) == ("profile", 1.75e3) and both.counted_microseconds == pytest.approx(2)
    data = told({"op": 1.75e3}, {"op": 3.5e3}, data=(1,), share=2.0)
    assert (data.clock, data.cycles) == ("bundles", 7e3) and data.microseconds == pytest.approx(4)
    assert told({}, {"op": 3.5e3}).clock == "bundles"
    lost = told({}, {}, {"op": "why"})
    assert lost.clock is lost.microseconds is None and lost.lost == {"op": "why"}


def test_the_fastest_variant_counts():
    slow, fast, failed = Static(microseconds=2.0), Static(microseconds=1.0), Static(failed="no")
    assert kernels.fastest([slow, failed, fast]) is fast
    assert kernels.fastest([failed]) is failed


def test_what_was_compiled_is_found_again(tmp_path, monkeypatch):
    compiled = []

    def compile_all(requests, progress):
        for index, request in enumerate(requests):
            compiled.append(request)
            failed = "not compiled after 300 s" if request.arguments == {"n": 2} else None
            progress(index, Static(microseconds=None if failed else 5.0, failed=failed, asked=(("op", {"D": 1}),)))

    monkeypatch.setattr(kernels, "compile_all", compile_all)
    for expected in (3, 1):  # what took too long is tried again
        kept = kernels.KeptResults(tmp_path / "kept.jsonl")
        (measured,) = kernels.measure([CASE], "v6e", kept, Console(quiet=True))
        assert len(compiled) == expected
        assert measured.ours.microseconds == measured.peers["a"].microseconds == 5.0
        compiled.clear()
    with (tmp_path / "kept.jsonl").open("a") as out:
        out.write('{"name": "half a li')
    kernels.measure([CASE], "v6e", kernels.KeptResults(tmp_path / "kept.jsonl"), Console(quiet=True))
    assert len(compiled) == 1


def test_a_change_of_the_source_makes_another_name(monkeypatch, tmp_path):
    request = Request("v6e", "benchmarks.kernel_cases.grouped_matmul:ours", {"n": 1})
    file = tmp_path / "a.py"
    file.write_text("1")
    monkeypatch.setattr(kernels, "_sources", lambda request, operation: [file])
    before = kernels.fingerprint(request, None)
    assert before == kernels.fingerprint(request, None)
    assert before != kernels.fingerprint(Request("v5p", request.builder, request.arguments), None)
    file.write_text("2")
    assert before != kernels.fingerprint(request, None)


@pytest.mark.parametrize("operation", kernel_cases.names())
def test_cases_name_builders_that_are_there_and_arguments_of_json(operation):
    for chip in ("v5p", "v6e", "h200"):
        cases = list(kernel_cases.cases(operation, chip))
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            module = importlib.import_module(f"benchmarks.kernel_cases.{operation}")
            for _, _, kernel in kernels._kernels(case):
                assert callable(getattr(module, kernel.function))
                assert json.loads(json.dumps(kernel.arguments)) == _lists(kernel.arguments)


def _lists(x):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in x.items()}


def test_tables_as_functions_of_the_index():
    for sizes in ([256] * 8, [448] * 4 + [64] * 4, [3072, 64, 0, 832, 192, 1600, 320, 64]):
        for table in grouped_matmul._tables(sizes, 128, empty=True):
            known = grouped_matmul._Known(table)
            assert [int(known[i]) for i in range(len(table))] == table


def test_tiles_read_what_their_rows_see():
    read = paged_attention.tokens_read
    assert read([1, 1], [100, 64], 1, 64) == 128 + 64, "whole pages"
    assert read([256], [300], 128, 1) == 172 + 300, "the second tile sees 128 tokens more"
    assert read([256], [300], 128, 1, causal=False) == 600
    # Rows 0 to 2, 3 to 10: tiles of 4 rows of which the first two requests share one.
    assert read([3, 8], [3, 8], 4, 1) == 3 + 1 + 5 + 8
    assert read([3, 8], [3, 8], 4, 8, causal=False) == 8 * 4


def test_each_kernel_of_a_program_finds_its_own_scalars():
    whole = pl.BlockSpec((8, 128), lambda *_: (0, 0))

    def call(name, lengths, x):
        def kernel(lengths, x, o):
            o[...] = x[...]

        grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(1,), in_specs=[whole], out_specs=whole)
        return pl.pallas_call(kernel, grid_spec=grid, out_shape=x, name=name)(lengths, x)

    def step(lengths, x):
        places = jnp.searchsorted(lengths, lengths, side="right")  # a scan
        return call("b", places, call("a", lengths + 1, x))

    data = np.array([3, 5, 9], np.int32)
    traced = jax.make_jaxpr(step)(jax.ShapeDtypeStruct((3,), "int32"), jax.ShapeDtypeStruct((8, 128), "float32"))
    found = {
        name: np.asarray(values[0]).tolist() for name, values in static_child._kernels_scalars(traced, [data, None])
    }
    assert found == {"a": [4, 6, 10], "b": [1, 2, 3]}
    assert dumps._operands({"a": 1, "b": 2}, "b.1") == 2 and dumps._operands({"a": 1, "b": 2}, "c.1") is None
    assert dumps._operands({"": 1}, "custom-call.3") == 1


def test_what_ptxas_says_is_read():
    said = """ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
    0 bytes stack frame, 96 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
    0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers"""
    found = read_ptxas(said)
    assert (found.registers, found.spills, found.warnings) == (255, 200, ("C7511",))
    assert read_ptxas("").registers is None


def test_what_libtpu_leaves_is_read_once(tmp_path):
    (tmp_path / "llo").mkdir()
    (tmp_path / "static").mkdir()
    for name in ("op.1", "<whole>"):
        (tmp_path / "llo" / f"17-{name}-71-schedule-analysis_final_bundles.txt").write_text(
            "Schedule analysis:\n\ttotal scheduled bundles:    2205\n"
        )
        (tmp_path / "llo" / f"17-{name}-72-final_bundles.txt").write_text(
            "{ vst [vmem:[#allocation7_spill + $0x8]] }\n"
            "{ vld [vmem:[#allocation7]] ;; %1 = vld [vmem:[#allocation9_spill]] }\n"
        )
    estimate = 'hlo_op_estimate {\n  hlo_op_name: "op.1"\n  estimated_cycles: 8938\n}'
    (tmp_path / "static" / "op.1_static_llo_profile.textproto").write_text(estimate)
    found = read_tpu(tmp_path, "v6e")
    assert (found.cycles, found.bundles, found.spills) == ({"op.1": 8938.0}, {"op.1": 2205}, 2)
    assert read_tpu(tmp_path, "v6e").bundles == {}
    (tmp_path / "static" / "op.1_static_llo_profile.textproto").write_text(estimate)
    forget(tmp_path)
    assert read_tpu(tmp_path, "v6e").cycles == {}, "of a compilation that failed"


BUILDERS = '''
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from benchmarks.static import Program
from twinax.pallas_kernels import tuned
from twinax.pallas_kernels.chips import target_chip


def product(target, blocks, run=None, broken=False):
    """Blocks of a product, of which the first `run` are computed."""
    assert target_chip() is None, "there is no chip but while tracing"

    def kernel(x, w, o):
        if broken:
            raise NotImplementedError("not this one")
        def compute():
            o[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(o.dtype)
        compute() if run is None else pl.when(pl.program_id(0) < run)(compute)

    def call(x, w):
        rows = (tuned.best("op", target_chip(), {"n": 1}) or {"rows": 256})["rows"]
        assert target_chip() == "v6e"
        return pl.pallas_call(
            kernel, grid=(256 * blocks // rows,),
            in_specs=[pl.BlockSpec((rows, 512), lambda i: (i, 0)), pl.BlockSpec((512, 512), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((rows, 512), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, w)

    return Program(call, (target.array((blocks * 256, 512)), target.array((512, 512))), 2 * blocks * 256 * 512**2, 0)
'''


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is the compiler, and is not installed")
def test_a_kernel_is_compiled_for_a_chip_that_is_not_there(tmp_path):
    file = tmp_path / "builders.py"
    file.write_text(BUILDERS)
    given = [{"blocks": 8}, {"blocks": 16}, {"blocks": 16, "run": 8}, {"blocks": 8, "broken": True}, {"blocks": 8}]
    requests = [Request("v6e", f"{file}:product", arguments) for arguments in given]
    requests.append(Request("v6e", f"{file}:product", {"blocks": 8}, using=(("op", {"n": 1}, {"rows": 512}),)))
    eight, sixteen, half, broken, again, other = static.compile_all(requests)
    assert eight.failed is None and eight.spills == 0 and eight.bundles > 50 and 0.1 < eight.of_limit < 1
    assert 1.7 < sixteen.cycles / eight.cycles < 2.1, "cycles grow with the blocks"
    assert eight.cycles < half.cycles < sixteen.cycles, "conditions on program ids are followed"
    for one in (eight, sixteen, half):
        assert not one.lost and one.clock == "profile" and list(one.counted) == list(one.by_op)
    # A block is little work: the profiler lets it wait for its copies, which bundles do not tell.
    assert 0.75 < (_counted(sixteen) - _counted(eight)) / (sixteen.cycles - eight.cycles) < 1
    assert _counted(eight) < _counted(half) < _counted(sixteen)
    assert "not this one" in broken.failed
    assert again.cycles == eight.cycles != other.cycles, "block sizes are those that the request says"
    assert eight.asked == (("op", {"n": 1}),)


def _counted(found):
    return sum(found.counted.values())


LIVE = """
import jax
import jax.numpy as jnp
from benchmarks.kernels_timed import InPlace
from benchmarks.static import Program


def product(target, n, broken=False, update=False):
    if update:
        def step(x, kept):
            return x @ kept["a"], {"a": kept["a"].at[0].add(1)}

        given = target.array((n, n)), {"a": target.array((n, n))}
        return InPlace(jax.jit(step, donate_argnums=1), given, 2 * n**3, 0, updated=1)
    if broken:
        raise NotImplementedError("not here")
    ids = target.array((n,), "int32")
    return Program(lambda x, w, ids: (x @ w)[ids], (target.array((n, n)), target.array((n, n)), ids), 2 * n**3, 0)
"""


def test_a_kernel_is_timed_where_there_is_a_device(tmp_path, monkeypatch):
    from benchmarks import kernels_timed

    monkeypatch.setattr(kernels_timed, "LEAST_SECONDS", 0.001)
    monkeypatch.setattr(kernels_timed, "REPEATS", 3)
    file = tmp_path / "live.py"
    file.write_text(LIVE)
    found = kernels_timed.time_one(f"{file}:product", {"n": 64}, V6E)
    assert found.failed is None and found.microseconds > 0.1
    assert found.of_limit == pytest.approx(2 * 64**3 / V6E.flops / (1e-6 * found.microseconds))
    found = kernels_timed.time_one(f"{file}:product", {"n": 64, "update": True}, V6E)
    assert found.failed is None and found.microseconds > 0.1, "what is given away comes back"
    assert "not here" in kernels_timed.time_one(f"{file}:product", {"n": 64, "broken": True}, V6E).failed
    with pytest.raises(RuntimeError, match="no GPU here"):
        kernels_timed.timed((), None, None, Console(quiet=True))


def test_timing_counts_runs(monkeypatch):
    from benchmarks import kernels_timed

    clock = [0.0]
    monkeypatch.setattr(kernels_timed.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += 0.002
        return 0

    assert kernels_timed.median_seconds(run) == pytest.approx(0.002)
