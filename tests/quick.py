"""How tests compile: quickly, as most of a test's time is XLA making a program that then runs once or twice."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version

import pytest

# The same products and sums, in a fifth of the time; and what XLA does unless it is told otherwise. XLA:CPU has its
# older emitters up to jaxlib 0.10; a later one ends at a flag that it does not know.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
FULL = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
if version("jaxlib").startswith("0.10."):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    FULL["xla_cpu_use_fusion_emitters"] = True

ENVIRONMENT = {
    "XLA_FLAGS": " ".join(f"--{name}={value}".lower() for name, value in QUICK.items()),
    # A device that waits for the others in a collective may keep a thread of a pool that all share. XLA makes as many
    # as there are cores, or as this says; with two, simulated devices can wait for each other forever.
    "NPROC": "64",
    # Torch's threads wait by spinning: for models so small, and beside another worker, half of its time.
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def full_compile() -> Iterator[None]:
    """XLA compiles as it does for a user, in this process and in those that are started meanwhile.

    For bits that must be equal in programs of several shapes: the compiler chooses how a sum is ordered.
    """
    import jax
    from jax._src import compiler

    options = compiler.get_compile_options

    def full(*args, env_options_overrides=None, **rest):
        return options(*args, env_options_overrides={**FULL, **(env_options_overrides or {})}, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", full)
        patch.delenv("XLA_FLAGS", raising=False)
        jax.clear_caches()  # of programs that other tests compiled quickly
        yield
