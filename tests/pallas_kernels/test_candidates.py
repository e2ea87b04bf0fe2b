"""The candidate mechanism, on an operation made of files written by the test."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from twinax.pallas_kernels import candidates
from twinax.pallas_kernels.candidates import NoCandidateError, Operation
from twinax.pallas_kernels.flash_attention import OPERATION as FLASH
from twinax.pallas_kernels.paged_attention import OPERATION as PAGED

PLUS = "def add(x, *, n):\n    return x + n + {}\n"
REFUSES = "def add(x, *, n):\n    raise NotImplementedError('{} wants an even n, got ' + str(n))\n"
BREAKS = "def add(x, *, n):\n    raise RuntimeError('a bug')\n"


@pytest.fixture
def operation(tmp_path, monkeypatch):
    """Makes an operation whose candidates are the given files."""

    def make(**sources):
        package = tmp_path / "fake_operation"
        package.mkdir()
        (package / "__init__.py").touch()
        for name, source in sources.items():
            (package / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return Operation("fake_operation", "add")

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "fake_operation"]:
        del sys.modules[name]


KINDS = {"cpu": "cpu", "cuda": "NVIDIA H200", "tpu": "TPU v5p"}


def lowered_for(platform, op, n=0):
    """The text of the program that `platform` would compile, traced under a mesh of its devices."""
    device = AbstractDevice(KINDS[platform], None, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda x: op(x, n=n)).trace(jnp.ones(3, jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_files_are_the_candidates_and_others_are_not(operation):
    op = operation(xla=PLUS.format(1), reference=PLUS.format(2), tpu=PLUS.format(3), helper="")
    assert op.names() == ("tpu", "xla", "reference")


def test_a_name_runs_that_candidate_only(operation):
    op = operation(xla=REFUSES.format("xla"), reference=PLUS.format(2))
    assert op(1, n=1, implementation="reference") == 4
    with pytest.raises(NotImplementedError, match=r"^xla wants an even n, got 1$"):
        op(1, n=1, implementation="xla")


def test_an_unknown_name_lists_the_choices(operation):
    op = operation(xla=PLUS.format(1), reference=PLUS.format(2))
    for name in ("tpu", "helper", ""):
        with pytest.raises(ValueError, match=f"no implementation '{name}'.*xla, reference"):
            op(1, n=1, implementation=name)


def test_the_reference_is_never_chosen_and_the_error_holds_every_reason(operation):
    op = operation(tpu=REFUSES.format("tpu"), xla=REFUSES.format("xla"), reference=PLUS.format(2))
    with pytest.raises(NoCandidateError, match="xla: xla wants an even n, got 1"):
        op(1, n=1)
    with pytest.raises(NoCandidateError, match="tpu: tpu wants an even n, got 1; xla: xla wants an even n, got 1"):
        op._first(("tpu", "xla"), (1,), {"n": 1})


def test_the_choice_is_the_platform_of_the_lowering(operation):
    op = operation(tpu=PLUS.format(77), gpu=PLUS.format(88), xla=PLUS.format(99))
    assert op(jnp.zeros((), jnp.int32), n=0) == 99  # these tests run on a CPU
    for platform, own, others in (("tpu", "77", "8899"), ("cuda", "88", "7799"), ("cpu", "99", "7788")):
        text = lowered_for(platform, op)
        assert f"dense<{own}>" in text
        assert f"dense<{others[:2]}>" not in text and f"dense<{others[2:]}>" not in text


def test_without_a_mesh_a_process_with_an_accelerator_chooses_while_lowering(operation, monkeypatch):
    monkeypatch.setattr(candidates, "known_platform", lambda: None)
    op = operation(tpu=PLUS.format(77), xla=PLUS.format(99))
    assert op(jnp.zeros((), jnp.int32), n=0) == 99
    traced = jax.jit(lambda x: op(x, n=0)).trace(jnp.ones(3, jnp.int32))
    for platform, own, other in (("tpu", "77", "99"), ("cpu", "99", "77"), ("cuda", "99", "77")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{own}>" in text and f"dense<{other}>" not in text


def test_a_kernel_that_refuses_gives_way_to_the_next(operation):
    op = operation(tpu=REFUSES.format("tpu"), xla=PLUS.format(99))
    assert "dense<99>" in lowered_for("tpu", op)


def test_other_errors_are_not_hidden(operation):
    op = operation(xla=BREAKS, reference=PLUS.format(2))
    with pytest.raises(RuntimeError, match="a bug"):
        op(1, n=1)


def test_a_chosen_kernel_is_differentiable(operation):
    op = operation(tpu="def add(x, *, n):\n    return x * x * 5\n", xla="def add(x, *, n):\n    return x * x * 3\n")
    assert jax.jit(jax.grad(lambda x: op(x, n=0)))(2.0) == 12.0


@pytest.mark.parametrize("op", [FLASH, PAGED], ids=lambda op: op.name)
def test_the_real_operations(op):
    assert set(op.names()) >= {"xla", "reference"}
    assert all(callable(op.load(name)) for name in op.names())
    assert set(op.names()) <= set(candidates.ROSTER)
