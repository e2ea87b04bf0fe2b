"""Library kernels that live in environments of their own, named by flag: `benchmarks.kernels --tokamax PYTHON`.

tokamax needs Python 3.12 and a newer jax than ours, so its kernels are compiled by that environment's libtpu:

  python3.12 -m venv VENV; VENV/bin/pip install tokamax libtpu rich; VENV/bin/pip install --no-deps -e .

Its splash attention is given a mask that hides nothing and no tables (see `kernel_cases/flash_attention.py`), and of
the tiles' cycles a causal case counts the share that is not empty: what masking costs is given to it for nothing.

Its grouped products ("mosaic_tpu" of its `ragged_dot`) get tables as functions of the program ids and are profiled in
parts, as megablox's (see `kernel_cases/grouped_matmul.py`), and get Pallas's own pipeline in place of one that the
kernel emits, with which they count up to 1.6 times the microseconds. "mosaic_tpu_v2" makes its tables in the kernel,
from sizes in memory, by loops of unknown length: the static profiler can't follow it.
"""

import dataclasses
import json
import subprocess
import types
from collections.abc import Callable, Sequence
from typing import Any

from .kernel_cases import Case, Kernel
from .static import REPOSITORY, Program, Request, Static

TOKAMAX = "tokamax"
# Rows and keys of a tile, keys of a product, and whether by its experimental scheduler.
FORWARD = ((1024, 1024, 512, True), (1024, 1024, 512, False), (1024, 1024, 1024, True), (2048, 1024, 512, True))
BACKWARD = ((512, 512, 512, False), (1024, 1024, 512, False))


def tokamax_kernels(case: Case) -> tuple[Kernel, ...]:
    """The variants to compare a case on TPUs with; none if tokamax has no such kernel or is not asked here."""
    shape = case.ours.arguments
    if case.operation == "grouped_matmul":
        tilings = [kernel.arguments["tiling"] for kernel in case.peers["megablox"]]
        return tuple(Kernel(f"{__name__}:ragged_dot", {**shape, "tiling": x}, TOKAMAX) for x in tilings)
    if case.operation != "flash_attention" or "implementation" in shape:
        return ()
    function, blocks = (f"{__name__}:splash", FORWARD)
    if case.ours.function == "backward":
        function, blocks = f"{__name__}:splash_backward", BACKWARD
    return tuple(Kernel(function, {**shape, "blocks": x}, TOKAMAX) for x in blocks)


def in_environment(python: str, requests: Sequence[Request], progress: Callable[[int, Static], None]) -> None:
    """Compiles with another interpreter, which has to see this checkout as `twinax`."""
    fields = {field.name for field in dataclasses.fields(Static)}
    for number, request in enumerate(requests):
        command = [python, "-m", "benchmarks.static", request.chip, request.builder, json.dumps(request.arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            values = json.loads(lines[-1])
            progress(number, Static.from_json({name: x for name, x in values.items() if name in fields}))
        else:
            progress(number, Static(failed=f"{python}: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"))


def versions(python: str) -> str:
    """What the results hang on. OSError or ValueError if it is no interpreter with tokamax."""
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('tokamax', 'jax', 'libtpu')))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{python} has no tokamax with jax and libtpu: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def splash(target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int, bool]) -> Program:
    """Called in tokamax's environment."""
    from .kernel_cases import flash_attention as cases

    rows, keys, part = (min(size, T) for size in blocks[:3])
    heads, (length, times) = cases._heads(target, B, T, H), cases._part(T)
    kernel = _kernel((length, length), block_q=rows, block_kv=keys, block_kv_compute=part, scheduler=blocks[3])
    x = target.array((heads, length, D))
    share = (cases._not_empty(T, rows, keys) if causal else 1.0) * B * H / heads * times
    program = Program(lambda q, k, v: kernel(q, k, v), (x, x, x), *cases._work(B, T, H, D, causal), share=share)
    return cases._as_kernels_want(target, program)


def splash_backward(
    target: Any, B: int, T: int, H: int, D: int, causal: bool, blocks: tuple[int, int, int, bool]
) -> Program:
    from .kernel_cases import flash_attention as cases

    rows, keys, part = (min(size, T) for size in blocks[:3])
    heads, (length, times) = cases._heads(target, B, T, H, True), cases._part(T)
    sizes = {"block_q_dkv": rows, "block_kv_dkv": keys, "block_kv_dkv_compute": part}
    sizes |= {"block_q": rows, "block_kv": keys, "block_kv_compute": part}
    kernel = _kernel((length, length), **sizes, scheduler=blocks[3])
    share = (cases._not_empty(T, rows, keys) if causal else 1.0) * B * H / heads * times
    x = target.array((heads, length, D))
    work = cases._work(B, T, H, D, causal, backward=True)
    return cases._pullback(target, lambda q, k, v: kernel(q, k, v), [x, x, x], work, share)


def ragged_dot(
    target: Any, I: int, O: int, sizes: list[int], times: int, kind: str, tiling: tuple[int, int, int]
) -> Program:
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from tokamax._src.ops.ragged_dot import (  # pyright: ignore[reportMissingImports]
        pallas_mosaic_tpu_kernel as library,
    )

    from .kernel_cases import grouped_matmul as cases

    rows, sums, columns = tiling
    if kind == "dx":
        sums, columns = min(columns, O), min(sums, I)
    tables = cases._tables(sizes, rows, empty=kind == "dweight")
    known = tuple(map(cases._Known, tables)), cases._Known([0])
    library.make_group_metadata = lambda **_: (tuple(jnp.asarray(x, jnp.int32) for x in tables), len(tables[1]))

    def call(kernel: Any, *, grid_spec: Any, input_buffer_count: Any, **more: Any) -> Any:
        def spec(given: Any) -> Any:
            return pl.BlockSpec(given.block_shape, lambda *ids: given.index_map(*ids, *known))

        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid_spec.grid,
            in_specs=[spec(one) for one in grid_spec.in_specs],
            out_specs=jax.tree.map(spec, grid_spec.out_specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
            scratch_shapes=grid_spec.scratch_shapes,
        )
        inner = pl.pallas_call(lambda *refs: kernel(*known, *refs), grid_spec=grid, **more)
        return lambda metadata, offset, *arrays: inner(*arrays)

    library.common = types.SimpleNamespace(custom_buffered_pallas_call=call)
    given = {"precision": jax.lax.Precision.DEFAULT, "out_dtype": jnp.dtype(jnp.bfloat16)}
    given |= {"tiling": (rows, sums, columns)}

    def product(a: Any, b: Any) -> Any:
        sizes_G = jnp.asarray(sizes, jnp.int32)
        if kind == "dweight":
            return library.tgmm.__wrapped__(a.T, b, sizes_G, **given)
        return library.gmm.__wrapped__(a, b, sizes_G, transpose_rhs=kind == "forward", **given)

    C = I if kind == "dx" else O
    part = cases._part(target, C, columns)
    arrays = cases._arrays(target, part if kind == "dx" else I, O if kind == "dx" else part, sizes, kind)
    return Program(product, arrays, *cases._work(I, O, sizes, times), share=times * C / part)


def _kernel(shape: tuple[int, int], scheduler: bool, **sizes: int) -> Any:
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as library,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    config = library.SplashConfig(**sizes, use_experimental_scheduler=scheduler)
    kernel = library.make_splash_mha_single_device(masks.FullMask(shape), config=config)

    def without(info: Any) -> Any:
        return None if info is None else info._replace(**dict.fromkeys(info._fields))

    infos = without(kernel.fwd_mask_info), without(kernel.dkv_mask_info)
    return library.SplashAttentionKernel(*infos, **kernel.kwargs)
