"""Compiled programs on disk: who finds them compiles and traces nothing and gets the same bits; all others compile."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.model import write
from tests.serving.engines import loaded
from tests.serving.test_engine_prefixes import CONFIG
from twinax.models import decoder, parameters
from twinax.models.parameters import param_shapes
from twinax.serving import program_store
from twinax.serving.compiles import fresh_compiles
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.program_store import MODULES, ROOMS, ProgramStore, know_kept_shapes, sources

ENGINE = """
import json, sys
import jax
from twinax.serving.engine import Engine, EngineConfig

folder, model = sys.argv[1:]
engine = Engine.from_path(model, EngineConfig(max_running=2, page_size=16, chunk_tokens=64, compile_cache=folder))
counts = {}
def count(event, seconds, **rest):
    name = event.split("/")[-1]
    counts[name] = counts.get(name, 0) + 1
jax.monitoring.register_event_duration_secs_listener(count)
engine.warmup()
heavy = sorted({"flax", "jax.experimental.pallas"} & set(sys.modules))
from tests.serving.engines import greedy, logprobs_of, prompts
done = engine.generate(prompts(3), greedy(temperature=0.8, seed=1))
print(json.dumps([counts, [(one.token_ids, [x.hex() for x in logprobs_of(one)]) for one in done],
                  engine.stats().compiles_after_warmup, heavy]))
"""


@pytest.fixture(autouse=True)
def jax_settings():
    """Those that an engine with a compile cache changes are as before."""
    names = [name for name in jax.config.values if "compilation_cache" in name or "persistent_cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def store(folder: Path, *about: object) -> ProgramStore:
    return ProgramStore(folder, jax.devices()[:1], about)


@pytest.fixture(scope="module")
def program():
    """It takes and returns a tree, and its first argument's memory is the result's."""
    like = {"x": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    with fresh_compiles():
        return jax.jit(lambda tree, y: {"x": tree["x"] + jnp.sin(y)}, donate_argnums=0).lower(like, like["x"]).compile()


def run(program) -> np.ndarray:
    tree = {"x": jnp.ones((4, 3))}
    result = program(tree, jnp.arange(12, dtype=jnp.float32).reshape(4, 3))
    assert tree["x"].is_deleted(), "what was donated is"
    return np.asarray(result["x"])


@pytest.mark.slow  # two engines' starts
def test_a_second_process_compiles_and_traces_nothing_and_gives_the_same_bits(repository: Path, tmp_path: Path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", ENGINE, str(tmp_path / "kept"), str(write(tmp_path / "model", CONFIG))]
    first, second = (
        json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        for _ in range(2)
    )
    assert first[0]["backend_compile_duration"] > 10
    assert not second[0], "nothing was traced, lowered or compiled"
    assert second[1] == first[1] and first[2] == second[2] == 0
    assert first[3] and not second[3], "what traces is imported where something is traced"


def test_shapes_that_were_kept_are_those_of_the_modules(tmp_path: Path, monkeypatch):
    shapes = param_shapes(CONFIG)
    know_kept_shapes(tmp_path, CONFIG)
    [kept] = tmp_path.iterdir()
    monkeypatch.setattr(parameters, "_shapes", {})
    monkeypatch.setattr(decoder, "abstract_params", None)  # nobody asks the modules
    know_kept_shapes(tmp_path, CONFIG)
    assert param_shapes(CONFIG) == shapes
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:-1])
    monkeypatch.setattr(parameters, "_shapes", {})
    know_kept_shapes(tmp_path, CONFIG)  # damaged: asked and kept again
    assert param_shapes(CONFIG) == shapes and len(list(tmp_path.iterdir())) == 1


def test_what_was_kept_runs_as_before(tmp_path: Path, program):
    assert store(tmp_path).load() is None
    store(tmp_path).keep([program, program])
    found = store(tmp_path).load()
    assert found is not None and len(found) == 2
    for one in found:
        assert run(one).tobytes() == run(program).tobytes()
    assert [path.suffix for path in tmp_path.iterdir()] == [program_store.SUFFIX]


@pytest.mark.parametrize("damage", ["head", "key", "checksum", "body", "cut", "empty", "folder"])
def test_damaged_files_are_passed_over_and_replaced(tmp_path: Path, program, damage: str):
    mine = store(tmp_path)
    mine.keep([program])
    data = bytearray(mine.path.read_bytes())
    places = {"head": 3, "key": 25, "checksum": 60, "body": len(data) // 2}
    if damage == "folder":
        mine.path.unlink()
        mine.path.mkdir()
        assert mine.load() is None
        mine.keep([program])  # can't be replaced: no more than a warning
        return
    if damage in places:
        data[places[damage]] ^= 1
    mine.path.write_bytes(data if damage in places else data[: len(data) // 2 if damage == "cut" else 0])
    assert mine.load() is None
    mine.keep([program])
    assert mine.load() is not None


def test_a_file_that_others_may_write_to_is_not_trusted(tmp_path: Path, program, caplog):
    mine = store(tmp_path)
    mine.keep([program])
    mine.path.chmod(0o664)
    assert mine.load() is None and "others may write to it" in caplog.text
    mine.keep([program])  # replaced by one of our own
    assert mine.path.stat().st_mode & 0o022 == 0 and mine.load() is not None


def test_files_that_were_made_for_something_else_are_passed_over(tmp_path: Path, program, monkeypatch):
    mine = store(tmp_path, CONFIG, "float32")
    mine.keep([program])
    for other in (store(tmp_path, CONFIG, "bfloat16"), store(tmp_path, "float32", CONFIG)):
        assert other.load() is None
        shutil.copy(mine.path, other.path)
        assert other.load() is None, "by another's name too"
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert store(tmp_path, CONFIG, "float32").load() is None
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert store(tmp_path, CONFIG, "float32").load() is None
    monkeypatch.undo()
    monkeypatch.setattr(program_store, "sources", lambda: "others")
    assert store(tmp_path, CONFIG, "float32").load() is None
    monkeypatch.undo()
    with jax.default_matmul_precision("highest"):
        assert store(tmp_path, CONFIG, "float32").load() is None
    assert store(tmp_path, CONFIG, "float32").load() is not None


def test_a_folder_that_can_t_be_written_to_costs_a_warning(tmp_path: Path, program, caplog):
    (tmp_path / "file").touch()
    mine = store(tmp_path / "file" / "folder")
    mine.keep([program])
    assert mine.load() is None
    assert "can't be kept" in caplog.text


def test_the_files_used_last_stay(tmp_path: Path, program, monkeypatch):
    monkeypatch.setattr(program_store, "MOST_FILES", 3)
    stores = [store(tmp_path, number) for number in range(5)]
    for age, one in enumerate(stores[:3]):
        one.keep([program])
        os.utime(one.path, (age, age))
    assert stores[0].load() is not None  # used: no longer the oldest
    (tmp_path / "other").touch()
    for one in stores[3:]:
        one.keep([program])
    assert [one.path.exists() for one in stores] == [True, False, False, True, True]
    monkeypatch.setattr(program_store, "MOST_BYTES", 1)
    stores[1].keep([program])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other", stores[1].path.name])


def test_many_may_read_write_and_remove_at_once(tmp_path: Path, program, monkeypatch):
    monkeypatch.setattr(program_store, "MOST_FILES", 1)
    want, wrong = run(program).tobytes(), []

    def work(number: int) -> None:
        for turn in range(4):
            mine = store(tmp_path, (number + turn) % 2)
            mine.keep([program])
            if (found := mine.load()) is not None and run(found[0]).tobytes() != want:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(path.suffix == program_store.SUFFIX and path.name[0] != "." for path in tmp_path.iterdir())


def test_what_jax_s_cache_has_is_compiled_anew_to_be_kept(tmp_path: Path):
    """jaxlib 0.10.2 keeps a CPU program that it has read from there without its functions."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    like = jax.ShapeDtypeStruct((7, 5), jnp.float32)

    def compile():
        return jax.jit(lambda x: jnp.cumsum(x * 2.5, 0)).lower(like).compile()

    compile()
    entries = sorted((tmp_path / "jax").iterdir())
    assert entries
    with fresh_compiles():
        mine = store(tmp_path)
        mine.keep([compile()])
    found = mine.load()
    assert found is not None
    np.testing.assert_array_equal(found[0](jnp.ones((7, 5))), np.cumsum(np.full((7, 5), 2.5, np.float32), 0))


def test_nothing_is_kept_where_jax_s_cache_is_not_trusted(tmp_path: Path):
    make = partial(Engine, loaded(dataclasses.replace(CONFIG, num_kv_heads=2, vocab_size=260)))
    assert make(EngineConfig(compile_cache=str(tmp_path))).runner._store is not None
    assert make(EngineConfig(compile_cache=str(tmp_path), plan="tensor=2")).runner._store is None
    assert make(EngineConfig(compile_cache="")).runner._store is None


def test_sources_that_decide_programs_make_others(repository: Path, tmp_path: Path):
    def copied() -> str:
        sources.cache_clear()
        return sources(tmp_path)

    (tmp_path / "serving").mkdir()
    for name in MODULES:
        shutil.copy(repository / "serving" / f"{name}.py", tmp_path / "serving")
    (tmp_path / "pallas_kernels" / "one" / "tuned").mkdir(parents=True)
    before = copied()
    (tmp_path / "serving" / "scheduler.py").write_text("x = 1")
    (tmp_path / "pallas_kernels" / "one" / "notes.md").write_text("x")
    assert copied() == before
    seen = {before}
    for name in ("serving/sampling.py", "pallas_kernels/one/xla.py", "pallas_kernels/one/tuned/h200.json"):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        seen.add(copied())
    assert len(seen) == 4


def test_all_that_the_programs_import_is_among_the_sources(repository: Path):
    for name in MODULES:
        for node in ast.walk(ast.parse((repository / "serving" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert set(names) <= set(MODULES)
            elif isinstance(node, ast.ImportFrom) and node.level == 2:
                assert (node.module or "").split(".")[0] in ROOMS
