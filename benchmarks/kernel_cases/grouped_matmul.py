"""Grouped products against jax's megablox, on GPUs its kernels for Hopper: 8 and 128 experts, with equal and unequal
shares of the rows.

Both read from prefetched tables which rows are whose, which the static profiler cannot follow. Ours takes static sizes;
megablox's own kernel is compiled with its tables as functions of the program ids (`_Known`). Where groups repeat, one
or two of their periods are profiled, with the block sizes of the whole, and counted as often; and of the columns, over
which the grids go outermost, a part (`_part`). What is fetched before the first step and stored after the last counts
each time then: the larger a kernel's blocks, the more too much.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..static import Program
from . import Case, Kernel

# Inputs and outputs, how many rows the groups that are profiled have, and how many times these repeat.
EIGHT, MANY = (4096, 14336), (2048, 768)
SHAPES: tuple[tuple[str, tuple[int, int], list[int], int], ...] = (
    ("8 experts, balanced", EIGHT, [1024] * 8, 1),
    ("8 experts, skewed", EIGHT, [3072, 64, 1472, 832, 192, 1600, 320, 640], 1),
    ("128 experts, balanced", MANY, [256] * 8, 16),
    ("128 experts, skewed", MANY, ([448] * 4 + [64] * 4) * 2, 8),
)
# Rows, sums and outputs of a tile, as large as half of the products' sizes or all of them.
TILINGS = {EIGHT: ((512, 1024, 1024), (512, 2048, 1024)), MANY: ((256, 2048, 768), (512, 1024, 768))}


def cases(chip: str) -> Iterator[Case]:
    if not chip.startswith(("v", "tpu")):
        yield from _on_gpus()
        return
    for words, (I, O), sizes, times in SHAPES:
        for kind in ("forward", "dx", "dweight"):
            given: dict[str, Any] = {"I": I, "O": O, "sizes": sizes, "times": times, "kind": kind}
            if kind == "dx" and words == "8 experts, balanced":  # whole, the profiler needs over 15 GB
                given |= {"sizes": sizes[:2], "times": 4}
            peers = tuple(Kernel("megablox", {**given, "tiling": tiling}) for tiling in TILINGS[I, O])
            limit = 0.6 if chip == "v5p" else None
            yield Case("grouped_matmul", f"{kind}, {words}", Kernel("ours", given), {"megablox": peers}, of_limit=limit)


def _on_gpus() -> Iterator[Case]:
    """Groups of decoding too, and quantised weights; sizes are data there."""
    few = (("8 experts, decoding", EIGHT, [8] * 8, 1), ("128 experts, decoding", MANY, [4] * 128, 1))
    for words, (I, O), part, times in (*SHAPES, *few):
        sizes = part * times
        for kind in ("forward", "dx", "dweight"):
            if kind != "forward" and "decoding" in words:
                continue
            given: dict[str, Any] = {"I": I, "O": O, "sizes": sizes, "kind": kind}
            peers = {"XLA": (Kernel("on_gpu", {**given, "implementation": "xla"}),)}
            blocks = ((64, 128), (128, 128)) if kind == "dweight" else ((64, 128), (128, 128), (128, 192))
            peers["pallas"] = tuple(Kernel("pallas", {**given, "blocks": block}) for block in blocks)
            yield Case("grouped_matmul", f"{kind}, {words}", Kernel("on_gpu", given), peers)
        if "decoding" in words:
            given = {"I": I, "O": O, "sizes": sizes, "kind": "forward", "format": "int4"}
            peers = {"XLA": (Kernel("on_gpu", {**given, "implementation": "xla"}),)}
            yield Case("grouped_matmul", f"forward, {words}, int4", Kernel("on_gpu", given), peers)


def on_gpu(
    target: Any, I: int, O: int, sizes: list[int], kind: str, format: str | None = None, implementation: str = "gpu"
) -> Program:
    import jax
    import jax.numpy as jnp

    from twinax.pallas_kernels import grouped_matmul as package
    from twinax.pallas_kernels.quantized_matmul import quantize

    function = {
        "forward": package.grouped_matmul,
        "dx": package.grouped_matmul_dx,
        "dweight": package.grouped_matmul_dweight,
    }[kind]

    def product(a: Any, b: Any) -> Any:
        return function(a, b, _on_device(sizes), implementation=implementation)

    a, b = _arrays(target, I, O, sizes, kind)
    flops, hbm_bytes = _work(I, O, sizes)
    if format is not None:
        made = jax.eval_shape(lambda w: quantize(w, format, block=(1, 128)), jax.ShapeDtypeStruct(b.shape, jnp.float32))
        hbm_bytes += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made)) - 2.0 * b.size
        b = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)
    return Program(product, (a, b), flops, hbm_bytes)


def pallas(target: Any, I: int, O: int, sizes: list[int], kind: str, blocks: tuple[int, int]) -> Program:
    """jax's own kernels for Hopper, which want products of whole tiles and one group or more in each."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    block = {"block_m": blocks[0], "block_n": blocks[1], "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}

    def product(a: Any, b: Any) -> Any:
        sizes_G = _on_device(sizes)
        if kind == "dweight":
            return transposed_ragged_dot_mgpu.transposed_ragged_dot(b, a, group_sizes=sizes_G, **block)
        return ragged_dot_mgpu.ragged_dot(a, b, group_sizes=sizes_G, transpose_rhs=kind == "forward", **block)

    return Program(product, _arrays(target, I, O, sizes, kind), *_work(I, O, sizes))


def _on_device(sizes: list[int]) -> Any:
    """As data, so that nothing is computed from them beforehand."""
    import jax

    return jax.lax.optimization_barrier(jax.numpy.asarray(sizes, "int32"))


def _work(I: int, O: int, sizes: Sequence[int], times: int = 1) -> tuple[float, float]:
    """FLOPs and bytes: rows, weights (or their gradient) and results of 2 bytes, each once."""
    N, G = sum(sizes) * times, len(sizes) * times
    return 2.0 * N * I * O, 2.0 * (N * I + G * I * O + N * O)


def _arrays(target: Any, I: int, O: int, sizes: Sequence[int], kind: str) -> tuple[Any, Any]:
    N, weight = sum(sizes), (len(sizes), O, I)
    shapes = {"forward": ((N, I), weight), "dx": ((N, O), weight), "dweight": ((N, I), (N, O))}
    a, b = shapes[kind]
    return target.array(a), target.array(b)


def ours(target: Any, I: int, O: int, sizes: list[int], times: int, kind: str) -> Program:
    import jax.numpy as jnp

    from twinax.pallas_kernels.grouped_matmul import tpu

    known, N, G = tuple(sizes), sum(sizes) * times, len(sizes) * times
    contract, A, C = (1, O, I) if kind == "dx" else (2, I, O)
    with target.context():
        if kind == "dweight":
            blocks = tpu.gradient_blocks(N, I, O, G, jnp.bfloat16)
            part = _part(target, O, blocks.o)
        else:
            blocks = tpu.product_blocks(N, A, C, G, jnp.bfloat16, contract)
            part = _part(target, C, blocks.c)

    def product(a: Any, b: Any) -> Any:
        if kind == "dweight":
            return tpu.gradient(a, b, known, blocks=tpu.gradient_blocks(N, I, O, G, jnp.bfloat16))
        return tpu.product(
            a, b, known, contract=contract, blocks=tpu.product_blocks(N, A, C, G, jnp.bfloat16, contract)
        )

    arrays = _arrays(target, part if kind == "dx" else I, O if kind == "dx" else part, sizes, kind)
    return Program(product, arrays, *_work(I, O, sizes, times), share=times * C / part)


def megablox(
    target: Any, I: int, O: int, sizes: list[int], times: int, kind: str, tiling: tuple[int, int, int]
) -> Program:
    import importlib

    import jax
    import jax.numpy as jnp

    library = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    rows, sums, columns = tiling
    if kind == "dx":
        sums, columns = min(columns, O), min(sums, I)
    N, tables = sum(sizes), _tables(sizes, rows, empty=kind == "dweight")
    library.pl = _KnownTables(library.pl, tables)
    active = len(tables[1])
    library.make_group_metadata = lambda **_: (tuple(jnp.asarray(x, jnp.int32) for x in tables), active)
    sizes_G = jax.numpy.asarray(sizes, jnp.int32)

    def product(a: Any, b: Any) -> Any:
        if kind == "dweight":
            return library.tgmm.__wrapped__(a.T, b, sizes_G, jnp.bfloat16, (rows, sums, columns))
        return library.gmm.__wrapped__(
            a, b, sizes_G, jnp.bfloat16, (rows, sums, columns), transpose_rhs=kind == "forward"
        )

    assert N % rows == 0
    C = I if kind == "dx" else O
    part = _part(target, C, columns)
    arrays = _arrays(target, part if kind == "dx" else I, O if kind == "dx" else part, sizes, kind)
    return Program(product, arrays, *_work(I, O, sizes, times), share=times * C / part)


def _part(target: Any, columns: int, block: int) -> int:
    """How many columns are profiled: whole blocks for each core, 2,048 at least."""
    blocks = block * (2 if target.chip.name == "v5p" else 1)
    return next((n for n in range(2048, columns, 1024) if columns % n == 0 and n % blocks == 0), columns)


def _tables(sizes: Sequence[int], rows: int, empty: bool) -> tuple[list[int], list[int], list[int]]:
    """Where groups begin, and of each visit of a tile of rows by a group: the group, the tile."""
    ends = [sum(sizes[: g + 1]) for g in range(len(sizes))]
    starts, groups, tiles = [0, *ends[:-1]], [], []
    for g, (start, end) in enumerate(zip(starts, ends, strict=True)):
        visits = range(start // rows, -(-end // rows)) if end > start else [start // rows] * empty
        groups += [g] * len(visits)
        tiles += visits
    return [*starts, ends[-1]], groups, tiles


class _Known:
    """Stands for a prefetched table: its values as a function of the index, a step wherever they change their pace."""

    def __init__(self, values: Sequence[int]):
        self.values = list(values)

    def __getitem__(self, index: Any) -> Any:
        import jax.numpy as jnp

        values = self.values
        run = values.count(values[0])
        if values == [values[0] + i // run for i in range(len(values))]:
            return values[0] + index // run
        result, pace = values[0], 0
        for i in range(1, len(values)):
            if (change := values[i] - values[i - 1] - pace) != 0:
                result += jnp.maximum(index - i + 1, 0) * change
                pace += change
        return result


class _KnownTables:
    """`jax.experimental.pallas` with a `pallas_call` that leaves out the two prefetched arguments of megablox."""

    def __init__(self, pallas: Any, tables: tuple[list[int], ...]):
        self._pallas = getattr(pallas, "_pallas", pallas)
        self._scalars = tuple(map(_Known, tables)), _Known([0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pallas, name)

    def pallas_call(self, kernel: Any, *, grid_spec: Any, **more: Any) -> Any:
        from jax.experimental.pallas import tpu as pltpu

        def spec(given: Any) -> Any:
            if given is None:
                return None
            return self._pallas.BlockSpec(given.block_shape, lambda *ids: given.index_map(*ids, *self._scalars))

        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid_spec.grid,
            in_specs=[spec(one) for one in grid_spec.in_specs],
            out_specs=spec(grid_spec.out_specs),
            scratch_shapes=grid_spec.scratch_shapes,
        )
        call = self._pallas.pallas_call(lambda *refs: kernel(*self._scalars, *refs), grid_spec=grid, **more)
        return lambda metadata, offset, *arrays: call(*arrays)
