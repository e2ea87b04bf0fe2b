"""FLOPs of a product: of a `dot`, of a `convolution` (as which a TPU writes all products), of a kernel."""

import json
import math
import re

import numpy as np

from .hlo import Computation, Instruction

# Calls that may hold products; what is not among them places, sorts or hints.
WITH_PRODUCTS = re.compile(r"tpu_custom_call|mosaic|triton|cudnn|cublas|onednn|gemm|matmul|conv|attention", re.I)


def product_flops(computation: Computation, i: Instruction) -> float:
    """2 FLOPs for each multiplication and addition of a `dot` or `convolution`."""
    left, right = (computation[name].shape for name in i.operands[:2])
    if i.opcode == "dot":
        summed = math.prod(left.dims[axis] for axis in i.integers("lhs_contracting_dims"))
        return 2.0 * i.shape.elements * summed
    labels = i.attribute("dim_labels")
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if match is None:
        raise ValueError(f"The convolution {i.name} has dim_labels={labels!r}, which the planner cannot read.")
    left_labels, right_labels, out_labels = match.groups()
    inputs = left.dims[left_labels.index("f")] / int(i.attribute("feature_group_count") or 1)
    outputs = right.dims[right_labels.index("o")]
    batch = left.dims[left_labels.index("b")] / int(i.attribute("batch_group_count") or 1)
    positions = 1.0
    for axis in (label for label in out_labels if label.isdigit()):
        sizes = (left.dims[left_labels.index(axis)], right.dims[right_labels.index(axis)])
        positions *= _positions(*sizes, i.shape.dims[out_labels.index(axis)], i.braces("window") or "", int(axis))
    return 2.0 * inputs * outputs * batch * positions


def _positions(size: int, kernel: int, outputs: int, window: str, axis: int) -> float:
    """Pairs of an output place and a kernel place that meet an input, and not padding or a gap between inputs."""
    stride, dilation, spread = (_of(window, name, axis, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    shift = _of(window, "pad", axis, 0) - np.arange(kernel) * spread  # output o meets the input at o * stride - shift
    first = np.maximum(-(-shift // stride), 0)
    last = np.minimum(((size - 1) * dilation + shift) // stride, outputs - 1)
    # Of these outputs every so-manieth meets an input and not a gap: o * stride = shift, modulo the dilation.
    common = math.gcd(stride, dilation)
    period = dilation // common
    residue = shift // common * pow(stride // common, -1, period) % period
    met = (last - residue) // period - (first - 1 - residue) // period
    return float(np.where((shift % common == 0) & (last >= first), met, 0).sum())


def _of(window: str, name: str, axis: int, default: int) -> int:
    match = re.search(rf"\b{name}=([\dx_\-]+)", window)
    return int(match[1].split("x")[axis].split("_")[0]) if match else default


def custom_call_flops(computation: Computation, i: Instruction) -> float | None:
    """What a kernel or a library's product computes; None when it does not say."""
    target = i.attribute("custom_call_target") or re.search(r'custom_call_target="([^"]*)"', i.attributes)
    target = target if isinstance(target, str) else (target[1] if target else "")
    config = _config(i)
    declared = _find(config, "cost_estimate")
    if isinstance(declared, dict) and "flops" in declared:
        return float(declared["flops"])
    dims = _find(config, "dot_dimension_numbers")
    if isinstance(dims, dict):
        left = computation[i.operands[0]].shape
        axes = dims.get("lhs_contracting_dimensions") or dims.get("lhsContractingDimensions") or ()
        return 2.0 * i.shape.elements * math.prod(left.dims[int(axis)] for axis in axes)
    return None if WITH_PRODUCTS.search(target) else 0.0


def _config(i: Instruction) -> object:
    text = i.braces("backend_config")
    if text is None:
        return {}
    try:
        return json.loads("{" + text + "}")
    except json.JSONDecodeError:  # a kernel's own text
        return {}


def _find(tree: object, name: str) -> object:
    """The first value under the key `name`, at any depth."""
    if isinstance(tree, dict):
        if name in tree:
            return tree[name]
        return next((found for value in tree.values() if (found := _find(value, name)) is not None), None)
    return None
