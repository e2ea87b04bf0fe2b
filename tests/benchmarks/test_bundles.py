"""The clock that counts bundles: a program written as libtpu's dumps are."""

import importlib.util

import numpy as np
import pytest

from benchmarks.bundles import Lost, Program, parse
from benchmarks.static import Request, compile_all

# Two operands, the second's address in vector memory; a loop over the steps, of which one of two bodies runs: the long
# one where the step is below the first operand's value at it.
DUMP = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[3], index: 0, kind: input, shape index: {}] /* a /* nested
 */ brace } */  ;;  %s2_s1 = smov [#allocation4] }
   0x1   :  { %3 = dma.hbm_to_smem %s1_s0, 16, %s2_s1, [#allocation5]  ;;  %v7 = vmov 0.0 }
   0x2   :  { %s9_s3 = inlined_call_operand.<no memory space> [shape: s32[1], index: 1, kind: input, shape index: {}] }
   0x3   :  { %s10_s2 = smov 0  ;;  %90 = sst [smem:[#allocation9_spill]] %s9_s3 } /* Start region 1 */
   0x4 LB: > { %s11_s2 = sphi %s10_s2, %s12_s2  ;;  %s20_s4 = sld [smem:[#allocation4 + %s11_s2]] }
   0x5   : > { %p21_p0 = scmp.ge.s32.totalorder %s11_s2, %s20_s4  ;;  %s91_s5 = sld [smem:[#allocation9_spill]] }
   0x6   : > { %22 = sbr.rel (%p21_p0) target bundleno = 14 (0xe), region = 3  ;;  %s12_s2 = sadd.s32 1, %s11_s2 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   :  {} /* End region 2 */
   0xb   : > { %v30 = vld [vmem:[#allocation2]] }
   0xc   : > { %31 = vst [vmem:[#allocation2]] %v30 }
   0xd   :  {} /* End region 3 */
   0xe PF: > { %p23_p1 = scmp.ge.s32.totalorder %s12_s2, %s91_s5 } /* Start/End empty region 4 */
   0xf   : > { %24 = sbr.rel (!%p23_p1) target bundleno = 4 (0x4), region = 1 }
  0x10   :  {}
  0x11   :  {}
  0x12   : > { %s40_s6 = spop %v7  ;;  %p41_p2 = scmp.lt.s32.totalorder %s40_s6, 5 }
  0x13   :  { %42 = sst [smem:[#allocation4]] (%p41_p2), %s40_s6 } /* End region 1 */
  0x14   :  { %50 = vsyncpa [#allocation7], 1 }
"""


def test_what_runs_hangs_on_data():
    program = Program(DUMP, "v6e")
    assert len(program.bundles) == 21
    # 4 before, 13 a step and 3 more where the long body runs, 1 after.
    data = {0: np.array([0, 2, 3]), 1: np.array([1])}
    assert program.cycles(data) == 4 + 13 + 1
    assert program.cycles({0: np.array([1, 1, 0]), 1: np.array([1])}) == 4 + 16 + 1
    with pytest.raises(Lost, match="no value"):  # vectors may have changed the table in the first step
        Program(DUMP.replace("#allocation4]] (%p41", "#allocation4 + $0x1]] (%p41"), "v6e").cycles({**data, 1: [2]})


def test_loops_run_as_often_as_they_say():
    program = Program(DUMP.replace("{ %42 = sst [smem:[#allocation4]] (%p41_p2), %s40_s6 }", "{}"), "v6e")
    assert program.cycles({0: np.array([0, 2, 3]), 1: [3]}) == 4 + 13 + 16 + 16 + 1
    assert program.cycles({0: np.array([1, 2, 3]), 1: [3]}) == 4 + 3 * 16 + 1
    assert program.cycles({0: np.array([0, 0, 0]), 1: [2]}) == 4 + 2 * 13 + 1


def test_what_cannot_be_followed_is_said():
    with pytest.raises(Lost, match="operand 1 is data"):
        Program(DUMP, "v6e").cycles({0: np.array([0])})
    with pytest.raises(Lost, match="operand 0 is data"):
        Program(DUMP, "v6e").cycles({1: np.array([2])})
    with pytest.raises(Lost, match="not taken after 6 bundles"):
        Program(DUMP, "tpu7x")
    with pytest.raises(Lost, match="vectors decide or nobody knows"):
        Program(DUMP.replace("sld [smem:[#allocation9_spill]]", "smagic.s32 4"), "v6e").cycles({})
    with pytest.raises(Lost, match="branches of another kind"):
        Program(DUMP.replace("sbr.rel", "sbr.ind"), "v6e")
    with pytest.raises(Lost, match="follows"):
        parse(DUMP.replace("0x14   :", "0x15   :"))
    with pytest.raises(Lost, match="words of operand 0"):
        Program(DUMP, "v6e").cycles({0: np.zeros((3, 2), int), 1: [1]})


ARITHMETIC = [
    ("sadd.s32 2147483647, 1", -(2**31)), ("ssub.s32 3, 5", -2), ("smul.u32 65536, 65537", 65536),
    ("sshll.u32 3, 30", -(2**30)), ("sshra.s32 4294967288, 1", -4), ("sshrl.u32 4294967288, 1", 2**31 - 4),
    ("sand.u32 4294967295, 12", 12), ("sor.u32 5, 2", 7), ("sxor.u32 5, 1", 4), ("smin.u32 4294967295, 3", 3),
    ("smin.s32 4294967295, 3", -1), ("smax.s32 4294967295, 3", 3), ("smulhi.u32 4294967295, 2", 1),
    ("scalar_lea.smem [#allocation2], 3", 2 * 2**20 + 3), ("smov.u32 7", 7),
    ("int_to_ptr.smem [resolvable:$true] %s9", 9),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ARITHMETIC)
def test_scalar_instructions(text, expected):
    dump = f"""
     0   :  {{ %s9 = smov 9 }}
   0x1   :  {{ %s1 = {text} }}
   0x2   :  {{ %p2 = scmp.eq.s32.totalorder %s1, {expected} }}
   0x3   :  {{ %p3 = scmp.lt.u32.totalorder %s1, %s1  ;;  %p4 = pneg %p2 }}
   0x4   :  {{ %p5 = por %p3, %p4 }}
   0x5   :  {{ %3 = sbr.rel (%p5) target bundleno = 11 (0xb), region = 1 }}
   0x6   :  {{}}
   0x7   :  {{}}
   0x8   :  {{}}
   0x9   :  {{}} /* End region 1 */
   0xa   :  {{}}
   0xb   :  {{}}
"""
    assert Program(dump, "v6e").cycles() == 12, "a wrong result would leave one out"


def test_predicated_moves_and_selections():
    dump = """
     0   :  { %s1 = smov 4  ;;  %p1 = scmp.lt.s32.totalorder 3, 4 }
   0x1   :  { %s2 = smov (%p1, %s1), 9  ;;  %s3 = smov (!%p1, %s1), 9  ;;  %s4 = scalar_select %p1, 5, 6 }
   0x2   :  { %s5 = sadd.s32 %s2, %s3 }
   0x3   :  { %s6 = sadd.s32 %s5, %s4 }
   0x4   :  { %p7 = scmp.ne.s32.totalorder %s6, 18 }
   0x5   :  { %3 = sbr.rel (%p7) target bundleno = 11 (0xb), region = 1 }
   0x6   :  {}
   0x7   :  {}
   0x8   :  {}
   0x9   :  {} /* End region 1 */
   0xa   :  {}
   0xb   :  {}
"""
    assert Program(dump, "v6e").cycles() == 12


BUILDERS = '''
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from benchmarks.static import Program


def product(target, blocks, run):
    """Blocks of a product, of which the first `run` are computed, as a prefetched scalar says."""

    def kernel(count, x, w, o):
        @pl.when(pl.program_id(0) < count[0])
        def _():
            o[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(o.dtype)

    @jax.jit
    def call(x, w, halves):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(blocks,),
            in_specs=[pl.BlockSpec((256, 512), lambda i, _: (i, 0)), pl.BlockSpec((512, 512), lambda i, _: (0, 0))],
            out_specs=pl.BlockSpec((256, 512), lambda i, _: (i, 0)))
        return pl.pallas_call(kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(
            jnp.sum(halves, keepdims=True), x, w)

    given = target.array((blocks * 256, 512)), target.array((512, 512)), target.array((2,), "int32")
    return Program(call, given, 0, 0, data=(None, None, np.full(2, run // 2, np.int32)))
'''


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is the compiler, and is not installed")
@pytest.mark.parametrize("chip", ["v6e", "v5p", "7x"])
def test_a_kernel_whose_data_decides_is_followed(tmp_path, chip):
    file = tmp_path / "builders.py"
    file.write_text(BUILDERS)
    given = [{"blocks": 16, "run": run} for run in (0, 8, 16)]
    requests = [Request(chip, f"{file}:product", x, profiled=False) for x in given]
    none, half, every = compile_all(requests)
    assert [x.failed for x in (none, half, every)] == [None] * 3
    assert not any(name.startswith("call") for name in half.lost)
    assert half.clock == "bundles" and half.counted_microseconds == half.microseconds > 0
    assert 0 < none.cycles < half.cycles, "what does not run does not count"
    assert every.cycles - half.cycles == half.cycles - none.cycles > 8 * 50
