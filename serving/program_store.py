"""An engine's compiled programs on disk, as machine code: a start that finds them traces and compiles nothing.

JAX's compile cache is asked by a program's text, so a start that compiles nothing still traces and lowers all of it:
half of its time. Here the question is a hash of all that decides the text and what is made of it: sources, versions,
flags, machine, and what the engine says of itself.

Invariants:
- a file holds all programs of an engine or is not there (it is renamed into place); any number of processes may read,
  write and remove files at once;
- what is damaged, or was made for something else, is passed over, and replaced by what is compiled then;
- a folder that can't be written to costs nothing but time.

A file holds machine code, and pickles of how it is called: who writes one has the server run what he likes. So only
those of this user or root are read, and only if nobody else may write to them.
"""

import functools
import hashlib
import json
import logging
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from ..models.config import DecoderConfig
from ..models.parameters import know_shapes, param_shapes

ROOT = Path(__file__).resolve().parent.parent
# Whose sources decide what programs compute: whole rooms, and modules of this one.
ROOMS = ("pallas_kernels", "sharding", "layers", "models")
MODULES = ("batch", "compiles", "program_store", "programs", "rounding", "runner", "sampling", "step_sizes")
SUFFIX = ".programs"
MOST_FILES = 64  # those used last stay
MOST_BYTES = 4 << 30
_MAGIC = b"twinax programs 1\n"
_log = logging.getLogger(__name__)


class Kept:
    """Bytes in a folder, for what these texts say.

    Args:
        folder: made when something is kept.
        about: all that decides the bytes.
        what: they are, in a warning.
    """

    def __init__(self, folder: Path, about: Iterable[object], what: str):
        self._key = hashlib.sha256(json.dumps([*map(str, about)]).encode()).digest()
        self._what = what
        self.path = folder / (self._key.hex()[:40] + SUFFIX)

    def read(self, use: Callable[[memoryview], Any]) -> Any:
        """What `use` makes of the bytes; None where there are none to trust, or it raises."""
        try:
            with self.path.open("rb") as file:
                status, data = os.fstat(file.fileno()), file.read()
        except OSError:
            return None
        try:
            if hasattr(os, "geteuid") and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022):
                raise ValueError("others may write to it; remove it, or keep programs in another folder")
            head = len(_MAGIC) + len(self._key)
            body = memoryview(data)[head + hashlib.sha256().digest_size :]
            if data[:head] != _MAGIC + self._key or data[head : -len(body)] != hashlib.sha256(body).digest():
                raise ValueError("it is damaged")
            found = use(body)
        except Exception as error:  # the reader is the runtime's: it raises what it likes
            _log.warning("%s in %s are not used, and made again: %s", self._what, self.path, error)
            return None
        _touch(self.path)
        return found

    def write(self, body: bytes) -> None:
        """In place of what was there. Removes old files if there are too many."""
        data = _MAGIC + self._key + hashlib.sha256(body).digest() + body
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(suffix=SUFFIX, prefix=".", dir=self.path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, self.path)
            except OSError:
                os.unlink(temporary)
                raise
            _remove_old(self.path)
        except OSError as error:
            _log.warning("%s can't be kept in %s: %s", self._what, self.path.parent, error)


class ProgramStore:
    """The programs of one engine in a folder.

    Args:
        folder: where; made when something is kept.
        devices: that the programs run on, in order.
        about: all else that decides them, as texts: sizes, dtypes, config.
    """

    def __init__(self, folder: Path, devices: Iterable[Any], about: Iterable[object]):
        self._devices = list(devices)
        self._kept = Kept(folder, [*surroundings(self._devices), sources(), *about], "compiled programs")
        self.path = self._kept.path

    def load(self, early: Callable[[Any], None] | None = None) -> list[Any] | None:
        """The programs in the order in which they were kept, ready to be called; None where there are none to trust.

        `early` is called with the first while the others are on their way.
        """

        def load(body: memoryview) -> list[Any]:
            with ThreadPoolExecutor(2) as pool:
                pending = [pool.submit(self._load_one, one) for one in pickle.loads(body)]
                if early is not None:
                    early(pending[0].result())
                return [one.result() for one in pending]

        return self._kept.read(load)

    def keep(self, programs: Iterable[Any]) -> None:
        """Writes compiled programs, in place of what was there, and removes old files if there are too many."""
        try:
            body = pickle.dumps([serialize_executable.serialize(program) for program in programs])
        except Exception as error:  # a runtime that can't: every start compiles, or asks JAX's cache
            _log.warning("compiled programs can't be kept: %s", error)
            return
        self._kept.write(body)

    def _load_one(self, kept: tuple[bytes, Any, Any]) -> Any:
        client = self._devices[0].client
        return serialize_executable.deserialize_and_load(*kept, backend=client, execution_devices=self._devices)


def know_kept_shapes(folder: Path, config: DecoderConfig) -> None:
    """`param_shapes` of `config` from an earlier start, or for a later one, which then needs no Flax.

    The modules, which are asked otherwise, decide them as they decide the programs.
    """

    def know(body: memoryview) -> bool:
        found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in json.loads(bytes(body))}
        know_shapes(config, found)
        return True

    kept = Kept(folder, ("shapes", *versions(), sources(), config), "parameters' shapes")
    if kept.read(know) is None:
        shapes = [(name, x.shape, x.dtype.name) for name, x in param_shapes(config).items()]
        kept.write(json.dumps(shapes).encode())


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        return  # not ours to write: whoever looks after the folder decides what is old


def _remove_old(newest: Path) -> None:
    """Files that were used longest ago, until the rest is few and small enough. Others may be removing them too."""
    found = []
    for path in newest.parent.iterdir():
        if path.name.endswith(SUFFIX) and path != newest:
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue
    total = newest.stat().st_size
    for number, (_, size, path) in enumerate(sorted(found, reverse=True), 2):
        total += size
        if number > MOST_FILES or total > MOST_BYTES:
            path.unlink(missing_ok=True)


def versions() -> list[str]:
    """Of what traces and compiles."""
    return [f"python {sys.version_info[:2]} flax {version('flax')} jax {jax.__version__} jaxlib {version('jaxlib')}"]


def surroundings(devices: Sequence[Any]) -> list[str]:
    """What decides machine code beside the program: versions, flags, the machine and its devices."""
    options = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    return [
        *versions(),
        *(f"{name}={value!r}" for name, value in sorted(options.items()) if "cache" not in name),
        *(f"{name}={os.environ.get(name)!r}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC")),
        # XLA:CPU cuts a loop into as many parts as there are cores.
        f"{platform.machine()} {os.cpu_count()} {sorted(os.sched_getaffinity(0)) if sys.platform == 'linux' else ''}",
        processor(),
        devices[0].client.platform_version,
        *(f"{device.platform} {device.device_kind} {device.id}" for device in devices),
    ]


def processor() -> str:
    """The first core's model and instruction sets, without what changes while it runs."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if not line.lower().startswith(("cpu mhz", "bogomips")))


@functools.cache
def sources(root: Path = ROOT) -> str:
    """A hash of the sources below `root` that decide what programs compute, and of the tuned sizes among them."""
    digest = hashlib.sha256()
    files = [path for room in ROOMS for path in sorted((root / room).rglob("*")) if path.suffix in (".py", ".json")]
    for path in [*files, *(root / "serving" / f"{name}.py" for name in MODULES)]:
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
