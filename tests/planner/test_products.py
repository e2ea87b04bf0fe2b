"""FLOPs of products as a TPU's compiler writes them, against counting by hand."""

import numpy as np
import pytest

from twinax.planner.hlo import Module
from twinax.planner.products import _positions, custom_call_flops, product_flops


def flops(left: str, right: str, out: str, attributes: str, opcode: str = "convolution") -> float:
    text = f"""ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} {opcode}(%a, %b), {attributes}
}}"""
    entry = Module.parse(text).entry
    return product_flops(entry, entry["c"])


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "count"),
    [
        ("bf16[64,32]{1,0}", "bf16[16,32]{1,0}", "bf16[64,16]{1,0}", "dim_labels=bf_oi->bf", 64 * 32 * 16),
        ("bf16[32,64]{1,0}", "bf16[32,16]{1,0}", "bf16[64,16]{1,0}", "dim_labels=fb_io->bf", 64 * 32 * 16),
        # A batched product [8, 64, 32] x [8, 16, 32]: the batch is a spatial axis, spread so that each meets its own.
        (
            "bf16[8,64,32]{2,1,0}",
            "bf16[8,16,32]{2,1,0}",
            "bf16[8,64,16]{2,1,0}",
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf",
            8 * 64 * 32 * 16,
        ),
        # A real convolution, 3x3 over 5x5 with a border of one: 13 of 15 pairs along each axis meet an input.
        (
            "f32[2,5,5,3]{3,2,1,0}",
            "f32[3,3,3,7]{3,2,1,0}",
            "f32[2,5,5,7]{3,2,1,0}",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 3 * 7 * 13 * 13,
        ),
        (
            "f32[2,6,8]{2,1,0}",
            "f32[1,2,8]{2,1,0}",
            "f32[2,6,8]{2,1,0}",
            "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=4",
            2 * 6 * 2 * 8,
        ),
    ],
)
def test_convolutions(left: str, right: str, out: str, attributes: str, count: int):
    assert flops(left, right, out, attributes) == 2 * count


def test_places_are_counted_as_by_trying_each():
    random = np.random.default_rng(0)
    for _ in range(300):
        size, kernel, outputs = (int(n) for n in random.integers(1, 12, 3))
        stride, dilation, spread = (int(n) for n in random.integers(1, 10, 3))
        low = int(random.integers(0, 9))
        window = f"size={kernel} stride={stride} pad={low}_0 lhs_dilate={dilation} rhs_dilate={spread}"
        met = 0
        for out in range(outputs):
            for place in range(kernel):
                at = out * stride - low + place * spread
                met += 0 <= at <= (size - 1) * dilation and at % dilation == 0
        assert _positions(size, kernel, outputs, window, 0) == met


def test_dots():
    attributes = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    found = flops("f32[4,8,16]{2,1,0}", "f32[4,16,2]{2,1,0}", "f32[4,8,2]{2,1,0}", attributes, "dot")
    assert found == 2 * 4 * 8 * 16 * 2


@pytest.mark.parametrize(
    ("attributes", "count"),
    [
        ('custom_call_target="AllocateBuffer"', 0.0),
        ('custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"}}', None),
        (
            'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":'
            '{"flops":"1024","transcendentals":"0","bytes_accessed":"9"}}}',
            1024.0,
        ),
        (
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            2.0 * 64 * 16 * 32,
        ),
    ],
)
def test_kernels(attributes: str, count: float | None):
    text = f"""ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = f32[64,32]{{1,0}} parameter(0)
  %b = f32[32,16]{{1,0}} parameter(1)
  ROOT %c = f32[64,16]{{1,0}} custom-call(%a, %b), {attributes}
}}"""
    entry = Module.parse(text).entry
    assert custom_call_flops(entry, entry["c"]) == count
