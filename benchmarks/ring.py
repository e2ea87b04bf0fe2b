"""Attention over rows cut over eight devices: what a device sends and holds, read from the compiled program.

Each row compares with the least that the scheme could do: what its own docstring counts, segment ids and numbers a row
left out of the bytes sent; and the buffers that travel or gather sums for the bytes held beside arguments and results,
where the rest is the scratch of the local attention. The busiest link carries every message one hop in its direction,
the shorter way, or half of it each way; there a ring of both ways is compared with a ring of one.

Compiled for simulated CPUs in float32, or with --topology v5p:2x2x2 (needs libtpu) for that machine, in bfloat16.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from . import report

DEVICES, TOKENS, HEAD_DIM = 8, 8192, 128
HEADS = {"16 key heads": (16, 16), "4 key heads": (16, 4)}  # of 16 query heads
KINDS = ("ring", "ring_two_way", "all_to_all")
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One device's part: H query heads and K key heads of `tokens`, elements of `e` bytes; sums have 4."""

    H: int
    K: int
    e: int
    tokens: int = TOKENS // DEVICES

    def sent(self, kind: str, backward: bool) -> float:
        """The fewest bytes that a device sends."""
        n, a, b, s = DEVICES, DEVICES // 2, (DEVICES - 1) // 2, 4
        H, K, e = self.H, self.K, self.e
        if kind == "all_to_all":
            copies = math.lcm(K, n) // K
            return self._bytes((n - 1) / n * (2 * H + 2 * K * copies) * e)
        if kind == "ring":
            return self._bytes((n - 1) * 2 * K * (e + s * backward))
        if not backward:
            return self._bytes(a * 2 * K * e + b * H * (e + s))
        return self._bytes(a * 2 * K * (e + s) + b * H * (2 * e + s))

    def held(self, kind: str, backward: bool) -> float:
        """The fewest bytes beside arguments and results: what travels, twice (in use and arriving), and sums."""
        H, K, e, s = self.H, self.K, self.e, 4
        if kind == "all_to_all":  # heads of whole rows: the output, or its gradient and those of q, k and v
            copies = math.lcm(K, DEVICES) // K
            return self._bytes((2 * H + 2 * K * copies) * e if backward else H * e)
        keys, sums = 2 * 2 * K * e, (H + 2 * 2 * K * backward) * s
        if kind == "ring_two_way":
            keys, sums = keys + 2 * H * e * (1 + backward), sums + (2 * H + 2 * K * backward) * s
        return self._bytes(keys + sums)

    def _bytes(self, heads_times_bytes: float) -> float:
        return heads_times_bytes * self.tokens * HEAD_DIM


def compile_passes(kind: str, sizes: Sizes, devices: list[Any], dtype: Any) -> list[Any]:
    """The forward and the backward pass, each a program of its own; what passes between them stays on its device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from twinax.pallas_kernels.flash_attention import flash_attention
    from twinax.pallas_kernels.ring_attention import ring_attention
    from twinax.sharding.all_to_all import over_heads

    mesh = Mesh(np.array(devices[:DEVICES]), ("sequence",), axis_types=(AxisType.Auto,))
    cut = PartitionSpec(None, "sequence")

    def rows(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return flash_attention(q, k, v, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            if kind == "all_to_all":
                return over_heads(rows, q, k, v, ids, axis="sequence")
            # What the kernel for TPUs sends stands in no HLO.
            way = {"two_way": kind == "ring_two_way", "implementation": "xla"}
            return ring_attention(q, k, v, axis="sequence", segment_ids_BT=ids, **way)

        return jax.vjp(attend, q, k, v)

    def place(tree: Any) -> Any:
        rest = NamedSharding(mesh, cut)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rest), tree)

    def compiled(function: Any, *given: Any) -> Any:
        # An old program of the same text may lack what is read here.
        return function.lower(*given).compile(compiler_options={"xla_embed_ir_in_executable": False})

    island = {"mesh": mesh, "in_specs": cut, "out_specs": cut, "check_vma": False}
    shapes = [(1, TOKENS, heads, HEAD_DIM) for heads in (sizes.H, sizes.K, sizes.K)]
    given = place([*(jax.ShapeDtypeStruct(x, dtype) for x in shapes), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)])
    first = jax.jit(jax.shard_map(forward, **island))
    out, pullback = place(jax.eval_shape(first, *given))
    second = jax.jit(jax.shard_map(lambda pullback, d_out: pullback(d_out), **island))
    return [compiled(first, *given), compiled(second, pullback, out)]


def messages(frame: Any, times: int = 1) -> Iterator[tuple[int, float]]:
    """Hops (the shorter way round, with a sign) and bytes of the permutations that a run makes."""
    from twinax.planner.integers import Loop

    for i in frame.computation:
        if i.opcode == "while":
            loop = Loop(frame, i)
            turns = loop.turns()
            yield from messages(loop.at({}), times * (1 if turns is None else turns))
        elif i.opcode in ("call", "conditional", "async-start"):
            for name in i.called:
                yield from messages(frame.call(name, [None]), times)
        elif i.opcode.removesuffix("-start") == "collective-permute":
            source, target = i.integers("source_target_pairs")[:2]
            hops = (target - source) % DEVICES
            size = sum(frame.computation[name].bytes for name in i.operands)
            if 2 * hops == DEVICES:  # as far one way as the other
                yield from ((hops, times * size / 2), (-hops, times * size / 2))
            else:
                yield (hops if 2 * hops < DEVICES else hops - DEVICES), times * size


def measure(kind: str, sizes: Sizes, devices: list[Any], dtype: Any) -> list[dict[str, float]]:
    """Bytes sent and held by a device, and on the busiest direction of its links, for each pass."""
    from twinax.planner.costs import count
    from twinax.planner.hlo import Module
    from twinax.planner.integers import Frame

    found = []
    for program in compile_passes(kind, sizes, devices, dtype):
        module = Module.parse(program.as_text())
        sent = sum(traffic.sent for traffic in count(module, {"sequence": DEVICES}).collectives.values())
        ways = [0.0, 0.0]
        for hops, size in messages(Frame(module, module.entry, [])):
            ways[hops < 0] += abs(hops) * size
        held = program.memory_analysis().temp_size_in_bytes
        found.append({"sent": sent, "held": held, "busiest": max(ways)})
    return found


def main() -> None:
    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("--topology", default="cpu", help="cpu, or a machine of at least 8 TPUs such as v5p:2x2x2")
    options = parser.parse_args()
    devices, dtype = described(options.topology)
    rows: list[report.Row] = []

    def add(case: str, ours: float, peer: float, name: str, goal: float | None) -> None:
        rows.append(report.Row("ring", case, ours / 2**20, peer / 2**20, name, "MiB", goal, higher_is_better=False))

    for what, (H, K) in HEADS.items():
        sizes = Sizes(H, K, 4 if dtype == "float32" else 2)
        one_way = None
        for kind in KINDS:
            found = measure(kind, sizes, devices, dtype)
            one_way = one_way or found
            for number, one_pass in enumerate(PASSES):
                case = f"{kind}, {what}, {one_pass}"
                add(f"{case}: sent", found[number]["sent"], sizes.sent(kind, bool(number)), "least", 0.98)
                add(f"{case}: held", found[number]["held"], sizes.held(kind, bool(number)), "least", None)
                if kind == "ring_two_way":
                    busiest = found[number]["busiest"], one_way[number]["busiest"]
                    add(f"{case}: busiest link", *busiest, "one way", 1.0)
    report.finish(rows, options.json)


def described(topology: str) -> tuple[list[Any], str]:
    """The devices to compile for, and the dtype that they like; sets what must be set before JAX is imported."""
    if topology == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
        import jax

        return jax.devices(), "float32"
    from twinax.planner.devices import check_compiler, find_devices, settings
    from twinax.planner.topology import Topology

    found = Topology.parse(topology)
    check_compiler(found)
    os.environ |= settings(found)
    return find_devices(found), "bfloat16"


if __name__ == "__main__":
    main()
