"""Plans and rules: what they accept, and how they refuse."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from twinax.sharding.plan import Plan
from twinax.sharding.rules import PARAMETER_RULES, parameter_sharding, partition_spec


def test_parse_reads_what_str_writes():
    for plan in (Plan(), Plan(fsdp=4), Plan(data=2, fsdp=2)):
        assert Plan.parse("" if plan == Plan() else str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=4", "Did you mean 'fsdp'"),
        ("fsdp", "whole number"),
        ("fsdp=two", "whole number"),
        ("fsdp=0", "from 1 up"),
        ("fsdp=2,fsdp=2", "twice"),
    ],
)
def test_a_wrong_plan_names_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.parse(text)


def test_too_few_devices_says_how_many_there_are():
    with pytest.raises(ValueError, match=f"there are {len(jax.devices())}"):
        Plan(fsdp=4096).mesh()


def test_fsdp_cuts_the_model_width_only():
    mesh = Plan(fsdp=4).mesh()
    assert parameter_sharding(("layers", "mlp", "embed"), mesh, (3, 10, 8)).spec == PartitionSpec(None, None, ("fsdp",))


def test_an_indivisible_size_names_axis_size_and_fix():
    mesh = Plan(fsdp=4).mesh()
    with pytest.raises(ValueError, match=r"'embed' has size 6, .* 4 devices .*Use 3 devices"):
        parameter_sharding(("embed",), mesh, (6,))


def test_an_axis_without_a_rule_and_a_collision_are_errors():
    mesh = Plan(fsdp=4).mesh()
    with pytest.raises(ValueError, match="'width' has no rule"):
        parameter_sharding(("width",), mesh)
    with pytest.raises(ValueError, match="would cut both 'embed' and 'mlp'"):
        partition_spec(("embed", "mlp"), mesh, {**PARAMETER_RULES, "mlp": ("fsdp",)})


@pytest.fixture
def cache_folder(tmp_path):
    """A folder in which JAX keeps every compiled program."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "enable_compilation_cache")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    for name, value in zip(before, (str(tmp_path), 0.0, True), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_for_several_cpu_devices_are_not_read_from_a_cache(cache_folder):
    """As they would mix up messages: a ring with a window was wrong in one of three runs."""
    Plan().mesh()
    jax.jit(lambda x: x + 1)(1.0)
    kept = set(cache_folder.iterdir())
    assert kept
    mesh = Plan(fsdp=2).mesh()
    cut = jax.device_put(jax.numpy.arange(4.0), jax.NamedSharding(mesh, PartitionSpec("fsdp")))
    jax.jit(lambda x: x.sum())(cut)
    assert set(cache_folder.iterdir()) == kept
