"""The package as users get it: its list of packages, a wheel outside the repository, the editable install."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOMS = ("pallas_kernels", "sharding", "layers", "models", "checkpoints", "train", "serving", "planner")

# Imported from where the package is installed, never from the current folder: one forward of a tiny model.
TINY_FORWARD = """
import json, pathlib, sys
import twinax
assert "jax" not in sys.modules, "import twinax imported jax"
import numpy as np
from twinax.layers.contexts import PackedContext
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, init_params
config = DecoderConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
                       head_dim=8, max_position_embeddings=16)
params = init_params(config, seed=0)
tokens = np.arange(6, dtype=np.int32)[None]
context = PackedContext(np.ones((1, 6), np.int32), np.arange(6, dtype=np.int32)[None])
apply = functional(config)
hidden, *_ = apply.hidden(params, tokens, context)
logits = np.asarray(apply.unembed(params, hidden))
assert logits.shape == (1, 6, 64) and np.isfinite(logits).all()
print(json.dumps({"file": str(pathlib.Path(twinax.__file__).resolve()), "version": twinax.__version__}))
"""


def _project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_folder_with_an_init_file_is_packaged_and_nothing_else(repository: Path):
    tool = _project(repository)["tool"]["setuptools"]
    folders = set()
    for room in (*ROOMS, "twinax"):
        for init in (repository / room).rglob("__init__.py"):
            parts = init.parent.relative_to(repository).parts
            folders.add(".".join(parts if room == "twinax" else ("twinax", *parts)))
    assert sorted(tool["packages"]) == sorted(folders), "edit [tool.setuptools] packages in pyproject.toml"
    assert tool["package-dir"] == {"twinax": "twinax"} | {f"twinax.{room}": room for room in ROOMS}


def test_no_folder_of_modules_lacks_its_init_file(repository: Path):
    lacking = {
        str(path.parent.relative_to(repository))
        for room in (*ROOMS, "twinax")
        for path in (repository / room).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert not lacking, f"add an __init__.py, or the wheel leaves these out: {sorted(lacking)}"


def test_constraints_pin_every_dependency(repository: Path):
    project = _project(repository)["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve"], *extras["train"], *extras["test"]]
    names = {_name(requirement) for requirement in wanted} - {"twinax"}
    pinned = {_name(line) for line in (repository / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pinned, f"constraints.txt does not pin {sorted(names - pinned)}"


def test_the_version_is_said_once(repository: Path):
    import twinax

    assert twinax.__version__ == _project(repository)["project"]["version"]
    assert f"## {twinax.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_rooms_and_front_door_import_without_jax(tmp_path: Path):
    rooms = [f"twinax.{room}" for room in ROOMS]
    code = f"import sys, importlib\nfor name in ['twinax', 'twinax.cli', *{rooms}]: importlib.import_module(name)\n"
    _run(sys.executable, "-c", f"{code}assert 'jax' not in sys.modules, 'jax was imported'", cwd=tmp_path)


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git would have, so that a build leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source")
    tracked = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=repository).splitlines()
    for name in tracked:
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((repository / name).read_bytes())
    return copy


def _environment(folder: Path) -> Path:
    """A new environment that sees this one's dependencies, but neither its Twinax nor its editable hook."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).strip()
    # A plain line in a .pth adds the folder to sys.path without running the .pth files in it (editable installs).
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _install(python: Path, *arguments: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"]
    # Twinax is visible through the dependencies' folder, so without these two flags pip would replace that one.
    _run(*pip, "--ignore-installed", "--no-index", *arguments, cwd=python.parent)


def _check_installed(python: Path, folder: Path, version: str) -> dict:
    import json

    command = python.parent / "twinax"
    assert version in _run(command, "--version", cwd=folder)
    assert "--optimizer" in _run(command, "train", "--help", cwd=folder)
    return json.loads(_run(python, "-c", TINY_FORWARD, cwd=folder).splitlines()[-1])


def test_the_wheel_works_outside_the_repository(source: Path, tmp_path: Path):
    probe = source / "pallas_kernels" / "flash_attention" / "tuned" / "probe.json"
    probe.parent.mkdir(exist_ok=True)
    probe.write_text("{}")
    tuned = {f"twinax/{file.relative_to(source)}" for file in (source / "pallas_kernels").glob("*/tuned/*.json")}
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    _run(*build, "-w", tmp_path, source, cwd=tmp_path)
    probe.unlink()
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in packed if name.endswith(".json")} == tuned, "block sizes that the kernels read"
    page = {f"twinax/{file.relative_to(source)}" for file in (source / "serving" / "http" / "page").glob("*.*")}
    assert {name for name in packed if name.startswith("twinax/serving/http/page/")} == page, "what the server shows"
    assert len(page) >= 4
    python = _environment(tmp_path / "env")
    _install(python, wheel)
    version = _project(source)["project"]["version"]
    found = _check_installed(python, tmp_path, version)
    assert found["version"] == version
    assert found["file"].startswith(str(tmp_path / "env")), f"not the wheel's copy was imported: {found['file']}"


def test_the_editable_install_follows_the_source(source: Path, tmp_path: Path):
    python = _environment(tmp_path / "env")
    _install(python, "-e", source)
    found = _check_installed(python, tmp_path, _project(source)["project"]["version"])
    assert found["file"] == str(source / "twinax" / "__init__.py")
    (source / "models" / "brand_new.py").write_text("from . import config\nVALUE = 3\n")
    code = "from twinax.models import brand_new; print(brand_new.VALUE, brand_new.config.__name__)"
    assert _run(python, "-c", code, cwd=tmp_path).split() == ["3", "twinax.models.config"]


def _name(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end].lower().replace("_", "-").replace(".", "-")
