"""What every test shares: JAX on the CPU with eight simulated devices, quick compiles, repeatable Hypothesis."""

import gc
import os
import zlib
from pathlib import Path

from tests import quick

REPOSITORY = Path(__file__).resolve().parent.parent

# Before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    for name, value in quick.ENVIRONMENT.items():
        os.environ.setdefault(name, value)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# A second run of the suite finds its compiled programs here. Only those that took a while: reading one costs too.
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# The same examples on every run, and no time limits: the suite must say the same on a slow machine.
hypothesis.settings.register_profile("twinax", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("twinax")

_CACHED = jax.config.jax_enable_compilation_cache


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        metavar="N/OF",
        help="of the slow tests of kernels and layouts run the N-th of OF shares (0/3, 1/3 or 2/3), of others all",
    )


def pytest_configure(config):
    share = config.getoption("--share")
    if share is not None and not (
        len(parts := share.split("/")) == 2 and all(map(str.isdecimal, parts)) and int(parts[0]) < int(parts[1])
    ):
        raise pytest.UsageError(f"--share is N/OF with N from 0 to OF - 1, as 0/3; it was {share!r}")


def pytest_collection_modifyitems(config, items):
    """Leaves out what belongs to other shares. A test's share depends on nothing but its name."""
    share = config.getoption("--share")
    if share is None:
        return
    nth, of = map(int, share.split("/"))

    def is_left_out(item: pytest.Item) -> bool:
        is_shared = "pallas_kernels" in item.path.parts or item.path.name == "test_equivalence.py"
        is_shared &= item.get_closest_marker("slow") is not None
        return is_shared and zlib.crc32(item.nodeid.encode()) % of != nth

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def pytest_collection_finish():
    """What was imported stays: the collector need not look through it again and again. Tracing makes much at once."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def compile_cache():
    """The cache is there again after a test with several devices, for which a plan's mesh turned it off.

    As at the start, not as before the test: what a file makes for all of its tests may have turned it off already.
    """
    yield
    if jax.config.jax_enable_compilation_cache != _CACHED:
        jax.config.update("jax_enable_compilation_cache", _CACHED)
        compilation_cache.reset_cache()


@pytest.fixture
def full_compile():
    """See `tests.quick.full_compile`; the other tests compile quickly."""
    with quick.full_compile():
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository that the tests belong to."""
    return REPOSITORY
